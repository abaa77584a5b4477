"""Stochastic rounding whose noise is a function of (seed, step, block, position): a resume repeats it exactly,
and so does any other number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def noise_bits(salts: Tensor, step: int, seed: int, count: int) -> Tensor:
    """Uniform 32-bit noise.

    Args:
        salts: int32 (B,), one number per block that is the same in every run.

    Returns:
        int32 (B, count).
    """
    start = _mix(salts.to(torch.int32) + _as_int32(seed * 0x9E3779B9))
    start = _mix(start + _as_int32(step * 0x85EBCA6B))
    position = torch.arange(count, dtype=torch.int32, device=salts.device)
    return _mix(_mix(position) + start.unsqueeze(1))


def to_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to one of the two neighbouring bfloat16 numbers, the nearer with the larger probability.

    Args:
        x: float32, any shape; finite.
        noise: int32 of x's shape, uniform.
    """
    bits = x.contiguous().view(torch.int32) + (noise & 0xFFFF)
    return (bits & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers with good avalanche (Wellons' lowbias32)."""
    x = (x ^ _shift(x, 16)) * _as_int32(0x7FEB352D)
    x = (x ^ _shift(x, 15)) * _as_int32(0x846CA68B)
    return x ^ _shift(x, 16)


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical right shift of int32."""
    return (x >> n) & ((1 << (32 - n)) - 1)


def _as_int32(n: int) -> int:
    n &= 0xFFFFFFFF
    return n - (1 << 32) if n >= 1 << 31 else n
