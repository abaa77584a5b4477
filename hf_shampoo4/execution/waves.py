"""Stacks of equal blocks, and the waves in which gradients reach them and updates go back.

A *stack* is all blocks of a wave that share an algorithm description (hence a shape), as one (B, m, n) tensor; its
state buffers have B rows, and `optimizer.state[p]` holds the rows of parameter p as views, under its `StateKey`.  These
views alone keep a buffer alive: who moves the state elsewhere, or empties it, frees its memory.

A *wave* is as many whole parameters as have room (`blocking.wave_elements`); one that does not fit, a large embedding,
is a wave of several *parts*, which are computed one after the other.  That bounds the memory that a step needs at a
time, whatever the size of the model.

A block's owner updates it, and sends the result to all that hold it.  Where every rank holds all of a parameter (one
process, DDP), every rank keeps all state too: owners send what a step has changed of it along.  There every rank may
also update all blocks itself (`apply`), but for those that are refreshed in a step.  Everywhere else a block's owner
alone keeps its state.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..numerics.blocks import Index, State, gather_blocks, index_of, on_device, scatter_blocks
from ..numerics.storage import allocate
from ..options import Options
from ..preconditioners.protocols import Algorithm, blocks_that_change
from ..sharding.exchange import Ranks
from ..sharding.geometry import MatrixView, Rect
from ..sharding.local_parameter import LocalParameter, overlapping
from ..sharding.placement import Placement, whole
from ..sharding.route import BlockedParameter, Route, route
from .blocking import Block, in_parts
from .state_map import Rows
from .wave_state import WaveState


@dataclass
class WaveParameter:
    """A parameter of a wave."""

    local: LocalParameter
    placement: Placement
    blocks: list[Block]
    owners: list[int]
    """Of the blocks, in canonical order."""
    room: int
    """How many entries its wave may have on a rank."""
    phases: list[float] = field(default_factory=list)
    """Of the blocks, see `blocking.phases_of`."""
    updates: int = 0
    """How many it has had, which all ranks count alike."""

    @property
    def name(self) -> str:
        """The same in every run and on every rank."""
        return self.local.name

    @property
    def parameter(self) -> Tensor:
        """The model's."""
        return self.local.parameter

    @property
    def kind(self) -> Hashable:
        """What the parameters of a wave have in common."""
        return self.local.buffer.device, self.local.buffer.dtype

    @property
    def numel(self) -> int:
        """Entries of all of it."""
        return self.local.numel

    @property
    def shard_count(self) -> int:
        """Into how many the ranks have cut it."""
        return len(self.placement.shards)

    def gradient(self) -> Tensor:
        """What this rank has of its gradient, flat and in its own dtype; zeros if there is none."""
        found = self.local.gradient()
        return torch.zeros_like(self.local.weights()) if found is None else found

    @cached_property
    def seed_offsets(self) -> list[int]:
        """One number a block, for stochastic rounding."""
        return [zlib.crc32(f"{self.name}:{k}".encode()) - (1 << 31) for k in range(len(self.blocks))]

    def positions_of(self, algorithm: Algorithm) -> list[int]:
        """Its blocks that run `algorithm`: block i is row `positions_of(algorithm).index(i)` of the saved state."""
        return [i for i, block in enumerate(self.blocks) if block.algorithm == algorithm]


@dataclass
class BlockStack:
    """Equal blocks of a wave, and their state."""

    algorithm: Algorithm
    blocks: list[int]
    """Their positions in the wave."""
    membership: Tensor
    """float32 (members, B): 1 where the block belongs to the member."""
    seed_offsets: Tensor
    """int32 (B,)."""
    phases: list[float]
    """Of the blocks, in [0, 1)."""
    held: State = field(default_factory=dict)
    """What is not lent."""
    lent: dict[tuple[str, str], list[weakref.ref[Tensor]]] = field(default_factory=dict)
    """Tensor and buffer of it -> the views in `optimizer.state`, of each member one."""
    updates: list[int] = field(default_factory=list)
    """How many each block has had, while a step works on it: this one included."""

    @property
    def state(self) -> State:
        """Tensor -> buffer of it -> (B, ...).  What is lent and gone begins afresh, until it is loaded again."""
        if not self.lent:
            return self.held
        found: State = {}
        for (tensor, name), views in self.lent.items():
            view: Any = views[0]()
            if view is None:
                view = _first(views)
            if view is None:
                self._begin_afresh()
                return self.held
            found.setdefault(tensor, {})[name] = view._base
        for tensor, buffers in self.held.items():
            found.setdefault(tensor, {}).update(buffers)
        return found

    def lend(self, tensor: str, name: str, views: Sequence[Tensor]) -> None:
        """From now on a buffer lives as long as one of its members' views does."""
        buffer = self.state[tensor][name]
        if views and all(view._base is buffer for view in views):  # not in inference mode
            self.lent[tensor, name] = [weakref.ref(view) for view in views]
            self.held.get(tensor, {}).pop(name, None)

    def _begin_afresh(self) -> None:
        """Hold again what is left, and new memory for what is gone."""
        fresh = new_state(self.algorithm, len(self.blocks), self.seed_offsets.device)
        for (tensor, name), views in self.lent.items():
            left = _first(views)
            self.held.setdefault(tensor, {})[name] = fresh[tensor][name] if left is None else left._base
        self.lent.clear()

    def select(self, positions: list[int]) -> tuple[BlockStack, Callable[[], None]]:
        """Some blocks of it for a step, as a view where they follow each other, and what brings changed state back."""
        if len(positions) == len(self.blocks):
            state = self.state
            all_of_it = BlockStack(self.algorithm, self.blocks, self.membership, self.seed_offsets, self.phases, state)
            return all_of_it, lambda: None
        index = index_of(positions, self.seed_offsets.device)
        blocks, phases = [self.blocks[i] for i in positions], [self.phases[i] for i in positions]
        state = gather_blocks(self.state, index)
        some = BlockStack(self.algorithm, blocks, self.membership[:, index], self.seed_offsets[index], phases, state)
        return some, lambda: scatter_blocks(self.state, index, state)


