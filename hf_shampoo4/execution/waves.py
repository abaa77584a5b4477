"""Stacks of equal blocks, and the waves in which gradients reach them and updates go back.

A *stack* is all blocks of a wave that share an algorithm description (hence a shape), as one (B, m, n) tensor; its
state buffers have B rows, and `optimizer.state[p]` holds the rows of parameter p as views, under
"<shape>/<tensor>.<buffer>".  A *wave* is as many whole parameters as fit `plan.WAVE_ELEMENTS`; one that does not fit, a
large embedding, is a wave of several *parts*, which are computed one after the other.  That bounds the memory that a
step needs at a time, whatever the size of the model.

A block's owner updates it, and sends the result to all that hold it.  Where every rank holds all of a parameter (one
process, DDP), every rank keeps all state too: owners send what a step has changed of it along.  Everywhere else a
block's owner alone keeps its state.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..exceptions import CheckpointError
from ..numerics.storage import Index, allocate, index_of, put_back, taken
from ..options import Options
from ..preconditioners.algorithms import Elementwise
from ..preconditioners.protocols import Algorithm, State, rows_that_change
from ..sharding.agreement import of_each, together
from ..sharding.exchange import Cut, Exchange, Form, Piece, Ranks, Route, packed, route
from ..sharding.geometry import MatrixView, Rect
from ..sharding.local_parameter import Held, alike, sharing
from ..sharding.placement import Placement, Sharding, assign, placed, ranges, sharded, sharding_of, whole
from .blocking import Block, _in_parts, _in_waves, blocks_of, loads_of, places_of
from .state_layout import Entry, blocks_key, state_key, state_layout


@dataclass
class Member:
    """A parameter of a wave."""

    held: Held
    placement: Placement
    blocks: list[Block]
    owners: list[int]
    """Of the blocks, in canonical order."""
    places: list[float] = field(default_factory=list)
    """Of the blocks, see `plan.places_of`."""
    updates: int = 0
    """How many it has had, which all ranks count alike."""

    @property
    def name(self) -> str:
        """The same in every run and on every rank."""
        return self.held.name

    @property
    def parameter(self) -> Tensor:
        """The model's."""
        return self.held.parameter

    @property
    def kind(self) -> Hashable:
        """What the parameters of a wave have in common."""
        return self.held.buffer.device, self.held.buffer.dtype

    @property
    def numel(self) -> int:
        """Entries of all of it."""
        return self.held.numel

    @property
    def parts(self) -> int:
        """Into how many the ranks have cut it."""
        return len(self.placement.shares)

    def gradient(self) -> Tensor:
        """What this rank has of its gradient, flat; zeros if there is none."""
        found = self.held.gradient()
        return torch.zeros_like(self.held.weights()) if found is None else found

    @cached_property
    def salts(self) -> list[int]:
        """One number a block, for stochastic rounding."""
        return [zlib.crc32(f"{self.name}:{k}".encode()) - (1 << 31) for k in range(len(self.blocks))]

    def rows(self, algorithm: Algorithm) -> list[int]:
        """Its blocks that run `algorithm`: block i is row `rows.index(i)` of the saved state."""
        return [i for i, block in enumerate(self.blocks) if block.algorithm == algorithm]


@dataclass
class Stack:
    """Equal blocks of a wave, and their state."""

    algorithm: Algorithm
    blocks: list[int]
    """Their positions in the wave."""
    membership: Tensor
    salts: Tensor
    places: list[float]
    state: State = field(default_factory=dict)
    updates: list[int] = field(default_factory=list)
    """How many each block has had, while a step works on it: this one included."""

    def part(self, rows: list[int]) -> tuple[Stack, Callable[[], None]]:
        """Some blocks of it, as a view where they follow each other, and what brings changed state back."""
        if len(rows) == len(self.blocks):
            return self, lambda: None
        index = index_of(rows, self.salts.device)
        state, blocks, places = taken(self.state, index), [self.blocks[i] for i in rows], [self.places[i] for i in rows]
        part = Stack(self.algorithm, blocks, self.membership[:, index], self.salts[index], places, state)
        return part, lambda: put_back(self.state, index, state)


class Rows(NamedTuple):
    """State of some blocks: rows of a buffer."""

    buffer: Tensor
    at: Index
    many: int

    @property
    def form(self) -> Form:
        return Form((self.many, *self.buffer.shape[1:]), self.buffer.dtype)

    def read(self) -> Tensor:
        return self.buffer[self.at]

    def write(self, values: Tensor) -> None:
        self.buffer[self.at] = values


