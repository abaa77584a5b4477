"""The form of a parameter's state: which tensors there are, of which shapes, under which keys.

A key is "<block shape>/<tensor>.<buffer>", such as "64x64/left.basis.codes"; dim 0 of every tensor is the block.
Keys without a slash are not this optimizer's: they are carried along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..preconditioners.protocols import Algorithm

if TYPE_CHECKING:
    from .blocking import Block

Entry = dict[str, Tensor]


def state_layout(blocks: Sequence[Block]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """State key -> shape and dtype of the tensors that a parameter cut into `blocks` keeps."""
    layout = {}
    for algorithm in dict.fromkeys(block.algorithm for block in blocks):
        count = sum(block.algorithm == algorithm for block in blocks)
        for tensor, storage in algorithm.storages().items():
            for buffer, (shape, dtype) in storage.layout().items():
                layout[state_key(algorithm, tensor, buffer)] = ((count, *shape), dtype)
    return layout


def state_key(algorithm: Algorithm, tensor: str, buffer: str) -> str:
    """Where `optimizer.state[p]` keeps one buffer of the blocks that run `algorithm`."""
    return f"{'x'.join(map(str, algorithm.shape))}/{tensor}.{buffer}"


def blocks_key(state_key: str) -> str:
    """Where a part says of which blocks it has a kind of tensor."""
    return state_key.split("/")[0] + "/blocks"


def own(entry: Mapping[Any, Any]) -> Entry:
    """What of a parameter's state is this optimizer's."""
    return {key: t for key, t in entry.items() if isinstance(key, str) and "/" in key}


def foreign(entry: Mapping[Any, Any]) -> dict[Any, Any]:
    """What wrappers such as Lookahead keep in it."""
    return {key: value for key, value in entry.items() if not (isinstance(key, str) and "/" in key)}


def is_partial(entry: Entry) -> bool:
    """Whether an entry has a part of a parameter's blocks only."""
    return any(key.endswith("/blocks") for key in own(entry))
