"""How much memory operations take, seen from the tensors that they give."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Allocated(TorchDispatchMode):
    """The most bytes of new tensors that were alive at once (what an operation needs inside is not seen)."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and storage_of(tensor) not in given | self.alive.keys():
                self.alive[storage_of(tensor)] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.alive.pop, storage_of(tensor), None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result
