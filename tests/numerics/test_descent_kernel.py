"""The kernel of a parameter's update in Triton's interpreter, against torch and float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from hf_shampoo4.numerics import quantize
from hf_shampoo4.numerics.rounding import noise_at, to_bfloat16

pytest.importorskip("triton", reason="Triton is not installed (the extra `triton`): its kernels are not tested")


@pytest.fixture
def kernels() -> ModuleType:
    """The kernels, interpreted (conftest.py says so to Triton)."""
    return quantize.kernels("descent")


class Pieces:
    """Rectangles of some parameters, and their updates in one memory."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, count: int = 3) -> None:
        rows, columns = shape
        self.whole = [torch.randn(rows + 2, columns + 3).to(dtype) for _ in range(count)]
        self.before = [p.clone() for p in self.whole]
        self.targets = [p[1 : rows + 1, 2 : columns + 2] for p in self.whole]
        self.memory = torch.randn(count + 1, rows, columns + 1)
        self.updates = [u[:, 1:] for u in self.memory[1:].flip(0)]

    def descend(self, kernels: ModuleType, keep: float, lr: float, **other: object) -> None:
        kernels.descend(
            torch.tensor([t.data_ptr() for t in self.targets], dtype=torch.int64),
            self.targets[0].dtype,
            self.updates[0]._base.flatten(),
            torch.tensor([u.storage_offset() for u in self.updates]),
            tuple(self.targets[0].shape),
            (self.targets[0].stride(0), self.updates[0].stride(0)),
            keep,
            lr,
            **other,
        )

    def others_are_left(self) -> bool:
        inside = [p.clone() for p in self.before]
        for p, target in zip(inside, self.targets, strict=True):
            p[1 : target.shape[0] + 1, 2 : target.shape[1] + 2] = target
        return all(torch.equal(p, q) for p, q in zip(inside, self.whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (40, 33)])
def test_pieces_of_many_tensors_in_one_pass(kernels: ModuleType, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    pieces = Pieces(shape, dtype)
    exact = [t.double() * 0.99 - 0.3 * u.double() for t, u in zip(pieces.targets, pieces.updates, strict=True)]
    pieces.descend(kernels, 0.99, 0.3)
    ulp = 2 * torch.finfo(dtype).eps  # the interpreter cuts bfloat16 off
    for target, right in zip(pieces.targets, exact, strict=True):
        torch.testing.assert_close(target.double(), right, rtol=ulp, atol=ulp)
    assert pieces.others_are_left()


@pytest.mark.parametrize(("step", "seed"), [(1, 0), (123_456, 2**31 + 7)])
def test_stochastic_rounding_has_the_references_noise_bit_for_bit(kernels: ModuleType, step: int, seed: int) -> None:
    pieces, seed_offsets = Pieces((7, 30), torch.bfloat16), torch.tensor([5, -(1 << 31), 77], dtype=torch.int32)
    row, column, width = 40, 3, 100

    def expected(i: int, target: Tensor, update: Tensor) -> Tensor:
        positions = ((row + torch.arange(7)).unsqueeze(1) * width + column + torch.arange(30)).flatten().int()
        noise = noise_at(seed_offsets[i : i + 1], step, seed, positions).view(7, 30)
        return to_bfloat16(target.float() - 0.5 * update, noise)

    right = [expected(i, t, u) for i, (t, u) in enumerate(zip(pieces.targets, pieces.updates, strict=True))]
    pieces.descend(kernels, 1.0, 0.5, noise=(seed_offsets, step, seed), at=(row, column, width))
    assert all(torch.equal(t, r) for t, r in zip(pieces.targets, right, strict=True))
    assert pieces.others_are_left()


def test_a_step_that_does_not_count_changes_nothing_and_no_piece_is_none(kernels: ModuleType) -> None:
    pieces = Pieces((4, 6), torch.float32)
    pieces.memory[1] = torch.nan
    pieces.descend(kernels, 0.5, 0.3, counts=torch.tensor(False))
    assert all(torch.equal(p, q) for p, q in zip(pieces.whole, pieces.before, strict=True))
    pieces = Pieces((4, 6), torch.float32)
    pieces.descend(kernels, 0.5, 0.0, counts=torch.tensor(True))
    assert torch.equal(pieces.targets[0], pieces.before[0][1:5, 2:8] * 0.5)
    none = torch.zeros(0, dtype=torch.int64)
    kernels.descend(none, torch.float32, torch.zeros(1), none, (4, 6), (6, 6), 1.0, 1.0)
