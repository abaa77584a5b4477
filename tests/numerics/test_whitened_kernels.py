"""The kernels of first moments and sums of squares in Triton's interpreter, against torch and float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_shampoo4.numerics import quantize
from hf_shampoo4.numerics.codebooks import CODEBOOKS, ONLY_4_BITS, levels
from hf_shampoo4.numerics.rounding import Noise
from hf_shampoo4.numerics.storage import Blockwise, Dense, allocate
from hf_shampoo4.preconditioners import whitened
from hf_shampoo4.preconditioners.moments import MomentStep
from hf_shampoo4.preconditioners.whitened import BasisUpdate, FusedMoment, WhitenedMoment, can_fuse

pytest.importorskip("triton", reason="Triton is not installed (the extra `triton`): its kernels are not tested")

SIGNED = sorted(name for name in CODEBOOKS if levels(name, 4)[0] < 0)
STORAGES = [("codes", name, bits) for name in SIGNED for bits in (4, 8) if bits == 4 or name not in ONLY_4_BITS]
STORAGES += [("dense", "", 32), ("dense", "", 16)]
SHAPES = [(2, 12, 24), (3, 7, 33), (1, 1, 5), (2, 33, 1)]
CPU = torch.device("cpu")


@pytest.fixture
def kernels() -> ModuleType:
    """The kernels, interpreted (conftest.py says so to Triton)."""
    return quantize.kernels("whitened")


def storage_of(kind: str, name: str, bits: int, shape: tuple[int, int]) -> Blockwise | Dense:
    if kind == "dense":
        return Dense(shape, torch.float32 if bits == 32 else torch.bfloat16)
    return Blockwise(shape, name, bits, 128 if bits == 4 else 256)


def scales(count: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.rand(count, m, 1) + 0.1, torch.rand(count, 1, n) + 0.1


def moments(
    storage: Any, count: int, start: Tensor, given: tuple[Tensor, Tensor]
) -> list[tuple[Any, dict[str, Tensor]]]:
    """The reference and the kernel's, on buffers of their own with the same content."""
    found = []
    for kind in (WhitenedMoment, FusedMoment):
        buffers = allocate(storage, count, "cpu")
        storage.write(buffers, start)
        found.append((kind(storage, buffers, given), buffers))
    return found


@pytest.mark.parametrize("settles", [False, True])
@pytest.mark.parametrize(("kind", "name", "bits"), STORAGES)
def test_a_moment_in_one_pass_is_the_references(
    kernels: ModuleType, kind: str, name: str, bits: int, settles: bool
) -> None:
    for (count, m, n), weight in zip(SHAPES, (0.1, 0.7, 0.5, 0.1), strict=True):
        storage = storage_of(kind, name, bits, (m, n))
        (plain, stored), (fused, fused_stored) = moments(storage, count, torch.randn(count, m, n), scales(count, m, n))
        exact, g, new = plain.exact.double(), torch.randn(count, n, m).mT, scales(count, m, n)
        g = torch.where(torch.arange(n) % 3 == 1, 0.0, g)
        noise = Noise(torch.arange(count, dtype=torch.int32) * 1000 - 7, 3, 5)
        at = MomentStep((1 - weight, 0.99), 1e-8, torch.arange(1.0, count + 1), noise if settles else None)
        for moment in (plain, fused):
            moment.add(g, weight)
            moment.carry([])
        u, fused_u = plain.step(new, at), fused.step(new, at)
        torch.testing.assert_close(fused_u, u, rtol=1e-6, atol=1e-6)
        right = (exact + weight * (g.double() - exact)) / new[0].double() / new[1].double()
        right /= (1 - at.betas[0] ** at.steps.double()).view(-1, 1, 1)
        torch.testing.assert_close(fused_u.double(), right, rtol=2e-6, atol=2e-6)
        # a rounding may move a number over a threshold, to the neighbouring code
        close = torch.isclose(storage.read(fused_stored), storage.read(stored), rtol=1e-2 if bits == 16 else 1e-5)
        assert close.float().mean() > 0.99


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 2), torch.tensor([0, 2])], ids=["all", "one", "spaced"])
def test_blocks_whose_bases_turned_are_carried_over_and_no_others(kernels: ModuleType, bits: int, rows: Any) -> None:
    count, m, n = 3, 6, 10
    storage = storage_of("dense" if bits == 32 else "codes", "dynamic", bits, (m, n))
    (plain, stored), (fused, fused_stored) = moments(storage, count, torch.randn(count, m, n), scales(count, m, n))
    g, new, some = torch.randn(count, m, n), scales(count, m, n), torch.arange(count)[rows]
    updates = [
        BasisUpdate(
            rows, torch.linalg.qr(torch.randn(len(some), m, m)).Q, torch.linalg.qr(torch.randn(len(some), n, n)).Q
        )
    ]
    for moment in (plain, fused):
        moment.add(g, 0.1)
        moment.carry(updates)
    at = MomentStep((0.9, 0.99), 1e-8, torch.full((count,), 3.0))
    torch.testing.assert_close(fused.step(new, at), plain.step(new, at), rtol=1e-5, atol=1e-5)
    close = torch.isclose(storage.read(fused_stored), storage.read(stored), rtol=1e-4, atol=1e-6)
    assert close.float().mean() > 0.98


