"""`hf-shampoo4 bench`: what an optimizer's step of a whole model costs, beside others and beside what was predicted.

Each contestant has a model of its own, embeddings and head included, with made-up gradients: the cost does not depend
on their values.  Late steps, in which bases are updated as rarely as they ever are, are timed apart from steps in which
all of them are; the first 1,000 steps follow from the two by the schedule.  A finished contestant is kept at once.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from hf_shampoo4.groups import is_of_matrices, param_groups
from hf_shampoo4.integrations.trainer import head_options
from hf_shampoo4.options import Options, users_of
from hf_shampoo4.planning.launches import Counted, LaunchCounter, steps_of
from hf_shampoo4.planning.step_time import Seconds, seconds, unknown
from hf_shampoo4.planning.training_memory import build
from hf_shampoo4.preconditioners.algorithms import algorithm_class, intervals
from hf_shampoo4.studies.bench_contestants import CONTESTANTS, Contestant, Settings
from hf_shampoo4.studies.bench_report import Result, as_markdown, draw, summary
from hf_shampoo4.studies.ceilings_here import Timer, as_ceilings, measured_ceilings
from hf_shampoo4.studies.code_version import versions
from hf_shampoo4.studies.machine import tensors_of
from hf_shampoo4.studies.muon import Joined
from hf_shampoo4.studies.runner import Runs
from hf_shampoo4.training.arguments import ModelArguments
from hf_shampoo4.training.model import load_model_config
from hf_shampoo4.utils.ceilings import Ceilings
from hf_shampoo4.utils.files import write_json, write_text


def model_of(settings: Settings, device: str) -> nn.Module:
    """The whole model, weights drawn from one seed; on the meta device without weights."""
    config = load_model_config(ModelArguments(model=settings.model, model_overrides=settings.overrides()))
    with torch.device("meta"):
        model: nn.Module = build(config, torch.float32, 0)
    if device == "meta":
        return model
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02, generator=generator)
    return model


Counts = dict[str, Counted]
"""Launches of a period of "late" steps, and of a step that updates "all" bases."""


class Bench:
    """A model and a contestant's optimizer."""

    def __init__(self, contestant: Contestant, settings: Settings) -> None:
        self.contestant, self.timer = contestant, Timer(torch.device(settings.device), settings.clock)
        self.model = model_of(settings, settings.device)
        self.parameters = list(self.model.parameters())
        generator = torch.Generator(settings.device).manual_seed(1)
        self._gradients = [1e-3 * torch.randn(p.shape, device=p.device, generator=generator) for p in self.parameters]
        for p, gradient in zip(self.parameters, self._gradients, strict=True):
            p.grad = gradient.clone()
        self.optimizer = optimizer_of(contestant, self.model, settings.device)

    def fresh_gradients(self) -> None:
        """As they were: some optimizers change them."""
        for p, gradient in zip(self.parameters, self._gradients, strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(gradient)
            p.grad.copy_(gradient)

    def step(self, counter: LaunchCounter | None = None) -> float:
        """A step on fresh gradients, counted or not; its milliseconds."""
        self.fresh_gradients()
        began = self.timer.now()
        with counter or nullcontext():
            self.optimizer.step()
        return 1e3 * (self.timer.now() - began)

    def update_all_bases(self) -> bool:
        """From now on in every step; False: there are none, or it always does."""
        found = False
        for group in self.optimizer.param_groups if self.contestant.ours else ():
            for name in algorithm_class(group["algorithm"]).every.values():
                if group[name] > 1:
                    group[name], found = 1, True
        return found


def optimizer_of(contestant: Contestant, model: nn.Module, device: str) -> Any:
    """The contestant's optimizer on a model."""
    kind, keywords = _imported(contestant.target), dict(contestant.keywords)
    if contestant.ours:
        groups = param_groups(model, head=head_options(keywords))
        if keywords.get("algorithm", Options.algorithm) in users_of("refresh_warmup"):
            keywords["refresh_warmup"] = 0  # late steps from the first
        return kind(groups, lr=1e-4, **keywords)
    if contestant.package == "heavyball" and device == "cpu":
        utilities: Any = importlib.import_module("heavyball.utils")
        utilities.compile_mode = None  # its default, max-autotune, is for GPUs
    if not contestant.rest:
        return kind(list(model.parameters()), lr=1e-4, **keywords)
    groups = [
        {"params": [p for _, p in group["params"]], "use_muon": is_of_matrices(group)} for group in param_groups(model)
    ]
    return Joined(groups, 1e-4, (kind, keywords), (_imported(contestant.rest), {"fused": True}))


def _imported(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def peak_beyond(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that `run` holds at a time beyond what was held before, by torch's allocator or profiler."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())  # type: ignore[union-attr]
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"), default=0)


def held_bytes(bench: Bench) -> int:
    """Bytes of the optimizer's state; a storage that several tensors share counts once."""
    own = {p.untyped_storage().data_ptr() for p in bench.parameters}
    own |= {p.grad.untyped_storage().data_ptr() for p in bench.parameters if p.grad is not None}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(bench.optimizer.state)}
    return sum(size for pointer, size in storages.items() if pointer not in own)


def ceilings_here(settings: Settings, runs: Runs) -> Mapping[str, Any]:
    """This machine's row of ceilings, measured once in a bench."""
    chosen = {"ceilings": settings.device, "clock": settings.clock, "threads": settings.threads}
    timer = Timer(torch.device(settings.device), settings.clock)
    larger: dict[str, Any] = {"orders": (512, 1024, 2048), "product": 8192} if settings.device != "cpu" else {}
    return runs.once(chosen, versions([]), lambda: {"row": measured_ceilings(timer, **larger)})["row"]


def write_report(names: Sequence[str], settings: Settings, folder: Path) -> str:
    """Measure the contestants that are not finished; JSON, table and picture are written anew after each.

    Args:
        names: of `CONTESTANTS`.
        settings: of all of them.
        folder: where finished contestants are kept, and the report is written.

    Returns:
        The table.
    """
    runs = Runs(folder / "runs")
    ceilings = ceilings_here(settings, runs)
    parameters = sum(p.numel() for p in model_of(settings, "meta").parameters())
    results: list[Result] = []
    for name in names:
        contestant = CONTESTANTS[name]
        code = versions(["hf_shampoo4" if contestant.ours else contestant.package or "torch"])
        began = time.perf_counter()
        make = functools.partial(_made, name, settings, ceilings)
        made = runs.once({**asdict(settings), "contestant": name}, code, make)
        results.append(Result(**{key: made[key] for key in Result.__dataclass_fields__}))
        told = summary(settings, parameters, ceilings, results)
        write_json(folder / "bench.json", told)
        write_text(folder / "bench.md", as_markdown(told))
        print(f"{contestant.label}: {results[-1].missing or 'done'}, {time.perf_counter() - began:.0f} s", flush=True)
    if any(not result.missing for result in results):
        draw(told, folder / "bench.png")
    return as_markdown(told)


def _made(name: str, settings: Settings, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    contestant = CONTESTANTS[name]
    result = Result(name, contestant.label)
    if contestant.package and find_spec(contestant.target.split(":")[0].split(".")[0]) is None:
        result.missing = f"not installed: pip install {contestant.package}"
        return asdict(result)
    try:
        bench = Bench(contestant, settings)
        counts = {"late": Counted(), "all": Counted()}
        _measure(bench, settings, result, counts)
        steps = _period(contestant) if _is_counted_here(contestant, settings) else 1
        _predict(contestant, as_ceilings(ceilings), result, counts, steps)
    except Exception as error:  # somebody else's optimizer on this torch: the others' figures are still wanted
        result.missing = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return asdict(result)


def _measure(bench: Bench, settings: Settings, result: Result, counts: Counts) -> None:
    """Steps that make the state, late steps, and steps that update all bases; counted are those before the clock."""
    until = time.perf_counter() + settings.seconds
    result.first_ms = bench.step()
    period, live = _period(bench.contestant), _is_counted_here(bench.contestant, settings)
    _warm(bench, period, result, counts["late"] if live else None)
    result.late_ms = _timed(bench, settings.steps if period > 1 else min(settings.steps, 3), until)
    result.state_bytes = held_bytes(bench)
    result.transient_bytes = peak_beyond(bench.step, bench.timer.device)
    if bench.update_all_bases():
        _warm(bench, 1, result, counts["all"] if live else None)
        result.all_ms = _timed(bench, settings.turning, until)
    if not live:
        triton = find_spec("triton") is not None
        counts |= steps_of(model_of(settings, "meta"), bench.contestant.keywords, triton, settings.device)
    late = statistics.fmean(result.late_ms)
    worst = statistics.fmean(result.all_ms) if result.all_ms else late if bench.contestant.ours else max(result.late_ms)
    result.measured_ms = asdict(_over_schedule(bench.contestant, late, worst))


def _period(contestant: Contestant) -> int:
    """Steps after which an optimizer's work repeats."""
    if not contestant.ours:
        return contestant.period
    return max(intervals(Options(**contestant.keywords)).values(), default=1)


def _is_counted_here(contestant: Contestant, settings: Settings) -> bool:
    """Whether a period of steps is counted on the device; else one is on the meta device, with Triton's kernels."""
    return not contestant.ours or settings.device == "cpu"


def _warm(bench: Bench, steps: int, result: Result, counts: Counted | None) -> None:
    """Steps off the clock, which may be counted."""
    if bench.contestant.compiled:
        result.not_counted, counts = "its step is compiled", None
    counter = LaunchCounter(bench.timer.device.type)
    for _ in range(steps):
        bench.step(counter if counts is not None else None)
    if counts is not None:
        counts.update(counter.found)


def _over_schedule(contestant: Contestant, late: float, worst: float) -> Seconds:
    if contestant.ours:
        return Seconds.over_schedule(late, worst, Options(**contestant.keywords))
    return Seconds(late, worst, late)


def _timed(bench: Bench, steps: int, until: float) -> list[float]:
    taken = [bench.step()]
    while len(taken) < steps and time.perf_counter() < until:
        taken.append(bench.step())
    return taken


def _predict(contestant: Contestant, ceilings: Ceilings, result: Result, counts: Counts, steps: int) -> None:
    """What was counted, late in so many steps, would take this."""
    if result.not_counted:
        return
    late = 1e3 * seconds(counts["late"].launches(), ceilings) / steps
    worst = 1e3 * seconds(counts["all"].launches(), ceilings) if counts["all"] else late
    result.predicted_ms = asdict(_over_schedule(contestant, late, worst))
    result.counts = {"late": counts["late"].summary(steps), "all": counts["all"].summary()}
    result.unknown = unknown(Counted(counts["late"] + counts["all"]).launches(), ceilings)
