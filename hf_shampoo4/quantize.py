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

from functools import cache

import torch
from torch import Tensor

from .codebooks import levels

FLOAT32_MAX = torch.finfo(torch.float32).max


def quantize_block(x: Tensor, codebook: str, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Quantise rows of numbers, `block` consecutive ones sharing a scale.

    Args:
        x: (..., L), any float dtype.  The last block of a row may be shorter.

    Returns:
        codes: uint8, (..., ceil(L / 2)) for 4 bits or (..., L) for 8.
        scales: float32, (..., ceil(L / block)).
    """
    x = x.float()
    scales = _safe_scale(_block_absmax(x, block))
    return pack(encode(_ratio(x, _spread(scales, block, x.shape[-1])), codebook, bits), bits), scales


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
    scale = torch.minimum(rows.unsqueeze(-1), columns.unsqueeze(-2))
    return pack(encode(_ratio(x, scale), codebook, bits).flatten(-2), bits), rows, columns


def dequantize_rank1(codes: Tensor, rows: Tensor, columns: Tensor, codebook: str, bits: int) -> Tensor:
    """Inverse of `quantize_rank1`: float32 (..., m, n)."""
    m, n = rows.shape[-1], columns.shape[-1]
    x = decode(codes, codebook, bits, m * n).unflatten(-1, (m, n))
    return x.mul_(torch.minimum(rows.unsqueeze(-1), columns.unsqueeze(-2)))


def encode(x: Tensor, codebook: str, bits: int) -> Tensor:
    """Index of the level nearest to each normalised number: uint8 of x's shape; a tie goes to the lower level."""
    if bits == 8:
        return torch.bucketize(x.contiguous(), _middles(codebook, 8).to(x.device)).to(torch.uint8)
    # 15 comparisons beat a binary search by 2.4x on a CPU: they vectorise.
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for middle in _middles(codebook, 4).tolist():
        codes += x > middle
    return codes


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


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.where(scale > 0, scale, 1.0)


@cache
def _table(codebook: str, bits: int, device: torch.device) -> Tensor:
    return torch.tensor(levels(codebook, bits), dtype=torch.float32, device=device)


@cache
def _middles(codebook: str, bits: int) -> Tensor:
    """float32 on the CPU: the comparisons take them as numbers, which waits for no device."""
    exact = torch.tensor(levels(codebook, bits), dtype=torch.float64)
    return ((exact[1:] + exact[:-1]) / 2).to(torch.float32)


@cache
def _pair_table(codebook: str, device: torch.device) -> Tensor:
    """int64 (256,): the two float32 levels of every byte."""
    table = torch.tensor(levels(codebook, 4), dtype=torch.float32)
    table = torch.nn.functional.pad(table, (0, 16 - len(table)))  # dynamic0 leaves code 15 unused
    byte = torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=-1).view(torch.int64).squeeze(-1).to(device)
