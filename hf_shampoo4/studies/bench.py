"""`hf-shampoo4 bench`: what an optimizer step costs, in time, memory and operations, beside other optimizers.

All contestants live in one process and take their steps in turn, so that whatever else the machine does falls on all of
them.  The warm-up is apart; its last refresh period is looked at step by step (matrix operations, allocations) and is
not timed.  Gradients are random: the cost does not depend on their values.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.options import Options
from hf_shampoo4.sharding.geometry import matrix_view, partition
from hf_shampoo4.studies.demo import write_json

# ------------------------------------------------------------------------------------------------ what is compared


@dataclass(frozen=True)
class Model:
    """The weight matrices of a transformer; embeddings are another matter (elementwise)."""

    layers: int
    matrices: tuple[tuple[int, int], ...]
    """Of one layer, (rows, columns) as `torch.nn.Linear` has them."""


def _llama(layers: int, width: int, hidden: int) -> Model:
    return Model(layers, (*[(width, width)] * 4, *[(hidden, width)] * 2, (width, hidden)))


MODELS = {
    "gpt2_124m": Model(12, ((2304, 768), (768, 768), (3072, 768), (768, 3072))),
    "llama_130m": _llama(12, 768, 2048),  # the LLaMA sizes are GaLore's (2403.03507)
    "llama_350m": _llama(24, 1024, 2736),
    "llama_1b": _llama(24, 2048, 5461),
    "tiny": _llama(1, 64, 128),  # does the command work here?
}


@dataclass(frozen=True)
class Contestant:
    """An optimizer, and how it calls what all have in common."""

    label: str
    target: str
    """`module:class`."""
    package: str = ""
    """What to `pip install` for it, if anything; its module is the target's."""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    every: tuple[str, ...] = ()
    """Keywords that take the steps between two refreshes."""
    block: str = ""
    """Keyword that takes the largest order of a factor, if longer sides are cut (and not left alone)."""


ALGORITHMS: tuple[str, ...] = get_args(get_type_hints(Options)["algorithm"])


def _ours(label: str, **options: Any) -> Contestant:
    intervals = {"elementwise": (), "shampoo": ("stats_every", "roots_every")}
    every: tuple[str, ...] = intervals.get(options["algorithm"], ("stats_every",))
    if every == ("stats_every",):
        options["refresh_warmup"] = 0  # the others' bases do not turn at every step to begin with
    return Contestant(label, "hf_shampoo4:Shampoo4bit", "", options, every, "block_size" if every else "")


CONTESTANTS: dict[str, Contestant] = {
    "adamw_fused": Contestant("torch AdamW, fused", "torch.optim:AdamW", keywords={"fused": True}),
    "adamw_foreach": Contestant("torch AdamW, foreach", "torch.optim:AdamW", keywords={"foreach": True}),
    "bnb_adamw8bit": Contestant("bitsandbytes AdamW8bit", "bitsandbytes.optim:AdamW8bit", "bitsandbytes"),
    "torchao_adamw4bit": Contestant("torchao AdamW4bit", "torchao.optim:AdamW4bit", "torchao"),
    "ours_elementwise": _ours("ours: AdamW, 4-bit", algorithm="elementwise"),
    "muon": Contestant("torch Muon", "torch.optim:Muon"),
    "po_soap": Contestant(
        "pytorch_optimizer SOAP", "pytorch_optimizer:SOAP", "pytorch_optimizer", every=("precondition_frequency",)
    ),
    "po_shampoo": Contestant(
        "pytorch_optimizer ScalableShampoo", "pytorch_optimizer:ScalableShampoo", "pytorch_optimizer",
        {"start_preconditioning_step": 1},
        ("preconditioning_compute_steps", "statistics_compute_steps"), "block_size",
    ),
    "heavyball_soap": Contestant("HeavyBall SOAP", "heavyball:SOAP", "heavyball", every=("precondition_frequency",)),
    **{f"ours_{name}": _ours(f"ours: {name}, 4-bit", algorithm=name) for name in ALGORITHMS if name != "elementwise"},
    "ours_shampoo_staggered": _ours("ours: shampoo, 4-bit, staggered", algorithm="shampoo", stagger=True),
    "ours_kl_shampoo_together": _ours("ours: kl_shampoo, 4-bit, all at once", algorithm="kl_shampoo", stagger=False),
    "ours_shampoo32": _ours("ours: shampoo, 32-bit", algorithm="shampoo", factor="direct", bits=32, moments="fp32"),
}  # fmt: skip


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long."""

    model: str = "llama_130m"
    layers: int = 2
    block: int = 1024
    every: int = 10
    """Steps between two refreshes, for every contestant that has them."""
    warmup: int = 20
    steps: int = 20
    threads: int = 2
    device: str = "cpu"
    clock: str = "wall"
    """`cpu`: this process's processor time, all threads together, for a machine that is busy with other work."""
    stagger: bool = True
    """Whether those of ours that spread their refreshes over the steps may."""

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise OptionError(f"unknown model {self.model!r}; known: {', '.join(MODELS)}")
        if not 1 <= self.layers <= MODELS[self.model].layers:
            raise OptionError(f"--layers {self.layers}: {self.model} has 1 to {MODELS[self.model].layers}")
        if self.clock not in CLOCKS:
            raise OptionError(f"--clock {self.clock}: one of {', '.join(CLOCKS)}")
        for name in ("warmup", "steps"):
            if getattr(self, name) < 1 or getattr(self, name) % self.every:
                raise OptionError(f"--{name} {getattr(self, name)} must be whole refresh periods of {self.every} steps")

    def shapes(self) -> list[tuple[int, int]]:
        """Of all matrices."""
        return list(MODELS[self.model].matrices) * self.layers


