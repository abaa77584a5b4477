"""The form of a parameter's state: which tensors there are, of which shapes, under which keys (`StateKey`).

Dim 0 of every tensor is the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .blocking import Block

Entry = dict[str, Tensor]
"""State key -> tensor, of one parameter."""

BLOCKS = "blocks"


class StateKey(NamedTuple):
    """Where `optimizer.state[p]` keeps one buffer: "<block shape>/<tensor>.<buffer>", "64x64/left.basis.codes".

    Keys without a slash are not this optimizer's: they are kept as they are.
    """

    shape: str
    """Of a block, as its algorithm sees it: "64x64"."""
    tensor: str
    """What is kept, such as "left.basis"."""
    buffer: str
    """What its storage makes of it, such as "codes"."""

    @staticmethod
    def of(shape: tuple[int, ...], tensor: str = "", buffer: str = "") -> StateKey:
        """The key of a buffer of blocks of `shape`."""
        return StateKey("x".join(map(str, shape)), tensor, buffer)

    @staticmethod
    def parse(key: str) -> StateKey:
        """The inverse of `str`."""
        shape, _, rest = key.partition("/")
        tensor, _, buffer = rest.rpartition(".")
        return StateKey(shape, tensor, buffer)

    def __str__(self) -> str:
        return f"{self.shape}/{self.tensor}.{self.buffer}"

    @property
    def kind(self) -> str:
        """The tensor without its side: "basis"."""
        return self.tensor.rpartition(".")[2]

    @property
    def blocks(self) -> str:
        """The key under which partial state says which blocks of this shape it has."""
        return f"{self.shape}/{BLOCKS}"


def is_own(key: Any) -> bool:
    """Whether a key of a parameter's state is this optimizer's."""
    return isinstance(key, str) and "/" in key


def names_blocks(key: str) -> bool:
    """Whether what is under a key says which blocks there are."""
    return key.endswith(f"/{BLOCKS}")


def state_layout(blocks: Sequence[Block]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """State key -> shape and dtype of the tensors that a parameter cut into `blocks` keeps."""
    layout = {}
    for algorithm in dict.fromkeys(block.algorithm for block in blocks):
        count = sum(block.algorithm == algorithm for block in blocks)
        for tensor, storage in algorithm.storages().items():
            for buffer, (shape, dtype) in storage.layout().items():
                layout[str(StateKey.of(algorithm.shape, tensor, buffer))] = ((count, *shape), dtype)
    return layout


def own_state(entry: Mapping[Any, Any]) -> Entry:
    """What of a parameter's state is this optimizer's."""
    return {key: t for key, t in entry.items() if is_own(key)}


def foreign_state(entry: Mapping[Any, Any]) -> dict[Any, Any]:
    """What wrappers such as Lookahead keep in it."""
    return {key: value for key, value in entry.items() if not is_own(key)}


def is_partial(entry: Mapping[Any, Any]) -> bool:
    """Whether an entry has a part of a parameter's blocks only."""
    return any(names_blocks(key) for key in own_state(entry))
