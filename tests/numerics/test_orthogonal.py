"""Orthogonal iteration by Cholesky against float64, on factors that are hard: see `HARD`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_shampoo4.numerics.orthogonal import DISORDER, _order, cholesky_qr, orthogonal_iteration

EPS = torch.finfo(torch.float32).eps
ORTHOGONAL, RESIDUAL, EIGENVALUES = 0.1, 0.03, 0.5
"""Of k eps: |Q^T Q - I|_F / sqrt(k), |A - Q R| of a column over its norm, an eigenvalue's relative error."""
MEMORY = 0.3  # least share of the identity in a factor, `bases.SHORTEST_MEMORY`


def _gradients(kind: str, k: int) -> Tensor:
    """float64 (k, n), a rotated gradient of which a factor's correlations are made."""
    g = torch.Generator().manual_seed(k)
    x = torch.randn(k, 2 * k, generator=g, dtype=torch.float64)
    if kind == "rank_deficient":
        return x[:, : k // 8]
    if kind == "near_collinear":
        return x[:, :1] * torch.randn(1, 2 * k, generator=g, dtype=torch.float64) + 1e-6 * x
    if kind == "row_scaled":
        return x * torch.logspace(0, -12, k, dtype=torch.float64)[torch.randperm(k, generator=g), None]
    if kind == "one_vector":
        return x[:, :1]
    return x


def _eigenvalues(kind: str, k: int) -> Tensor:
    g = torch.Generator().manual_seed(k)
    if kind == "clustered":
        steps = torch.arange(k, dtype=torch.float64) * 4 // k
        return 10.0 ** (-3 * steps) * (1 + 1e-6 * torch.rand(k, generator=g, dtype=torch.float64))
    falling = torch.logspace(0, -12, k, dtype=torch.float64)
    if kind == "teeth":  # rising by less than DISORDER within each of four parts
        return torch.cat([part.flip(0) for part in falling.chunk(4)]).pow(math.log10(DISORDER) / 3.1)
    if kind == "rising":
        return falling.flip(0)
    return falling if kind == "falling" else falling[torch.randperm(k, generator=g)]


HARD = {
    "dense": ("dense", "falling"),
    "clustered": ("dense", "clustered"),
    "rank_deficient": ("rank_deficient", "any"),
    "near_collinear": ("near_collinear", "falling"),
    "near_collinear, rising": ("near_collinear", "rising"),
    "near_collinear, teeth": ("near_collinear", "teeth"),
    "row_scaled": ("row_scaled", "any"),
    "one_vector, 12 decades": ("one_vector", "any"),
}
"""What a gradient is like, and the eigenvalues that its factor had."""


def hard_factors(k: int) -> Tensor:
    """float32 (len(HARD), k, k), all kinds: D (MEMORY I + (1 - MEMORY) C) D, C a gradient's correlations."""
    found = []
    for gradients, eigenvalues in HARD.values():
        x = torch.nn.functional.normalize(_gradients(gradients, k), dim=-1)
        d = _eigenvalues(eigenvalues, k).sqrt()
        m = (1 - MEMORY) * (x @ x.mT) + MEMORY * torch.eye(k, dtype=torch.float64)
        found.append(d.unsqueeze(-1) * m * d)
    return torch.stack(found).float()


def _in_order(a: Tensor, order: Tensor) -> Tensor:
    return torch.stack([block[o][:, o] for block, o in zip(a, order, strict=True)])


def errors(a: Tensor) -> dict[str, Tensor]:
    """Of `orthogonal_iteration` against float64, in multiples of k eps, (B,) each."""
    k, unit = a.shape[-1], a.shape[-1] * EPS
    found, eigenvalues, good = orthogonal_iteration(a)
    assert good.all()
    order = _order(a.diagonal(dim1=-2, dim2=-1))
    q, exact = _in_order(found.double(), order), _in_order(a.double(), order)
    r = q.mT @ exact  # Q R = A: what is left of it below the diagonal is what Q misses
    below = torch.linalg.vector_norm(r.tril(-1), dim=-2) / torch.linalg.vector_norm(exact, dim=-2)
    assert (r.diagonal(dim1=-2, dim2=-1) > 0).all(), "a vector changed its direction"
    rayleigh = (found.double() * (a.double() @ found.double())).sum(-2)
    deviation = q.mT @ q - torch.eye(k, dtype=torch.float64)
    return {
        "orthogonality": torch.linalg.matrix_norm(deviation) / k**0.5 / unit,
        "residual": below.amax(-1) / unit,
        "eigenvalues": ((eigenvalues - rayleigh) / rayleigh).abs().amax(-1) / unit,
    }


@pytest.mark.parametrize("k", [32, 128, 512])
def test_hard_factors_of_mixed_condition_are_orthogonalised_to_rounding(k: int) -> None:
    found = errors(hard_factors(k))
    assert found["orthogonality"].max() <= ORTHOGONAL, found
    assert found["residual"].max() <= RESIDUAL, found
    assert found["eigenvalues"].max() <= EIGENVALUES, found


def test_where_eigenvalues_fall_on_the_whole_it_is_the_q_of_qr_with_its_signs() -> None:
    a = hard_factors(64)[[0, 5]]
    q, r = torch.linalg.qr(a.double())
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    torch.testing.assert_close(orthogonal_iteration(a)[0].double(), q, atol=1e-5, rtol=0)


def test_vectors_keep_their_positions_whatever_the_order_of_eigenvalues() -> None:
    a = hard_factors(64)[[0, 2, 3, 4, 6, 7]]  # not those that go by position
    backwards = a.flip(-2, -1)
    q, eigenvalues, _ = orthogonal_iteration(a)
    q_backwards, eigenvalues_backwards, _ = orthogonal_iteration(backwards)
    torch.testing.assert_close(q_backwards.flip(-2, -1), q)
    torch.testing.assert_close(eigenvalues_backwards.flip(-1), eigenvalues)


def test_iterated_it_comes_to_the_eigenvectors() -> None:
    a = hard_factors(32)[1:2].double()  # three clusters apart
    exact = torch.linalg.eigvalsh(a).flip(-1)
    u = torch.eye(32, dtype=torch.float64)[None]
    for _ in range(600):
        q, eigenvalues, _ = orthogonal_iteration(u.mT @ a @ u)
        u = u @ q
    torch.testing.assert_close(eigenvalues.sort(-1, descending=True).values, exact, rtol=1e-2, atol=0)


def test_a_block_does_not_depend_on_its_stack() -> None:
    a = hard_factors(48)
    together = orthogonal_iteration(a)
    for i in range(len(a)):
        alone = orthogonal_iteration(a[i : i + 1])
        assert all(torch.equal(x[i], y[0]) for x, y in zip(together, alone, strict=True))


def test_a_factor_that_is_not_definite_is_said_not_to_be_good_and_spoils_no_other() -> None:
    a = hard_factors(32)
    alone = orthogonal_iteration(a[:1])[0]
    a[1], a[2], a[3, 5, 5] = -a[1], torch.nan, torch.inf
    q, _, good = orthogonal_iteration(a)
    assert good.tolist() == [True, False, False, False, True, True, True, True]
    assert torch.equal(q[:1], alone)


def test_what_cholesky_qr_calls_good_is_good_and_ill_conditioned_matrices_are_not() -> None:
    k = 64
    u, v = (torch.linalg.qr(torch.randn(13, k, k, dtype=torch.float64)).Q for _ in range(2))
    spectra = torch.stack([torch.logspace(0, -decade, k, dtype=torch.float64) for decade in range(13)])
    x = ((u * spectra.unsqueeze(-2)) @ v).float()
    q, r, good = cholesky_qr(x)
    assert good[:3].all(), "condition 1 to 100"
    assert not good[6:].any(), "condition 1e6 and more"
    deviation = (q.double().mT @ q.double() - torch.eye(k, dtype=torch.float64))[good]
    assert torch.linalg.matrix_norm(deviation).max() < 2 * k * EPS
    assert torch.linalg.matrix_norm((q.double() @ r.double() - x)[good]).max() < 4 * k * EPS
    assert (r.diagonal(dim1=-2, dim2=-1)[good] > 0).all()
    assert not r[good].tril(-1).any()
    scaled = cholesky_qr(x[:3] * torch.logspace(-8, 8, k))[0]
    assert (scaled - q[:3]).abs().max() < 1e-3, "columns' scales do not matter"


def test_nothing_waits_for_the_host() -> None:
    q, eigenvalues, good = orthogonal_iteration(torch.empty(3, 8, 8, device="meta"))
    assert (q.shape, eigenvalues.shape, good.shape) == ((3, 8, 8), (3, 8), (3,))
