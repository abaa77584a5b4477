"""Inverse roots and the safe Cholesky factorisation against float64, over conditions and ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_shampoo4.numerics.linalg import ROOTS, largest_eigenvalue, safe_cholesky, smallest_damping
from tests.support.reference import PROPERTY

NEWTON = ["newton", "newton_db"]


def _matrix(order: int, eigenvalues: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Symmetric float64 (1, k, k) with these eigenvalues, and its eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64, generator=generator)).Q
    a = (u * eigenvalues) @ u.T
    return ((a + a.T) / 2).unsqueeze(0), u


def _spectrum(order: int, condition: float) -> Tensor:
    return torch.logspace(0, -torch.tensor(condition).log10().item(), order, dtype=torch.float64)


def _oracle(u: Tensor, eigenvalues: Tensor, damping: float, exponent: float = -0.25) -> Tensor:
    return (u * (eigenvalues + damping * eigenvalues.max()) ** exponent) @ u.T


def _error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("order", [1, 2, 33, 96])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("method", ROOTS)
def test_float64_roots_are_exact_up_to_condition_1e12(method: str, condition: float, order: int) -> None:
    eigenvalues = _spectrum(order, condition)
    a, u = _matrix(order, eigenvalues)
    damping = 1e-12
    # the relative error of the smallest eigenvalue is rounding times the condition
    allowed = 1e-13 + 100 * torch.finfo(torch.float64).eps * min(condition, 1e12)
    # power iteration may miss a hundredth of lambda_max, hence of the damping
    allowed += 0.01 * damping * condition / (1 + damping * condition)
    assert _error(ROOTS[method](a, -0.25, damping)[0], _oracle(u, eigenvalues, damping)) < allowed


@pytest.mark.parametrize(("condition", "newton", "eigh"), [(1e2, 5e-6, 1e-5), (1e4, 2e-4, 2e-3), (1e6, 6e-3, 0.1)])
@pytest.mark.parametrize("method", ROOTS)
def test_attainable_accuracy_in_float32(method: str, condition: float, newton: float, eigh: float) -> None:
    """Newton's iterations are the more accurate: eigh misses every eigenvalue by rounding times the largest."""
    eigenvalues = _spectrum(128, condition)
    a, u = _matrix(128, eigenvalues)
    x = ROOTS[method](a.float(), -0.25, 1e-6)[0]
    assert _error(x, _oracle(u, eigenvalues, 1e-6)) < (eigh if method == "eigh" else newton)


@pytest.mark.parametrize("condition", [1e8, 1e10, 1e12])
@pytest.mark.parametrize("method", NEWTON)
def test_beyond_float32_the_damping_has_a_floor(method: str, condition: float) -> None:
    eigenvalues = _spectrum(96, condition)
    a, u = _matrix(96, eigenvalues)
    floor = smallest_damping(torch.float32)
    for damping in (1e-12, 1e-6):
        x = ROOTS[method](a.float(), -0.25, damping)[0]
        assert _error(x, _oracle(u, eigenvalues, max(damping, floor))) < 0.05


@pytest.mark.parametrize("rank", [1, 8, 60])
@pytest.mark.parametrize("method", ROOTS)
def test_rank_deficient(method: str, rank: int) -> None:
    eigenvalues = torch.zeros(64, dtype=torch.float64)
    eigenvalues[:rank] = torch.linspace(1, 0.5, rank, dtype=torch.float64)
    a, u = _matrix(64, eigenvalues)
    exact = _oracle(u, eigenvalues, 1e-6)
    assert _error(ROOTS[method](a, -0.25, 1e-6)[0], exact) < 4e-3  # a quarter of the power iteration's error
    assert _error(ROOTS[method](a.float(), -0.25, 1e-6)[0], exact) < 0.06


@pytest.mark.parametrize("method", NEWTON)
def test_inverse_square_root(method: str) -> None:
    eigenvalues = _spectrum(48, 1e5)
    a, u = _matrix(48, eigenvalues)
    assert _error(ROOTS[method](a, -0.5, 1e-9)[0], _oracle(u, eigenvalues, 1e-9, -0.5)) < 1e-6


