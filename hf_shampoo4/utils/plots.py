"""Pictures in one look, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import write_figure

COLOURS = ("#6b7280", "#d9480f", "#1971c2", "#2f9e44", "#862e9c")
"""Of few lines, the first the one that the others are measured against."""
GRID = "#e5e7eb"
# Okabe and Ito's, which the colour-blind can tell apart, without their yellow, which white paper swallows, and black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")


@contextmanager
def picture(
    path: Path,
    size: tuple[float, float],
    panels: tuple[int, int] = (1, 1),
    *,
    grid: str = "both",
    font: float = 11,
    dpi: int = 150,
    **subplots: Any,
) -> Iterator[tuple[Any, Any]]:
    """A figure that is written to `path` when the block ends well.

    Args:
        path: the file, replaced at once.
        size: width and height in inches.
        panels: rows and columns.
        grid: the axis whose lines lie behind the data, "x", "y" or "both".
        font: points.
        dpi: dots an inch.
        subplots: for `Figure.subplots`.

    Yields:
        The figure, and its axes: an array (rows, columns).
    """
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    look = {"font.size": font, "axes.titlesize": font, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        axes: Any = figure.subplots(*panels, squeeze=False, **subplots)
        for panel in axes.flat:
            panel.grid(axis=grid, color=GRID, linewidth=0.8)
            panel.set_axisbelow(True)
        yield figure, axes
        write_figure(path, figure)


def style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of line number `index` among many: no two of 24 are alike.

    The first six differ in colour, marker and dashes, so that they are told apart in grey too.
    """
    turn, place = divmod(index, len(PALETTE))
    return {"color": PALETTE[place], "marker": MARKERS[place], "linestyle": DASHES[(place + turn) % len(DASHES)]}


def label_ends(axes: Any, labels: Sequence[tuple[float, float, str, Any]], size: float = 9) -> None:
    """Name lines at their right ends, moved apart up and down where they would lie over each other.

    Args:
        axes: their limits must be set.
        labels: x and y of a line's end, its name and its colour.
        size: points of the letters.
    """
    points = axes.get_position().height * axes.figure.get_figheight() * 72  # the height of the panel
    gap = 1.25 * size
    low, high = axes.get_ylim()
    ends = sorted(labels, key=lambda label: label[1])
    wanted = [(y - low) / (high - low) * points for _, y, _, _ in ends]
    placed = apart(wanted, gap, points)
    for (x, y, text, colour), at, place in zip(ends, wanted, placed, strict=True):
        offset = {"xytext": (6, place - at), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(text, (x, y), color=colour, fontsize=size, va="center", **offset)


def apart(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Places in ascending order, moved until each is `gap` above the last and, if there is room, none above `top`."""
    placed: list[float] = []
    for place in wanted:
        placed.append(max(place, placed[-1] + gap) if placed else place)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], top if i + 1 == len(placed) else placed[i + 1] - gap)
    return placed
