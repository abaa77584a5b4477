"""Reference quantiser: normalise, round to the nearest level, pack; and back.

Numbers are divided by a scale that they share (a block's or a row and column's largest magnitude), rounded to the
nearest level of a codebook (a tie goes to the lower level), and stored as codes: two to a byte for 4 bits, the first
in the high half.  Arithmetic is float32 whatever the input.

Special values, on the way in:
* a block of zeros has scale 0 and decodes to zeros, also with a codebook that has no zero;
* denormals are kept (numbers are divided by the scale, never multiplied by its reciprocal, which would overflow);
* +-Inf becomes +-the largest finite float32, which then is the scale of its block;
* a block that holds a NaN decodes to zeros.  The optimizer never stores a non-finite number: see `optimizer.py`.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .codebooks import levels
from .rounding import Stochastic

FLOAT32_MAX = torch.finfo(torch.float32).max

CHUNK = 1 << 18  # numbers that are encoded at a time: bounds the memory of indices, and keeps it in a CPU's cache


def quantize_block(
    x: Tensor, codebook: str, bits: int, block: int, rounding: Stochastic | None = None, eden: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise rows of numbers, `block` consecutive ones sharing a scale.

    Args:
        x: (..., L), any float dtype.  The last block of a row may be shorter.
        rounding: how to choose between the two neighbouring levels; the nearer without it.
        eden: then multiply each scale by |x|^2 / <x, Q(x)> of its block, so that <x, Q(x)> = |x|^2 (2610.12444).

    Returns:
        codes: uint8, (..., ceil(L / 2)) for 4 bits or (..., L) for 8.
        scales: float32, (..., ceil(L / block)).
    """
    x = x.float()
    scales = _safe_scale(_block_absmax(x, block))
    divisor = _spread(_divisor(scales), block, x.shape[-1])
    x = x / divisor
    codes = encode(x, codebook, bits) if rounding is None else encode_between(x, codebook, bits, rounding, divisor)
    if eden:
        scales = scales * _eden(x, codes, codebook, bits, block)
    return pack(codes, bits), scales


def dequantize_block(codes: Tensor, scales: Tensor, codebook: str, bits: int, block: int, length: int) -> Tensor:
    """Inverse of `quantize_block`: float32 (..., length)."""
    return decode(codes, codebook, bits, length).mul_(_spread(scales, block, length))


