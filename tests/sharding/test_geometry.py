"""Cutting parameters into rectangles: they tile, fit, are even, and respect fused matrices."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from hf_shampoo4.sharding.geometry import MatrixView, Rect, entries_view, matrix_view, partition
from tests.support import reference
from tests.support.reference import PROPERTY

sides = st.integers(1, 60)


@PROPERTY
@given(st.integers(1, 3), sides, sides, st.integers(1, 70))
def test_blocks_tile_the_view_exactly(count: int, rows: int, columns: int, block_size: int) -> None:
    covered = np.zeros((count, rows, columns), dtype=int)
    rects = partition(MatrixView(count, rows, columns), block_size)
    for r in rects:
        assert r.shape == (r.r1 - r.r0, r.c1 - r.c0)
        assert 1 <= min(r.shape)
        assert max(r.shape) <= block_size
        covered[r.matrix, r.r0 : r.r1, r.c0 : r.c1] += 1
    assert (covered == 1).all()
    for lengths in ({r.shape[0] for r in rects}, {r.shape[1] for r in rects}):
        assert max(lengths) - min(lengths) <= 1
    assert len(rects) == count * -(-rows // block_size) * -(-columns // block_size)  # the fewest that fit


@PROPERTY
@given(st.lists(sides, min_size=1, max_size=5), sides, st.integers(1, 70))
def test_no_block_straddles_a_row_split(splits: list[int], columns: int, block_size: int) -> None:
    covered = np.zeros((sum(splits), columns), dtype=int)
    edges = np.cumsum([0, *splits]).tolist()
    for r in partition(MatrixView(1, sum(splits), columns), block_size, tuple(splits)):
        owner = np.searchsorted(edges, r.r0, side="right") - 1
        assert r.r1 <= edges[owner + 1]
        assert max(r.shape) <= block_size
        covered[r.r0 : r.r1, r.c0 : r.c1] += 1
    assert (covered == 1).all()


@PROPERTY
@given(st.integers(1, 3), sides, sides, st.integers(1, 70))
def test_order_is_canonical(count: int, rows: int, columns: int, block_size: int) -> None:
    rects = partition(MatrixView(count, rows, columns), block_size)
    assert rects == sorted(rects, key=lambda r: (r.matrix, r.r0, r.c0))


@pytest.mark.parametrize("shape", [(7, 9), (70, 130), (3, 65, 66), (8, 3, 3, 3), (5, 4, 3)])
@pytest.mark.parametrize("block_size", [4, 64, 1024])
def test_blocks_are_those_of_the_reference(shape: tuple[int, ...], block_size: int) -> None:
    view = matrix_view(shape)
    assert view is not None
    theirs = [(r.matrix, r.rows, r.columns) for r in reference.rects(np.zeros(shape), block_size)]
    ours = [(r.matrix, slice(r.r0, r.r1), slice(r.c0, r.c1)) for r in partition(view, block_size)]
    assert ours == theirs


@pytest.mark.parametrize(
    ("shape", "kind", "expected"),
    [
        ((768, 3072), "auto", MatrixView(1, 768, 3072)),
        ((64, 3, 3, 3), "auto", MatrixView(1, 64, 27)),
        ((8, 1024, 4096), "auto", MatrixView(8, 1024, 4096)),
        ((8, 1024, 16), "auto", MatrixView(8, 1024, 16)),
        ((512, 256, 3), "auto", MatrixView(1, 512, 768)),  # a 1-D convolution
        ((768, 48, 128), "auto", MatrixView(1, 768, 6144)),  # one with a long kernel
        ((1024, 16, 64), "auto", MatrixView(1, 1024, 1024)),  # XLNet's projection to 16 heads
        ((512, 1024, 256), "auto", MatrixView(512, 1024, 256)),
        ((8, 1024, 4096), "flatten", MatrixView(1, 8, 1024 * 4096)),
        ((512, 256, 3), "batch", MatrixView(512, 256, 3)),
        ((2, 3, 20, 30), "batch", MatrixView(6, 20, 30)),
        ((2, 3, 20, 30), "auto", MatrixView(1, 2, 1800)),
    ],
)
def test_matrix_view(shape: tuple[int, ...], kind: str, expected: MatrixView) -> None:
    assert matrix_view(shape, kind) == expected


@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (5, 1), (5, 1, 1, 1), (0, 4), (4, 0), (1, 5, 6, 7)])
def test_no_matrix(shape: tuple[int, ...]) -> None:
    assert matrix_view(shape) is None


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1, 1)), ((5,), (1, 5)), ((5, 1), (5, 1)), ((7, 9), (7, 9)), ((1, 197, 768), (197, 768)),
        ((1, 64, 64, 768), (4096, 768)), ((64, 3, 3, 3), (64, 27)), ((8, 1024, 4096), (8192, 4096)),
    ],
)  # fmt: skip
def test_what_has_no_matrix_is_seen_with_the_fewest_rows_and_columns(shape: tuple[int, ...], expected: Any) -> None:
    assert entries_view(shape) == MatrixView(1, *expected)


def test_examples_of_the_docstring() -> None:
    assert partition(MatrixView(1, 768, 3072), 1024) == [Rect(0, 0, 768, c, c + 1024) for c in (0, 1024, 2048)]
    assert len(partition(MatrixView(8, 1024, 4096), 1024)) == 32
    assert partition(MatrixView(1, 1536, 1024), 1024, (1024, 512)) == [
        Rect(0, 0, 1024, 0, 1024),
        Rect(0, 1024, 1536, 0, 1024),
    ]


def test_row_splits_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match=r"row_splits \(3, 4\) add up to 7"):
        partition(MatrixView(1, 8, 8), 4, (3, 4))
