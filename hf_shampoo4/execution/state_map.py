"""Between local state, on the owners of blocks, and full state, where the parameters' placements say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..numerics.blocks import Index, index_of
from ..sharding.agreement import all_or_none
from ..sharding.dtensor import sharded
from ..sharding.exchange import Form, packed
from ..sharding.geometry import MatrixView, Rect
from ..sharding.local_parameter import local_tensor
from ..sharding.placement import Placement, whole
from ..sharding.route import BlockedParameter, Piece, Route, Transfer, route
from .state_layout import Entry, StateKey

if TYPE_CHECKING:
    from .waves import Wave


class Rows(NamedTuple):
    """State of some blocks: rows of a buffer, whose dim 0 is the block."""

    buffer: Tensor
    at: Index
    many: int

    @property
    def form(self) -> Form:
        """Shape (rows, ...) and dtype of what is read."""
        return Form((self.many, *self.buffer.shape[1:]), self.buffer.dtype)

    def read(self) -> Tensor:
        """(rows, ...), a view for a slice, else a copy."""
        return self.buffer[self.at]

    def write(self, values: Tensor) -> None:
        """Replace them by `values`, (rows, ...)."""
        self.buffer[self.at] = values


def write_rows(found: Sequence[tuple[Rows, Tensor]]) -> None:
    """`Rows.write` of each, all at once as far as they are slices: on a GPU a launch, whatever the number of ranks."""
    sliced = [(rows, values) for rows, values in found if isinstance(rows.at, slice)]
    if sliced:
        torch._foreach_copy_([rows.buffer[rows.at] for rows, _ in sliced], [values for _, values in sliced])
    for rows, values in found:
        if not isinstance(rows.at, slice):
            rows.write(values)


class StateMap:
    """The rows of a wave's state: local on their owners, full where the parameters' placements say.

    A row moves as an entry of a vector of rows would, so `route.route` knows the way: `collect` is loading,
    `send` saving.
    """

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.groups = [
            (m, algorithm)
            for m, member in enumerate(wave.members)
            for algorithm in dict.fromkeys(block.algorithm for block in member.blocks)
        ]
        self.parameters: list[BlockedParameter] = []
        self.first = [0]
        for m, algorithm in self.groups:
            member = wave.members[m]
            rows = member.positions_of(algorithm)
            rects = [Rect(0, 0, 1, k, k + 1) for k in range(len(rows))]
            placement = _saved_placement(member.placement, len(rows), wave.ranks.world)
            self.parameters.append(
                BlockedParameter(placement, MatrixView(1, 1, len(rows)), rects, [member.owners[i] for i in rows])
            )
            self.first.append(self.first[-1] + len(rows))

    def local_rows(self, entries: Sequence[Entry] | None = None) -> list[Entry]:
        """The rows that this rank keeps, views.

        Args:
            entries: of the members, what `optimizer.state` has of them; default: what the stacks have.

        Raises:
            RuntimeError: others have put something there that is not these rows, or have emptied it.
        """
        local, found = self.wave.state.local() if entries is None else entries, list[Entry]()
        for g, (m, _) in enumerate(self.groups):
            kept = len(self.kept_blocks(g))
            found.append({key: self._row(m, key, local[m].get(key), kept) for key in self.layout(g)})
        return found

    def _row(self, member: int, key: str, there: Any, blocks: int) -> Tensor:
        if not isinstance(there, Tensor) or hasattr(there, "to_local") or len(there) != blocks:
            raise RuntimeError(
                f"the state of {self.wave.members[member].name!r} was emptied or replaced since the last step ({key}): "
                "make a step before saving it, or give what is to be trained on to load_state_dict"
            )
        return there.to(self.wave.device)

    @cached_property
    def route(self) -> Route:
        """Of rows, as pieces of one entry."""
        return route(self.wave.ranks.rank, self.wave.ranks.world, self.parameters)

    def kept_blocks(self, group: int) -> list[int]:
        """The blocks of a group whose state lives on this rank."""
        owners = self.parameters[group].owners
        return [k for k, owner in enumerate(owners) if self.wave.keeps_state_of(owner)]

    def layout(self, group: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """State key -> shape of a row and dtype."""
        algorithm = self.groups[group][1]
        return {
            str(StateKey.of(algorithm.shape, tensor, buffer)): layout
            for tensor, storage in algorithm.storages().items()
            for buffer, layout in storage.layout().items()
        }

    def empty_rows(self) -> list[Entry]:
        """Room for the saved rows that this rank holds."""
        rank, found = self.wave.ranks.rank, []
        for g in range(len(self.groups)):
            count, layout = self.parameters[g].placement.shard_of[rank].region.numel, self.layout(g).items()
            found.append({k: _empty((count, *shape), dtype, self.wave.device) for k, (shape, dtype) in layout})
        return found

    def are_dtensors(self, saved: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Whether each group's saved state is DTensors; the same on every rank."""
        return [
            any(hasattr(saved[m].get(key), "to_local") for key in self.layout(g))
            for g, (m, _) in enumerate(self.groups)
        ]

    def lies_as_saved(self, group: int, saved: Mapping[str, Any]) -> bool:
        """Whether a member's saved DTensors, if they are some, have on this rank the rows that full state has here."""
        member, rank = self.wave.members[self.groups[group][0]], self.wave.ranks.rank
        here = self.parameters[group].placement.shard_of[rank].region.numel
        there: list[Any] = [saved.get(key) for key in self.layout(group)]
        spread = [t for t in there if hasattr(t, "to_local")]
        if not all(len(local_tensor(t)) == here for t in spread):
            return False
        if self.wave.replicated or not hasattr(member.parameter, "placements"):
            return True
        return all(tuple(t.placements) == _by_block(member.parameter) for t in spread)

    def rows_of(self, groups: Sequence[bool]) -> set[int]:
        """The rows, as the route counts them, of some groups."""
        return {row for g, of_group in enumerate(groups) if of_group for row in range(self.first[g], self.first[g + 1])}

    def dtensor_rows(self, saved: Sequence[Mapping[str, Any]]) -> list[Entry]:
        """The rows of saved DTensors that this rank holds."""
        return [
            {key: saved[m][key].to_local() for key in self.layout(g)} if is_spread else {}
            for g, ((m, _), is_spread) in enumerate(zip(self.groups, self.are_dtensors(saved), strict=True))
        ]

    def entries(self, rows: list[Entry]) -> dict[int, Entry]:
        """Member -> its saved state, from the rows that this rank holds."""
        found: dict[int, Entry] = {m: {} for m in range(len(self.wave.members))}
        for g, (m, _) in enumerate(self.groups):
            blocks = len(self.parameters[g].rects)
            found[m].update({key: _as_saved(t, self.wave.members[m].parameter, blocks) for key, t in rows[g].items()})
        return found

    def save(self, local: list[Entry], full: list[Entry]) -> None:
        """Copy the local rows of all ranks to where full state has them; every rank must call it."""
        self._move(self.route.send, "save", (local, True), (full, False))

    def load(self, full: list[Entry], groups: Sequence[bool]) -> None:
        """Copy rows of some groups from where full state has them into the local ones; every rank must call it."""
        wanted = self.route.collect.of_blocks(self.rows_of(groups))
        self._move(wanted, "load", (full, False), (self.local_rows(), True))

    def _move(
        self, transfer: Transfer, purpose: str, source: tuple[list[Entry], bool], target: tuple[list[Entry], bool]
    ) -> None:
        """In one all-to-all; `source` and `target` say whether they are local rows."""
        ranks, device = self.wave.ranks, self.wave.device
        with all_or_none(ranks):
            outgoing = {rank: self.rows_at(pieces, *source) for rank, pieces in transfer.out.items()}
            incoming = {rank: self.rows_at(pieces, *target) for rank, pieces in transfer.into.items()}
            for here, there in zip(incoming.get(ranks.rank, ()), outgoing.get(ranks.rank, ()), strict=True):
                here.write(there.read())
            out = {rank: packed([rows.read() for rows in found], device) for rank, found in outgoing.items()}
        if transfer.is_local:
            return
        sizes = {rank: part.numel() for rank, part in out.items()}
        into = {rank: [rows.form for rows in found] for rank, found in incoming.items()}
        pending = ranks.all_to_all(purpose, out, sizes, into, device)
        with all_or_none(ranks):
            for rank, received in pending.wait().items():
                for rows, values in zip(incoming.get(rank, ()), received, strict=True):
                    rows.write(values)

    def rows_at(self, pieces: Sequence[Piece], tensors: list[Entry], local: bool) -> list[Rows]:
        """The rows, of every tensor of the groups, that the pieces are of."""
        found = []
        by_group: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_group.setdefault(piece.member, []).append(piece)
        for g, members in by_group.items():
            rows = [piece.offset for piece in members]
            if local:
                position = {k: i for i, k in enumerate(self.kept_blocks(g))}
                rows = [position[piece.block - self.first[g]] for piece in members]
            index = index_of(rows, self.wave.device)
            found += [Rows(tensors[g][key], index, len(rows)) for key in self.layout(g)]
        return found


def _saved_placement(placement: Placement, rows: int, world: int) -> Placement:
    """Where the saved state of `rows` blocks lives: on a DTensor's mesh, cut where it is cut, else everywhere."""
    return sharded((rows,), placement.layout.by_block()) if placement.layout else whole((rows,), world)


def _by_block(p: Any) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate, Shard

    return tuple(Replicate() if placement.is_replicate() else Shard(0) for placement in p.placements)


def _as_saved(rows: Tensor, p: Any, blocks: int) -> Tensor:
    """A tensor of all blocks, (blocks, ...), as a DTensor if the parameter is one, else the rows themselves.

    Args:
        rows: (rows, ...), those that this rank has in full state.
        p: the parameter.
        blocks: how many there are in all.
    """
    if not hasattr(p, "device_mesh"):
        return rows
    from torch.distributed.tensor import DTensor

    shape = torch.Size((blocks, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, p.device_mesh, _by_block(p), run_check=False, shape=shape, stride=stride)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
