"""The two sides' eigenvalues: their product is what gradients tell, and how it is shared stays within float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.numerics.storage import allocate
from hf_shampoo4.options import Options
from hf_shampoo4.preconditioners import eigenbasis
from hf_shampoo4.preconditioners.bases import DecodedSide, balance, make_sides


def run(
    shape: tuple[int, int], steps: int, rank: int | None = None, moved: float = 1.0, **options: object
) -> tuple[Tensor, list[Tensor]]:
    """A parameter after some steps, and its eigenvalues, left and right; after ten `moved` from one to the other."""
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Shampoo4bit([p], lr=1e-2, **options)
    for t in range(steps):
        generator = torch.Generator().manual_seed(t)
        if rank is None:
            p.grad = torch.randn(shape, generator=generator)
        else:
            p.grad = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
        optimizer.step()
        eigenvalues = [t for key, t in sorted(optimizer.state[p].items()) if "eigenvalues" in key]
        if t == 10:
            eigenvalues[0].div_(moved)
            eigenvalues[1].mul_(moved)
    return p.detach(), eigenvalues


@pytest.mark.parametrize(("shape", "rank"), [((128, 32), 1), ((32, 128), 1), ((48, 32), None)])
def test_the_sides_stay_together(shape: tuple[int, int], rank: int | None) -> None:
    """They were 25 decades apart after 500 steps of rank one, at the ends of float32 after 1,500."""
    _, (left, right) = run(shape, 500, rank)
    assert 1e-6 < left.max() / right.max() < 1e6


@pytest.mark.parametrize("algorithm", ["kl_shampoo", "kl_soap"])
@pytest.mark.parametrize("shape", [(48, 32), (128, 32), (32, 128)])
@pytest.mark.parametrize("bits", [4, 32])
def test_steps_are_the_same_bits(
    algorithm: str, shape: tuple[int, int], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"algorithm": algorithm, "bits": bits, "stats_every": 3}
    monkeypatch.setattr(eigenbasis, "BALANCED_EVERY", 10**9)
    without, apart = run(shape, 40, 1, **options)
    monkeypatch.setattr(eigenbasis, "BALANCED_EVERY", 7)
    balanced, together = run(shape, 40, 1, moved=2.0**20, **options)
    assert torch.equal(without, balanced)
    assert 2.0**-17 < together[0].max() / together[1].max() < 2.0**17
    assert torch.equal(apart[0].amax() * apart[1].amax(), together[0].amax() * together[1].amax())


@pytest.mark.parametrize("large", [1e5, 1e30, 3e38])
def test_from_the_ends_of_float32_they_come_back(large: float) -> None:
    options = Options(algorithm="kl_shampoo")
    sides = [
        DecodedSide(side, {name: allocate(storage, 3, "cpu") for name, storage in side.storages().items()})
        for side in make_sides((64, 64), options, (True, True))
    ]
    given = [torch.rand(3, 64) + 0.1 for _ in sides]
    scales = torch.tensor([[1.0], [large], [0.0]])
    for side, x, scale in zip(sides, given, (scales, torch.where(scales > 0, 1 / scales, 0.0)), strict=True):
        side.eigenvalues.copy_(x * scale)
    before = [side.eigenvalues.clone() for side in sides]
    balance(*sides)
    for side, x, old in zip(sides, given, before, strict=True):
        assert torch.equal(side.eigenvalues[0], old[0])
        assert not side.eigenvalues[2].any()
        power = side.eigenvalues[1] / x[1]
        assert 1e-2 < power.min() <= power.max() < 1e2
        assert torch.equal(side.largest, side.eigenvalues.amax(-1, keepdim=True))