# ------------------------------------------------------------------------------------------------------ one of them


@dataclass
class Result:
    """One contestant's figures."""

    name: str
    label: str
    missing: str = ""
    """Why there are no figures."""
    milliseconds: list[float] = field(default_factory=list)
    state_bytes: int = 0
    transient_bytes: int = 0
    """The most that one step allocates beyond what it keeps."""
    products: list[int] = field(default_factory=list)
    """Operations of the matrix products of each step of a period (factorisations are not counted)."""

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def p90(self) -> float:
        """Milliseconds, the 90th percentile."""
        return sorted(self.milliseconds)[-(-9 * len(self.milliseconds) // 10) - 1]

    @property
    def worst(self) -> float:
        """Milliseconds."""
        return max(self.milliseconds)

    @property
    def amortised(self) -> float:
        """Milliseconds a step, over whole refresh periods."""
        return statistics.fmean(self.milliseconds)


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


def tensors_of(state: Any) -> Iterator[Tensor]:
    """All tensors inside an optimizer's state, whatever it nests them in."""
    todo, seen = [state], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor) and hasattr(item, "__tensor_flatten__"):  # torchao's states are subclasses
            todo += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
        elif isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()


def held_bytes(racer: Racer) -> int:
    """Bytes of the optimizer's state; a storage that several tensors share counts once."""
    own = {p.untyped_storage().data_ptr() for p in racer.parameters}
    own |= {p.grad.untyped_storage().data_ptr() for p in racer.parameters if p.grad is not None}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(racer.optimizer.state)}
    return sum(size for pointer, size in storages.items() if pointer not in own)


# ---------------------------------------------------------------------------------------------------------- the race


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


def apply_operations(shapes: Sequence[tuple[int, int]], block: int) -> int:
    """2mn(m + n) for every block: what L^-1/4 G R^-1/4 takes, and twice in and out of an eigenbasis."""
    views = [matrix_view(shape) for shape in shapes]
    blocks = [rect.shape for view in views if view for rect in partition(view, block)]
    return sum(2 * m * n * (m + n) for m, n in blocks)


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


# ------------------------------------------------------------------------------------------------------ what is told


def machine() -> dict[str, Any]:
    """Name of the processor and the accelerator, and how busy the machine was."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": model, "cores": os.cpu_count(), "accelerator": accelerator, "load": load, "torch": torch.__version__}


def summary(settings: Settings, results: Sequence[Result], ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Everything, for the JSON file."""
    operations = apply_operations(settings.shapes(), settings.block)
    figures = [
        {**asdict(r), **({} if r.missing else {n: getattr(r, n) for n in ("median", "p90", "worst", "amortised")})}
        for r in results
    ]
    return {
        "settings": asdict(settings),
        "machine": machine(),
        "parameters": sum(m * n for m, n in settings.shapes()),
        "ceilings": dict(ceilings),
        "apply_operations": operations,
        "apply_floor_ms": 1e3 * operations / ceilings["product_operations"],
        "results": figures,
    }


