"""Matrices in eigenbases: the first moment in one pass, and sums of squares by row and column.

A first moment m' is stored over the roots of its rows' and columns' eigenvalues.  Arithmetic is in the order of
preconditioners/moments.py, `WhitenedMoment`, so that results differ by the rounding of products and sums alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantize import DENSE_BLOCK
from ..rounding import Settling
from .blockwise import _encode, _load_levels, _scale, _settled, _store_codes, _tile, terms_of

HIGH, WIDE = 16, 128  # of a tile whose rows and columns are summed
CLEARED = 1024  # numbers that a program clears at a time


@triton.jit
def _lerp(m, g, weight):
    """As torch.lerp: exact at both ends."""
    return tl.where(weight < 0.5, m + weight * (g - m), g - (g - m) * (1 - weight))


@triton.jit
def _read(
    codes, scales, table, rows, columns, row, block, j, i, k, inside, needed, length, blocks,
    BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m' as it was before it was stored over `rows` and `columns`."""
    if BITS > 8:
        m = tl.load(codes + row * length + j, mask=needed, other=0.0).to(tl.float32)
    else:
        m = _load_levels(codes, table, row, j, length, BITS, TILE, BLOCK)
        m = m * tl.load(scales + row * blocks + block, mask=block < blocks, other=0.0)[:, None]
    return m * tl.load(rows + i, mask=inside, other=1.0) * tl.load(columns + k, mask=inside, other=1.0)


