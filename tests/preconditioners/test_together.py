"""preconditioners/together.py: how many bases are updated at once."""

from __future__ import annotations

import pytest
import torch

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.preconditioners import together


@pytest.mark.parametrize(("at_once", "calls"), [(1 << 25, [2]), (100, [1, 1])])
def test_bases_of_one_stack_are_updated_at_once_only_as_far_as_there_is_memory(
    at_once: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    update_bases = together.update_bases
    monkeypatch.setattr(together, "update_bases", lambda steps: found.append(len(steps)) or update_bases(steps))
    monkeypatch.setattr(together, "AT_ONCE", at_once)
    monkeypatch.setattr(together, "ALONE", ())  # as on a GPU
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = Shampoo4bit([weight], lr=1e-2)
    weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert found == calls
