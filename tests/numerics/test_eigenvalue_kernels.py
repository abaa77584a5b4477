"""The kernels of eigenvalues in Triton's interpreter, against torch; whole steps are in test_fused_steps.py."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from hf_shampoo4.numerics import quantize
from hf_shampoo4.preconditioners.bases import Jump

pytest.importorskip("triton", reason="Triton is not installed (the extra `triton`): its kernels are not tested")

FLOOR, TINY = 1e-7, torch.finfo(torch.float32).tiny
M, N = 1500, 7  # longer and shorter than what a program works on at a time


@pytest.fixture
def kernels() -> ModuleType:
    """The kernels, interpreted (conftest.py says so to Triton)."""
    return quantize.kernels("eigenvalues")


def sides() -> list[torch.Tensor]:
    """Of four blocks: an ordinary one, one of many decades, one without eigenvalues yet, one of tiny ones."""
    size = torch.tensor([[1.0], [1e10], [0.0], [1e-38]])
    return [size * torch.rand(4, k).pow(torch.tensor([[1.0], [20.0], [1.0], [1.0]])) for k in (M, N)]


def test_roots_and_weights_are_those_of_torch(kernels: ModuleType) -> None:
    given = sides()
    roots = kernels.roots(*given, 1e-3, TINY)
    weights = kernels.weights(*given, kernels.Bounds(FLOOR, TINY, 1e36), True)
    for x, root, weight in zip(given, roots, weights, strict=True):
        largest = x.amax(-1, keepdim=True)
        torch.testing.assert_close(root, (x + 1e-3 * largest).clamp_min(TINY).sqrt(), rtol=1e-6, atol=0)
        least = (FLOOR * largest).clamp_min(TINY)
        expected = torch.where(largest > 0, 1 / torch.maximum(x, least), 1.0)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)
    assert all((w == 1).all() for w in kernels.weights(*given, kernels.Bounds(FLOOR, TINY, 1e36), False))


ONES = torch.ones(4, M), torch.ones(4, N)
BOUNDS = (FLOOR, TINY, 1e36)


def test_eigenvalues_start_at_the_level_and_follow_what_is_finite_and_not_zero(kernels: ModuleType) -> None:
    left, right = sides()
    rows, columns = torch.rand(4, M), torch.rand(4, N)
    rows[1, 1300], columns[1], columns[3] = torch.nan, torch.inf, 0.0
    whole = torch.tensor([3.0, torch.nan, 4.0 * M * N, 5.0])
    new = new_left, new_right = left.clone(), right.clone()
    sums = quantize.kernels("whitened").Sums(rows, columns, whole)
    good = kernels.follow(new, ONES, sums, (True, True), 0.25, kernels.Bounds(*BOUNDS), True)
    assert good.tolist() == [True, False, True, True]
    torch.testing.assert_close(new_left[0], left[0].lerp(rows[0] / N, 0.25), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(new_right[0], right[0].lerp(columns[0] / M, 0.25), rtol=1e-5, atol=1e-9)
    assert torch.equal(new_left[1], left[1])
    assert torch.equal(new_right[1], right[1])
    # from the level, 2 = sqrt(4), by which sums with weights of 1 are divided
    torch.testing.assert_close(new_left[2], torch.full((M,), 2.0).lerp(rows[2] / 2 / N, 0.25))
    torch.testing.assert_close(new_right[2], torch.full((N,), 2.0).lerp(columns[2] / 2 / M, 0.25))
    assert torch.equal(new_right[3], right[3])


@pytest.mark.parametrize("follows", [(True, True), (True, False), (False, True)])
def test_of_squares_that_have_grown_each_side_takes_its_share(kernels: ModuleType, follows: tuple[bool, bool]) -> None:
    """Of three blocks: all has grown; one column has; one row has."""
    left, right = torch.rand(3, M) + 0.5, torch.rand(3, N) + 0.5
    relative = torch.rand(3, M, N)
    relative[0] *= 1e6
    relative[1, :, 2] *= 1e6
    relative[2, 1300] *= 1e8
    squares = relative * left[:, :, None] * right[:, None]
    weights = kernels.weights(left, right, kernels.Bounds(*BOUNDS), True)
    sums = quantize.kernels("whitened").square_sums(squares.sqrt(), *weights, rows=True, columns=True, whole=True)
    new = left.clone(), right.clone()
    kernels.follow(new, weights, sums, follows, 0.25, kernels.Bounds(*BOUNDS), True)
    jump = Jump.of(relative.mean(-1), relative.mean(-2), 0.25)
    of_rows_alone = Jump.of(relative.mean(-2), relative.mean(-1), 0.25).of_rows_alone()
    shares = jump.shares() if all(follows) else (jump.of_rows_alone(), of_rows_alone)
    for one, old, mean, share, does in zip(
        new, (left, right), (relative.mean(-1), relative.mean(-2)), shares, follows, strict=True
    ):
        expected = old.lerp(old * mean * share, 0.25) if does else old
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=0)


def test_one_side_may_only_start_and_follow_later(kernels: ModuleType) -> None:
    left, right = torch.zeros(2, M), torch.tensor([[0.0] * N, [3.0] * N])
    rows, whole = torch.rand(2, M), torch.full((2,), 9.0 * M * N)
    sums = quantize.kernels("whitened").Sums(rows, None, whole)
    kernels.follow((left, right), ONES, sums, (True, False), 0.5, kernels.Bounds(*BOUNDS), False)
    assert (right[0] == 9).all()
    assert (right[1] == 3).all()
    torch.testing.assert_close(left, torch.full((2, M), 9.0).lerp(rows / N, 0.5))
    columns = torch.tensor([[0.0] * N, [4.0] * N])
    kernels.follow_alone(right, columns, M, 0.5)
    assert (right[0] == 9).all()
    torch.testing.assert_close(right[1], torch.full((N,), 1.5 + 2.0 / M))
