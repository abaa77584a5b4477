"""`hf-shampoo4 bench`: what an optimizer step costs, in time, memory and operations, beside other optimizers.

All contestants live in one process and take their steps in turn, so that whatever else the machine does falls on all of
them.  The warm-up is apart; its last refresh period is looked at step by step (matrix operations, allocations) and is
not timed.  Gradients are random: the cost does not depend on their values.
"""

from __future__ import annotations

import importlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hf_shampoo4.studies.bench_contestants import CLOCKS, CONTESTANTS, Contestant, Settings
from hf_shampoo4.studies.bench_report import Result, apply_operations
from hf_shampoo4.studies.machine import tensors_of


class Racer:
    """A contestant with parameters and an optimizer of its own."""

    def __init__(self, name: str, settings: Settings) -> None:
        contestant = CONTESTANTS[name]
        self.result = Result(name, contestant.label)
        self.device, self.clock = torch.device(settings.device), CLOCKS[settings.clock]
        generator = torch.Generator().manual_seed(0)
        self.parameters = [
            torch.nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(self.device))
            for shape in settings.shapes()
        ]
        self.optimizer = _construct(contestant, self.parameters, settings)

    def take(self, gradients: Sequence[Tensor]) -> None:
        """A step on copies of the gradients (some optimizers change them), made before the clock runs."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        _wait(self.device)
        began = self.clock()
        self.optimizer.step()
        _wait(self.device)
        self.result.milliseconds.append(1e3 * (self.clock() - began))

    def inspect(self, gradients: Sequence[Tensor]) -> None:
        """A step whose matrix products and allocations are counted."""
        operations, peak = counted(lambda: self.take(gradients), self.device)
        copies = sum(g.numel() * g.element_size() for g in gradients)
        self.result.products.append(operations)
        self.result.transient_bytes = max(self.result.transient_bytes, peak - copies)


def _construct(contestant: Contestant, parameters: list[torch.nn.Parameter], settings: Settings) -> Any:
    module, _, name = contestant.target.partition(":")
    if contestant.package == "heavyball" and settings.device == "cpu":
        utilities: Any = importlib.import_module("heavyball.utils")
        utilities.compile_mode = None  # its default, max-autotune, is for GPUs
    keywords = {**contestant.keywords, **dict.fromkeys(contestant.every, settings.every)}
    if contestant.block:
        keywords[contestant.block] = settings.block
    if not settings.stagger and "algorithm" in keywords:
        keywords["stagger"] = False
    return getattr(importlib.import_module(module), name)(parameters, lr=1e-4, **keywords)


PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}


def counted(run: Callable[[], None], device: torch.device) -> tuple[int, int]:
    """What `run` does, by torch's profiler and allocator.

    Returns:
        Operations of its matrix products, and the most bytes that it holds at a time beyond what was held before.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=not cuda, with_flops=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())  # type: ignore[union-attr]
    operations = sum(e.flops() for e in events if e.name() in PRODUCTS)
    if cuda:
        return operations, torch.cuda.max_memory_allocated(device) - before
    held = itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]")
    return operations, max(held, default=0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held_bytes(racer: Racer) -> int:
    """Bytes of the optimizer's state; a storage that several tensors share counts once."""
    own = {p.untyped_storage().data_ptr() for p in racer.parameters}
    own |= {p.grad.untyped_storage().data_ptr() for p in racer.parameters if p.grad is not None}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(racer.optimizer.state)}
    return sum(size for pointer, size in storages.items() if pointer not in own)


def race(names: Sequence[str], settings: Settings) -> list[Result]:
    """Figures of the contestants, in their order; one that is not installed or fails says so in `missing`."""
    generator = torch.Generator().manual_seed(1)
    gradients = [
        [(1e-3 * torch.randn(shape, generator=generator)).to(settings.device) for shape in settings.shapes()]
        for _ in range(2)
    ]
    racers, results = [], []
    for name in names:
        racer = _warm(name, settings, gradients)
        if isinstance(racer, Racer):
            racers.append(racer)
        results.append(racer.result if isinstance(racer, Racer) else racer)
        print(f"{CONTESTANTS[name].label}: {results[-1].missing or 'ready'}", flush=True)
    for step in range(settings.steps):
        for racer in racers:
            racer.take(gradients[step % 2])
    return results


def _warm(name: str, settings: Settings, gradients: Sequence[Sequence[Tensor]]) -> Racer | Result:
    contestant = CONTESTANTS[name]
    if contestant.package and find_spec(contestant.target.split(":")[0].split(".")[0]) is None:
        return Result(name, contestant.label, f"not installed: pip install {contestant.package}")
    try:
        racer = Racer(name, settings)
        for step in range(settings.warmup - settings.every):
            racer.take(gradients[step % 2])
        for step in range(settings.every):
            racer.inspect(gradients[step % 2])
    except Exception as error:  # somebody else's optimizer on this torch: the others' figures are still wanted
        return Result(name, contestant.label, f"failed: {type(error).__name__}: {str(error).splitlines()[0]}")
    racer.result.state_bytes = held_bytes(racer)
    racer.result.milliseconds.clear()
    return racer


def rates(settings: Settings) -> dict[str, float]:
    """This machine's ceilings, measured now: operations a second of a float32 product, bytes a second of a copy."""
    device = torch.device(settings.device)
    a = torch.randn(settings.block, settings.block, device=device)
    big = torch.randn(1 << 24, device=device)
    target = torch.empty_like(big)
    return {
        "product_operations": 2 * settings.block**3 / _seconds(lambda: torch.mm(a, a), settings),
        "copy_bytes": 2 * 4 * big.numel() / _seconds(lambda: target.copy_(big), settings),
    }


def _seconds(run: Callable[[], Any], settings: Settings, times: int = 15) -> float:
    device, clock, taken = torch.device(settings.device), CLOCKS[settings.clock], []
    for _ in range(times):
        _wait(device)
        began = clock()
        run()
        _wait(device)
        taken.append(clock() - began)
    return statistics.median(taken[2:])


SWEEP_BLOCKS, SWEEP_LAYERS, SWEEP_EVERY = (256, 512, 1024), (1, 2), (1, 10, 100)


def sweep(settings: Settings, names: Sequence[str]) -> list[dict[str, Any]]:
    """How cost grows with the block order and the parameters; with the refresh interval by the measured parts.

    The steady step is the median, the refresh what a period takes beyond it; `stagger` is off, to tell them apart.
    """
    rows = []
    for block in SWEEP_BLOCKS:
        for layers in SWEEP_LAYERS if block == settings.block else SWEEP_LAYERS[:1]:
            point = replace(settings, block=block, layers=min(layers, settings.layers), stagger=False)
            operations = apply_operations(point.shapes(), block)
            for result in race(names, point):
                steady = result.median
                refresh = sum(result.milliseconds) / (point.steps // point.every) - point.every * steady
                rows.append({
                    "name": result.name, "block": block, "parameters": sum(m * n for m, n in point.shapes()),
                    "steady_ms": steady, "refresh_ms": refresh, "state_bytes": result.state_bytes,
                    "apply_operations": operations, "products_steady": min(result.products),
                    "products_refresh": max(result.products) - min(result.products),
                    "amortised_ms": {every: steady + refresh / every for every in SWEEP_EVERY},
                })  # fmt: skip
    return rows
