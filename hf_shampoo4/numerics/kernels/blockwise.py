"""Blocks of consecutive numbers that share a scale: quantise, dequantise, and an AdamW step on quantised moments.

A program works on TILE blocks of one row, (TILE, BLOCK) numbers; the last block of a row may be shorter.  Quantising
and dequantising do the same roundings in the same order as quantize.py, so that the results are equal bit for bit;
division is the correctly rounded one for that reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rounding import Settling

FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)
NUMBERS = 2048  # of a program's tile
LARGEST_BLOCK = 8192  # more would not fit a program's registers


@triton.jit
def _scale(value):
    """The largest magnitude of each block: finite, and 0 where there is a NaN."""
    is_nan = value != value
    largest = tl.max(tl.where(is_nan, 0.0, tl.abs(value)), axis=1)
    return tl.where(tl.max(is_nan.to(tl.int32), axis=1) > 0, 0.0, tl.minimum(largest, FLOAT32_MAX))


@triton.jit
def _encode(value, scale, thresholds, BITS: tl.constexpr):
    """How many thresholds lie below each normalised number, by bisection: int32, as `value`."""
    normal = tl.div_rn(value, tl.where(scale > 0, scale, 1.0)[:, None] + tl.zeros_like(value))
    code = tl.zeros(value.shape, tl.int32)
    for bit in tl.static_range(BITS):
        step = 1 << (BITS - 1 - bit)
        passed = normal > tl.load(thresholds + code + (step - 1))
        code += tl.where(passed, step, 0)
    return code


@triton.jit
def _settled(code, value, gradient, scale, table, ended, multiplier, addend, j, BITS: tl.constexpr):
    """As `quantize.encode_settling`, from the codes of the nearest levels."""
    normal = tl.div_rn(value, tl.where(scale > 0, scale, 1.0)[:, None] + tl.zeros_like(value))
    lower = tl.where(normal < tl.load(table + code), tl.maximum(code - 1, 0), tl.minimum(code, (1 << BITS) - 2))
    a = tl.load(table + lower)
    bits = (j.to(tl.uint32) * multiplier.to(tl.uint32) + addend.to(tl.uint32)) >> 1
    uniform = (bits.to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    least = a + (tl.load(table + lower + 1) - a) * uniform
    has_ended = tl.abs(gradient) <= tl.abs(value) * ended
    return tl.where(has_ended, lower + (normal > least).to(tl.int32), code)


@triton.jit
def _store_codes(codes, code, row, j, length, BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    code = tl.where(j < length, code, 0)
    if BITS == 8:
        tl.store(codes + row * length + j, code.to(tl.uint8), mask=j < length)
    else:
        high, low = tl.split(tl.reshape(code, (TILE, BLOCK // 2, 2)))
        first, _ = tl.split(tl.reshape(j, (TILE, BLOCK // 2, 2)))
        bytes_a_row = (length + 1) // 2
        tl.store(codes + row * bytes_a_row + first // 2, ((high << 4) | low).to(tl.uint8), mask=first < length)


@triton.jit
def _load_levels(codes, table, row, j, length, BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Levels of the codes of a tile, float32 (TILE, BLOCK)."""
    if BITS == 8:
        levels = tl.load(table + tl.load(codes + row * length + j, mask=j < length, other=0).to(tl.int32))
    else:
        first, _ = tl.split(tl.reshape(j, (TILE, BLOCK // 2, 2)))
        bytes_a_row = (length + 1) // 2
        byte = tl.load(codes + row * bytes_a_row + first // 2, mask=first < length, other=0).to(tl.int32)
        levels = tl.reshape(tl.join(tl.load(table + (byte >> 4)), tl.load(table + (byte & 15))), (TILE, BLOCK))
    return levels


@triton.jit(do_not_specialize=["multiplier", "addend"])
def _quantize(
    x, g, codes, scales, table, thresholds, ended, multiplier, addend, length, blocks,
    SETTLES: tl.constexpr, LEAST_SQUARES: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    j = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + row * length + j, mask=j < length, other=0.0).to(tl.float32)
    scale = _scale(value)
    code = _encode(value, scale, thresholds, BITS)
    if SETTLES:
        gradient = tl.load(g + row * length + j, mask=j < length, other=0.0)
        code = _settled(code, value, gradient, scale, table, ended, multiplier, addend, j, BITS)
    _store_codes(codes, code, row, j, length, BITS, TILE, BLOCK)
    if LEAST_SQUARES:
        # scale <- scale <x, Q(x)> / |Q(x)|^2, of the normalised x
        level = tl.where(j < length, tl.load(table + code), 0.0)
        agreement = tl.sum(value / tl.where(scale > 0, scale, 1.0)[:, None] * level, axis=1)
        factor = agreement / tl.maximum(tl.sum(level * level, axis=1), 1e-12)
        scale *= tl.where(factor < float("inf"), factor, 1.0)  # a NaN is not less
    tl.store(scales + row * blocks + block, scale, mask=block < blocks)


@triton.jit
def _dequantize(
    codes, scales, largest, x, table, length, blocks,
    SHARES: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    j = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scale = tl.load(scales + row * blocks + block, mask=block < blocks, other=0).to(tl.float32)
    if SHARES:  # roots of shares of the largest, in 255ths
        scale = tl.div_rn(scale, tl.full((TILE,), 255.0, tl.float32))
        scale = scale * scale * tl.load(largest + row)
    levels = _load_levels(codes, table, row, j, length, BITS, TILE, BLOCK)
    tl.store(x + row * length + j, levels * scale[:, None], mask=j < length)


@triton.jit(do_not_specialize=["multiplier", "addend"])
def _adamw(
    g, u, codes1, scales1, codes2, scales2, table1, thresholds1, table2, thresholds2, bias1, bias2,
    beta1, beta2, weight1, weight2, eps, ended, multiplier, addend, length, blocks,
    SETTLES: tl.constexpr, EDEN: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    j = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    place, whole, inside = row * blocks + block, block < blocks, j < length
    gradient = tl.load(g + row * length + j, mask=inside, other=0.0)
    # m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    m = _load_levels(codes1, table1, row, j, length, BITS, TILE, BLOCK)
    m = m * tl.load(scales1 + place, mask=whole, other=0.0)[:, None] * beta1 + weight1 * gradient
    v = _load_levels(codes2, table2, row, j, length, BITS, TILE, BLOCK)
    v = v * tl.load(scales2 + place, mask=whole, other=0.0)[:, None] * beta2 + weight2 * gradient * gradient
    m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
    # u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    root = tl.sqrt(v / tl.load(bias2 + row)) + eps
    tl.store(u + row * length + j, m / tl.load(bias1 + row) / root, mask=inside)
    scale = _scale(m)
    code = _encode(m, scale, thresholds1, BITS)
    if SETTLES:
        code = _settled(code, m, gradient, scale, table1, ended, multiplier, addend, j, BITS)
    _store_codes(codes1, code, row, j, length, BITS, TILE, BLOCK)
    tl.store(scales1 + place, scale, mask=whole)
    scale = _scale(v)
    code = _encode(v, scale, thresholds2, BITS)
    _store_codes(codes2, code, row, j, length, BITS, TILE, BLOCK)
    if EDEN:
        # scale <- scale |x|^2 / <x, Q(x)>, of the normalised x
        x = v / tl.where(scale > 0, scale, 1.0)[:, None]
        agreement = tl.sum(tl.where(inside, x * tl.load(table2 + code), 0.0), axis=1)
        factor = tl.sum(x * x, axis=1) / tl.maximum(agreement, 1e-12)
        scale *= tl.where(factor < float("inf"), factor, 1.0)
    tl.store(scales2 + place, scale, mask=whole)


def quantize(
    x: Tensor, table: Tensor, thresholds: Tensor, bits: int, block: int, least_squares: bool = False,
    settling: Settling | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `quantize.quantize_block`, but not stochastically; fitted scales up to the rounding of their sums.

    Args:
        x: (rows, L), float32, float16 or bfloat16.
        table: float32, the levels, 2^bits of them.
        thresholds: float32, ascending, 2^bits - 1 of them (padded with infinity): a number has code j or more if it is
            greater than thresholds[j - 1].
        block: a power of two, at least 2.

    Returns:
        codes: uint8 (rows, ceil(L / 2)) for 4 bits or (rows, L) for 8.
        scales: float32 (rows, ceil(L / block)).
    """
    x = x.contiguous()
    rows, length = x.shape
    blocks = -(-length // block)
    codes = torch.empty((rows, length if bits == 8 else (length + 1) // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((rows, blocks), dtype=torch.float32, device=x.device)
    tile = _tile(block, blocks)
    with torch.cuda.device_of(x):
        _quantize[rows, triton.cdiv(blocks, tile)](
            x, None if settling is None else settling.gradient.contiguous(), codes, scales, table, thresholds,
            *terms_of(settling), length, blocks, SETTLES=settling is not None,
            LEAST_SQUARES=least_squares, BITS=bits, TILE=tile, BLOCK=block,
        )  # fmt: skip
    return codes, scales


def dequantize(
    codes: Tensor, scales: Tensor, table: Tensor, bits: int, block: int, length: int, largest: Tensor | None = None
) -> Tensor:
    """Inverse of `quantize`: float32 (rows, length).

    Args:
        table: float32, the levels, 2^bits of them.
        largest: float32 (rows,): scales are uint8, as `storage.DoubleQuantized` has them.
    """
    rows, blocks = scales.shape
    x = torch.empty((rows, length), dtype=torch.float32, device=codes.device)
    tile = _tile(block, blocks)
    with torch.cuda.device_of(x):
        _dequantize[rows, triton.cdiv(blocks, tile)](
            codes.contiguous(), scales.contiguous(), None if largest is None else largest.contiguous(), x, table,
            length, blocks, SHARES=largest is not None, BITS=bits, TILE=tile, BLOCK=block,
        )  # fmt: skip
    return x


@dataclass(frozen=True)
class Codes:
    """A quantised moment: its buffers, which `adamw` writes in place, and the levels of its codebook."""

    codes: Tensor
    """uint8 (rows, ceil(L / 2)) for 4 bits or (rows, L) for 8."""
    scales: Tensor
    """float32 (rows, ceil(L / block))."""
    table: Tensor
    """As `dequantize`'s."""
    thresholds: Tensor
    """As `quantize`'s."""


def terms_of(settling: Settling | None) -> tuple[float, int, int]:
    """What kernels are told of it beside the gradient."""
    return (0.0, 0, 0) if settling is None else (settling.share, *settling.hashing)


def adamw(
    g: Tensor, first: Codes, second: Codes, biases: tuple[Tensor, Tensor], betas: tuple[float, float], eps: float,
    bits: int, block: int, eden: bool, settling: Settling | None = None,
) -> Tensor:  # fmt: skip
    """`moments.Adam.direction` in one pass: moments are decoded, brought up to date, used and encoded again.

    Equal to the reference up to the rounding of its products and sums, hence up to a code where that decides.

    Args:
        g: float32 (rows, L).
        first, second: the moments; changed in place.
        biases: 1 - beta^t, float32 (rows,) each.
        eden: correct the second moment's scales, as `quantize.quantize_block`.
        settling: of the first moment, g is its gradient; None: to the nearest level.

    Returns:
        The direction, float32 (rows, L).
    """
    g = g.contiguous()
    u = torch.empty_like(g)
    (rows, length), blocks = g.shape, first.scales.shape[1]
    tile = _tile(block, blocks)
    with torch.cuda.device_of(g):
        _adamw[rows, triton.cdiv(blocks, tile)](
            g, u, first.codes, first.scales, second.codes, second.scales, first.table, first.thresholds, second.table,
            second.thresholds, *biases, *betas, 1 - betas[0], 1 - betas[1], eps, *terms_of(settling), length, blocks,
            SETTLES=settling is not None, EDEN=eden, BITS=bits, TILE=tile, BLOCK=block,
        )  # fmt: skip
    return u


def can_run(block: int) -> bool:
    """Whether the kernels take blocks of this size: a tile's sides are powers of two, and a byte lies in one block."""
    return 2 <= block <= LARGEST_BLOCK and math.log2(block).is_integer()


@cache
def _tile(block: int, blocks: int) -> int:
    """Blocks that a program works on."""
    return max(1, min(NUMBERS // block, triton.next_power_of_2(blocks)))
