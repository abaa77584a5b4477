"""Where all of a parameter's entries are, the same on every rank.

Every sharding comes down to one fact a rank: the *region* of the parameter that it has.

    one process, DDP              all of it, on every rank
    FSDP2, HSDP, tensor parallel  a box, or several where fused weights are cut (dtensor.py)
    FSDP1, ZeRO-1/2/3             a range of its entries in row-major order

Blocks are cut in the parameter's global coordinates whatever the sharding; owners.py gives each one owner.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from .regions import Region


class Shard(NamedTuple):
    """A region, and the ranks that hold it."""

    region: Region
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Where all of a parameter lives: every entry in one shard."""

    shape: tuple[int, ...]
    """The parameter's global shape."""
    shards: tuple[Shard, ...]
    layout: Layout | None = None
    """Of a DTensor."""

    @cached_property
    def shard_of(self) -> dict[int, Shard]:
        """By rank."""
        return {rank: shard for shard in self.shards for rank in shard.ranks}

    def holders(self, entry: int) -> tuple[int, ...]:
        """The ranks that hold an entry, by its row-major position."""
        last = bisect.bisect_right(self._starts, entry) if self._starts else len(self.shards)
        for region, ranks in reversed(self.shards[:last]):
            if any(runs.has(entry) for runs in region.runs):
                return ranks
        raise ValueError(f"nobody holds entry {entry} of a parameter of shape {self.shape}")

    @cached_property
    def _starts(self) -> list[int]:
        """Where the shards start, if they are in order."""
        starts = [shard.region.start for shard in self.shards if shard.region.numel]
        filled = all(shard.region.numel for shard in self.shards[: len(starts)])
        return starts if filled and starts == sorted(starts) else []

    @property
    def whole(self) -> bool:
        """Whether every rank holds all of it."""
        return len(self.shards) == 1


class Split(NamedTuple):
    """How a dimension of a mesh cuts a parameter: a dimension of it, in as many pieces as there are ranks."""

    dim: int
    factor: int
    """1: Shard.  Else _StridedShard: the dimension is that many equal parts, and a rank has its piece of each."""


class Layout(NamedTuple):
    """How a DTensor is laid out, the same on each of the meshes that together are all ranks."""

    meshes: tuple[tuple[int, ...], ...]
    """The ranks of each; those at one position are replicas."""
    shape: tuple[int, ...]
    """Of a mesh."""
    splits: tuple[Split | None, ...]
    """One a dimension of the mesh; None: replicas."""

    def by_block(self) -> Layout:
        """That of the state, whose dimension 0 is the block."""
        return self._replace(splits=tuple(split and Split(0, 1) for split in self.splits))


@cache
def whole(shape: tuple[int, ...], world: int) -> Placement:
    """All of it on every rank."""
    return Placement(shape, (Shard(Region.range(0, math.prod(shape)), tuple(range(world))),))


def ranges(shape: tuple[int, ...], bounds: Sequence[tuple[int, int]]) -> Placement:
    """Entries [start, stop) of the flattened parameter, by rank; equal bounds are replicas."""
    holders: dict[tuple[int, int], list[int]] = {}
    for rank, bound in enumerate(bounds):
        holders.setdefault(bound, []).append(rank)
    shards = [Shard(Region.range(a, b - a), tuple(held_by)) for (a, b), held_by in holders.items()]
    return Placement(shape, tuple(shards))