@pytest.mark.parametrize("method", ROOTS)
def test_blocks_are_independent_and_the_input_is_not_changed(method: str) -> None:
    conditions = [1.0, 1e2, 1e4, 1e6]
    a = torch.cat([_matrix(40, _spectrum(40, c), seed)[0] for seed, c in enumerate(conditions)]).float()
    before = a.clone()
    together = ROOTS[method](a, -0.25, 1e-6)
    assert torch.equal(a, before)
    for i, condition in enumerate(conditions):
        alone = ROOTS[method](a[i : i + 1], -0.25, 1e-6)[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-3, atol=1e-3 * condition**0.25)
        torch.testing.assert_close(together[i], together[i].T, rtol=1e-3, atol=1e-2 * condition**0.25)


@pytest.mark.parametrize("method", ROOTS)
def test_zero_block_gives_the_identity(method: str) -> None:
    a = torch.cat([torch.zeros(1, 16, 16), _matrix(16, _spectrum(16, 10.0))[0].float()])
    x = ROOTS[method](a, -0.25, 1e-6)
    torch.testing.assert_close(x[0], torch.eye(16))
    assert torch.isfinite(x[1]).all()


@pytest.mark.parametrize("method", NEWTON)
def test_an_indefinite_block_fails_alone(method: str) -> None:
    indefinite = torch.diag(torch.tensor([1.0, 0.5, -0.3, 0.1]))
    x = ROOTS[method](torch.stack([torch.eye(4), indefinite]), -0.25, 1e-6)
    torch.testing.assert_close(x[0], torch.eye(4), rtol=1e-5, atol=1e-5)
    assert torch.isnan(x[1]).all()


@PROPERTY
@given(exponent=st.floats(-30, 15), order=st.integers(2, 24), seed=st.integers(0, 99))
def test_roots_scale(exponent: float, order: int, seed: int) -> None:
    """(s A)^-1/4 = s^-1/4 A^-1/4, over 45 decades."""
    a, _ = _matrix(order, _spectrum(order, 1e3), seed)
    a, s = a.float(), 10.0**exponent
    for method in NEWTON:
        scaled = ROOTS[method](a * s, -0.25, 1e-6) * s**0.25
        torch.testing.assert_close(scaled, ROOTS[method](a, -0.25, 1e-6), rtol=1e-3, atol=1e-3)


def test_power_iteration_is_never_above() -> None:
    a = torch.cat([_matrix(50, _spectrum(50, c), 3)[0] for c in (1.0, 1e1, 1e6)])
    found = largest_eigenvalue(a)
    assert (found <= 1 + 1e-12).all()
    assert (found > 0.99).all()


# ----------------------------------------------------------------------------------------------------- Cholesky


def test_safe_cholesky_is_cholesky_where_it_can_be() -> None:
    a = torch.cat([_matrix(32, _spectrum(32, c))[0] for c in (1.0, 1e6)])
    c = safe_cholesky(a, 1e-12)
    torch.testing.assert_close(c @ c.mT, a, rtol=0, atol=1e-11)
    assert torch.equal(c, c.tril())


@pytest.mark.parametrize("rank", [0, 1, 31])
def test_safe_cholesky_lifts_a_singular_block_alone(rank: int) -> None:
    eigenvalues = torch.zeros(64, dtype=torch.float64)
    eigenvalues[:rank] = 1.0
    a = torch.cat([_matrix(64, eigenvalues)[0], torch.eye(64, dtype=torch.float64)[None]]).float()
    before = a.clone()
    c = safe_cholesky(a, 1e-7)
    assert torch.equal(a, before)
    assert torch.isfinite(c).all()
    torch.testing.assert_close(c @ c.mT, a, rtol=0, atol=2e-5)
    torch.testing.assert_close(c[1], (1 + 1e-7) ** 0.5 * torch.eye(64), rtol=0, atol=1e-6)


def test_safe_cholesky_marks_what_is_indefinite() -> None:
    c = safe_cholesky(torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -1.0]))]), 1e-6)
    assert torch.isfinite(c[0]).all()
    assert torch.isnan(c[1]).all()
