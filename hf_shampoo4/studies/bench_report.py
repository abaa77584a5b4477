"""The report of `hf-shampoo4 bench`: its JSON, its table and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_shampoo4.studies.bench_contestants import Settings
from hf_shampoo4.studies.machine import machine
from hf_shampoo4.utils.plots import COLOURS, picture

AGREE = 0.3
"""Prediction and measurement on one machine agree if they are within this share of each other."""


@dataclass
class Result:
    """One contestant's figures; times in milliseconds: late, worst and first as in `planning.step_time.Seconds`."""

    name: str
    label: str
    missing: str = ""
    """Why there are no figures."""
    first_ms: float = 0.0
    """The first step, in which the state is made."""
    late_ms: list[float] = field(default_factory=list)
    """Of each late step."""
    all_ms: list[float] = field(default_factory=list)
    """Of each step that updates all bases."""
    measured_ms: dict[str, float] = field(default_factory=dict)
    predicted_ms: dict[str, float] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    """Of a late step and one that updates all bases: launches, bytes, products, decompositions."""
    not_counted: str = ""
    """Why there are no counts and no prediction."""
    unknown: list[str] = field(default_factory=list)
    """What the prediction is without."""
    state_bytes: int = 0
    transient_bytes: int = 0
    """The most that a late step holds beyond what it keeps."""

    def off(self, which: str) -> float | None:
        """By what share of the measurement the prediction is off; None: there is no prediction."""
        return self.predicted_ms[which] / self.measured_ms[which] - 1 if self.predicted_ms else None


def summary(
    settings: Settings, parameters: int, ceilings: Mapping[str, Any], results: Sequence[Result]
) -> dict[str, Any]:
    """Everything, for the JSON file."""
    offs = {r.name: off for r in results if (off := r.off("late")) is not None and not r.missing}
    return {
        "settings": asdict(settings),
        "title": settings.title(),
        "machine": machine(),
        "parameters": parameters,
        "ceilings": dict(ceilings),
        "agree_within": AGREE,
        "off": offs,
        "results": [asdict(r) for r in results],
    }


def as_markdown(told: Mapping[str, Any]) -> str:
    """The table, with what it was measured on above it."""
    s, m, n = told["settings"], told["machine"], told["parameters"]
    lines = [
        f"{told['title']}, {n / 1e6:.1f}M parameters, embeddings and head included; {s['threads']} threads of "
        f"{m['accelerator'] or m['processor']}, torch {m['torch']}, {s['clock']} time.",
        ceilings_line(told["ceilings"]),
        "",
        "| | late ms | predicted | first 1,000 | predicted | all bases | predicted | launches | bytes a parameter | "
        "GFLOP | state, bytes a parameter | transient MB |",
        "|---|" + "---:|" * 11,
    ]
    for r in told["results"]:
        if r["missing"]:
            lines.append(f"| {r['label']} | {r['missing']} |" + " |" * 10)
            continue
        times = [
            f"{_ms(r['measured_ms'], which)} | {_ms(r['predicted_ms'], which)}" for which in ("late", "first", "worst")
        ]
        counts = "not counted | | "
        if r["counts"]:
            late = r["counts"]["late"]
            gflop = sum(late["products"].values()) / 1e9
            counts = f"{late['launches']:,} | {late['bytes'] / n:.0f} | {gflop:.1f}"
        lines.append(
            f"| {r['label']} | {' | '.join(times)} | {counts} | {r['state_bytes'] / n:.2f} | "
            f"{r['transient_bytes'] / 1e6:.0f} |"
        )
    return "\n".join([*lines, "", *_remarks(told)]) + "\n"


def _ms(times: Mapping[str, float], which: str) -> str:
    if not times:
        return ""
    return f"{times[which]:.0f}" if times[which] >= 10 else f"{times[which]:.2g}"


