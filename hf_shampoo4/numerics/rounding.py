"""Stochastic rounding, of all numbers or of those that would not move otherwise.

The noise is a function of (seed, step, block, position): a resume repeats it exactly, and so does any other number of
ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio; a seed is multiplied by it, as a step and a stream by theirs
OF_STEP, OF_STREAM = 0x85EBCA6B, 0xC2B2AE35


def noise_bits(seed_offsets: Tensor, step: int, seed: int, count: int, stream: int = 0) -> Tensor:
    """Uniform 32-bit noise.

    Args:
        seed_offsets: int32 (B,), one number per block that is the same in every run.
        stream: another one gives other noise (0: a parameter's write-back).

    Returns:
        int32 (B, count).
    """
    return noise_at(
        seed_offsets, step, seed, torch.arange(count, dtype=torch.int32, device=seed_offsets.device), stream
    )


def noise_at(seed_offsets: Tensor, step: int, seed: int, position: Tensor, stream: int = 0) -> Tensor:
    """`noise_bits` at some positions of each block only: int32 (count,) -> int32 (B, count)."""
    start = _mix(seed_offsets.to(torch.int32) + as_int32(seed * GOLDEN))
    start = _mix(start + as_int32(step * OF_STEP))
    start = _mix(start + as_int32(stream * OF_STREAM)) if stream else start
    return _mix(_mix(position) + start.unsqueeze(1))


@dataclass(frozen=True)
class Noise:
    """The noise of one step for a stack of blocks; each tensor of a block draws from a stream of its own."""

    seed_offsets: Tensor
    """int32 (B,), as in `noise_bits`."""
    step: int
    seed: int

    def bits(self, stream: int, count: int) -> Tensor:
        """int32 (B, count), uniform."""
        return noise_bits(self.seed_offsets, self.step, self.seed, count, stream)

    def uniform(self, stream: int, count: int) -> Tensor:
        """float32 (B, count), uniform on 2^31 points inside (0, 1), which float32 tells apart near 0 (small odds)."""
        return _uniform(self.bits(stream, count))

    def multiply_shift(self, stream: int) -> tuple[int, int]:
        """An odd multiplier and an addend, int32, of a hash of positions that is the same for all blocks."""
        x = _mixed(_mixed(_mixed(self.seed * GOLDEN) + self.step * GOLDEN) + stream * GOLDEN)
        return as_int32(x | 1), as_int32(_mixed(x + GOLDEN))


@dataclass(frozen=True)
class Stochastic:
    """Take the lower neighbour a < x < b with odds (b - x) / (b - a): the rounded x is right on average."""

    uniform: Tensor
    """float32, of the shape of what is rounded."""

    def part(self, rows: slice, columns: slice) -> Stochastic:
        """What rounds this part of (..., L), seen as rows of L."""
        return Stochastic(_as_rows(self.uniform)[rows, columns])

    def odds_of_lower(self, x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """All float32 and of one shape; x, a and b are divided by `scale`."""
        return (b - x) / (b - a)


@dataclass(frozen=True)
class PreconditionerSpace(Stochastic):
    """ZIP-SR (2610.12444): h(v) = 1 / (sqrt(v / bias) + eps) is right on average, not v.

    Odds of the lower neighbour: (h(x) - h(b)) / (h(a) - h(b)).  Zero is a level: its odds are of the order of eps.
    """

    bias: Tensor
    """1 - beta2^t, broadcastable to what is rounded."""
    eps: float

    def part(self, rows: slice, columns: slice) -> PreconditionerSpace:
        """As `Stochastic.part`."""
        bias = _as_rows(self.bias.expand_as(self.uniform))[rows, columns]
        return PreconditionerSpace(_as_rows(self.uniform)[rows, columns], bias, self.eps)

    def odds_of_lower(self, x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """As `Stochastic.odds_of_lower`; x, a and b are not negative."""
        # multiplied out, with e = eps sqrt(bias / scale): differences of 1 / eps would lose every digit
        e = (self.bias / scale).sqrt_().mul_(self.eps)
        x, a, b = x.sqrt(), a.sqrt(), b.sqrt()
        return (b - x).mul_(a + e).div_(x.add(e).mul_(b - a))


@dataclass(frozen=True)
class Settling:
    """To the nearest level; entries of a moment whose gradient has ended are rounded stochastically.

    Of 16 levels the nearest one to 0.9 of a level is that level again, so that a moment would never fall while its
    block's scale is that of others.  What has a gradient moves from level to level by that.

    All blocks of a step have the same noise, a hash of positions by one multiplication (Dietzfelbinger et al., 1997)
    that is another one in each step: an entry's noise is uniform and independent from step to step, any two entries'
    are nearly independent, and it costs next to nothing.
    """

    gradient: Tensor
    """(B, L), of what is rounded."""
    share: float
    """Gradients of at most this times the moment count as ended; 0: those that are zero."""
    hashing: tuple[int, int]
    """As `Noise.multiply_shift`."""
    start: int = 0
    """Position of the first column in its block."""

    def part(self, rows: slice, columns: slice) -> Settling:
        """As `Stochastic.part`."""
        return replace(self, gradient=self.gradient[rows, columns], start=columns.start)

    def ended(self, x: Tensor, scale: Tensor) -> Tensor:
        """bool: whose gradient has ended, of the moments x times `scale`."""
        if self.share == 0:
            return self.gradient == 0
        return self.gradient.abs() <= (x * scale).abs_().mul_(self.share)

    def uniform(self) -> Tensor:
        """float32 (L,), inside (0, 1)."""
        end = self.start + self.gradient.shape[1]
        position = torch.arange(self.start, end, dtype=torch.int32, device=self.gradient.device)
        return _uniform(position.mul_(self.hashing[0]).add_(self.hashing[1]).bitwise_right_shift_(1))


Rounding = Stochastic | Settling
"""Of what is stored in levels, other than to the nearest."""


def to_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to one of the two neighbouring bfloat16 numbers, the nearer with the larger probability.

    Args:
        x: float32, any shape; finite.
        noise: int32 of x's shape, uniform.
    """
    bits = x.contiguous().view(torch.int32) + (noise & 0xFFFF)
    return (bits & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def _uniform(bits: Tensor) -> Tensor:
    return bits.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)


def _mixed(x: int) -> int:
    """As `_mix`, of a number on the host: 32 bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x &= 0xFFFFFFFF
        x = (x ^ (x >> shift)) * factor
    return x


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers with good avalanche (Wellons' lowbias32)."""
    x = (x ^ _shift(x, 16)) * as_int32(0x7FEB352D)
    x = (x ^ _shift(x, 15)) * as_int32(0x846CA68B)
    return x ^ _shift(x, 16)


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical right shift of int32."""
    return (x >> n) & ((1 << (32 - n)) - 1)


def as_int32(n: int) -> int:
    """The int32 of n's lowest 32 bits."""
    n &= 0xFFFFFFFF
    return n - (1 << 32) if n >= 1 << 31 else n
