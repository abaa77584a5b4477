"""Problems of other suites: a convergence problem beside pytorch_optimizer, hard factors for the linear algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.numerics.linalg import ROOTS, root_by_eigh, safe_cholesky, safe_qr, smallest_damping

# ------------------------------------------------------------------------------------------- a convergence problem


def fall(make: Callable[[nn.Module], torch.optim.Optimizer]) -> float:
    """Last loss over the first of logistic regression through a hidden layer, two clouds apart."""
    generator = torch.Generator().manual_seed(42)
    x = torch.randn(100, 16, generator=generator)
    x[:50] += 1.0
    y = torch.cat([torch.ones(50, 1), torch.zeros(50, 1)])
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    optimizer, losses = make(model), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"algorithm": "soap"}, {"algorithm": "shampoo", "roots_every": 2, "stats_every": 2},
     {"algorithm": "elementwise"}],
    ids=["kl_shampoo", "soap", "shampoo", "adamw4bit"],
)  # fmt: skip
def test_a_classifier_converges_as_with_the_adamw_of_pytorch_optimizer(options: dict[str, Any]) -> None:
    theirs = pytest.importorskip("pytorch_optimizer").load_optimizer("adamw")
    reference = fall(lambda model: theirs(model.parameters(), lr=1e-2))
    ours = fall(lambda model: Shampoo4bit(model.named_parameters(), lr=1e-2, **options))
    assert reference < 0.5
    assert ours < max(0.3, 1.5 * reference)


# ------------------------------------------------------------------------------------------------------ hard factors


def rank_deficient(g: Tensor) -> Tensor:
    return torch.cat([g[:, : g.shape[1] // 4], torch.zeros_like(g[:, g.shape[1] // 4 :])], 1)


def clustered(g: Tensor) -> Tensor:
    """Three groups of nearly equal singular values."""
    q = torch.linalg.qr(g).Q
    values = torch.tensor([1.0, 1e-1, 1e-2], dtype=g.dtype)[torch.arange(len(g)) % 3]
    return q * (values * (1 + 1e-6 * torch.arange(len(g))))


def row_scaled(g: Tensor) -> Tensor:
    return g * torch.logspace(0, -3, len(g), dtype=g.dtype)[:, None]


def near_collinear(g: Tensor) -> Tensor:
    return g[:, :1] + 1e-3 * g


def mixed(g: Tensor) -> Tensor:
    """One half well conditioned, one half badly."""
    k = len(g) // 2
    q = torch.linalg.qr(g).Q
    return q * torch.cat([torch.ones(k), torch.logspace(0, -3, len(g) - k)]).to(g.dtype)


HARD = [rank_deficient, clustered, row_scaled, near_collinear, mixed]
hard = pytest.mark.parametrize("kind", HARD, ids=lambda f: f.__name__)
orders = pytest.mark.parametrize("order", [32, 100, 256])


def factor(kind: Callable[[Tensor], Tensor], order: int) -> tuple[Tensor, Tensor]:
    """float64 (1, k, k): the matrix, and its Gram matrix with a largest eigenvalue of 1."""
    generator = torch.Generator().manual_seed(order)
    b = kind(torch.randn(order, order, dtype=torch.float64, generator=generator))
    b = b / torch.linalg.matrix_norm(b, 2)
    return b[None], (b @ b.T)[None]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@hard
@orders
def test_qr_of_a_hard_matrix_is_orthogonal_and_gives_it_back(kind: Callable[[Tensor], Tensor], order: int) -> None:
    b, _ = factor(kind, order)
    q, r = safe_qr(b.float())
    eye = torch.eye(order, dtype=torch.float64)[None]
    allowed = 10 * torch.finfo(torch.float32).eps
    assert relative(q.double().mT @ q.double(), eye) < allowed
    assert relative(q.double() @ r.double(), b) < allowed
    assert torch.equal(r, r.triu())


@hard
@orders
def test_cholesky_of_a_hard_factor_gives_the_shifted_factor_back(kind: Callable[[Tensor], Tensor], order: int) -> None:
    _, a = factor(kind, order)
    c = safe_cholesky(a.float(), 1e-6)
    assert torch.isfinite(c).all()
    assert torch.equal(c, c.tril())
    assert relative(c.double() @ c.double().mT, a) < 1e-4


@hard
@orders
def test_inverse_roots_of_a_hard_factor_are_those_of_float64(kind: Callable[[Tensor], Tensor], order: int) -> None:
    """By three methods, at a damping of 1e-4: x^-1/4 of eigenvalues that float32 cannot tell from 0."""
    _, a = factor(kind, order)
    damping = 1e-4
    assert damping > 100 * smallest_damping(torch.float32)
    exact = root_by_eigh(a, -0.25, damping)
    for name, root in ROOTS.items():
        found = root(a.float(), -0.25, damping)
        assert torch.isfinite(found).all(), name
        assert relative(found, exact) < 5e-3, name  # the largest eigenvalue, hence the damping, to 1%
