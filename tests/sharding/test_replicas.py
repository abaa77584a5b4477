"""Whose parameters are whose: the wrappers that are looked up among all objects of a process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_shampoo4.sharding.replicas import wrappers


class Wrapper(DistributedDataParallel):
    """A library's own, without the process group that its base asks for."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


class Again(Wrapper):
    """Of a user."""


@pytest.mark.parametrize("kind", [Wrapper, Again])
def test_wrappers_of_any_class_are_found_by_their_parameters(kind: type[Wrapper]) -> None:
    mine, _other = kind(nn.Linear(2, 2)), kind(nn.Linear(2, 2))
    found = [wrapper() for wrapper in wrappers(list(mine.parameters())[:1])]
    assert found == [mine]
    assert wrappers([torch.zeros(2)]) == []
