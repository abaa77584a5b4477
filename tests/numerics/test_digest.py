"""The number of the bits of tensors: the same for the same bits, another for others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_shampoo4.numerics.digest import COLUMNS, digest
from hf_shampoo4.planning.launches import LaunchCounter

KINDS = {
    "matrix": lambda: torch.randn(130, 97),
    "bfloat16": lambda: torch.randn(37, 5, dtype=torch.bfloat16),
    "codes": lambda: torch.randint(0, 256, (3, 41), dtype=torch.uint8),
    "number": lambda: torch.randn(()),
    "flags": lambda: torch.rand(9) > 0.5,
}


def bits(t: Tensor) -> Tensor:
    return t.view(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_any_bit_that_changes_is_seen(kind: str) -> None:
    torch.manual_seed(0)
    t, beside = KINDS[kind](), torch.ones(3)
    found = digest([t, beside])
    assert found.dtype == torch.float64
    assert found == digest([t.clone(), beside])
    assert found == found.round()
    assert abs(found) < 2**47
    for i in torch.randint(0, bits(t).numel(), (20,)).tolist():
        changed = t.clone()
        bits(changed)[i] ^= 1 << (i % (1 if kind == "flags" else 8))
        assert digest([changed, beside]) != found


def test_changes_that_add_up_to_nothing_are_seen() -> None:
    """Last bits that go up in one place and down in another, and numbers that change places."""
    x = torch.ones(8 * COLUMNS)
    found = digest([x])
    up, down = x.view(torch.int32).clone(), torch.arange(1, 9)
    up[0] += 1
    up[2 * down] -= 1
    up[18:25] += 1
    assert up.sum() == x.view(torch.int32).sum()
    assert digest([up]) != found
    a, b = torch.randn(4), torch.randn(4)
    assert digest([a, b]) != digest([b, a])
    assert digest([a]) != digest([a.flip(0)])


def test_memory_may_lie_as_it_will() -> None:
    x = torch.randn(64, 33)
    assert digest([x[:, 3:9]]) == digest([x[:, 3:9].clone()])
    assert digest([x.view(-1)[1:1001]]) == digest([x.view(-1)[1:1001].clone()])
    assert digest([x[:0], x]) == digest([x])


def test_a_tensor_is_read_once_in_one_launch() -> None:
    tensors = [torch.empty(512, 512, device="meta") for _ in range(20)]
    with LaunchCounter() as counter:
        digest(tensors)
    assert counter.found.total() < len(tensors) + 15
    moved = counter.found.summary(1)["bytes"]
    assert moved < 1.2 * sum(4 * t.numel() for t in tensors)
