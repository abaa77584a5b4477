"""Eigenvalues of both sides of a stack of blocks, each a vector of a few thousand numbers: a program has one block.

In plain PyTorch these vectors take 1% of a step's bytes and most of its launches.  Arithmetic is in the order of
preconditioners/eigenbasis.py, so that results differ by the rounding of products and sums alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .whitened import Sums

Pair = tuple[Tensor, Tensor]
NUMBERS = 1024  # of a vector that are worked on at a time


@triton.jit
def _largest(x, at, length, NUMBERS: tl.constexpr):
    """Of a row; a NaN where one is."""
    found = tl.full((NUMBERS,), float("-inf"), tl.float32)
    for start in range(0, length, NUMBERS):
        k = start + tl.arange(0, NUMBERS)
        value = tl.load(x + at * length + k, mask=k < length, other=float("-inf"))
        found = tl.maximum(found, value, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(tl.max((found != found).to(tl.int32), axis=0) > 0, float("nan"), tl.max(found, axis=0))


@triton.jit
def _roots_of(x, out, at, length, damping, tiny, NUMBERS: tl.constexpr):
    added = damping * _largest(x, at, length, NUMBERS)
    for start in range(0, length, NUMBERS):
        k = start + tl.arange(0, NUMBERS)
        value = tl.load(x + at * length + k, mask=k < length, other=0.0)
        tl.store(out + at * length + k, tl.sqrt_rn(tl.maximum(value + added, tiny)), mask=k < length)


@triton.jit
def _roots(left, right, of_left, of_right, height, width, damping, tiny, NUMBERS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _roots_of(left, of_left, at, height, damping, tiny, NUMBERS)
    else:
        _roots_of(right, of_right, at, width, damping, tiny, NUMBERS)


@triton.jit
def _weights_of(x, out, at, length, floor, tiny, WHITENED: tl.constexpr, NUMBERS: tl.constexpr):
    largest = _largest(x, at, length, NUMBERS)
    least = tl.maximum(floor * largest, tiny)
    for start in range(0, length, NUMBERS):
        k = start + tl.arange(0, NUMBERS)
        value = tl.load(x + at * length + k, mask=k < length, other=1.0)
        weight = tl.full((NUMBERS,), 1.0, tl.float32)
        if WHITENED:
            weight = tl.where(largest > 0, tl.div_rn(weight, tl.maximum(value, least)), weight)
        tl.store(out + at * length + k, weight, mask=k < length)


@triton.jit
def _weights(left, right, of_left, of_right, height, width, floor, tiny, WHITENED: tl.constexpr, NUMBERS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _weights_of(left, of_left, at, height, floor, tiny, WHITENED, NUMBERS)
    else:
        _weights_of(right, of_right, at, width, floor, tiny, WHITENED, NUMBERS)


@triton.jit
def _follow_one(x, sums, at, length, start_at, factor, count, weight, good, NUMBERS: tl.constexpr):
    """lambda <- lerp(lambda, sums factor / count, weight) if `good`, started at `start_at` if that is not negative."""
    most = _largest(sums, at, length, NUMBERS) * factor / count
    tells = (most > 0) & (most < float("inf")) & good
    for start in range(0, length, NUMBERS):
        k = start + tl.arange(0, NUMBERS)
        value = tl.load(x + at * length + k, mask=k < length, other=0.0)
        value = tl.where(start_at >= 0, start_at, value)
        new = tl.load(sums + at * length + k, mask=k < length, other=0.0) * factor / count
        value = tl.where(tells, value + weight * (new - value), value)
        tl.store(x + at * length + k, value, mask=k < length)


@triton.jit
def _start_one(x, at, length, start_at, NUMBERS: tl.constexpr):
    if start_at >= 0:
        for start in range(0, length, NUMBERS):
            k = start + tl.arange(0, NUMBERS)
            tl.store(x + at * length + k, tl.zeros((NUMBERS,), tl.float32) + start_at, mask=k < length)


@triton.jit
def _growth(sums, weights, at, length, factor, most, NUMBERS: tl.constexpr):
    """Of samples over eigenvalues, sums weights factor: the mean, and that of (1 + x)^-1/4 of those above 0."""
    total = tl.zeros((NUMBERS,), tl.float32)
    roots = tl.zeros((NUMBERS,), tl.float32)
    some = tl.zeros((NUMBERS,), tl.float32)
    for start in range(0, length, NUMBERS):
        k = start + tl.arange(0, NUMBERS)
        sample = tl.load(sums + at * length + k, mask=k < length, other=0.0) * factor
        sample = sample * tl.load(weights + at * length + k, mask=k < length, other=0.0)
        total += sample
        root = tl.sqrt_rn(tl.sqrt_rn(tl.minimum(1.0 + sample, most)))
        roots += tl.where(sample > 0, 1.0 / root, 0.0)
        some += tl.where(sample > 0, 1.0, 0.0)
    return tl.sum(total, axis=0) / length, tl.sum(roots, axis=0) / tl.sum(some, axis=0)


@triton.jit
def _follow(
    left, right, left_weights, right_weights, rows, columns, all, good, height, width, weight, floor, tiny, most,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHITENED: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    level = tl.load(all + at) / (height * width)
    is_good = (level >= 0) & (level < float("inf"))
    tl.store(good + at, is_good)
    level = tl.where(is_good, level, 0.0)
    if WHITENED:
        level = tl.sqrt_rn(level)
    # blocks without eigenvalues as yet were summed with weights of 1
    left_start = tl.where(_largest(left, at, height, NUMBERS) <= 0, level, -1.0)
    right_start = tl.where(_largest(right, at, width, NUMBERS) <= 0, level, -1.0)
    of_left = 1.0
    of_right = 1.0
    if WHITENED:
        of_level = 1.0 / tl.maximum(level, tl.maximum(floor * level, tiny))
        of_left = tl.where(right_start >= 0, of_level, 1.0)
        of_right = tl.where(left_start >= 0, of_level, 1.0)
        # preconditioners/bases.py, Jump
        both = of_left * of_right
        mean, of_rows = _growth(rows, left_weights, at, height, both / width, most, NUMBERS)
        _, of_columns = _growth(columns, right_weights, at, width, both / height, most, NUMBERS)
        excess = tl.minimum(tl.maximum(weight * mean, 1.0), most)
        root = of_rows / of_columns * (of_rows / of_columns)
        ratio = tl.minimum(tl.maximum(root * root, 1.0 / excess), excess)
        if ROWS and COLUMNS:
            root = tl.sqrt_rn(ratio)
            of_left *= root / tl.sqrt_rn(excess)
            of_right *= 1.0 / (root * tl.sqrt_rn(excess))
        elif ROWS:
            of_left *= tl.minimum(ratio, 1.0)
        else:
            of_right *= tl.minimum(1.0 / ratio, 1.0)
    if ROWS:
        _follow_one(left, rows, at, height, left_start, of_left, width, weight, is_good, NUMBERS)
    else:
        _start_one(left, at, height, left_start, NUMBERS)
    if COLUMNS:
        _follow_one(right, columns, at, width, right_start, of_right, height, weight, is_good, NUMBERS)
    else:
        _start_one(right, at, width, right_start, NUMBERS)


@triton.jit
def _follow_alone(x, sums, length, count, weight, NUMBERS: tl.constexpr):
    _follow_one(x, sums, tl.program_id(0).to(tl.int64), length, -1.0, 1.0, count, weight, True, NUMBERS)


@dataclass(frozen=True)
class Bounds:
    """Of eigenvalues."""

    share: float
    """The least, of a side's largest one."""
    tiny: float
    """The least."""
    most: float
    """By how much a gradient's squares are taken to have grown at most."""


