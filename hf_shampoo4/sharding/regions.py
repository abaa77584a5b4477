"""Which entries of a parameter a rank has, and as which rectangles of its matrix view these lie: integers only."""

from __future__ import annotations

from typing import NamedTuple

from .geometry import MatrixView, Rect


class Runs(NamedTuple):
    """`number` runs of `length` consecutive entries of a parameter (row-major), `step` apart."""

    start: int
    number: int
    length: int
    step: int
    offset: int
    """Of the first run in the rank's flat tensor."""
    stride: int
    """From a run to the next in the rank's flat tensor."""

    def has(self, entry: int) -> bool:
        """Whether an entry of the parameter is in one of them."""
        run, within = divmod(entry - self.start, self.step)
        return 0 <= run < self.number and within < self.length


class Region(NamedTuple):
    """What a rank holds of a parameter; none of it twice."""

    runs: tuple[Runs, ...]

    @property
    def numel(self) -> int:
        """Entries of all of it."""
        return sum(runs.number * runs.length for runs in self.runs)

    @property
    def start(self) -> int:
        """The first entry."""
        return min((runs.start for runs in self.runs), default=0)

    @classmethod
    def range(cls, start: int, numel: int) -> Region:
        """Consecutive entries."""
        return cls((Runs(start, 1, numel, numel, 0, numel),) if numel else ())


class LocalRect(NamedTuple):
    """A rectangle of a parameter's matrix view that a rank holds, and where it lies in the rank's flat tensor."""

    rect: Rect
    offset: int
    """Of its first entry."""
    stride: int
    """From a row to the next."""


def local_rects(region: Region, view: MatrixView) -> list[LocalRect]:
    """The region as rectangles of the matrix view: for a range at most three a matrix, for a box one."""
    return [rect for runs in region.runs for rect in _local_rects(runs, view)]


def _local_rects(runs: Runs, view: MatrixView) -> list[LocalRect]:
    start, number, length, step, offset, stride = runs
    row, column = divmod(start, view.columns)
    if number > 1 and step == view.columns and column + length <= view.columns:  # one rectangle a matrix
        return [
            LocalRect(Rect(r.matrix, r.r0, r.r1, column, column + length), offset + at // view.columns * stride, stride)
            for r, at, _ in _rectangles(row * view.columns, (row + number) * view.columns, view)
        ]
    return [
        LocalRect(rect, offset + i * stride + at, view.columns)
        for i in range(number)
        for rect, at, _ in _rectangles(start + i * step, start + i * step + length, view)
    ]


def _rectangles(start: int, stop: int, view: MatrixView) -> list[LocalRect]:
    """Entries [start, stop) of the view: part of a row, whole rows, part of a row, in each matrix."""
    found = []
    at = start
    while at < stop:
        row, column = divmod(at, view.columns)
        matrix, r = divmod(row, view.rows)
        if column or stop - at < view.columns:
            size = min(view.columns - column, stop - at)
            rect = Rect(matrix, r, r + 1, column, column + size)
        else:
            rows = min((stop - at) // view.columns, view.rows - r)
            size = rows * view.columns
            rect = Rect(matrix, r, r + rows, 0, view.columns)
        found.append(LocalRect(rect, at - start, view.columns))
        at += size
    return found
