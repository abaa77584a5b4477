"""Batched matrix functions: (B, k, k) float32 in, new tensors out, the input never changed but by what ends in `_`.

Matrix products run in float32 proper (`precision.exact_float32`): TF32's ten mantissa bits are too few for a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor


def bjorck(v: Tensor, steps: int) -> Tensor:
    """`steps` times V <- 1.5 V - 0.5 V V^T V: the nearest orthogonal matrix, to third order a step (Björck 1971).

    Args:
        v: (B, k, k), nearly orthogonal: singular values in (0, sqrt(3)).
    """
    for _ in range(steps):
        v = torch.baddbmm(v, v, v.mT @ v, beta=1.5, alpha=-0.5)
    return v


def power_qr(a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One QR power iteration towards the eigenbasis of symmetric `a`, from the orthogonal `v` (2405.18144, alg. 1).

    Returns:
        u: (B, k, k), the Q of A V.
        eigenvalues: (B, k), diag(U^T A U), not below 0.
    """
    u, _ = safe_qr(a @ v)
    return u, (u * (a @ u)).sum(-2).clamp_min(0.0)


def symmetric_power(u: Tensor, eigenvalues: Tensor, exponent: float, damping: float) -> Tensor:
    """U diag((lambda + damping max(lambda))^exponent) U^T; eigenvalues (B, k) >= 0, exponent < 0.

    A zero matrix (no statistic yet) gives the identity.
    """
    largest = eigenvalues.amax(-1, keepdim=True)
    damped = torch.where(largest > 0, eigenvalues.clamp_min(0.0) + damping * largest, 1.0)
    # float32's pow rounds the last few of a tensor otherwise than the rest: a block's root would depend on its stack
    power = damped.double().pow(exponent).to(u.dtype)
    return (u * power.unsqueeze(-2)) @ u.mT


def root_by_eigh(a: Tensor, exponent: float, damping: float) -> Tensor:
    """A^exponent of symmetric (B, k, k) by its eigendecomposition; negative eigenvalues count as 0.

    Args, Returns: as `root_by_newton`.
    """
    eigenvalues, u = _eigh(a)
    return symmetric_power(u, eigenvalues.clamp_min(0.0), exponent, damping)


def root_by_newton(a: Tensor, exponent: float, damping: float) -> Tensor:
    """A^(-1/p) by the coupled Newton ("Schur-Newton") iteration (Guo and Higham 2006; 2405.18144, algorithm 4).

    Args:
        a: (B, k, k), symmetric, positive semidefinite up to rounding; float32 or float64.
        exponent: -1 / p, p a positive integer.
        damping: times the largest eigenvalue, added to `a`; not below `smallest_damping(a.dtype)`.

    Returns:
        Of a's shape and dtype; NaN in the blocks that did not converge (not semidefinite), (1 + damping)^exponent times
        the identity for a zero block.
    """
    p = round(-1 / exponent)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    unit, bound, _ = _damped_unit(a, damping)

    def step(x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        # T = ((p + 1) I - M) / p;  X <- X T;  M <- T^p M
        t = ((p + 1) * eye - m) / p
        return x @ t, torch.linalg.matrix_power(t, p) @ m

    # M = z A, X = z^(1/p) I: convergence needs M's eigenvalues below p + 1, z = (p + 1) / 2 is the middle
    z = (p + 1) / 2
    (x, _), residual = _settle(step, ((z ** (1 / p) * eye).expand_as(a), z * unit))
    return _scaled_back(x, bound, exponent, residual)


def root_by_newton_db(a: Tensor, exponent: float, damping: float) -> Tensor:
    """A^(-1/p), p a power of two: log2(p) square roots by coupled Newton-Schulz, or Denman-Beavers, pairs.

    As in DASH (2602.02016), with the scaling of Chen and Chow (2014): the damping bounds the spectrum from below, and
    the scaled polynomial lifts the smallest eigenvalue 6.75-fold an iteration instead of 2.25-fold.

    Args, Returns: as `root_by_newton`.
    """
    unit, bound, lowest = _damped_unit(a, damping)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)

    def step(low: Tensor, y: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        # s^2 = 3 / (1 + l + l^2);  T = s (3 I - s^2 Z Y) / 2;  Y <- Y T;  Z <- T Z;  l <- s l (3 - s^2 l^2) / 2
        s = (3 / (1 + low + low * low)).sqrt()
        t = s * (1.5 * eye - 0.5 * s * s * w)
        y, z = y @ t, t @ z
        return (0.5 * s * low * (3 - s * s * low * low)).clamp_max(1.0), y, z, z @ y

    y, z, residual = unit, unit, torch.zeros_like(bound)
    for _ in range(round(-1 / exponent).bit_length() - 1):
        # Y -> A^1/2, Z -> A^-1/2; then the same of A^1/2
        lowest = lowest.sqrt()
        (_, y, z, _), settled = _settle(step, (lowest, y, eye.expand_as(a), y))
        residual = torch.maximum(residual, settled)
    return _scaled_back(z, bound, exponent, residual)


ROOTS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "eigh": root_by_eigh,
    "newton": root_by_newton,
    "newton_db": root_by_newton_db,
}