def ceilings_line(row: Mapping[str, Any]) -> str:
    """What was measured before the contestants, in a sentence."""
    products = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in row["products"].items())
    qr = ", ".join(f"{order}: {1e3 * taken:.1f}" for order, taken in row["decompositions"]["linalg_qr_ms"].items())
    fresh = f", of new memory {row['fresh'] / 1e9:.1f}" if "fresh" in row else ""
    fresh += f", of what is changed in place {row['in_place'] / 1e9:.1f}" if "in_place" in row else ""
    coded = {name.rpartition("::")[2]: rate for name, rate in row.get("one_by_one", {}).items()}
    numbers = ", ".join(f"{name} {rate / 1e6:,.0f}" for name, rate in coded.items())
    return (
        f"Measured at the start: products of {products} GFLOP/s; a copy {row['memory'] / 1e9:.1f} GB/s{fresh}; "
        f"{f'millions of numbers a second one by one: {numbers}; ' if numbers else ''}"
        f"a launch {1e6 * row['launch']:.1f} us; a QR by order, ms: {qr}."
    )


def _remarks(told: Mapping[str, Any]) -> list[str]:
    within = [name for name, off in told["off"].items() if abs(off) <= told["agree_within"]]
    outside = [f"{name} {off:+.0%}" for name, off in told["off"].items() if abs(off) > told["agree_within"]]
    found = [
        f"Predictions of late steps within {told['agree_within']:.0%} of the measurement: {', '.join(within) or 'none'}"
        + (f"; outside: {', '.join(outside)}." if outside else ".")
    ]
    for r in told["results"]:
        if r["not_counted"]:
            found.append(f"{r['label']} cannot be counted: {r['not_counted']}.")
        if r["unknown"]:
            found.append(f"The prediction for {r['label']} is without {', '.join(r['unknown'])}.")
    return found


def draw(told: Mapping[str, Any], path: Path) -> None:
    """Step times and bytes of each contestant, as a PNG.

    Args:
        told: what `summary` gives.
        path: the file, replaced at once.
    """
    shown = [r for r in told["results"] if not r["missing"]]
    size = (12, 1.8 + 0.5 * len(shown))
    with picture(path, size, (1, 2), grid="x", sharey=True, width_ratios=(3, 2)) as (figure, panels):
        times, sizes = panels[0]
        for place, r in enumerate(shown):
            colour = COLOURS[2] if r["label"].startswith("ours") else COLOURS[0]
            late, worst = r["measured_ms"]["late"], r["measured_ms"]["worst"]
            times.barh(place, late, color=colour, height=0.62)
            times.plot([late, worst], [place, place], color="#111827", linewidth=0.8, linestyle=":")
            times.plot(r["measured_ms"]["first"], place, "d", color="#111827", markersize=5)
            times.plot(worst, place, ">", color="#111827", markersize=4)
            if r["predicted_ms"]:
                times.plot(r["predicted_ms"]["late"], place, "|", color=COLOURS[1], markersize=16, markeredgewidth=2)
            inside = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "color": "white"}
            times.annotate(_ms(r["measured_ms"], "late"), (late, place), va="center", fontsize=9, **inside)
            state = r["state_bytes"] / told["parameters"]
            sizes.barh(place, state, color=colour, height=0.62)
            sizes.barh(
                place, r["transient_bytes"] / told["parameters"], left=state, color=colour, height=0.62, alpha=0.35
            )
        times.set_yticks(range(len(shown)), [r["label"] for r in shown])
        times.invert_yaxis()
        times.set(
            title="Step: late (bar), first 1,000 (diamond), all bases (>), predicted late (|)",
            xlabel=f"milliseconds ({told['settings']['clock']} time)",
            xscale="log",
        )
        sizes.set(title="State (dark), working memory (pale)", xlabel="bytes a parameter")
        where = told["machine"].get("accelerator") or "a CPU"
        figure.suptitle(f"{told['title']}, {told['parameters'] / 1e6:.1f}M parameters, on {where}")
