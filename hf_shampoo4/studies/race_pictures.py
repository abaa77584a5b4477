"""The pictures of a race: loss against steps and time, loss against bytes of state, shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_shampoo4.studies.grid import Grid
from hf_shampoo4.studies.race_results import Row
from hf_shampoo4.utils.plots import COLOURS, PALETTE, apart, label_ends, picture, style

MOST = 6
"""Lines of one picture: more cannot be followed."""


def draw_curves(grid: Grid, rows: Sequence[Row], path: Path) -> None:
    """Mean validation loss against steps and against training time, as a PNG; at most six of the grid's `curves`.

    Args:
        grid: the race; the first of its `curves` is thick, its baseline dashed.
        rows: the contestants.
        path: the file, replaced at once.
    """
    names = [name for name in grid.curves or [c.name for c in grid.contestants] if name in {row.name for row in rows}]
    shown = [next(row for row in rows if row.name == name) for name in names[:MOST]]
    ends = [row.mean for row in shown if math.isfinite(row.mean)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)  # all may have diverged
    top = high + 2.5 * (high - low) + 0.2
    with picture(path, (13, 5.6), (1, 2), sharey=True) as (figure, axes):
        by_step, by_time = axes[0]
        for place, row in enumerate(shown):
            losses = [loss for _, loss in row.curve]
            look = {**style(place), "markersize": 5, "markevery": (place % 3, 3)}
            look["linewidth"] = 3.0 if place == 0 else 1.6
            by_step.plot([step for step, _ in row.curve], losses, **look)
            by_time.plot([seconds / 60 for seconds in row.seconds], losses, **look)
        by_step.set_ylim(low - 0.08 * (top - low), top)
        by_step.set(title=f"{grid.title}: by steps", xlabel="step", ylabel="validation loss")
        by_time.set(title="by time; the final losses", xlabel="training time, minutes")
        finite = [(place, row) for place, row in enumerate(shown) if math.isfinite(row.mean)]
        right = max((row.seconds[-1] for _, row in finite), default=60.0) / 60
        by_time.set_xlim(0, 1.75 * right)
        figure.draw_without_rendering()  # the layout gives the panels their height
        ends = [(right, row.mean, f"{row.mean:.3f}  {row.label}", style(place)["color"]) for place, row in finite]
        label_ends(by_time, ends, 9.5)


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
            colour = PALETTE[1] if row.name == first else PALETTE[0] if best else COLOURS[0]
            look = {"fmt": "D" if row.name == first else "o" if best else "s", "markersize": 8 if best else 6}
            axes.errorbar(row.bytes_per_parameter, row.mean, yerr=row.spread or 0, color=colour, capsize=3, **look)
            axes.annotate(
                f"{row.mean:.3f}  {row.bytes_per_parameter:.2f} B  {row.label}", (row.bytes_per_parameter, row.mean),
                xytext=(right, height), va="center", fontsize=8.5, color=colour, annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6},
            )  # fmt: skip
        if finite:
            axes.set_xlim(right=right * 60)
            ticks = [t for t in (0.5, 1, 2, 4, 8, 16, 32, 64) if t <= 1.1 * right]
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.set_xticks([], minor=True)
        axes.set(title=f"{grid.title}: final loss against state", ylabel="validation loss (bar: spread over seeds)")
        axes.set_xlabel("bytes of optimizer state a parameter, logarithmic; the line joins the best at their bytes")


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
