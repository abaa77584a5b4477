"""The pictures of a race: loss against steps and time, loss against bytes of state, shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_shampoo4.studies.grid import Grid
from hf_shampoo4.studies.race_results import Row
from hf_shampoo4.utils.plots import COLOURS, PALETTE, apart, label_ends, picture, style

PUBLISHED: dict[str, Any] = {"facecolor": "#fde3d3", "edgecolor": COLOURS[1], "hatch": "///", "linewidth": 0}
LINES = 6  # of a picture: more cannot be followed
OPEN = "*: sweep open, a better rate may lie beyond"


def draw_curves(grid: Grid, rows: Sequence[Row], path: Path) -> None:
    """Mean validation loss against steps and against training time, as a PNG; the first of `curves` is thick.

    At most `LINES` of them: without `curves` the baseline and the best of the others.
    """
    names = grid.curves or [contestant.name for contestant in grid.contestants]
    named = [row for row in rows if row.name in names]
    kept = sorted(named, key=lambda row: (row.name != grid.baseline, row.mean))[:LINES]
    shown, labels = sorted(kept, key=lambda row: row.mean), []
    with picture(path, (13, 6.4), (1, 2), sharey=True) as (figure, axes):
        by_step, by_time = axes[0]
        for row in shown:
            losses = [loss for _, loss in row.curve]
            label = f"{row.mean:.3f}  {_marked(row)} ({row.bytes_per_parameter:.1f} B/param)"
            look = {**style(shown.index(row)), "linewidth": 3.2 if row.name == names[0] else 1.8, "markersize": 5}
            look |= {"color": "black", "linestyle": "--"} if row.name == grid.baseline else {}
            if row.curve:
                labels.append((*row.curve[-1], row.label.partition(" (")[0], look["color"]))
            by_step.plot([step for step, _ in row.curve], losses, label=label, **look)
            by_time.plot([seconds / 60 for seconds in row.seconds], losses, **look)
        if ends := [row.mean for row in shown if math.isfinite(row.mean)]:  # all may have diverged
            by_step.set_ylim(min(ends) - 0.05, max(ends) + 4 * (max(ends) - min(ends)) + 0.2)
        figure.suptitle(grid.title)  # too long for one of the panels
        by_step.set(title="by steps", xlabel="step", ylabel="validation loss, nats a token")
        by_step.set_xlim(right=1.3 * by_step.get_xlim()[1])  # room for the names
        label_ends(by_step, labels)
        by_time.set(title="by time", xlabel="training time, minutes")
        title = "final loss, best first down the columns" + (f"; {OPEN}" if any(row.open for row in shown) else "")
        columns = 3 if max((len(line.get_label()) for line in by_step.get_lines()), default=0) < 45 else 2
        place = {"loc": "outside lower center", "ncols": columns, "alignment": "left"}
        figure.legend(frameon=False, fontsize=9, title=title, title_fontsize=9, **place)


def draw_bytes(grid: Grid, rows: Sequence[Row], path: Path) -> None:
    """Final loss against bytes of state a parameter, as a PNG; the line joins those with none better at fewer bytes.

    Args:
        grid: the race; the first of its `curves` stands out.
        rows: the contestants, which have a point each.
        path: the file, replaced at once.
    """
    finite = sorted((row for row in rows if math.isfinite(row.mean)), key=lambda row: row.mean)
    front = frontier(finite)
    first = (grid.curves or [""])[0]
    with picture(path, (11, 6.2)) as (_, panels):
        axes = panels[0][0]
        if finite:
            axes.set_xscale("log")
            top = finite[-1].mean
            span = top - finite[0].mean or 1.0
            heights = apart([row.mean for row in finite], 0.045 * span, top + 0.05 * span)
            right = 1.35 * max(row.bytes_per_parameter for row in finite)
            axes.plot([r.bytes_per_parameter for r in front], [r.mean for r in front], color=COLOURS[0], linewidth=1.2)
        for row, height in zip(finite, heights if finite else (), strict=True):
            best = row in front
            colour = PALETTE[0] if row.name == first else PALETTE[1] if best else COLOURS[0]  # as in the curves
            look = {"fmt": "D" if row.name == first else "o" if best else "s", "markersize": 8 if best else 6}
            axes.errorbar(
                row.bytes_per_parameter, row.mean, yerr=row.spread or 0, color=colour, capsize=2, elinewidth=0.8, **look
            )
            axes.annotate(
                f"{row.mean:.3f}  {row.bytes_per_parameter:.2f} B  {_marked(row)}", (row.bytes_per_parameter, row.mean),
                xytext=(right, height), va="center", fontsize=8.5, color=colour, annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "relpos": (0, 0.5)},
            )  # fmt: skip
        if finite:
            axes.set_xlim(right=right * 40)
            ticks = [t for t in (0.5, 1, 2, 4, 8, 16, 32, 64) if t <= 1.1 * right]
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.set_xticks([], minor=True)
        axes.set(title=f"{grid.title}: final loss against state", ylabel="validation loss (bar: spread over seeds)")
        joined = "; the line joins the best at their bytes" if len(front) > 1 else ""
        noted = f"\n{OPEN}" if any(row.open for row in finite) else ""
        axes.set_xlabel(f"bytes of optimizer state a parameter, logarithmic{joined}{noted}")


def _marked(row: Row) -> str:
    return row.label + " *" * row.open


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Those that nobody with as few bytes or fewer is under; in ascending order of bytes."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.bytes_per_parameter, row.mean)):
        if not found or row.mean < found[-1].mean:
            found.append(row)
    return found


def draw_shares(title: str, rows: Sequence[Row], path: Path) -> None:
    """Losses by seed, and the share of each contestant beside the published one, as a PNG.

    Args:
        title: of the right half.
        rows: the contestants, drawn from the top.
        path: the file, replaced at once.
    """
    with picture(path, (14, 1.6 + 0.45 * len(rows)), (1, 2), grid="x", sharey=True) as (_, axes):
        losses, shares = axes[0]
        for place, row in enumerate(rows):
            _draw_losses(losses, place, row)
            _draw_share(shares, place, row)
        losses.set_yticks(range(len(rows)), [f"{row.label}  ({row.bytes_per_parameter:.2f} B/param)" for row in rows])
        losses.invert_yaxis()
        losses.set(title="Final validation loss: each seed (dot), the mean (|)", xlabel="nats a token")
        shares.set(title=title, xlabel="per cent (bar: standard error)")
        _finish(shares, any(row.paper for row in rows))


def _draw_losses(axes: Any, place: int, row: Row) -> None:
    axes.scatter(list(row.losses.values()), [place] * len(row.losses), color=COLOURS[2], s=26, alpha=0.55, linewidths=0)
    axes.scatter([row.mean], [place], color=COLOURS[0], marker="|", s=220, linewidths=2)


def _draw_share(axes: Any, place: int, row: Row) -> None:
    if row.paper is not None:
        low, high = 100 * min(row.paper) - 0.7, 100 * max(row.paper) + 0.7
        axes.barh(place, high - low, left=low, height=0.7, **PUBLISHED)
    if row.share is not None:
        error = 100 * (row.share_error or 0.0)
        axes.errorbar(100 * row.share, place, xerr=error, color=COLOURS[2], fmt="o", markersize=6, capsize=4)
        axes.annotate(
            f"{row.share:.0%}", (100 * row.share, place), xytext=(0, 7), textcoords="offset points", ha="center",
            fontsize=9, color=COLOURS[2], bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip


def _finish(axes: Any, has_published: bool) -> None:
    """The two ends of the way, and what the shaded range is."""
    from matplotlib.patches import Patch

    for end in (0, 100):
        axes.axvline(end, color=COLOURS[0], linewidth=1, linestyle=(0, (4, 3)))
    if has_published:
        hatched = [Patch(label="published, other models", **PUBLISHED)]
        axes.figure.legend(handles=hatched, frameon=False, loc="outside lower right")
