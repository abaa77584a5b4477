"""A wave's state in each of its forms: on its owners, whole as a checkpoint has it, or one rank's blocks of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..exceptions import CheckpointError
from ..sharding.agreement import all_or_none
from ..sharding.local_parameter import local_tensor
from .state_layout import Entry, StateKey, is_partial, state_layout
from .state_map import StateMap

if TYPE_CHECKING:
    from .waves import BlockStack, Wave


class WaveState:
    """The state of a wave's members; `Entry` is one member's, state key -> tensor, dim 0 the block."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave

    @cached_property
    def map(self) -> StateMap:
        """Between local and full state."""
        return StateMap(self.wave)

    def local(self) -> dict[int, Entry]:
        """Member -> the rows of its state that this rank keeps, as views of the stacks.

        Every rank has every key, of kinds of blocks that it keeps none of with no row: torch asks a rank's own state
        for the keys of a flattened state dict.
        """
        wave = self.wave
        found: dict[int, Entry] = {}
        for m, member in enumerate(wave.members):
            layout = state_layout(member.blocks).items()
            found[m] = {
                key: torch.empty((0, *shape[1:]), dtype=dtype, device=wave.device) for key, (shape, dtype) in layout
            }
        for stack in wave.stacks:
            start, state = 0, stack.state
            for m in self._members_of(stack):
                count = sum(wave.member_of[block] == m for block in stack.blocks)
                for tensor, buffers in state.items():
                    for name, buffer in buffers.items():
                        key = str(StateKey.of(stack.algorithm.shape, tensor, name))
                        found[m][key] = buffer[start : start + count]
                start += count
        return found

    def lent(self) -> dict[int, Entry]:
        """`local`, for `optimizer.state`, which has the memory from now on."""
        found = self.local()
        for stack in self.wave.stacks:
            shape, members = stack.algorithm.shape, self._members_of(stack)
            for tensor, name in [(tensor, name) for tensor, buffers in stack.state.items() for name in buffers]:
                key = str(StateKey.of(shape, tensor, name))
                stack.lend(tensor, name, [found[m][key] for m in members])
        return found

    def _members_of(self, stack: BlockStack) -> list[int]:
        return sorted({self.wave.member_of[block] for block in stack.blocks})

    def full(self, entries: Sequence[Entry] | None = None) -> dict[int, Entry]:
        """Member -> its whole state in canonical block order, with no rank in it; every rank must call it.

        Plain tensors for a parameter that is whole on every rank, DTensors with the blocks sharded over the
        parameter's mesh for one that is a DTensor.

        Args:
            entries: what `optimizer.state` has of the members; default: what the stacks have.

        Raises:
            RuntimeError: see `StateMap.local_rows`.
        """
        if self.wave.replicated:
            return self.local() if entries is None else dict(enumerate(entries))
        with all_or_none(self.wave.ranks):
            local, rows = self.map.local_rows(entries), self.map.empty_rows()
        self.map.save(local, rows)
        return self.map.entries(rows)

    def partial(self, entries: Sequence[Entry]) -> dict[int, Entry]:
        """Member -> the part of its state that this rank keeps (checkpointing/formats.py); plain tensors.

        Args:
            entries: what `optimizer.state` has of the members.

        Raises:
            RuntimeError: see `StateMap.local_rows`.
        """
        found: dict[int, Entry] = {m: {} for m in range(len(self.wave.members))}
        for (m, _), rows in zip(self.map.groups, self.map.local_rows(entries), strict=True):
            found[m].update({key: t for key, t in rows.items() if len(t)})
        for g, (m, algorithm) in enumerate(self.map.groups):
            kept = torch.tensor(self.map.kept_blocks(g), dtype=torch.long, device="cpu")
            found[m][StateKey.of(algorithm.shape).blocks] = kept
        return found

    def named_blocks(self, entries: Sequence[Entry] | None = None, owned: bool = False) -> dict[str, Tensor]:
        """The state that this rank keeps, block by block: the name of a row, see `row_name` -> a view.

        Args:
            entries: what `optimizer.state` has of the members; default: what the stacks have.
            owned: of its own blocks alone, so that every row is some rank's and no row is two ranks'.

        Raises:
            RuntimeError: see `StateMap.local_rows`.
        """
        local_rows = self.map.local_rows(entries)
        return {
            row_name(self.wave.members[m].name, key, k): t[i]
            for g, (m, _) in enumerate(self.map.groups)
            for key, t in local_rows[g].items()
            for i, k in enumerate(self.map.kept_blocks(g))
            if not owned or self.map.parameters[g].owners[k] == self.wave.ranks.rank
        }

    def check(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Make sure that `load` can take the members' state over.

        Raises:
            CheckpointError: partial state of other blocks than are this rank's here; DTensors that are cut otherwise.
            ValueError: state of a parameter of another shape.
        """
        for entry, member in zip(saved, self.wave.members, strict=True):
            layout = state_layout(member.blocks)
            if entry and not is_partial(entry) and not _fits(entry, layout):
                raise ValueError(
                    f"the state of {member.name!r} does not fit its shape, {member.local.shape}, any more: delete it "
                    "(del optimizer.state[parameter]) to begin afresh"
                )
        for g, (m, algorithm) in enumerate(self.map.groups):
            there, here = saved[m].get(StateKey.of(algorithm.shape).blocks), self.map.kept_blocks(g)
            if there is not None and there.tolist() != here:
                raise CheckpointError(
                    f"the checkpoint has blocks {_few(there.tolist())} of {self.wave.members[m].name!r} for this rank, "
                    f"which has {_few(here)} here: another number of ranks, ZeRO stage or configuration of DeepSpeed.  "
                    "Make one file of it that fits any: hf-shampoo4 checkpoint convert DIR, and give that to "
                    "optimizer.load_state_dict"
                )
            if not self.map.lies_as_saved(g, saved[m]):
                raise CheckpointError(
                    f"the state of {self.wave.members[m].name!r} is DTensors, cut over ranks otherwise than the "
                    "parameter is now: save and load by torch.distributed.checkpoint (dcp.load into "
                    "optimizer.state_dict()), which fits any layout, or call full_tensor() on each before it is saved"
                )

    def whole_here(self, saved: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Whether this rank has all blocks of each member's saved state, as plain tensors."""
        found = [bool(entry) and not is_partial(entry) for entry in saved]
        for g, (m, _) in enumerate(self.map.groups):
            there = [saved[m].get(key) for key in self.map.layout(g)]
            count = len(self.map.parameters[g].rects)
            found[m] &= all(t is not None and not hasattr(t, "to_local") and len(t) == count for t in there)
        return found

    def load(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Take over what there is of the members' state, full or local; every rank must call it.

        Raises:
            ValueError: a tensor with neither all blocks nor those of this rank.
        """
        with all_or_none(self.wave.ranks):
            if self.wave.replicated:  # each rank keeps all rows, and has them all
                saved = [{key: local_tensor(t) for key, t in entry.items()} for entry in saved]
            are_dtensors = self.map.are_dtensors(saved)
            rows = self.map.dtensor_rows(saved) if any(are_dtensors) else []
            self.copy_whole(saved, are_dtensors)
        if any(are_dtensors):
            self.map.load(rows, are_dtensors)

    def copy_whole(self, saved: Sequence[Mapping[str, Any]], are_dtensors: Sequence[bool]) -> None:
        """Take over what this rank has all it needs of: plain tensors of all blocks, or of its own."""
        found: list[tuple[Tensor, Tensor]] = []
        local_rows = self.map.local_rows()
        for g, (m, _) in enumerate(self.map.groups):
            if are_dtensors[g]:
                continue
            mine, count = self.map.kept_blocks(g), len(self.map.parameters[g].rects)
            for key, local in local_rows[g].items():
                there = saved[m].get(key)
                if there is None:
                    continue
                if len(there) not in (len(local), count):
                    name = self.wave.members[m].name
                    raise ValueError(f"state of {name!r}: {key} has {len(there)} blocks, expected {count}")
                there = there if len(there) == len(local) else there[mine]
                if there.data_ptr() != local.data_ptr() or there.device != local.device:
                    found.append((local, there.clone() if _share_memory(there, local) else there))
        for local, there in found:  # entries may have been exchanged
            local.copy_(there)


def _fits(entry: Mapping[str, Any], layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bool:
    """Whether an entry has the tensors of a layout, whatever the number of blocks."""
    rows = {key: shape[1:] for key, (shape, _) in layout.items()}
    return {key: tuple(tensor.shape[1:]) for key, tensor in entry.items()} == rows


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def row_name(parameter: str, key: str, block: int) -> str:
    """What one block's tensor is called where blocks are stored by themselves: "<parameter>/<state key>/<block>"."""
    return f"{parameter}/{key}/{block}"


def parse_row_name(name: str) -> tuple[str, str, int]:
    """Parameter (whose name may have slashes), state key and block of a row; the inverse of `row_name`."""
    parameter, shape, tensor, block = name.rsplit("/", 3)
    return parameter, f"{shape}/{tensor}", int(block)


def _few(numbers: list[int]) -> str:
    return f"{numbers}" if len(numbers) <= 4 else f"{numbers[:4]} and {len(numbers) - 4} more"
