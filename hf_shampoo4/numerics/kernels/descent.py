"""p <- (1 - lr wd) p - lr u on many tensors of one shape in one pass, rounded to nearest or stochastically."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rounding import GOLDEN, OF_STEP, as_int32

NUMBERS = 1024  # that a program changes

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Of the tensors that are changed."""


@triton.jit
def _mix(x):
    """As rounding.py's, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["seed_term", "step_term"])
def _descend(
    chunks, targets, updates, offsets, seeds, counts, keep, lr, seed_term, step_term, rows, columns, target_stride,
    update_stride, row, column, width,
    COUNTED: tl.constexpr, STOCHASTIC: tl.constexpr, DTYPE: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    piece, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks  # the grid's other axes end at 65,535
    j = chunk.to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    i, k = j // columns, j % columns
    inside = i < rows
    if COUNTED:
        inside = i < tl.where(tl.load(counts), rows, 0)
    target = tl.load(targets + piece).to(tl.pointer_type(DTYPE)) + i * target_stride + k
    update = updates + tl.load(offsets + piece) + i * update_stride + k
    exact = tl.load(target, mask=inside, other=0.0).to(tl.float32) * keep
    exact -= lr * tl.load(update, mask=inside, other=0.0).to(tl.float32)
    if STOCHASTIC:
        start = _mix(tl.load(seeds + piece).to(tl.uint32, bitcast=True) + seed_term.to(tl.uint32))
        start = _mix(start + step_term.to(tl.uint32))
        position = ((row + i) * width + column + k).to(tl.uint32)
        bits = exact.to(tl.uint32, bitcast=True) + (_mix(_mix(position) + start) & 0xFFFF)
        exact = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(target, exact.to(DTYPE), mask=inside)


def descend(
    targets: Tensor, dtype: torch.dtype, updates: Tensor, offsets: Tensor, shape: tuple[int, int],
    strides: tuple[int, int], keep: float, lr: float, counts: Tensor | None = None,
    noise: tuple[Tensor, int, int] | None = None, at: tuple[int, int, int] = (0, 0, 0),
) -> None:  # fmt: skip
    """p <- keep p - lr u for pieces (rows, columns) of tensors, in float32; whose columns have a stride of 1.

    Args:
        targets: int64 (pieces,), where in memory each p begins.
        dtype: of p, one of `DTYPES`.
        updates: the memory of all u, float32 or bfloat16.
        offsets: int64 (pieces,), where in `updates` each u begins.
        shape: rows and columns of each.
        strides: of the rows of p and of u.
        keep: what p is multiplied by.
        lr: what u is multiplied by.
        counts: bool of no dimension; false: nothing is changed.  None: true.
        noise: of stochastic rounding to bfloat16: `seed_offsets` int32 (pieces,), step and seed as `noise_at` has them.
        at: of a piece in its block: row and column of the first entry, and the block's width.
    """
    seeds, step, seed = noise if noise is not None else (None, 0, 0)
    (rows, columns), pieces = shape, len(targets)
    if rows * columns * pieces:
        with torch.cuda.device_of(updates):
            chunks = triton.cdiv(rows * columns, NUMBERS)
            _descend[(chunks * pieces,)](
                chunks, targets, updates, offsets, seeds, counts, keep, lr, as_int32(seed * GOLDEN),
                as_int32(step * OF_STEP), rows, columns, *strides, *at, COUNTED=counts is not None,
                STOCHASTIC=noise is not None, DTYPE=DTYPES[dtype], NUMBERS=NUMBERS,
            )  # fmt: skip


def moved(operands: Mapping[str, Any]) -> int:
    """Bytes that `_descend` reads and writes through its table of pointers and elsewhere."""
    itemsize: int = operands["DTYPE"].primitive_bitwidth // 8
    numbers = len(operands["targets"]) * operands["rows"] * operands["columns"]
    return numbers * (2 * itemsize + operands["updates"].element_size())