@triton.jit(do_not_specialize=["multiplier", "addend"])
def _moment(
    g, codes, scales, table, thresholds, rows, columns, new_rows, new_columns, carried, carried_at, bias, u,
    weight, most, ended, multiplier, addend, length, width, blocks,
    CARRIED: tl.constexpr, SETTLES: tl.constexpr,
    BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    j = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, height = j < length, length // width
    i, k = row * height + j // width, row * width + j % width
    needed = inside
    if CARRIED:
        at = tl.load(carried_at + row).to(tl.int64)
        needed = j < tl.where(at < 0, length, 0)
    # m' <- b1 m' + (1 - b1) G'
    m = _read(
        codes, scales, table, rows, columns, row, block, j, i, k, inside, needed, length, blocks, BITS, TILE, BLOCK
    )
    m = _lerp(m, tl.load(g + row * length + j, mask=needed, other=0.0), weight)
    if CARRIED:
        given = j < tl.where(at < 0, 0, length)
        m = tl.where(given, tl.load(carried + at * length + j, mask=given, other=0.0), m)
    m = tl.div_rn(m, tl.load(new_rows + i, mask=inside, other=1.0))
    m = tl.div_rn(m, tl.load(new_columns + k, mask=inside, other=1.0))
    m = tl.clamp(m, -most, most, propagate_nan=tl.PropagateNan.ALL)
    tl.store(u + row * length + j, tl.div_rn(m, tl.load(bias + row) + tl.zeros_like(m)), mask=inside)
    if BITS > 8:
        tl.store(codes + row * length + j, m.to(codes.dtype.element_ty), mask=inside)
    else:
        m = tl.where(inside, m, 0.0)
        scale = _scale(m)
        code = _encode(m, scale, thresholds, BITS)
        if SETTLES:
            gradient = tl.load(g + row * length + j, mask=inside, other=0.0)
            code = _settled(code, m, gradient, scale, table, ended, multiplier, addend, j, BITS)
        _store_codes(codes, code, row, j, length, BITS, TILE, BLOCK)
        tl.store(scales + row * blocks + block, scale, mask=block < blocks)


@triton.jit
def _lerped(
    g, codes, scales, table, rows, columns, m, weight, length, width, blocks,
    BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    j = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, height = j < length, length // width
    i, k = row * height + j // width, row * width + j % width
    x = _read(
        codes, scales, table, rows, columns, row, block, j, i, k, inside, inside, length, blocks, BITS, TILE, BLOCK
    )
    x = _lerp(x, tl.load(g + row * length + j, mask=inside, other=0.0), weight)
    tl.store(m + row * length + j, x, mask=inside)


@triton.jit
def _square_sums(
    x, row_weights, column_weights, of_rows, of_columns, of_all, height, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALL: tl.constexpr, WEIGHTED: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    matrix, strip = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = strip * HIGH + tl.arange(0, HIGH)
    sums = tl.zeros((HIGH,), tl.float32)
    total = tl.zeros((HIGH,), tl.float32)
    for start in range(0, width, WIDE):
        k = start + tl.arange(0, WIDE)
        inside = (i < height)[:, None] & (k < width)[None, :]
        value = tl.load(x + (matrix * height + i[:, None]) * width + k[None, :], mask=inside, other=0.0)
        square = value * value
        if ALL:
            total += tl.sum(square, axis=1)
        if ROWS:
            if WEIGHTED:
                weight = tl.load(column_weights + matrix * width + k, mask=k < width, other=0.0)
                sums += tl.sum(square * weight[None, :], axis=1)
            else:
                sums += tl.sum(square, axis=1)
        if COLUMNS:
            if WEIGHTED:
                square *= tl.load(row_weights + matrix * height + i, mask=i < height, other=0.0)[:, None]
            to = of_columns + (matrix * tl.num_programs(1) + strip) * width + k
            tl.store(to, tl.sum(square, axis=0), mask=k < width)
    if ROWS:
        tl.store(of_rows + matrix * height + i, sums, mask=i < height)
    if ALL:
        tl.store(of_all + matrix * tl.num_programs(1) + strip, tl.sum(total, axis=0))


@triton.jit
def _clear(x, good, length, NUMBERS: tl.constexpr):
    matrix = tl.program_id(0).to(tl.int64)
    if tl.load(good + matrix) == 0:
        for start in range(tl.program_id(1) * NUMBERS, length, tl.num_programs(1) * NUMBERS):
            j = start + tl.arange(0, NUMBERS)
            tl.store(x + matrix * length + j, tl.zeros((NUMBERS,), tl.float32), mask=j < length)


@dataclass(frozen=True)
class Stored:
    """A first moment as it is kept, in place: codes, or float32 or bfloat16 itself."""

    codes: Tensor
    """uint8 (B, bytes), or (B, m, n) as they are."""
    scales: Tensor | None = None
    """float32 (B, blocks), of codes."""
    table: Tensor | None = None
    """As `blockwise.dequantize`'s."""
    thresholds: Tensor | None = None
    """As `blockwise.quantize`'s."""
    bits: int = 32
    """Of a number; 4 and 8 are codes."""
    block: int = DENSE_BLOCK
    """Of numbers that share a scale."""


def lerped(g: Tensor, stored: Stored, scales: tuple[Tensor, Tensor], weight: float) -> Tensor:
    """A first moment as it is, brought up to date: lerp(m rows columns, g, weight).

    Args:
        g: float32 (B, m, n).
        stored: m, left as it is.
        scales: what it has been divided by, float32 (B, m, 1) and (B, 1, n).
        weight: of g.

    Returns:
        float32 (B, m, n).
    """
    g = g.contiguous()
    m = torch.empty_like(g)
    length, width = g[0].numel(), g.shape[-1]
    blocks = triton.cdiv(length, stored.block)
    tile = _tile(stored.block, blocks)
    if m.numel():
        with torch.cuda.device_of(g):
            _lerped[len(g), triton.cdiv(blocks, tile)](
                g, stored.codes, stored.scales, stored.table, *_vectors(scales), m, weight, length, width, blocks,
                BITS=stored.bits, TILE=tile, BLOCK=stored.block,
            )  # fmt: skip
    return m


@dataclass(frozen=True)
class Carried:
    """Blocks of a stack whose first moment is given as it is: `lerped`'s, rotated."""

    m: Tensor
    """float32 (b, m, n)."""
    at: Tensor
    """int32 (B,), where in `m` each block's is; below 0: nowhere."""


def moment(
    g: Tensor, stored: Stored, scales: tuple[Tensor, Tensor], new_scales: tuple[Tensor, Tensor], bias: Tensor,
    weight: float, most: float, carried: Carried | None = None, settling: Settling | None = None,
) -> Tensor:  # fmt: skip
    """A first moment brought up to date in one pass: w = lerp(m rows columns, g, weight) / new rows / new columns.

    Args:
        g: float32 (B, m, n).
        stored: m; w in the end.
        scales: what m has been divided by, float32 (B, m, 1) and (B, 1, n).
        new_scales: what w is divided by.
        bias: float32, B numbers.
        weight: of g.
        most: that an entry of w may have.
        carried: in the place of the lerp, of some blocks.
        settling: of codes of 4 bits, g is their gradient; None: to the nearest level.

    Returns:
        w / bias, before w is stored: float32 (B, m, n).
    """
    g = g.contiguous()
    u = torch.empty_like(g)
    length, width = g[0].numel() if len(g) else 0, g.shape[-1]
    blocks = triton.cdiv(length, stored.block)
    tile = _tile(stored.block, blocks)
    given = (None, None) if carried is None else (carried.m.contiguous(), carried.at)
    if u.numel():
        with torch.cuda.device_of(g):
            _moment[len(g), triton.cdiv(blocks, tile)](
                g, stored.codes, stored.scales, stored.table, stored.thresholds, *_vectors(scales),
                *_vectors(new_scales), *given, bias.reshape(-1).contiguous(), u,
                weight, most, *terms_of(settling), length, width, blocks,
                CARRIED=carried is not None, SETTLES=settling is not None and stored.bits == 4,
                BITS=stored.bits, TILE=tile, BLOCK=stored.block,
            )  # fmt: skip
    return u


@dataclass(frozen=True)
class Sums:
    """Of the squares of matrices, float32."""

    rows: Tensor | None
    """(B, m), over each row."""
    columns: Tensor | None
    """(B, n), over each column."""
    all: Tensor | None
    """(B,), without weights."""


def square_sums(
    x: Tensor, row_weights: Tensor | None = None, column_weights: Tensor | None = None, *,
    rows: bool = False, columns: bool = False, whole: bool = False,
) -> Sums:  # fmt: skip
    """Sums of squares in one pass: sum_j x_ij^2 column_weights_j, sum_i x_ij^2 row_weights_i.

    Args:
        x: float32 (B, m, n).
        row_weights: float32 (B, m), contiguous; none if the other one is None.
        column_weights: float32 (B, n), contiguous.
        rows, columns, whole: which sums.
    """
    x = x.contiguous()
    count, height, width = x.shape
    strips = triton.cdiv(height, HIGH)
    weighted = row_weights is not None or column_weights is not None
    of_rows = x.new_empty(count, height) if rows else None
    of_columns = x.new_empty(count, strips, width) if columns else None
    of_all = x.new_empty(count, strips) if whole else None
    if x.numel():
        with torch.cuda.device_of(x):
            _square_sums[count, strips](
                x, row_weights if columns else None, column_weights if rows else None, of_rows, of_columns, of_all,
                height, width, ROWS=rows, COLUMNS=columns, ALL=whole, WEIGHTED=weighted, HIGH=HIGH, WIDE=WIDE,
            )  # fmt: skip
    return Sums(of_rows, None if of_columns is None else of_columns.sum(1), None if of_all is None else of_all.sum(1))


def clear(x: Tensor, good: Tensor) -> None:
    """Zeros in the place of the blocks that are not good; the others are not even read.

    Args:
        x: float32 (B, m, n), contiguous; changed in place.
        good: bool (B,).
    """
    length = x[0].numel() if len(x) else 0
    if length:
        with torch.cuda.device_of(x):
            _clear[len(x), min(triton.cdiv(length, CLEARED), 64)](x, good, length, NUMBERS=CLEARED)


def _vectors(scales: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    rows, columns = scales
    return rows.contiguous(), columns.contiguous()