def quantize_rank1(x: Tensor, codebook: str, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise matrices, entry (i, j) scaled by the smaller of row i's and column j's absmax (2309.01507, 4.2).

    Args:
        x: (..., m, n), any float dtype.

    Returns:
        codes: uint8, (..., ceil(m n / 2)) for 4 bits or (..., m n) for 8, row-major.
        rows: float32, (..., m).
        columns: float32, (..., n).
    """
    x = x.float()
    magnitude = x.abs()
    rows, columns = _safe_scale(magnitude.amax(-1)), _safe_scale(magnitude.amax(-2))
    divisor = torch.minimum(_divisor(rows).unsqueeze(-1), _divisor(columns).unsqueeze(-2))
    return pack(encode(x / divisor, codebook, bits).flatten(-2), bits), rows, columns


def dequantize_rank1(codes: Tensor, rows: Tensor, columns: Tensor, codebook: str, bits: int) -> Tensor:
    """Inverse of `quantize_rank1`: float32 (..., m, n)."""
    m, n = rows.shape[-1], columns.shape[-1]
    x = decode(codes, codebook, bits, m * n).unflatten(-1, (m, n))
    return x.mul_(torch.minimum(rows.unsqueeze(-1), columns.unsqueeze(-2)))


def encode(x: Tensor, codebook: str, bits: int) -> Tensor:
    """Index of the level nearest to each normalised number: uint8 of x's shape; a tie goes to the lower level."""
    return _count_below(x, *_cells(codebook, bits, False, x.device))


def encode_between(x: Tensor, codebook: str, bits: int, rounding: Stochastic, scale: Tensor) -> Tensor:
    """Index of one of the two levels around each normalised number, chosen by `rounding`: uint8 of x's shape.

    A number that is a level stays; one beyond the last level gets that level, so it is not right on average.

    Args:
        scale: what x was divided by, of x's shape.
    """
    lower = _count_below(x, *_cells(codebook, bits, True, x.device))
    table, index = _table(codebook, bits, x.device), lower.flatten().int()
    a = torch.index_select(table, 0, index).view(x.shape)
    b = torch.index_select(table, 0, index + 1).view(x.shape)
    upper = (x > a) & (rounding.uniform >= rounding.odds_of_lower(x.clamp(a, b), a, b, scale))
    return lower.add_(upper)


def decode(codes: Tensor, codebook: str, bits: int, length: int) -> Tensor:
    """Levels of packed codes: float32 (..., length)."""
    if bits == 8:
        return torch.index_select(_table(codebook, 8, codes.device), 0, codes.flatten().int()).view(codes.shape)
    # One look-up per byte: its two float32 levels lie side by side and travel as one int64.
    pairs = torch.index_select(_pair_table(codebook, codes.device), 0, codes.flatten().int())
    return pairs.view(torch.float32).view(*codes.shape[:-1], 2 * codes.shape[-1])[..., :length]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Two 4-bit codes a byte along the last dimension, the first in the high half; 8-bit codes as they are."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


def packed_length(length: int, bits: int) -> int:
    """Bytes that `length` codes take."""
    return length if bits == 8 else (length + 1) // 2


def _block_absmax(x: Tensor, block: int) -> Tensor:
    whole = x.shape[-1] // block * block
    parts = [x[..., :whole].unflatten(-1, (-1, block)).abs().amax(-1)] if whole else []
    if whole < x.shape[-1]:
        parts.append(x[..., whole:].abs().amax(-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _safe_scale(absmax: Tensor) -> Tensor:
    return torch.nan_to_num(absmax, nan=0.0, posinf=FLOAT32_MAX)


def _spread(scales: Tensor, block: int, length: int) -> Tensor:
    """A scale for each number: (..., blocks) -> (..., length)."""
    return scales.repeat_interleave(block, dim=-1)[..., :length]


def _divisor(scale: Tensor) -> Tensor:
    """The scale, and 1 where it is 0: everything there is 0."""
    return torch.where(scale > 0, scale, 1.0)


def _eden(x: Tensor, codes: Tensor, codebook: str, bits: int, block: int) -> Tensor:
    """|x|^2 / <x, Q(x)> of each block of normalised numbers: float32 (..., blocks)."""
    decoded = torch.index_select(_table(codebook, bits, x.device), 0, codes.flatten().int()).view(x.shape)
    return _block_sum(x * x, block) / _block_sum(x * decoded, block).clamp_(min=1e-12)


def _block_sum(x: Tensor, block: int) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % block))
    return padded.unflatten(-1, (-1, block)).sum(-1)


def _count_below(x: Tensor, base: Tensor, next_threshold: Tensor) -> Tensor:
    """How many of the thresholds lie below each x: uint8 of x's shape.

    The upper 16 bits of a float32 name a cell of numbers; a table says how many thresholds lie below the whole cell and
    which one, if any, cuts it.  Two look-ups and one comparison beat 15 comparisons by 3x on a CPU.
    """
    flat = x.float().contiguous().view(-1)
    counts = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    for part, out in zip(flat.split(CHUNK), counts.split(CHUNK), strict=True):
        cell = (part.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        below = torch.index_select(base, 0, cell)
        out.copy_(below.add_(part > torch.index_select(next_threshold, 0, cell)))
    return counts.view(x.shape)


@cache
def _table(codebook: str, bits: int, device: torch.device) -> Tensor:
    return torch.tensor(levels(codebook, bits), dtype=torch.float32, device=device)


@cache
def _thresholds(codebook: str, bits: int, floor: bool) -> Tensor:
    """float32 (n,), ascending: x has code j or more if it is greater than thresholds[j - 1].

    The middles between levels; with `floor` just below the levels themselves, but for the first and the last.
    """
    exact = torch.tensor(levels(codebook, bits), dtype=torch.float64)
    if floor:
        return torch.nextafter(exact[1:-1].float(), torch.tensor(-math.inf))
    return ((exact[1:] + exact[:-1]) / 2).float()


@cache
def _cells(codebook: str, bits: int, floor: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """For `_count_below`, int32 and float32 (65536,): thresholds below a cell; the next one, which may cut the cell."""
    thresholds = _thresholds(codebook, bits, floor)
    cell = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.stack([cell, cell | 0xFFFF]).view(torch.float32)
    ends[1] = torch.where(ends[0].isinf(), ends[0], ends[1])  # the cell of an infinity holds NaNs too
    below = torch.searchsorted(thresholds, ends.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf))
    base = below.amin(0)
    assert int((below.amax(0) - base).max()) <= 1, f"two thresholds of {codebook} ({bits} bits) in one cell"
    following = torch.cat([thresholds, torch.tensor([math.inf])])[base]
    return base.int().to(device), following.to(device)


@cache
def _pair_table(codebook: str, device: torch.device) -> Tensor:
    """int64 (256,): the two float32 levels of every byte."""
    table = torch.tensor(levels(codebook, 4), dtype=torch.float32)
    table = torch.nn.functional.pad(table, (0, 16 - len(table)))  # dynamic0 leaves code 15 unused
    byte = torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=-1).view(torch.int64).squeeze(-1).to(device)
