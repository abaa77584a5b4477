"""Pictures in one look, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Colour and dashes of line number `index` among many: no two of 24 are alike."""
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": DASHES[index // len(PALETTE) % len(DASHES)]}
