"""No operation without use: what a step computes is what its closed form says, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_shampoo4 import Shampoo4bit


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


def stepped(shape: tuple[int, ...], steps: int = 2, **options: Any) -> Shampoo4bit:
    """An optimizer of one parameter that has its state and a gradient for the next step."""
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Shampoo4bit([p], **{"refresh_warmup": 0, **options})
    for _ in range(steps):
        p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("algorithm", ["soap", "kl_shampoo", "kl_soap"])
@pytest.mark.parametrize(("shape", "vocabulary"), [((520, 8), False), ((8, 520), False), ((520, 8), True)])
def test_nothing_of_rows_by_rows_of_a_side_without_a_basis(
    algorithm: str, shape: tuple[int, int], vocabulary: bool
) -> None:
    optimizer = stepped(shape, algorithm=algorithm, vocabulary=vocabulary, stats_every=1)
    with Shapes() as shapes:
        optimizer.step()
    assert any(seen.count(8) > 1 for seen in shapes.seen)
    assert not any(seen.count(520) > 1 for seen in shapes.seen)