def smallest_damping(dtype: torch.dtype) -> float:
    """Below it, rounding makes a semidefinite matrix indefinite, and Newton's iterations diverge: 4.8e-7 in float32."""
    return 4 * torch.finfo(dtype).eps


def largest_eigenvalue(a: Tensor, iterations: int = 50) -> Tensor:
    """By power iteration from the row norms: (B,) for semidefinite (B, k, k); never too large, at most 1% too small.

    Entries of about 1: squares of very small ones underflow.
    """
    x = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    for _ in range(iterations):
        x = torch.nn.functional.normalize(a @ torch.nn.functional.normalize(x, dim=-2), dim=-2)
    return torch.linalg.vector_norm(a @ x, dim=(-2, -1))


def safe_qr(a: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R of each block (B, k, k); NaN in the blocks in which the decomposition fails."""
    # at a stride of 4096 bytes a CPU's cache holds eight rows of a column: with rows of zeros below, LAPACK takes 58 ms
    # in place of 91 at order 1024
    k = a.shape[-1]
    extra = 8 if a.device.type == "cpu" and k * a.element_size() % 4096 == 0 else 0
    below = torch.nn.functional.pad(a, (0, 0, 0, extra)) if extra else a
    q, r = _solved(torch.linalg.qr, below, below.shape, a.shape)
    return q[:, :k], r


def safe_cholesky(a: Tensor, jitter: float, attempts: int = 6) -> Tensor:
    """C = chol(A + eps I) of each block, eps = `jitter` times the mean of A's diagonal, tenfold at each new attempt.

    Relative, so that C scales with the gradients; 2412.10663 adds an absolute 1e-6.

    Returns:
        Lower triangular (B, k, k); NaN in the blocks that are not positive definite after the last attempt.
    """
    shift = jitter * a.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(a.dtype).tiny * 1e8)
    for _ in range(attempts):
        shifted = a + torch.diag_embed(shift.unsqueeze(-1).expand(a.shape[:-1]))
        c, info = _solved(torch.linalg.cholesky_ex, shifted, a.shape, a.shape[:-2])
        if not info.any():
            break
        shift = torch.where(info > 0, 10 * shift, shift)
    return torch.where((info == 0)[:, None, None], c, torch.nan)


def transpose(a: Tensor | None) -> Tensor | None:
    """A^T, a view; None is the identity."""
    return None if a is None else a.mT


def clamp_rms_(x: Tensor, most: float, rows: bool, columns: bool) -> Tensor:
    """x (B, m, n), in place, with rows, columns or both scaled down where their root mean square is above `most`."""
    squares = x.square()  # of x as it was: with both, no row or column ends above `most` either
    of_dims = [squares.mean(dim, keepdim=True) for dim, scaled in ((-1, rows), (-2, columns)) if scaled]
    del squares
    factors = [(most / mean.sqrt_()).clamp_max_(1.0) for mean in of_dims]
    for factor in factors:
        x.mul_(factor)
    return x


def finite_blocks(*tensors: Tensor) -> Tensor:
    """bool (B,): blocks whose entries are all finite in every tensor."""
    # a NaN goes through both extremes; ten times as fast as torch.isfinite of every entry, on a CPU
    extremes = [extreme(tuple(range(1, t.dim()))) for t in tensors for extreme in (t.amax, t.amin)]
    return torch.isfinite(torch.stack(extremes)).all(0)


def replace_bad_blocks(a: Tensor, good: Tensor) -> Tensor:
    """(B, k, k) with the identity in place of the blocks that are not `good`, bool (B,): LAPACK never sees a NaN."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.where(good[:, None, None], a, eye)


MAX_ITERATIONS = 60  # condition 1e12 takes Newton 38
CONVERGED = 0.01  # residual |M - I| / sqrt(k) above which an iteration has failed; at condition 1e12 it ends at 4e-5


def _damped_unit(a: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """(A + damping lambda_max I) / bound with a spectrum in [lowest, 1]; a zero block counts as the identity.

    Returns:
        unit (B, k, k), bound (B, 1, 1) and lowest (B, 1, 1).
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    size = torch.linalg.matrix_norm(a, torch.inf, keepdim=True)
    a, size = torch.where(size > 0, a / size, eye), torch.where(size > 0, size, 1.0)
    shift = max(damping, smallest_damping(a.dtype)) * largest_eigenvalue(a)[:, None, None]
    damped = a + shift * eye
    # two bounds of the largest eigenvalue: |A|_F and |A|_inf
    bounds = [torch.linalg.matrix_norm(damped, order, keepdim=True) for order in ("fro", torch.inf)]
    bound = torch.minimum(*bounds)
    return damped / bound, size * bound, shift / bound


def _settle(step: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Iterate `step` until the state's last tensor is as near to the identity as rounding lets it be, in every block.

    A block is settled when its residual |M - I|_F / sqrt(k) is small and an iteration no longer halves it; it keeps
    the state of its smallest residual while the others go on.

    Returns:
        The kept state, and its residual (B, 1, 1).
    """
    eye = torch.eye(state[-1].shape[-1], dtype=state[-1].dtype, device=state[-1].device)

    def residual(m: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(m - eye, keepdim=True) / len(eye) ** 0.5

    best, kept = residual(state[-1]), state
    active = torch.ones_like(best, dtype=torch.bool)
    for _ in range(MAX_ITERATIONS):
        state = step(*state)
        now = residual(state[-1])
        better = active & (now < best)
        active &= torch.isfinite(now) & ((now < 0.5 * best) | (best > CONVERGED))
        kept = tuple(torch.where(better, new, old) for new, old in zip(state, kept, strict=True))
        best = torch.where(better, now, best)
        if not active.any():
            break
    return kept, best


def _scaled_back(x: Tensor, bound: Tensor, exponent: float, residual: Tensor) -> Tensor:
    """The root (B, k, k) of a matrix from that of matrix / bound (B, 1, 1); NaN where the iteration failed."""
    return torch.where(residual <= CONVERGED, x * bound**exponent, torch.nan)


def _eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, k), ascending, and eigenvectors (B, k, k); NaN in the blocks that fail."""
    eigenvalues, vectors = _solved(torch.linalg.eigh, a, a.shape[:-1], a.shape)
    return eigenvalues, vectors


def _solved(solve: Callable[[Tensor], Iterable[Tensor]], a: Tensor, *shapes: torch.Size) -> Iterable[Tensor]:
    """What `solve` gives of the blocks of `a`, of these shapes.

    One bad block fails the whole batch: then they are taken one by one in float64, and what still fails is NaN.
    """
    with suppress(torch.linalg.LinAlgError):
        return solve(a)
    found = [torch.full(shape, torch.nan, dtype=a.dtype, device=a.device) for shape in shapes]
    for i, block in enumerate(a):
        with suppress(torch.linalg.LinAlgError):
            for of_all, of_block in zip(found, solve(block.double()), strict=True):
                of_all[i] = of_block
    return found
