"""Who sends which rectangle of which block to whom.

A block's owner collects the block's gradient from the ranks that have it and sends its update to all of them.  Both
ends go through the same pieces in the same order, so nothing but the numbers themselves is sent.  What a rank would
send to itself stays where it is: one process is the case in which that is everything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .geometry import MatrixView, Rect
from .placement import Placement
from .regions import LocalRect, Region, local_rects


class Piece(NamedTuple):
    """A rectangle of a block that one rank holds."""

    member: int
    """Position of the parameter in the wave."""
    block: int
    """Position of the block in the wave."""
    offset: int
    """Of the first entry in the holder's flat tensor."""
    stride: int
    row: int
    """Of the first entry in the block."""
    column: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Entries of it."""
        return self.rows * self.columns

    def of_flat(self, flat: Tensor) -> Tensor:
        """This piece of the holder's flat tensor, whose stride is 1: (rows, columns), a view."""
        return flat.as_strided((self.rows, self.columns), (self.stride, 1), flat.storage_offset() + self.offset)

    def of_block(self, block: Tensor) -> Tensor:
        """This piece of the block, (rows, columns), a view."""
        if block.shape == (self.rows, self.columns):
            return block
        return block[self.row : self.row + self.rows, self.column : self.column + self.columns]


class BlockedParameter(NamedTuple):
    """A parameter of a wave: where it lives, and its blocks with their owners in canonical order."""

    placement: Placement
    view: MatrixView
    rects: Sequence[Rect]
    owners: Sequence[int]


@dataclass
class Transfer:
    """What this rank sends and receives in one direction, by the other rank (itself among them), in canonical order."""

    out: dict[int, list[Piece]] = field(default_factory=dict)
    into: dict[int, list[Piece]] = field(default_factory=dict)
    is_local: bool = False
    """Whether no rank sends anything to another one: then there is no collective."""

    def of_blocks(self, wanted: Collection[int]) -> Transfer:
        """The part that concerns some blocks only."""
        out, into = (
            {rank: [p for p in pieces if p.block in wanted] for rank, pieces in transfer.items()}
            for transfer in (self.out, self.into)
        )
        return Transfer(out, into, self.is_local)


class Route(NamedTuple):
    """Gradients to the owners, updates to the holders."""

    collect: Transfer
    send: Transfer


def route(rank: int, world: int, parameters: Sequence[BlockedParameter]) -> Route:
    """The pieces that `rank` sends and receives.

    A replicated piece is collected from the owner itself where it has one, else from the replica in the owner's place
    (with HSDP: of the owner's own shard group); it is delivered to all of them.
    """
    found = Route(
        Transfer(is_local=world == 1 or all(p.placement.whole for p in parameters)),
        Transfer(is_local=world == 1),
    )
    first = 0
    for member, (placement, view, rects, owners) in enumerate(parameters):
        mine = placement.shard_of[rank]
        for k, (rect, owner) in enumerate(zip(rects, owners, strict=True)):
            for region, ranks in placement.shards if owner == rank else (mine,):
                source = owner if owner in ranks else ranks[owner * len(ranks) // world]
                for piece in _pieces(member, first + k, rect, region, view):
                    if source == rank:
                        found.collect.out.setdefault(owner, []).append(piece)
                    if owner == rank:
                        found.collect.into.setdefault(source, []).append(piece)
                        for holder in ranks:
                            found.send.out.setdefault(holder, []).append(piece)
                    if rank in ranks:
                        found.send.into.setdefault(owner, []).append(piece)
        first += len(rects)
    return found


def _pieces(member: int, block: int, rect: Rect, region: Region, view: MatrixView) -> Iterator[Piece]:
    for held, offset, stride in _rects_by_matrix(region, view).get(rect.matrix, ()):
        r0, r1, c0, c1 = max(rect.r0, held.r0), min(rect.r1, held.r1), max(rect.c0, held.c0), min(rect.c1, held.c1)
        if r0 < r1 and c0 < c1:
            start = offset + (r0 - held.r0) * stride + c0 - held.c0
            yield Piece(member, block, start, stride, r0 - rect.r0, c0 - rect.c0, r1 - r0, c1 - c0)


@lru_cache(maxsize=1 << 16)
def _rects_by_matrix(region: Region, view: MatrixView) -> dict[int, list[LocalRect]]:
    found: dict[int, list[LocalRect]] = {}
    for rect in local_rects(region, view):
        found.setdefault(rect.rect.matrix, []).append(rect)
    return found
