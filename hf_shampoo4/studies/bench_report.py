"""The report of `hf-shampoo4 bench`: its JSON, its table and its picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_shampoo4.execution.blocking import blocks_of
from hf_shampoo4.options import Options
from hf_shampoo4.studies.bench_contestants import Settings
from hf_shampoo4.studies.machine import machine
from hf_shampoo4.utils.plots import COLOURS, picture


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


def apply_operations(shapes: Sequence[tuple[int, int]], block: int) -> int:
    """What L^-1/4 G R^-1/4 takes, by the closed form (preconditioners/operations.py): 2mn(m + n) for every block."""
    options = Options(algorithm="shampoo", block_size=block)
    return sum(b.algorithm.work()["step"].products for shape in shapes for b in blocks_of(shape, options))


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
        f"refresh every {s['every']} steps, {s['threads']} threads of {m['accelerator'] or m['processor']} "
        f"({m['cores']} cores{load}), torch {m['torch']}, {s['clock']} time.",
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
    shown = [r for r in told["results"] if not r["missing"]]
    size = (12, 1.8 + 0.42 * len(shown))
    with picture(path, size, (1, 2), grid="x", sharey=True, width_ratios=(3, 2)) as (figure, panels):
        times, sizes = panels[0]
        for place, r in enumerate(shown):
            colour = COLOURS[2] if r["label"].startswith("ours") else COLOURS[0]
            times.barh(place, r["amortised"], color=colour, height=0.62)
            times.plot([r["amortised"], r["worst"]], [place, place], color="#111827", linewidth=0.8, linestyle=":")
            times.plot(r["median"], place, "|", color="#111827", markersize=11)
            times.plot(r["worst"], place, ">", color="#111827", markersize=4)
            inside = {"xytext": (-3, 0), "textcoords": "offset points", "ha": "right", "color": "white"}
            times.annotate(f"{r['amortised']:.0f}", (r["amortised"], place), va="center", fontsize=9, **inside)
            after = {"xytext": (5, 0), "textcoords": "offset points", "color": "#6b7280"}
            times.annotate(f"worst {r['worst']:.0f}", (r["worst"], place), va="center", fontsize=8, **after)
            sizes.barh(place, r["state_bytes"] / 1e6, color=colour, height=0.62)
            left = r["state_bytes"] / 1e6
            sizes.barh(place, r["transient_bytes"] / 1e6, left=left, color=colour, height=0.62, alpha=0.35)
        times.set_yticks(range(len(shown)), [r["label"] for r in shown])
        times.invert_yaxis()
        times.set(
            title="Optimizer step: mean (bar and number in it), median (|), worst (>)",
            xlabel=f"milliseconds ({told['settings']['clock']} time)",
            xscale="log",
        )
        sizes.set(title="State (dark), working memory (pale)", xlabel="MB")
        given = told["settings"]
        figure.suptitle(
            f"{given['layers']} layers of {given['model']} on {told['machine'].get('accelerator') or 'a CPU'}"
        )
