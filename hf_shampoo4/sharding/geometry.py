"""Cut a parameter's matrix view into rectangles: pure geometry, in the parameter's global coordinates.

(768, 1536), at most 1024 a side       -> 2 blocks of 768 x 768
(64, 3, 3, 3), a convolution           -> its view (64, 27), 1 block
(768, 48, 128), a 1-D convolution      -> its view (768, 6144)
(8, 1024, 2048), experts               -> 8 matrices, 2 blocks each
(1536, 1024), row_splits (1024, 512)   -> q apart from kv: 1024 x 1024 and 512 x 1024
(32000, 1024), at most 8192 x 1024     -> 4 strips of 8000 rows
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

EXPERT_WIDTH = 16  # a 3-D tensor whose last side is smaller is a 1-D convolution's kernel, not a stack of matrices


@dataclass(frozen=True)
class MatrixView:
    """A parameter seen as `count` matrices of rows x columns."""

    count: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Rect:
    """Rows [r0, r1) and columns [c0, c1) of one matrix of a parameter's view."""

    matrix: int
    r0: int
    r1: int
    c0: int
    c1: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.r1 - self.r0, self.c1 - self.c0


def matrix_view(shape: tuple[int, ...], kind: str = "auto") -> MatrixView | None:
    """How a parameter of `shape` is seen as matrices, or None if it has none (a vector, or a side of length 1).

    Args:
        kind: `flatten`: (d0, d1 * d2 * ...); `batch`: the last two dimensions are the matrix; `auto`: `batch` for
            3 dimensions with a last one of at least 16, and no more matrices than their longer side is long (experts),
            else `flatten` (convolutions, projections to heads).
    """
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    if kind == "auto":
        stacked = len(shape) == 3 and shape[-1] >= EXPERT_WIDTH and shape[0] <= max(shape[1:])
        kind = "batch" if stacked else "flatten"
    if kind == "batch":
        view = MatrixView(math.prod(shape[:-2]), shape[-2], shape[-1])
    else:
        view = MatrixView(1, shape[0], math.prod(shape[1:]))
    return view if min(view.rows, view.columns) > 1 else None


def entries_view(shape: tuple[int, ...]) -> MatrixView:
    """A parameter without a matrix, for what has a number a row and a column: cut between two of its dimensions, so
    that these are fewest.  (1, 197, 768) -> 197 x 768, (5,) -> 1 x 5."""
    cuts = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))] or [(1, math.prod(shape))]
    return MatrixView(1, *min(cuts, key=sum))


Largest = Callable[[int, int], tuple[int, int]]
"""Rows and columns of a matrix -> the most that a block of it has."""


def partition(view: MatrixView, largest: int | Largest, row_splits: tuple[int, ...] = ()) -> list[Rect]:
    """Rectangles that tile the view, in canonical order: by matrix, then rows, then columns.

    A side longer than `largest` allows is cut into the fewest parts that fit, of sizes that differ by at most one, so
    that few shapes arise.  `row_splits` are the rows of matrices fused into one, each of which is cut by itself.

    Raises:
        ValueError: row_splits do not add up to the number of rows.
    """
    if row_splits and sum(row_splits) != view.rows:
        raise ValueError(f"row_splits {row_splits} add up to {sum(row_splits)}, but the matrix has {view.rows} rows")
    cuts, start = [], 0
    for size in row_splits or (view.rows,):
        rows, columns = (largest, largest) if isinstance(largest, int) else largest(size, view.columns)
        of_columns = cut(view.columns, columns)
        cuts += [(start + a, start + b, c, d) for a, b in cut(size, rows) for c, d in of_columns]
        start += size
    return [Rect(k, *edges) for k in range(view.count) for edges in cuts]


def cut(length: int, largest: int) -> list[tuple[int, int]]:
    """The fewest parts of a side that are not longer than `largest`, as [start, end)."""
    parts = -(-length // largest)
    edges = [length * i // parts for i in range(parts + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))
