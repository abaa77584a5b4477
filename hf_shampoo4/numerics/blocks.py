"""Some blocks of a stack: where they are in its buffers, and how their state is read, written and taken back.

Dim 0 of every buffer is the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Union

import torch
from torch import Tensor

Buffers = dict[str, Tensor]
State = dict[str, Buffers]
"""Tensor name -> its buffers: the state of a stack."""
Index = Union[slice, Tensor]


def index_of(rows: list[int], device: torch.device) -> Index:
    """Some blocks of a stack: a slice if they follow each other, as those that are refreshed together do.

    To index by a tensor is to copy, and to make one of a list on a GPU is to wait for it.
    """
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return on_device(tuple(rows), torch.long, device)


@lru_cache(maxsize=1 << 14)
def on_device(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of some numbers, not to be written to; made once, as the host waits for the device then."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def covers(index: Index, blocks: int) -> bool:
    """Whether an index is of all blocks of a stack."""
    return isinstance(index, slice) and index == slice(0, blocks)


def gather_blocks(state: State, index: Index) -> State:
    """The state of some blocks of a stack: views for a slice, copies for a tensor of positions."""
    return {tensor: {name: buffer[index] for name, buffer in buffers.items()} for tensor, buffers in state.items()}


def scatter_blocks(state: State, index: Index, some: State) -> None:
    """Copy what `gather_blocks` has copied back."""
    if isinstance(index, slice):
        return
    for tensor, buffers in some.items():
        for name, buffer in buffers.items():
            state[tensor][name][index] = buffer


def joined(states: Sequence[State]) -> State:
    """The state of the blocks of several, one after the other: a copy, unless it is of one alone."""
    if len(states) == 1:
        return states[0]
    return {
        tensor: {name: torch.cat([state[tensor][name] for state in states]) for name in buffers}
        for tensor, buffers in states[0].items()
    }


def scatter_joined(places: Sequence[tuple[State, Index]], some: Sequence[State], state: State) -> None:
    """Copy what `gather_blocks` and `joined` have copied back.

    Args:
        places: whole states and rows, of which `some` were gathered.
        some: what was joined.
        state: what it was joined to.
    """
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for tensor, buffers in state.items() if len(some) > 1 else ():
        for name, buffer in buffers.items():
            targets += [of_one[tensor][name] for of_one in some]
            values += buffer.split([len(of_one[tensor][name]) for of_one in some])
    if targets:
        torch._foreach_copy_(targets, values)
    for (whole, rows), of_one in zip(places, some, strict=True):
        scatter_blocks(whole, rows, of_one)


def add_to_blocks(buffer: Tensor, index: Index, x: Tensor) -> None:
    """Add x (b, ...) to some rows of a buffer."""
    if isinstance(index, slice):
        buffer[index].add_(x)  # += would copy the rows onto themselves
    else:
        buffer[index] += x


@contextmanager
def changed_if(counts: Tensor | None, buffers: Sequence[tuple[Tensor, Index]]) -> Iterator[None]:
    """Rows of some buffers that are changed inside are as before afterwards, unless the step `counts`.

    Args:
        counts: bool of no dimension, on the device; None: it does, and nothing is copied.
    """
    if counts is None or not buffers:
        yield
        return
    views = [_bytes(buffer[rows]) for buffer, rows in buffers if isinstance(rows, slice)]
    rest = [(buffer, rows, buffer[rows]) for buffer, rows in buffers if not isinstance(rows, slice)]
    before = torch.cat(views) if views else None  # all at once: four launches, however many buffers there are
    yield
    if before is not None:
        after = torch.where(counts, torch.cat(views), before)
        torch._foreach_copy_(views, after.split([len(view) for view in views]))
    for buffer, rows, old in rest:
        buffer[rows] = torch.where(counts, buffer[rows], old)


def _bytes(x: Tensor) -> Tensor:
    """uint8 (bytes,), a view of a contiguous tensor."""
    return x.view(-1).view(torch.uint8)