def test_two_groups_of_blocks_are_carried_over_each_with_its_rotation(kernels: ModuleType) -> None:
    storage = Dense((4, 3))
    (plain, _), (fused, _) = moments(storage, 4, torch.randn(4, 4, 3), scales(4, 4, 3))
    g, new = torch.randn(4, 4, 3), scales(4, 4, 3)
    turn = torch.linalg.qr(torch.randn(3, 3, 3)).Q
    updates = [BasisUpdate(torch.tensor([3, 0]), None, turn[:2]), BasisUpdate(slice(1, 2), None, turn[2:])]
    for moment in (plain, fused):
        moment.add(g, 0.1)
        moment.carry(updates)
    at = MomentStep((0.9, 0.99), 1e-8, torch.full((4,), 3.0))
    torch.testing.assert_close(fused.step(new, at), plain.step(new, at), rtol=1e-5, atol=1e-5)


def test_a_moment_without_blocks_and_one_that_is_not_a_number(kernels: ModuleType) -> None:
    storage = Blockwise((4, 6), "nf4", 4, 128)
    at = MomentStep((0.9, 0.99), 1e-8, torch.ones(0))
    fused = FusedMoment(storage, allocate(storage, 0, "cpu"), scales(0, 4, 6))
    fused.add(torch.zeros(0, 4, 6), 0.1)
    assert fused.step(scales(0, 4, 6), at).shape == (0, 4, 6)
    for value, becomes in ((torch.nan, torch.nan), (torch.inf, whitened.LARGEST / 0.1), (1e38, whitened.LARGEST / 0.1)):
        for moment, _ in moments(storage, 1, torch.zeros(1, 4, 6), (torch.ones(1, 4, 1), torch.ones(1, 1, 6))):
            g = torch.zeros(1, 4, 6)
            g[0, 1, 2] = value
            moment.add(g, 0.1)
            u = moment.step(
                (torch.full((1, 4, 1), 1e-9), torch.ones(1, 1, 6)), MomentStep((0.9, 0.99), 0, torch.ones(1))
            )
            torch.testing.assert_close(u[0, 1, 2], torch.tensor(becomes), equal_nan=True)
            assert u.nan_to_num().count_nonzero() == (value == value)


def test_what_a_kernel_cannot_do_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    four, eight = Blockwise((4, 6), "nf4", 4, 128), Blockwise((4, 6), "dynamic", 8, 256)
    at = MomentStep((0.9, 0.99), 1e-8, torch.ones(1))
    assert not can_fuse(four, at, CPU)
    monkeypatch.setattr(whitened, "has_kernels", lambda device, block: True)
    assert all(can_fuse(storage, at, CPU) for storage in (four, eight, Dense((4, 6)), Dense((4, 6), torch.bfloat16)))
    stochastic = MomentStep(at.betas, at.eps, at.steps, stochastic_first=True)
    assert [can_fuse(storage, stochastic, CPU) for storage in (four, eight)] == [False, True]
    assert not can_fuse(four, MomentStep(at.betas, at.eps, at.steps, watch=lambda exact: None), CPU)
    assert not can_fuse(Dense((4, 6), torch.float64), at, CPU)


@pytest.mark.parametrize("shape", [(2, 20, 300), (3, 17, 1), (1, 1, 129), (0, 4, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_squares_in_one_pass(kernels: ModuleType, shape: tuple[int, int, int], weighted: bool) -> None:
    count, m, n = shape
    x = torch.randn(count, n, m).mT
    weights = (torch.rand(count, m), torch.rand(count, n)) if weighted else (None, None)
    squares = x.double().square()
    of_rows, of_columns = weights if weighted else (torch.ones(count, m), torch.ones(count, n))
    found = kernels.square_sums(x, *weights, rows=True, columns=True, whole=True)
    torch.testing.assert_close(found.rows.double(), (squares * of_columns.unsqueeze(1)).sum(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.columns.double(), (squares * of_rows.unsqueeze(2)).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.all.double(), squares.sum((1, 2)), rtol=1e-5, atol=1e-6)
    only = kernels.square_sums(x, *weights, columns=True)
    assert (only.rows, only.all) == (None, None)
    assert torch.equal(only.columns, found.columns)


def test_bad_blocks_are_cleared_and_good_ones_left(kernels: ModuleType) -> None:
    x = torch.randn(3, 41, 60)
    x[1, 2, 3] = torch.inf
    expected = x.clone()
    expected[1] = 0
    kernels.clear(x, torch.tensor([True, False, True]))
    assert torch.equal(x, expected)
