"""Batched matrix functions, all pure: (B, k, k) float32 in, new tensors out, the input never changed.

Matrix products run in float32 proper: `exact_float32` turns TF32 and autocast off around a step, because TF32's ten
mantissa bits are too few for a Kronecker factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """float32 matrix products without TF32 and without autocast."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def bjorck(v: Tensor, steps: int) -> Tensor:
    """`steps` times V <- 1.5 V - 0.5 V V^T V: the nearest orthogonal matrix, to third order a step."""
    for _ in range(steps):
        v = torch.baddbmm(v, v, v.mT @ v, beta=1.5, alpha=-0.5)
    return v


def power_qr(a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One QR power iteration towards the eigenbasis of symmetric `a`, from the orthogonal `v` (2405.18144, alg. 1).

    Returns:
        u: (B, k, k), the Q of A V.
        eigenvalues: (B, k), diag(U^T A U), not below 0.
    """
    u = torch.linalg.qr(a @ v).Q
    return u, (u * (a @ u)).sum(-2).clamp_min(0.0)


def symmetric_power(u: Tensor, eigenvalues: Tensor, exponent: float, damping: float) -> Tensor:
    """U diag((lambda + damping max(lambda))^exponent) U^T; eigenvalues (B, k) >= 0, exponent < 0.

    A zero matrix (no statistic yet) gives the identity.
    """
    largest = eigenvalues.amax(-1, keepdim=True)
    damped = torch.where(largest > 0, eigenvalues.clamp_min(0.0) + damping * largest, 1.0)
    return (u * damped.pow(exponent).unsqueeze(-2)) @ u.mT


def root_by_eigh(a: Tensor, exponent: float, damping: float) -> Tensor:
    """Symmetric `a` to a negative power through its eigendecomposition; negative eigenvalues count as 0."""
    eigenvalues, u = _eigh(a)
    return symmetric_power(u, eigenvalues.clamp_min(0.0), exponent, damping)


def finite_blocks(*tensors: Tensor) -> Tensor:
    """bool (B,): blocks whose entries are all finite in every tensor."""
    return torch.stack([torch.isfinite(t.flatten(1)).all(1) for t in tensors]).all(0)


def or_identity(a: Tensor, good: Tensor) -> Tensor:
    """`a`, with the identity in place of the blocks that are not `good`: LAPACK never sees a NaN."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.where(good[:, None, None], a, eye)


def _eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return torch.linalg.eigh(a)
    except torch.linalg.LinAlgError:
        # One bad block fails the whole batch: take them one by one in float64, and mark what still fails with NaN.
        return _eigh_one_by_one(a)


def _eigh_one_by_one(a: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalues = torch.full(a.shape[:-1], torch.nan, dtype=a.dtype, device=a.device)
    vectors = torch.full_like(a, torch.nan)
    for i, block in enumerate(a):
        try:
            lam, u = torch.linalg.eigh(block.double())
        except torch.linalg.LinAlgError:
            continue
        eigenvalues[i], vectors[i] = lam, u
    return eigenvalues, vectors