def roots(left: Tensor, right: Tensor, damping: float, tiny: float) -> tuple[Tensor, Tensor]:
    """sqrt(max(lambda + damping max(lambda), tiny)) of two sides.

    Args:
        left: float32 (B, m), contiguous.
        right: float32 (B, n), contiguous.

    Returns:
        Of the same shapes.
    """
    found = torch.empty_like(left), torch.empty_like(right)
    with torch.cuda.device_of(left):
        _roots[len(left), 2](left, right, *found, left.shape[1], right.shape[1], damping, tiny, NUMBERS=NUMBERS)
    return found


def weights(left: Tensor, right: Tensor, bounds: Bounds, whitened: bool) -> tuple[Tensor, Tensor]:
    """1 / max(lambda, share max(lambda), tiny) of two sides; ones where there are none yet, or not `whitened`.

    Args, Returns: as `roots`.
    """
    found = torch.empty_like(left), torch.empty_like(right)
    with torch.cuda.device_of(left):
        _weights[len(left), 2](
            left, right, *found, left.shape[1], right.shape[1], bounds.share, bounds.tiny,
            WHITENED=whitened, NUMBERS=NUMBERS,
        )  # fmt: skip
    return found


def follow(
    sides: Pair, weights: Pair, sums: Sums, follows: tuple[bool, bool], weight: float, bounds: Bounds, whitened: bool
) -> Tensor:
    """Start eigenvalues of blocks that had none at their gradient's level, and let them follow its squares.

    Args:
        sides: eigenvalues, float32 (B, m) and (B, n), contiguous; changed in place.
        weights: `weights` of them.
        sums: of squares times the weights, and of all without; of a side that neither follows nor, `whitened`, tells of
            a jump: None.
        follows: which sides follow; the others are started only.
        weight: of the new ones.

    Returns:
        bool (B,): whether the sum of all is finite; eigenvalues of other blocks stay as they are.
    """
    left, right = sides
    good = torch.empty(len(left), dtype=torch.bool, device=left.device)
    with torch.cuda.device_of(left):
        _follow[(len(left),)](
            left, right, *weights, sums.rows, sums.columns, sums.all, good, left.shape[1], right.shape[1],
            weight, bounds.share, bounds.tiny, bounds.most,
            ROWS=follows[0], COLUMNS=follows[1], WHITENED=whitened, NUMBERS=NUMBERS,
        )  # fmt: skip
    return good


def follow_alone(eigenvalues: Tensor, sums: Tensor, count: int, weight: float) -> None:
    """One side's eigenvalues, float32 (B, k), follow `sums` / `count`, but where these are all zero, or not finite."""
    with torch.cuda.device_of(sums):
        _follow_alone[(len(sums),)](eigenvalues, sums, sums.shape[1], count, weight, NUMBERS=NUMBERS)