def _first(views: Sequence[weakref.ref[Tensor]]) -> Any:
    """The first view that is still there."""
    return next((view for ref in views if (view := ref()) is not None), None)


def new_state(algorithm: Algorithm, blocks: int, device: torch.device) -> State:
    """As before the first update: tensor -> buffer of it -> (blocks, ...)."""
    state = {name: allocate(storage, blocks, device) for name, storage in algorithm.storages().items()}
    algorithm.initialise(state)
    return state


@dataclass(frozen=True)
class Part:
    """Blocks of a wave that are computed at a time, who computes them, and their way there and back."""

    blocks: frozenset[int]
    route: Route
    ranks: Ranks
    """Those that share the blocks; one that computes them all itself is alone."""
    owners: Sequence[int]
    """Which of these ranks computes a block, of every block of the wave."""

    def of(self, blocks: frozenset[int]) -> Part:
        """The part of some of its blocks."""
        if len(blocks) == len(self.blocks):
            return self
        return replace(self, blocks=blocks, route=Route(*(transfer.of_blocks(blocks) for transfer in self.route)))


@dataclass
class Wave:
    """Whole parameters: all that are computed together or, of a large one, in parts one after the other."""

    members: list[WaveParameter]
    stacks: list[BlockStack]
    ranks: Ranks
    replicated: bool
    """Whether every rank keeps all state."""
    all_apply: bool = False
    """Whether every rank updates all blocks itself, but for those that are refreshed in a step; else owners do."""
    kernels: bool = True
    """Whether Triton's may be used: not where ranks have unlike ones."""
    wire: str = "exact"
    """The option."""

    @property
    def device(self) -> torch.device:
        """Where all of it is computed."""
        return self.members[0].local.buffer.device

    @cached_property
    def owners(self) -> list[int]:
        """The owner's rank, of every block."""
        return [owner for member in self.members for owner in member.owners]

    @cached_property
    def member_of(self) -> list[int]:
        """The position of the member that has it, of every block."""
        return [m for m, member in enumerate(self.members) for _ in member.blocks]

    @cached_property
    def rects(self) -> list[Rect]:
        """The rectangle of its parameter's matrix view, of every block."""
        return [block.rect for member in self.members for block in member.blocks]

    @cached_property
    def seed_offsets(self) -> list[int]:
        """A number that makes its noise its own, int32, of every block."""
        return [seed_offset for member in self.members for seed_offset in member.seed_offsets]

    @cached_property
    def sharing(self) -> set[str]:
        """Names of parameters with numbers in the memory of another one: on one process both are trained, in turn."""
        if self.ranks.world > 1:  # where they are refused
            return set()
        return {name for pair in overlapping([member.local for member in self.members]) for name in pair}

    @property
    def whole(self) -> bool:
        """Whether every rank holds all of its parameters."""
        return all(member.placement.whole for member in self.members)

    @property
    def sends_weights(self) -> bool:
        """Whether owners send the new weights, not updates: they have all of them, and the wire does not round them."""
        return self.whole and (self.wire == "exact" or self.members[0].local.buffer.dtype.itemsize == 2)

    @cached_property
    def grafted(self) -> bool:
        """Whether norms go over its parameters."""
        return any(block.algorithm.grafted for member in self.members for block in member.blocks)

    @cached_property
    def parts(self) -> list[Part]:
        """What is computed one after the other, by the owners."""
        return self._parts(self.ranks, self.owners, [_blocked(member) for member in self.members])

    @cached_property
    def parts_alone(self) -> list[Part]:
        """The same where a rank computes all of it itself, as one process does."""
        members = [_blocked(member) for member in self.members]
        here = [one._replace(placement=whole(one.placement.shape, 1), owners=[0] * len(one.owners)) for one in members]
        return self._parts(Ranks(), [0] * len(self.owners), here)

    def _parts(self, ranks: Ranks, owners: list[int], parameters: list[BlockedParameter]) -> list[Part]:
        blocks = [block for member in self.members for block in member.blocks]
        every = Part(frozenset(range(len(blocks))), route(ranks.rank, ranks.world, parameters), ranks, owners)
        parts = in_parts(blocks, owners, self.members[0].shard_count, self.members[0].room)
        return [every.of(frozenset(part)) for part in parts]

    def parts_of_step(self, wanted: Collection[int], options: Options, alike: bool = True) -> list[Part]:
        """What one step computes one after the other, of the members that are wanted; their updates are counted.

        Where ranks are not `alike`, as a gradient is there on some alone, owners update all: replicas would go apart.
        """
        if not self.all_apply or not alike:
            return [part for one in self.parts if (part := self.of_members(one, wanted)).blocks]
        due = self._refreshed(options)
        shared = [part.of(part.blocks & due) for part in self.parts]
        alone = [part.of(part.blocks - due) for part in self.parts_alone]
        return [part for one in (*shared, *alone) if (part := self.of_members(one, wanted)).blocks]

    def _refreshed(self, options: Options) -> frozenset[int]:
        """The blocks that are refreshed in this step; where norms go over whole parameters, all of these."""
        found = {
            stack.blocks[i]
            for stack in self.stacks
            for rows in blocks_that_change(stack.algorithm, options, self.updates(stack), stack.phases).values()
            for i in rows
        }
        if self.grafted and options.graft == "norm":
            members = {self.member_of[block] for block in found}
            found = {block for block, m in enumerate(self.member_of) if m in members}
        return frozenset(found)

    def updates(self, stack: BlockStack) -> list[int]:
        """How many each block of a stack has had."""
        return [self.members[self.member_of[block]].updates for block in stack.blocks]

    def update_counts(self) -> Tensor:
        """float32 (members,): how many updates each has had, as the state on this rank says; 0 where there is none."""
        if self.device.type == "meta":  # has no numbers: a plan for shapes alone starts at 0
            return torch.zeros(len(self.members), dtype=torch.float32, device="cpu")
        counts = [(s.membership * s.state["steps"]["dense"]).amax(1) for s in self.stacks]
        nothing = torch.zeros(len(self.members), dtype=torch.float32, device=self.device)
        return torch.stack([nothing, *counts]).amax(0)

    def changed_rows(self, blocks: Collection[int], options: Options) -> dict[int, list[Rows]]:
        """Owner -> the rows of the stacks' buffers that a step of some blocks changes, in the same order everywhere."""
        found: dict[int, list[Rows]] = {}
        for stack in self.stacks:
            rows: dict[int, list[int]] = {}
            for i, block in enumerate(stack.blocks):
                if block in blocks:
                    rows.setdefault(self.owners[block], []).append(i)
            rare = blocks_that_change(stack.algorithm, options, self.updates(stack), stack.phases)
            for tensor, buffers in stack.state.items():
                due = rare.get(tensor)
                for owner, of_owner in rows.items():
                    changed = of_owner if due is None else [i for i in of_owner if i in due]
                    if changed:
                        index, count = _spaced(changed, self.device), len(changed)
                        found.setdefault(owner, []).extend(Rows(t, index, count) for t in buffers.values())
        return found

    def of_members(self, part: Part, wanted: Collection[int]) -> Part:
        """The blocks of a part that are of the given members."""
        if len(wanted) == len(self.members) or not part.blocks:
            return part
        return part.of(frozenset(block for block in part.blocks if self.member_of[block] in wanted))

    @cached_property
    def state(self) -> WaveState:
        """Of its members, in each of its forms."""
        return WaveState(self)

    def let_go(self) -> None:
        """Of what its stacks still hold: there is a new plan."""
        for stack in self.stacks:
            stack.held, stack.lent = {}, {}
        self.__dict__.pop("state", None)  # which has the wave: a cycle

    def keeps_state_of(self, owner: int) -> bool:
        """Whether this rank keeps the state of a block."""
        return self.replicated or owner == self.ranks.rank


def _blocked(member: WaveParameter) -> BlockedParameter:
    view = member.blocks[0].view if member.blocks else MatrixView(0, 0, 0)
    return BlockedParameter(member.placement, view, [block.rect for block in member.blocks], member.owners)


def changing_rows(stack: BlockStack, options: Options) -> list[tuple[Tensor, Index]]:
    """The buffers of a stack's state that a step changes, and which rows of them."""
    rare = blocks_that_change(stack.algorithm, options, stack.updates, stack.phases)
    device, found = stack.seed_offsets.device, list[tuple[Tensor, Index]]()
    for tensor, buffers in stack.state.items():
        rows = sorted(rare.get(tensor, range(len(stack.blocks))))
        found += [(buffer, index_of(rows, device)) for buffer in buffers.values() if rows]
    return found


def _spaced(rows: list[int], device: torch.device) -> Index:
    """Rows of a buffer to be copied: a slice if they are evenly spaced, as blocks that were dealt in turn are."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if rows == list(range(rows[0], rows[-1] + 1, step)):
        return slice(rows[0], rows[-1] + 1, step)
    return on_device(tuple(rows), torch.long, device)