@dataclass(frozen=True)
class Part:
    """What of a wave is computed together, and the way to the owners and back."""

    blocks: frozenset[int]
    route: Route

    def of(self, blocks: frozenset[int]) -> Part:
        """The part of some of its blocks."""
        if len(blocks) == len(self.blocks):
            return self
        return Part(blocks, Route(*(side.of_blocks(blocks) for side in self.route)))


@dataclass
class Wave:
    """Whole parameters: all that are computed together or, of a large one, in parts one after the other."""

    members: list[Member]
    stacks: list[Stack]
    ranks: Ranks
    replicated: bool
    """Whether every rank keeps all state."""

    @property
    def device(self) -> torch.device:
        """Where all of it is computed."""
        return self.members[0].held.buffer.device

    @cached_property
    def owners(self) -> list[int]:
        """Of every block."""
        return [owner for member in self.members for owner in member.owners]

    @cached_property
    def member_of(self) -> list[int]:
        """Of every block."""
        return [m for m, member in enumerate(self.members) for _ in member.blocks]

    @cached_property
    def rects(self) -> list[Rect]:
        """Of every block."""
        return [block.rect for member in self.members for block in member.blocks]

    @cached_property
    def salts(self) -> list[int]:
        """Of every block."""
        return [salt for member in self.members for salt in member.salts]

    @cached_property
    def places(self) -> list[float]:
        """Of every block."""
        return [place for member in self.members for place in member.places]

    @property
    def whole(self) -> bool:
        """Whether every rank holds all of its parameters."""
        return all(member.placement.whole for member in self.members)

    @cached_property
    def grafted(self) -> bool:
        """Whether norms go over its parameters."""
        return any(block.algorithm.grafted for member in self.members for block in member.blocks)

    @cached_property
    def parts(self) -> list[Part]:
        """What is computed one after the other."""
        cuts = [_cut(member, member.placement, member.owners) for member in self.members]
        blocks = [block for member in self.members for block in member.blocks]
        every = Part(frozenset(range(len(blocks))), route(self.ranks.rank, self.ranks.world, cuts))
        return [every.of(frozenset(part)) for part in _in_parts(blocks, self.owners, self.members[0].parts)]

    def updates(self, stack: Stack) -> list[int]:
        """How many each block of a stack has had."""
        return [self.members[self.member_of[block]].updates for block in stack.blocks]

    def counted(self) -> Tensor:
        """float32 (members,): how many updates each has had, as the state on this rank says; 0 where there is none."""
        counts = [(s.membership * s.state["steps"]["dense"]).amax(1) for s in self.stacks]
        nothing = torch.zeros(len(self.members), dtype=torch.float32, device=self.device)
        return torch.stack([nothing, *counts]).amax(0)

    def changes(self, blocks: Collection[int], options: Options) -> dict[int, list[Rows]]:
        """Owner -> the rows of the stacks' buffers that a step of some blocks changes, in the same order everywhere."""
        found: dict[int, list[Rows]] = {}
        for stack in self.stacks:
            rows: dict[int, list[int]] = {}
            for i, block in enumerate(stack.blocks):
                if block in blocks:
                    rows.setdefault(self.owners[block], []).append(i)
            rare = rows_that_change(stack.algorithm, options, self.updates(stack), stack.places)
            for tensor, buffers in stack.state.items():
                due = rare.get(tensor)
                for owner, of_owner in rows.items():
                    changed = of_owner if due is None else [i for i in of_owner if i in due]
                    if changed:
                        index, count = _spaced(tuple(changed), self.device), len(changed)
                        found.setdefault(owner, []).extend(Rows(t, index, count) for t in buffers.values())
        return found

    def of_members(self, part: Part, wanted: Collection[int]) -> Part:
        """What of a part is of some parameters."""
        if len(wanted) == len(self.members):
            return part
        return part.of(frozenset(block for block in part.blocks if self.member_of[block] in wanted))

    def live(self) -> dict[int, Entry]:
        """Member -> the rows of its state that this rank keeps, as views of the stacks.

        Every rank has every key, of kinds of blocks that it keeps none of with no row: torch asks a rank's own state
        for the keys of a flattened state dict.
        """
        found: dict[int, Entry] = {}
        for m, member in enumerate(self.members):
            layout = state_layout(member.blocks).items()
            found[m] = {key: _empty((0, *shape[1:]), dtype, self.device) for key, (shape, dtype) in layout}
        for stack in self.stacks:
            start = 0
            for m in sorted({self.member_of[block] for block in stack.blocks}):
                count = sum(self.member_of[block] == m for block in stack.blocks)
                for tensor, buffers in stack.state.items():
                    for name, buffer in buffers.items():
                        found[m][state_key(stack.algorithm, tensor, name)] = buffer[start : start + count]
                start += count
        return found

    @cached_property
    def state_map(self) -> StateMap:
        """Between live and saved state."""
        return StateMap(self)

    def saved(self) -> dict[int, Entry]:
        """Member -> its whole state in canonical block order, with no rank in it; every rank must call it.

        Plain tensors for a parameter that is whole on every rank, DTensors with the blocks sharded over the
        parameter's mesh for one that is a DTensor.
        """
        if self.replicated:
            return self.live()
        with together(self.ranks):
            state = self.state_map
            held = state.empty()
        state.move(state.route.deliver, "save", state.live, held)
        return state.entries(held)

    def share(self) -> dict[int, Entry]:
        """Member -> the part of its state that this rank keeps (checkpointing/formats.py); plain tensors."""
        found, state = {m: {k: t for k, t in e.items() if len(t)} for m, e in self.live().items()}, self.state_map
        for g, (m, algorithm) in enumerate(state.groups):
            found[m][blocks_key(state_key(algorithm, "", ""))] = torch.tensor(
                state.kept(g), dtype=torch.long, device="cpu"
            )
        return found

    def rows(self, owned: bool = False) -> dict[str, Tensor]:
        """The state that this rank keeps, block by block: "<parameter>/<state key>/<row of the whole>" -> a view.

        Args:
            owned: of its own blocks alone, so that every row is some rank's and no row is two ranks'.
        """
        state = self.state_map
        return {
            f"{self.members[m].name}/{key}/{k}": t[i]
            for g, (m, _) in enumerate(state.groups)
            for key, t in state.live[g].items()
            for i, k in enumerate(state.kept(g))
            if not owned or state.cuts[g].owners[k] == self.ranks.rank
        }

    def check(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Make sure that `adopt` can take the members' state over.

        Raises:
            CheckpointError: a part of the state (`share`) of other blocks than are this rank's here.
        """
        state = self.state_map
        for g, (m, algorithm) in enumerate(state.groups):
            there = saved[m].get(blocks_key(state_key(algorithm, "", "")))
            if there is not None and there.tolist() != state.kept(g):
                raise CheckpointError(
                    f"the checkpoint has blocks {_few(there.tolist())} of {self.members[m].name!r} for this rank, "
                    f"which has {_few(state.kept(g))} here: another number of ranks, ZeRO stage or configuration of "
                    "DeepSpeed.  Make one file of it that fits any: hf-shampoo4 checkpoint convert DIR, and give that "
                    "to optimizer.load_state_dict"
                )

    def keeps(self, owner: int) -> bool:
        """Whether this rank keeps the state of a block."""
        return self.replicated or owner == self.ranks.rank

    def adopt(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Take over what there is of the members' state from what `saved` or `live` gave; every rank must call it.

        Raises:
            ValueError: a tensor with neither all blocks nor those of this rank.
        """
        with together(self.ranks):
            state = self.state_map
            spread = state.spread(saved)
            local = state.local(saved) if any(spread) else []
            self._copy(saved, spread)
        if any(spread):
            state.move(state.route.collect.of_blocks(state.rows(spread)), "load", local, state.live)

    def _copy(self, saved: Sequence[Mapping[str, Any]], spread: Sequence[bool]) -> None:
        """Take over what this rank has all it needs of."""
        state = self.state_map
        for g, (m, _) in enumerate(state.groups):
            if spread[g]:
                continue
            mine = state.kept(g)
            for key, live in state.live[g].items():
                there = saved[m].get(key)
                if there is None:
                    continue
                if len(there) not in (len(live), len(state.cuts[g].rects)):
                    name, expected = self.members[m].name, len(state.cuts[g].rects)
                    raise ValueError(f"state of {name!r}: {key} has {len(there)} blocks, expected {expected}")
                live.copy_(there if len(there) == len(live) else there[mine])


class StateMap:
    """The rows of a wave's state: live on their owners, saved where the parameters' placements say.

    A row moves as an entry of a vector of rows would, so `exchange.route` knows the way: `collect` is loading,
    `deliver` saving.
    """

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.groups = [
            (m, algorithm)
            for m, member in enumerate(wave.members)
            for algorithm in dict.fromkeys(block.algorithm for block in member.blocks)
        ]
        self.cuts: list[Cut] = []
        self.first = [0]
        for m, algorithm in self.groups:
            member = wave.members[m]
            rows = member.rows(algorithm)
            rects = [Rect(0, 0, 1, k, k + 1) for k in range(len(rows))]
            placement = _saved_placement(member.placement, len(rows), wave.ranks.world)
            self.cuts.append(Cut(placement, MatrixView(1, 1, len(rows)), rects, [member.owners[i] for i in rows]))
            self.first.append(self.first[-1] + len(rows))
        live = wave.live()
        self.live = [{key: live[m][key] for key in self.layout(g)} for g, (m, _) in enumerate(self.groups)]

    @cached_property
    def route(self) -> Route:
        """Of rows, as pieces of one entry."""
        return route(self.wave.ranks.rank, self.wave.ranks.world, self.cuts)

    def kept(self, group: int) -> list[int]:
        """The blocks of a group whose state lives on this rank."""
        owners = self.cuts[group].owners
        return [k for k, owner in enumerate(owners) if self.wave.keeps(owner)]

    def layout(self, group: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """State key -> shape of a row and dtype."""
        algorithm = self.groups[group][1]
        return {
            state_key(algorithm, tensor, buffer): layout
            for tensor, storage in algorithm.storages().items()
            for buffer, layout in storage.layout().items()
        }

    def empty(self) -> list[Entry]:
        """Room for the saved rows that this rank holds."""
        rank, found = self.wave.ranks.rank, []
        for g in range(len(self.groups)):
            count, layout = self.cuts[g].placement.share_of[rank].region.numel, self.layout(g).items()
            found.append({k: _empty((count, *shape), dtype, self.wave.device) for k, (shape, dtype) in layout})
        return found

    def spread(self, saved: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Whether each group's saved state is DTensors; the same on every rank."""
        return [
            any(hasattr(saved[m].get(key), "to_local") for key in self.layout(g))
            for g, (m, _) in enumerate(self.groups)
        ]

    def rows(self, groups: Sequence[bool]) -> set[int]:
        """The rows, as the route counts them, of some groups."""
        return {row for g, of_group in enumerate(groups) if of_group for row in range(self.first[g], self.first[g + 1])}

    def local(self, saved: Sequence[Mapping[str, Any]]) -> list[Entry]:
        """The rows of saved DTensors that this rank holds."""
        return [
            {key: saved[m][key].to_local() for key in self.layout(g)} if is_spread else {}
            for g, ((m, _), is_spread) in enumerate(zip(self.groups, self.spread(saved), strict=True))
        ]

    def entries(self, held: list[Entry]) -> dict[int, Entry]:
        """Member -> its saved state, from the rows that this rank holds."""
        found: dict[int, Entry] = {m: {} for m in range(len(self.wave.members))}
        for g, (m, _) in enumerate(self.groups):
            blocks = len(self.cuts[g].rects)
            found[m].update({key: _as_saved(t, self.wave.members[m].parameter, blocks) for key, t in held[g].items()})
        return found

    def move(self, side: Exchange, purpose: str, source: list[Entry], target: list[Entry]) -> None:
        """Copy rows from where they are to where the exchange says, all of them in one all-to-all."""
        ranks, device = self.wave.ranks, self.wave.device
        with together(ranks):
            outgoing = {rank: self._rows(pieces, source) for rank, pieces in side.out.items()}
            incoming = {rank: self._rows(pieces, target) for rank, pieces in side.into.items()}
            for here, there in zip(incoming.get(ranks.rank, ()), outgoing.get(ranks.rank, ()), strict=True):
                here.write(there.read())
            out = {rank: packed([rows.read() for rows in found], device) for rank, found in outgoing.items()}
        if side.local:
            return
        sizes = {rank: part.numel() for rank, part in out.items()}
        into = {rank: [rows.form for rows in found] for rank, found in incoming.items()}
        pending = ranks.all_to_all(purpose, out, sizes, into, device)
        with together(ranks):
            for rank, received in pending.wait().items():
                for rows, values in zip(incoming.get(rank, ()), received, strict=True):
                    rows.write(values)

    def _rows(self, pieces: Sequence[Piece], tensors: list[Entry]) -> list[Rows]:
        """The rows, of every tensor of the groups, that the pieces are of."""
        found = []
        by_group: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_group.setdefault(piece.member, []).append(piece)
        for g, members in by_group.items():
            rows = [piece.offset for piece in members]
            if tensors is self.live:
                position = {k: i for i, k in enumerate(self.kept(g))}
                rows = [position[piece.block - self.first[g]] for piece in members]
            index = index_of(rows, self.wave.device)
            found += [Rows(tensors[g][key], index, len(rows)) for key in self.layout(g)]
        return found


Shapes = Mapping[str, tuple[int, ...]]


def build(groups: Sequence[tuple[Options, Sequence[Held], Shapes]], ranks: Ranks) -> list[list[Wave]]:
    """Waves over the parameters of each group, with freshly initialised state; the same plan on every rank.

    Args:
        groups: options, the parameters in the same order on every rank, and the shapes of all that the group has: with
            DeepSpeed, the parameters may be a part of these.

    Raises:
        ValueError: a parameter that lives in a way that is not known, or not completely on these ranks, or that shares
            memory with another one where owners send new weights.
    """
    every = [held for _, of_group, _ in groups for held in of_group]
    said = zip(*of_each(ranks, lambda: [_said(held, ranks) for held in every]), strict=True)
    placements = iter([_placement(held, by_rank) for held, by_rank in zip(every, said, strict=True)])
    members = []
    for options, of_group, shapes in groups:
        blocks = {name: blocks_of(shape, options) for name, shape in shapes.items()}
        places = places_of({name: len(of_one) for name, of_one in blocks.items()})
        members.append([_member(h, next(placements), blocks[h.name], places[h.name]) for h in of_group])
    if ranks.world > 1:
        _refuse_sharing([member.held for of_group in members for member in of_group if member.placement.whole])
    _assign(members, [options for options, _, _ in groups], ranks.world)
    return [_waves(found, options, ranks) for found, (options, _, _) in zip(members, groups, strict=True)]


def _refuse_sharing(members: Sequence[Held]) -> None:
    pair = sharing(members)
    if pair is not None:
        raise ValueError(
            f"parameters {pair[0]!r} and {pair[1]!r} share memory, and with several ranks each one's owner would "
            "overwrite what the other's has done: make them one parameter, used twice, or clone() one of them"
        )


class _Said(NamedTuple):
    """What a rank says of a parameter; with neither a range nor a sharding, it has all of it."""

    range: tuple[int, int] | None
    sharding: Sharding | None
    digest: list[tuple[float, ...]]
    """Where its mesh has a part of the ranks."""


def _said(held: Held, ranks: Ranks) -> _Said:
    if held.range is not None:
        return _Said((held.range.start, held.range.start + held.range.numel), None, [])
    sharding = sharding_of(held.parameter)
    if sharding is None:
        return _Said(None, None, [])
    if ranks.group is not None:
        sharding = sharding._replace(mesh=ranks.of_members(sharding.mesh, held.name))
    return _Said(None, sharding, held.digest() if len(sharding.mesh) < ranks.world else [])


def _placement(held: Held, by_rank: Sequence[_Said]) -> Placement:
    """Where all of a parameter is, from what each rank says."""
    if held.range is None:
        placement = placed(held.name, held.shape, [said.sharding for said in by_rank])
        for _, ranks in placement.shares:
            if not alike([by_rank[rank].digest for rank in ranks]):
                raise ValueError(
                    f"parameter {held.name!r} has other numbers on each of the meshes of ranks "
                    f"{list(placement.layout.meshes[:4] if placement.layout else ())}, which should be replicas: "
                    "parameters that only some ranks train (expert and pipeline parallelism) are not supported"
                )
        return placement
    bounds = [said.range for said in by_rank if said.range]
    placement = ranges(held.shape, bounds)
    if sum(share.region.numel for share in placement.shares) != held.numel:
        raise ValueError(
            f"the {len(by_rank)} ranks that train together hold entries {bounds[:4]} of the {held.numel} of "
            f"{held.name!r}: leave out communicate=false, and use FSDP or DeepSpeed over all ranks"
        )
    return placement


def _member(held: Held, placement: Placement, blocks: list[Block], places: list[float]) -> Member:
    return Member(held, placement, blocks, [0] * len(blocks), places)


def _assign(groups: list[list[Member]], options: list[Options], world: int) -> None:
    """Give every block its owner; an elementwise one stays where it is, if one rank has most of it."""
    if world == 1:
        return
    loads, free, there = [], [], []
    for members, of_group in zip(groups, options, strict=True):
        for member in members:
            for k, load in enumerate(loads_of(member.blocks, of_group)):
                block = member.blocks[k]
                if isinstance(block.algorithm, Elementwise) and not member.placement.whole:
                    r, view = block.rect, block.view
                    middle = (r.matrix * view.rows + (r.r0 + r.r1) // 2) * view.columns + (r.c0 + r.c1) // 2
                    holders = member.placement.holders(middle)
                    member.owners[k] = holders[k % len(holders)]
                    there.append((member.owners[k], load))
                else:
                    loads.append(load)
                    free.append((member, k))
    for (member, k), owner in zip(free, assign(loads, world, there), strict=True):
        member.owners[k] = owner


def _waves(members: list[Member], options: Options, ranks: Ranks) -> list[Wave]:
    waves = []
    for batch in _in_waves(members):
        replicated = ranks.world == 1 or (batch[0].placement.whole and not options.shard_state)
        waves.append(_wave(batch, ranks, replicated))
    return waves


def _wave(members: list[Member], ranks: Ranks, replicated: bool) -> Wave:
    rows: dict[Algorithm, list[tuple[int, int, int, float]]] = {}
    first = 0
    for m, member in enumerate(members):
        for k, (block, owner) in enumerate(zip(member.blocks, member.owners, strict=True)):
            if replicated or owner == ranks.rank:
                rows.setdefault(block.algorithm, []).append((m, first + k, member.salts[k], member.places[k]))
        first += len(member.blocks)
    device = members[0].held.buffer.device
    return Wave(members, [_stack(a, found, len(members), device) for a, found in rows.items()], ranks, replicated)


def _stack(algorithm: Algorithm, rows: list[tuple[int, int, int, float]], members: int, device: torch.device) -> Stack:
    membership = torch.zeros((members, len(rows)), dtype=torch.float32, device="cpu")
    membership[[m for m, *_ in rows], list(range(len(rows)))] = 1.0
    state = {name: allocate(storage, len(rows), device) for name, storage in algorithm.storages().items()}
    algorithm.initialise(state)
    salts = torch.tensor([salt for _, _, salt, _ in rows], dtype=torch.int32, device=device)
    places = [place for *_, place in rows]
    return Stack(algorithm, [block for _, block, *_ in rows], membership.to(device), salts, places, state)


def _cut(member: Member, placement: Placement, owners: Sequence[int]) -> Cut:
    view = member.blocks[0].view if member.blocks else MatrixView(0, 0, 0)
    return Cut(placement, view, [block.rect for block in member.blocks], owners)


def _saved_placement(placement: Placement, rows: int, world: int) -> Placement:
    """Where the saved state of `rows` blocks lives: on a DTensor's mesh, cut where it is cut, else everywhere."""
    return sharded((rows,), placement.layout.by_block()) if placement.layout else whole((rows,), world)


def _by_block(p: Any) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate, Shard

    return tuple(Replicate() if placement.is_replicate() else Shard(0) for placement in p.placements)


def _as_saved(rows: Tensor, p: Any, blocks: int) -> Tensor:
    """This rank's rows of all blocks, as a DTensor if the parameter is one."""
    if not hasattr(p, "device_mesh"):
        return rows
    from torch.distributed.tensor import DTensor

    shape = torch.Size((blocks, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, p.device_mesh, _by_block(p), run_check=False, shape=shape, stride=stride)


@lru_cache(maxsize=1 << 14)
def _spaced(rows: tuple[int, ...], device: torch.device) -> Index:
    """Rows of a buffer to be copied: a slice if they are evenly spaced, as blocks that were dealt in turn are."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if rows == tuple(range(rows[0], rows[-1] + 1, step)):
        return slice(rows[0], rows[-1] + 1, step)
    return torch.tensor(rows, device=device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _few(numbers: list[int]) -> str:
    return f"{numbers}" if len(numbers) <= 4 else f"{numbers[:4]} and {len(numbers) - 4} more"