def as_markdown(told: Mapping[str, Any]) -> str:
    """The table, with what it was measured on above it."""
    s, m = told["settings"], told["machine"]
    load = "" if m["load"] is None else f", load {m['load']:.1f}"
    lines = [
        f"{s['layers']} layers of {s['model']}, {told['parameters'] / 1e6:.1f}M parameters, block order {s['block']}, "
        f"refresh every {s['every']} steps, {s['threads']} threads of {m['accelerator'] or m['cpu']} ({m['cores']} "
        f"cores{load}), torch {m['torch']}, {s['clock']} time.",
        f"float32 products {told['ceilings']['product_operations'] / 1e9:.0f} GFLOP/s, copies "
        f"{told['ceilings']['copy_bytes'] / 1e9:.1f} GB/s: the floor of Shampoo's apply is "
        f"{told['apply_floor_ms']:.0f} ms ({told['apply_operations'] / 1e9:.1f} GFLOP).",
        "",
        "| | amortised ms | median | p90 | worst | worst / median | GFLOP a step | state MB | transient MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in told["results"]:
        if r["missing"]:
            lines.append(f"| {r['label']} | {r['missing']} | | | | | | | |")
            continue
        operations = statistics.fmean(r["products"]) / 1e9
        lines.append(
            f"| {r['label']} | {r['amortised']:.0f} | {r['median']:.0f} | {r['p90']:.0f} | {r['worst']:.0f} | "
            f"{r['worst'] / r['median']:.1f} | {operations:.1f} | {r['state_bytes'] / 1e6:.1f} | "
            f"{r['transient_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines) + "\n"


def draw(told: Mapping[str, Any], path: Path) -> None:
    """Step times and bytes of each contestant, as a PNG.

    Args:
        told: what `summary` gives.
        path: the file, replaced at once.
    """
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    shown = [r for r in told["results"] if not r["missing"]]
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 1.8 + 0.42 * len(shown)), dpi=150, layout="constrained")
        times, sizes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for place, r in enumerate(shown):
            colour = "#2563eb" if r["label"].startswith("ours") else "#9ca3af"
            times.barh(place, r["amortised"], color=colour, height=0.62)
            times.plot([r["median"], r["worst"]], [place, place], color="#111827", linewidth=1)
            times.plot(r["median"], place, "|", color="#111827", markersize=11)
            times.plot(r["worst"], place, ">", color="#111827", markersize=4)
            times.annotate(f" {r['amortised']:.0f}", (max(r["worst"], r["amortised"]), place), va="center", fontsize=9)
            sizes.barh(place, r["state_bytes"] / 1e6, color=colour, height=0.62)
            left = r["state_bytes"] / 1e6
            sizes.barh(place, r["transient_bytes"] / 1e6, left=left, color=colour, height=0.62, alpha=0.35)
        times.set_yticks(range(len(shown)), [r["label"] for r in shown])
        times.invert_yaxis()
        times.set(
            title="Optimizer step: mean (bar), median (|), worst (>)",
            xlabel=f"milliseconds ({told['settings']['clock']} time)",
            xscale="log",
        )
        sizes.set(title="State (dark), transient (pale)", xlabel="MB")
        for axes in (times, sizes):
            axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        figure.savefig(temporary, format="png")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 bench`."""
    chosen = _parser().parse_args(arguments)
    settings = _settings(chosen)
    names = [name for name in chosen.contestants.split(",") if name] or list(CONTESTANTS)
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise OptionError(f"unknown contestants {', '.join(unknown)}; known: {', '.join(CONTESTANTS)}")
    torch.set_num_threads(settings.threads)
    folder = Path(chosen.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    told = summary(settings, race(names, settings), rates(settings))
    if chosen.sweep:
        told["sweep"] = sweep(settings, [name for name in names if name.startswith("ours")])
        print(json.dumps(told["sweep"], indent=1))
    write_json(folder / "bench.json", told)
    (folder / "bench.md").write_text(as_markdown(told), encoding="utf-8")
    draw(told, folder / "bench.png")
    print(as_markdown(told) + f"\n{folder}/bench.json, bench.md, bench.png")


def _settings(chosen: argparse.Namespace) -> Settings:
    names = get_type_hints(Settings)
    given = {name: found for name in names if (found := getattr(chosen, name, None)) is not None}
    quick = {"model": "tiny", "layers": 1, "block": 64, "every": 2, "warmup": 4, "steps": 4} if chosen.quick else {}
    return Settings(**{**quick, **given})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 bench", description=__doc__)
    add, default = parser.add_argument, Settings()
    add("--model", help=f"{', '.join(MODELS)}; default {default.model}")
    add("--layers", type=int, help=f"how many of its layers; default {default.layers}")
    add("--block", type=int, help=f"largest order of a factor; default {default.block}")
    add("--every", type=int, help=f"steps between two refreshes; default {default.every}")
    add("--warmup", type=int, help=f"steps before the clock runs; default {default.warmup}")
    add("--steps", type=int, help=f"steps that are timed; default {default.steps}")
    add("--threads", type=int, help=f"default {default.threads}")
    add("--clock", help=f"wall, or cpu: the process's own time, on a busy machine; default {default.clock}")
    add("--device", help=f"default {default.device}")
    add("--contestants", default="", help=f"comma-separated; default all: {','.join(CONTESTANTS)}")
    add("--sweep", action="store_true", help="ours again over block orders and sizes")
    add("--output_dir", default="runs/bench", help="default: runs/bench")
    add("--quick", action="store_true", help="a tiny model: does it work here?")
    return parser
