"""Whole steps with Triton's kernels, interpreted, against the same steps in plain PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.numerics import quantize
from hf_shampoo4.numerics.precision import rotate
from hf_shampoo4.numerics.storage import Dense
from hf_shampoo4.options import Options
from hf_shampoo4.preconditioners.bases import make_sides
from hf_shampoo4.preconditioners.eigenbasis import Eigenbasis, decays_of
from hf_shampoo4.preconditioners.moments import Momentum

pytest.importorskip("triton", reason="Triton is not installed (the extra `triton`): its kernels are not tested")

Gradient = Callable[[tuple[int, ...], int, int], Tensor]
SHAPES = [(12, 12), (12, 12), (20, 5), (5, 20), (5,)]


def with_kernels(patch: pytest.MonkeyPatch) -> None:
    """Wherever there is a kernel, it is used."""
    for name, module in list(sys.modules.items()):
        if name.startswith("hf_shampoo4.") and hasattr(module, "has_kernels"):
            patch.setattr(module, "has_kernels", lambda device, block: quantize.kernels().can_run(block))


def gradient(shape: tuple[int, ...], i: int, t: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * t + i)
    g = torch.randn(shape, generator=generator) * torch.logspace(0, -3, shape[-1])
    if i == 0 and t < 2:
        return torch.zeros(shape)  # has no eigenvalues until the third step
    return g.sign() * 1.2e19 if i == 1 and t == 2 else g  # each square is finite, their sum is not


def grown(shape: tuple[int, ...], i: int, t: int) -> Tensor:
    """After some steps a row, a column, or all of it are a thousand times as large."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(100 * t + i))
    if t >= 3:
        at: Any = [..., (0,), (slice(None), 0)][(i + len(shape) // 2) % 3 if len(shape) > 1 else 0]
        g[at] *= 1e3
    return g


def trained(
    steps: int, kernels: bool, dtype: torch.dtype = torch.float32, gradient: Gradient = gradient, **options: Any
) -> tuple[list[Tensor], Shampoo4bit]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    table = nn.Parameter(torch.randn(24, 4).to(dtype))
    groups = [{"params": parameters}, {"params": [table], "vocabulary": True}]
    optimizer = Shampoo4bit(groups, lr=0.05, betas=(0.9, 0.98), weight_decay=0.1, **options)
    with pytest.MonkeyPatch.context() as patch:
        if kernels:
            with_kernels(patch)
        for t in range(steps):
            for i, p in enumerate([*parameters, table]):
                p.grad = gradient(tuple(p.shape), i, t).to(dtype)
            optimizer.step()
    return [p.detach() for p in (*parameters, table)], optimizer


def assert_alike(plain: list[Tensor], fused: list[Tensor], one: Shampoo4bit, other: Shampoo4bit) -> None:
    """Weights and eigenvalues of two trainings."""
    for p, q in zip(plain, fused, strict=True):
        torch.testing.assert_close(q, p, rtol=2e-4, atol=2e-4)
    for p, q in zip(one.state.values(), other.state.values(), strict=True):
        for key in (key for key in p if isinstance(p[key], Tensor) and "eigenvalues" in key):
            torch.testing.assert_close(q[key], p[key], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("algorithm", "sides"), [("kl_shampoo", "auto"), ("kl_shampoo", "both"), ("soap", "auto"), ("kl_soap", "both")]
)
def test_steps_with_kernels_are_those_without(algorithm: str, sides: str) -> None:
    options = {"algorithm": algorithm, "sides": sides, "bits": 32, "moments": "fp32", "stats_every": 2}
    (plain, one), (fused, other) = (trained(4, kernels, **options) for kernels in (False, True))
    assert_alike(plain, fused, one, other)
    failed = 0
    for p, q in zip(one.state.values(), other.state.values(), strict=True):
        for key in (key for key in p if "failures" in key):
            assert torch.equal(q[key], p[key])
            failed += int(p[key].sum())
    assert failed > 0


@pytest.mark.parametrize("sides", ["auto", "both", "short"])
def test_steps_with_kernels_are_those_without_where_gradients_grow(sides: str) -> None:
    options = {"sides": sides, "bits": 32, "moments": "fp32", "stats_every": 2, "factor_beta": 0.95}
    (plain, one), (fused, other) = (trained(5, kernels, gradient=grown, **options) for kernels in (False, True))
    assert_alike(plain, fused, one, other)


def test_quantised_steps_with_kernels_train_alike() -> None:
    plain, fused = (trained(3, kernels, first_codebook="dynamic")[0] for kernels in (False, True))
    for p, q in zip(plain, fused, strict=True):
        assert torch.isclose(q, p, rtol=1e-3, atol=1e-3).float().mean() > 0.95


@pytest.mark.parametrize("stochastic", [False, True])
def test_bfloat16_weights_move_alike(stochastic: bool) -> None:
    options = {"bits": 32, "moments": "fp32", "stochastic_rounding": stochastic, "block_size": 8}
    plain, fused = (trained(2, kernels, torch.bfloat16, **options)[0] for kernels in (False, True))
    for p, q in zip(plain, fused, strict=True):
        torch.testing.assert_close(q.float(), p.float(), rtol=2e-2, atol=1e-3)
        assert not stochastic or (p == q).float().mean() > 0.9  # the noise is the same; a sum may be rounded otherwise


@pytest.mark.parametrize("rotated", [(True, True), (True, False), (False, True)])
def test_the_bound_on_the_bases_is_the_bound_on_what_they_rotate(rotated: tuple[bool, bool]) -> None:
    options = Options(bits=32)
    algorithm = Eigenbasis((12, 20), Momentum(Dense((12, 20))), *make_sides((12, 20), options, rotated), whitened=True)
    u = torch.randn(2, 12, 20)
    u[0, 3] *= 100
    u[1, :, 7] *= 100
    u[1, 5] = 0
    bases = [torch.randn(2, order, order) if has else None for order, has in zip((12, 20), rotated, strict=True)]
    expected = rotate(bases[0], algorithm._bounded(u, decays_of(options, 0.9), 0.98), bases[1])
    left, right = algorithm._bounding(u, *bases, decays_of(options, 0.9))
    torch.testing.assert_close(rotate(left, u, right), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(("shape", "vocabulary"), [((20, 24), False), ((60, 8), False), ((60, 8), True)])
def test_a_block_whose_squares_overflow_in_their_sum_alone_keeps_its_eigenvalues(
    shape: tuple[int, int], vocabulary: bool, kernels: bool
) -> None:
    """Each entry, its square and the sums of rows and columns are finite; the sum of all is not."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    optimizer = Shampoo4bit([{"params": [p], "vocabulary": vocabulary}], lr=0.05, stats_every=2, refresh_warmup=0)
    with pytest.MonkeyPatch.context() as patch:
        if kernels:
            with_kernels(patch)
        for large in (False, False, True):
            before = {key: t.clone() for key, t in optimizer.state[p].items() if "eigenvalues" in key}
            p.grad = torch.randn(shape).sign() * (1e18 if large else 1.0)
            optimizer.step()
    assert len(before) == 2
    for key, t in before.items():
        assert torch.equal(optimizer.state[p][key], t), key
    assert sum(int(t.sum()) for key, t in optimizer.state[p].items() if "failures" in key) == 1
    assert p.isfinite().all()
    assert optimizer.param_groups[0]["skipped_steps"] == 0
