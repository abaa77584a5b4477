"""Matrix functions against float64 linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_shampoo4.numerics import linalg as matrix
from hf_shampoo4.numerics.linalg import (
    bjorck,
    clamp_rms_,
    finite_blocks,
    power_qr,
    replace_bad_blocks,
    root_by_eigh,
    safe_qr,
    symmetric_power,
)
from hf_shampoo4.numerics.precision import exact_float32
from tests.support import reference


def orthogonal(batch: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(batch, k, k, generator=generator, dtype=torch.float64)).Q


def spectrum(batch: int, k: int, condition: float) -> torch.Tensor:
    """Geometric, from 1 down to 1/condition."""
    return torch.logspace(0, -np.log10(condition), k, dtype=torch.float64).repeat(batch, 1)


def symmetric(u: torch.Tensor, eigenvalues: torch.Tensor) -> torch.Tensor:
    return (u * eigenvalues.unsqueeze(-2)) @ u.mT


def relative(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


# ------------------------------------------------------------------------------------------------------- Bjorck


def test_bjorck_converges_to_the_polar_factor() -> None:
    noisy = (orthogonal(3, 40) + 0.02 * torch.randn(3, 40, 40, dtype=torch.float64)).float()
    exact = torch.stack([torch.tensor(reference.polar(v.double().numpy())) for v in noisy])
    errors = [relative(bjorck(noisy, steps), exact) for steps in range(5)]
    assert errors[0] > 0.05
    assert all(b < a / 3 for a, b in zip(errors[:3], errors[1:4], strict=True))
    assert errors[4] < 1e-5
    eye = torch.eye(40).expand(3, 40, 40)
    torch.testing.assert_close(bjorck(noisy, 4).mT @ bjorck(noisy, 4), eye, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_bjorck_is_the_reference(steps: int) -> None:
    noisy = (orthogonal(1, 30) + 0.05 * torch.randn(1, 30, 30, dtype=torch.float64)).float()
    exact = torch.tensor(reference.bjorck(noisy[0].double().numpy(), steps))
    assert relative(bjorck(noisy, steps)[0], exact) < 1e-5


def test_bjorck_leaves_an_orthogonal_matrix() -> None:
    u = orthogonal(2, 30).float()
    torch.testing.assert_close(bjorck(u, 4), u, atol=2e-6, rtol=0)


# -------------------------------------------------------------------------------------------- QR power iteration


def test_power_qr_returns_the_exact_basis() -> None:
    u, lam = orthogonal(2, 24), spectrum(2, 24, 1e3)
    found, eigenvalues = power_qr(symmetric(u, lam).float(), u.float())
    cosines = (found.double() * u).sum(-2).abs()
    assert cosines.min() > 1 - 1e-5
    assert ((eigenvalues - lam) / lam).abs().max() < 1e-3


def test_power_qr_converges_to_the_eigenbasis() -> None:
    u, lam = orthogonal(2, 12), 2.0 ** -torch.arange(12, dtype=torch.float64).repeat(2, 1)
    a = symmetric(u, lam).float()
    v = torch.eye(12).repeat(2, 1, 1)
    off = []
    for _ in range(40):
        v, eigenvalues = power_qr(a, v)
        rotated = v.mT @ a @ v
        off.append((rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))).norm().item())
    assert off[-1] < 1e-5 < off[0]
    torch.testing.assert_close(eigenvalues.double(), lam, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(v.mT @ v, torch.eye(12).expand(2, 12, 12), atol=1e-5, rtol=0)


def test_qr_with_rows_of_zeros_below_is_the_qr() -> None:
    """Order 1024 (a stride of 4096 bytes) is decomposed with rows of zeros below, against float64."""
    a = torch.randn(2, 1024, 1024)
    q, r = safe_qr(a)
    exact_q, exact_r = torch.linalg.qr(a.double())
    assert q.shape == r.shape == a.shape
    torch.testing.assert_close(q @ r, a, atol=2e-4, rtol=0)
    torch.testing.assert_close(q.double(), exact_q, atol=2e-4, rtol=0)
    torch.testing.assert_close(r.double(), exact_r, atol=2e-3, rtol=0)


def test_power_qr_keeps_orthogonality_where_the_matrix_has_low_rank() -> None:
    g = torch.randn(2, 20, 3)
    u, eigenvalues = power_qr(g @ g.mT, orthogonal(2, 20).float())
    torch.testing.assert_close(u.mT @ u, torch.eye(20).expand(2, 20, 20), atol=1e-5, rtol=0)
    assert (eigenvalues >= 0).all()
    torch.testing.assert_close(eigenvalues.sum(1), g.square().sum((1, 2)), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------- inverse roots


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12])
def test_inverse_fourth_root_over_condition_numbers(condition: float) -> None:
    u, lam = orthogonal(2, 32), spectrum(2, 32, condition)
    a = symmetric(u, lam)
    exact = torch.stack([torch.tensor(reference.inverse_fourth_root(x.numpy(), 1e-6)) for x in a])
    # float32 knows eigenvalues to some 1e-7 of the largest, a tenth of the damping, so their 4th root to a few percent
    assert relative(root_by_eigh(a.float(), -0.25, 1e-6), exact) < (1e-3 if condition <= 1e4 else 0.04)
    assert relative(symmetric_power(u.float(), lam.float(), -0.25, 1e-6), exact) < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_inverse_root_of_any_scale(scale: float) -> None:
    a = symmetric(orthogonal(1, 16), spectrum(1, 16, 1e3))
    exact = torch.tensor(reference.inverse_fourth_root(a[0].numpy() * scale, 1e-6))
    assert relative(root_by_eigh((a * scale).float(), -0.25, 1e-6)[0], exact) < 1e-3


@pytest.mark.parametrize("rank", [1, 5, 15])
def test_inverse_root_of_a_rank_deficient_matrix(rank: int) -> None:
    g = torch.randn(2, 16, rank, dtype=torch.float64)
    a = g @ g.mT
    exact = torch.stack([torch.tensor(reference.inverse_fourth_root(x.numpy(), 1e-4)) for x in a])
    assert relative(root_by_eigh(a.float(), -0.25, 1e-4), exact) < 2e-3


def test_a_zero_matrix_has_the_identity_as_its_root() -> None:
    eye = torch.eye(8).expand(2, 8, 8)
    torch.testing.assert_close(root_by_eigh(torch.zeros(2, 8, 8), -0.25, 1e-6), eye)
    torch.testing.assert_close(symmetric_power(eye, torch.zeros(2, 8), -0.25, 1e-6), eye)


def test_negative_eigenvalues_count_as_zero() -> None:
    u = orthogonal(1, 4)
    lam = torch.tensor([[1.0, 0.5, -0.1, -1e-3]], dtype=torch.float64)
    exact = symmetric_power(u, lam.clamp_min(0), -0.25, 1e-3)
    assert relative(root_by_eigh(symmetric(u, lam).float(), -0.25, 1e-3), exact) < 1e-3


@pytest.mark.parametrize(
    "call",
    [
        lambda a: bjorck(a, 3),
        lambda a: power_qr(a, a),
        lambda a: root_by_eigh(a, -0.25, 1e-6),
        lambda a: symmetric_power(a, a.diagonal(dim1=1, dim2=2), -0.25, 1e-6),
        lambda a: replace_bad_blocks(a, torch.tensor([True, False])),
    ],
    ids=["bjorck", "power_qr", "root_by_eigh", "symmetric_power", "replace_bad_blocks"],
)
def test_input_is_never_changed(call) -> None:
    a = symmetric(orthogonal(2, 6), spectrum(2, 6, 10.0)).float()
    before = a.clone()
    call(a)
    assert torch.equal(a, before)


# ------------------------------------------------------------------------------------------------------ failures


def test_within_scales_what_is_too_large_and_nothing_else() -> None:
    x = torch.tensor([[[3.0, 4.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, -2.0]]])
    expected = x.clone()
    expected[0, 0] *= 2 / 2.5
    assert torch.equal(clamp_rms_(x.clone(), 2.0, rows=True, columns=False), expected)
    assert torch.equal(clamp_rms_(x.clone().mT, 2.0, rows=False, columns=True), expected.mT)
    both = clamp_rms_(x, 1.5, rows=True, columns=True).square()
    assert both.mean(-1).max() <= 1.5**2
    assert both.mean(-2).max() <= 1.5**2


def test_exact_float32_leaves_the_users_setting_as_it_was() -> None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has no such setting for CPUs")
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        with exact_float32("cpu"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_finite_blocks_and_or_identity() -> None:
    a = torch.randn(3, 4, 4)
    a[0, 1, 2], a[2, 0, 0] = torch.nan, torch.inf
    good = finite_blocks(a, torch.ones(3, 4))
    assert good.tolist() == [False, True, False]
    assert finite_blocks(torch.tensor([[1.0], [torch.nan], [-torch.inf]])).tolist() == [True, False, False]
    filled = replace_bad_blocks(a, good)
    assert torch.equal(filled[1], a[1])
    assert torch.equal(filled[0], torch.eye(4))
    assert torch.equal(filled[2], torch.eye(4))


def failing_eigh(monkeypatch: pytest.MonkeyPatch, broken: torch.Tensor) -> list[int]:
    """Make eigh fail on any batch that holds `broken`; returns the list of batch sizes it was called with."""
    real, calls = torch.linalg.eigh, []

    def eigh(a: torch.Tensor):
        blocks = a if a.dim() == 3 else a.unsqueeze(0)
        calls.append(len(blocks))
        if any(torch.equal(block.float(), broken) for block in blocks):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return real(a)

    monkeypatch.setattr(matrix.torch.linalg, "eigh", eigh)
    return calls


def test_a_failing_eigh_is_tried_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    a = symmetric(orthogonal(3, 8), spectrum(3, 8, 100.0)).float()
    expected = root_by_eigh(a, -0.25, 1e-6)
    calls = failing_eigh(monkeypatch, a[1])
    found = root_by_eigh(a, -0.25, 1e-6)
    assert calls == [3, 1, 1, 1]
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)


def test_a_nan_block_spoils_no_other() -> None:
    a = symmetric(orthogonal(3, 8), spectrum(3, 8, 100.0)).float()
    expected = root_by_eigh(a, -0.25, 1e-6)
    a[1, 2, 3] = a[1, 3, 2] = torch.nan
    found = root_by_eigh(a, -0.25, 1e-6)
    assert found[1].isnan().any()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- precision


def test_exact_float32_turns_autocast_off_and_puts_settings_back() -> None:
    a = torch.randn(2, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with exact_float32("cpu"):
            assert torch.equal(a @ a, torch.bmm(a, a))
            assert (a @ a).dtype == torch.float32
            assert not torch.backends.cuda.matmul.allow_tf32
        assert (a @ a).dtype == torch.bfloat16
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with pytest.raises(RuntimeError, match="inside"), exact_float32("cpu"):
            raise RuntimeError("inside")
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
