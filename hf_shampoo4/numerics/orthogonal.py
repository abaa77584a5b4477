"""Orthogonal iteration without Householder's reflections: batched products, Cholesky and triangular solves alone.

CUDA computes the QR of a stack one matrix after another; these it computes all at once, and nothing waits for the host.
On a CPU LAPACK's QR is twice as fast (docs/results/orthogonal.json).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import on_device

SETTLED = 0.5  # |Q1^T Q1 - I|_F after the first round below which the second one leaves no more than rounding
DISORDER = 1000.0  # how many times as large as an earlier one an entry of a diagonal may be: 3.5 is what trainings show


def cholesky_qr(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q R = X by CholeskyQR2 (Yamamoto et al. 2015), R's diagonal positive.

    Args:
        x: (B, m, k), m >= k, full rank; what its columns are scaled by changes R alone, in exact arithmetic and in
            float32.

    Returns:
        q: (B, m, k), orthogonal to rounding in the good blocks.
        r: (B, k, k), upper triangular.
        good: bool (B,), false where the condition of X, its columns scaled to norm 1, is too large (from about
            1 / sqrt(k eps), 100 to 2,000 in float32): there Q and R are anything.
    """
    q, r1, failed = _round(x, x.mT @ x)
    del x
    gram = q.mT @ q
    q, r2, failed_again = _round(q, gram)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    settled = torch.linalg.matrix_norm(gram) < SETTLED  # false for NaN
    return q, r2 @ r1, settled & (failed + failed_again == 0)


def orthogonal_iteration(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of orthogonal iteration from the identity: the Q of Q R = A, and diag(R Q) = diag(Q^T A Q).

    With A = D M D, D = diag(A)^1/2, and A's Cholesky factor G, Q is that of G too, as A = G G^T and G^T is triangular.
    Where D falls, G's columns, scaled to a unit diagonal, are no worse conditioned than the Cholesky factor of M,
    whatever A's eigenvalues are; so two rounds always do, and there is nothing to shift or to fall back on.  Orthogonal
    iteration brings its vectors into that order itself.  In a block that is far from it (`DISORDER`) columns are
    orthogonalised in the order of A's diagonal, and put back in their places.

    Args:
        a: (B, k, k), symmetric, positive definite, the condition of M some times k at most: in
            `bases.factor_in_basis` it is a mean of the identity and of correlations.

    Returns:
        q: (B, k, k), near the identity where A is nearly diagonal: no vector changes its direction.
        eigenvalues: (B, k), > 0.
        good: bool (B,); false where `a` was not definite: there Q and the eigenvalues are anything.
    """
    order = _order(a.diagonal(dim1=-2, dim2=-1))
    blocks = on_device(tuple(range(len(a))), torch.long, a.device)[:, None, None]
    places = blocks, order.unsqueeze(-1), order.unsqueeze(-2)
    factor, info = torch.linalg.cholesky_ex(a[places])
    scale = factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-2).clone()
    q, r, good = cholesky_qr(factor.div_(scale))
    del factor
    # Q^T A Q = (Q^T G)(Q^T G)^T, and Q^T G = R: a sum of squares, of which small eigenvalues keep their digits
    eigenvalues = r.mul_(scale).square_().sum(-1)
    back = torch.empty_like(q)
    back[places] = q
    return back, torch.empty_like(eigenvalues).scatter_(-1, order, eigenvalues), good & (info == 0)


def _order(diagonal: Tensor) -> Tensor:
    """int64 (B, k): in which columns are orthogonalised; decided on the device, no block minds the others."""
    backwards = diagonal.flip(-1)
    later = backwards.cummax(-1).values
    disordered = (later / backwards).amax(-1, keepdim=True) > DISORDER
    by_size = diagonal.argsort(dim=-1, descending=True, stable=True)
    as_they_are = on_device(tuple(range(diagonal.shape[-1])), torch.long, diagonal.device)
    return torch.where(disordered, by_size, as_they_are)


def _round(x: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q = X R^-1, R = chol(gram)^T, and int32 (B,): 0 where the Gram matrix is definite in float32."""
    lower, info = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(lower.mT, x, upper=True, left=False), lower.mT, info
