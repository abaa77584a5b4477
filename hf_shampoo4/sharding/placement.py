"""Where a parameter's entries live, and who owns its blocks: integers only, the same on every rank.

Every sharding comes down to one fact a rank: the *region* of the parameter that it holds.

    one process, DDP              all of it, on every rank
    FSDP2, HSDP, tensor parallel  a box, or several where fused weights are cut, as the DTensor's placements say
    FSDP1, ZeRO-1/2/3             a range of its entries in row-major order

Blocks are cut in the parameter's global coordinates whatever the sharding; `assign` gives each one owner.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from .geometry import MatrixView, Rect

T = TypeVar("T")


class Runs(NamedTuple):
    """`number` runs of `length` consecutive entries of a parameter (row-major), `step` apart."""

    start: int
    number: int
    length: int
    step: int
    offset: int
    """Of the first run in the rank's flat tensor."""
    stride: int
    """From a run to the next in the rank's flat tensor."""

    def has(self, entry: int) -> bool:
        """Whether an entry of the parameter is in one of them."""
        run, within = divmod(entry - self.start, self.step)
        return 0 <= run < self.number and within < self.length


class Region(NamedTuple):
    """What a rank holds of a parameter; none of it twice."""

    runs: tuple[Runs, ...]

    @property
    def numel(self) -> int:
        return sum(runs.number * runs.length for runs in self.runs)

    @property
    def start(self) -> int:
        """The first entry."""
        return min((runs.start for runs in self.runs), default=0)

    @classmethod
    def range(cls, start: int, numel: int) -> Region:
        """Consecutive entries."""
        return cls((Runs(start, 1, numel, numel, 0, numel),) if numel else ())


class LocalRect(NamedTuple):
    """A rectangle of a parameter's matrix view that a rank holds, and where it lies in the rank's flat tensor."""

    rect: Rect
    offset: int
    """Of its first entry."""
    stride: int
    """From a row to the next."""


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


class Sharding(NamedTuple):
    """What a rank says of a DTensor."""

    mesh: tuple[int, ...]
    """The ranks of its mesh."""
    shape: tuple[int, ...]
    """Of the mesh."""
    splits: tuple[Split | None, ...] | None
    """None: another kind of placement."""
    placements: str
    held: int
    """Entries that the rank has."""


def sharding_of(p: Tensor) -> Sharding | None:
    """This rank's part of a live parameter; None for one that is no DTensor."""
    mesh = getattr(p, "device_mesh", None)
    if mesh is None:
        return None
    dtensor: Any = p
    return Sharding(
        _one(tuple(mesh.mesh.flatten().tolist())), _one(tuple(mesh.mesh.shape)),
        _one(splits_of(tuple(dtensor.placements), p.dim())), _one(str(dtensor.placements)), dtensor.to_local().numel(),
    )  # fmt: skip


@lru_cache(maxsize=1 << 10)
def _one(value: T) -> T:
    """One object for all equal ones, which pickle then sends once."""
    return value


def splits_of(placements: tuple[Any, ...], dims: int) -> tuple[Split | None, ...] | None:
    """A DTensor's placements; None if one is none of Replicate, Shard and _StridedShard."""
    splits: list[Split | None] = []
    for placement in placements:
        if placement.is_replicate():
            splits.append(None)
        elif type(placement).__name__ in ("Shard", "_StridedShard"):
            splits.append(Split(placement.dim % dims, int(getattr(placement, "split_factor", 1))))
        else:
            return None
    return tuple(splits)


def placed(name: str, shape: tuple[int, ...], by_rank: Sequence[Sharding | None]) -> Placement:
    """Where all of a parameter is, from what every rank says of it.

    A mesh of a part of the ranks is one of several that are alike: FSDP2 over one dimension of a mesh puts what tensor
    parallelism over the other does not cut, norms say, on meshes that are replicas of each other.

    Raises:
        ValueError: a kind of placement or meshes that are not known, or other local tensors than the placements say.
    """
    first, world = by_rank[0], len(by_rank)
    if first is None and not any(by_rank):
        return whole(shape, world)
    if first is None or any(other is None or other[1:4] != first[1:4] for other in by_rank):
        said = [sharding and f"{sharding.placements} on a mesh of {sharding.shape}" for sharding in by_rank]
        raise ValueError(f"parameter {name!r} is cut in another way on another rank: {list(dict.fromkeys(said))[:4]}")
    if first.splits is None:
        raise ValueError(f"parameter {name!r} has placements {first.placements}: Shard and Replicate are supported")
    meshes = tuple(dict.fromkeys(sharding.mesh for sharding in by_rank if sharding))
    if sorted(rank for mesh in meshes for rank in mesh) != list(range(world)):
        raise ValueError(
            f"parameter {name!r} lives on meshes of ranks {list(meshes[:4])}, but the optimizer works on {world} "
            "rank(s): leave out communicate=false, and use meshes that together have each rank once"
        )
    held = [sharding.held for sharding in by_rank if sharding]
    return _that_fits(name, shape, Layout(meshes, first.shape, first.splits), held, first.placements)


def _that_fits(name: str, shape: tuple[int, ...], layout: Layout, held: list[int], placements: str) -> Placement:
    """The one of the two orders of cutting (see `sharded`) that gives each rank as many entries as it has."""
    orders = {sharded(shape, layout), sharded(shape, layout, left_to_right=True)}
    fitting = [p for p in orders if [p.shard_of[rank].region.numel for rank in range(len(held))] == held]
    if len(fitting) == 1:
        return fitting[0]
    wrong = "which entries these are cannot be told: shard another dimension" if fitting else "which do not fit"
    raise ValueError(
        f"parameter {name!r} of shape {shape} has placements {placements} on a mesh of {layout.shape}, and {held} "
        f"entries on the ranks, {wrong}"
    )


@cache
def whole(shape: tuple[int, ...], world: int) -> Placement:
    """All of it on every rank."""
    return Placement(shape, (Shard(Region.range(0, math.prod(shape)), tuple(range(world))),))


@cache
def sharded(shape: tuple[int, ...], layout: Layout, left_to_right: bool = False) -> Placement:
    """A DTensor's placement.

    Args:
        left_to_right: whether the mesh's dimensions have cut it in their order, as `distribute_tensor` does it; else
            those that a _StridedShard before them leaves room for came first, as FSDP2 over tensor parallelism does it.
            Both are the same where all pieces are equal.
    """
    holders: dict[Region, list[int]] = {}
    for position, coordinate in enumerate(np.ndindex(layout.shape)):
        cuts: list[list[Chunk]] = [[] for _ in shape]
        for split, which, of in zip(layout.splits, coordinate, layout.shape, strict=True):
            if split is not None:
                cuts[split.dim].append(Chunk(which, of, split.factor))
        held = [
            _held_along(side, of_dim if left_to_right else _in_order(of_dim))
            for side, of_dim in zip(shape, cuts, strict=True)
        ]
        holders.setdefault(_product(shape, held), []).extend(mesh[position] for mesh in layout.meshes)
    return Placement(shape, tuple(Shard(region, tuple(ranks)) for region, ranks in holders.items()), layout)


def ranges(shape: tuple[int, ...], bounds: Sequence[tuple[int, int]]) -> Placement:
    """Entries [start, stop) of the flattened parameter, by rank; equal bounds are replicas."""
    holders: dict[tuple[int, int], list[int]] = {}
    for rank, bound in enumerate(bounds):
        holders.setdefault(bound, []).append(rank)
    shards = [Shard(Region.range(a, b - a), tuple(held_by)) for (a, b), held_by in holders.items()]
    return Placement(shape, tuple(shards))


def local_rects(region: Region, view: MatrixView) -> list[LocalRect]:
    """The region as rectangles of the matrix view: for a range at most three a matrix, for a box one."""
    return [rect for runs in region.runs for rect in _local_rects(runs, view)]


def _local_rects(runs: Runs, view: MatrixView) -> list[LocalRect]:
    start, number, length, step, offset, stride = runs
    row, column = divmod(start, view.columns)
    if number > 1 and step == view.columns and column + length <= view.columns:  # one rectangle a matrix
        return [
            LocalRect(Rect(r.matrix, r.r0, r.r1, column, column + length), offset + at // view.columns * stride, stride)
            for r, at, _ in _rectangles(row * view.columns, (row + number) * view.columns, view)
        ]
    return [
        LocalRect(rect, offset + i * stride + at, view.columns)
        for i in range(number)
        for rect, at, _ in _rectangles(start + i * step, start + i * step + length, view)
    ]


class Load(NamedTuple):
    """What a block asks of its owner."""

    flops: int
    """A step, refreshes averaged in."""
    bytes: int
    """Of state."""


def assign(loads: Sequence[Load], world: int, there: Sequence[tuple[int, Load]] = ()) -> list[int]:
    """The owner of every block; the same on every rank, for it depends on the arguments alone.

    `there` are the blocks that have owners already.

    Equal blocks are dealt out in turn, but for the last rounds, with which what the largest blocks leave uneven can be
    made up for: those go, the largest first, to the rank on which the larger of its two shares (of all flops, of all
    bytes) stays smallest, ties to the lowest.
    """
    counts = Counter(loads)
    totals = [max(sum(load[k] for load in (*loads, *(load for _, load in there))), 1) for k in range(2)]
    share = {load: max(x / total for x, total in zip(load, totals, strict=True)) for load in counts}
    largest = max(share.values(), default=0.0) or 1.0
    rounds = {load: count // world - 1 - int(min(largest / (share[load] or 1.0), 16)) for load, count in counts.items()}
    dealt = {load: max(full, 0) * world for load, full in rounds.items()}
    owners, seen, left = [0] * len(loads), Counter[Load](), []
    for i, load in enumerate(loads):
        if seen[load] < dealt[load]:
            owners[i] = seen[load] % world
        else:
            left.append(i)
        seen[load] += 1
    shares = np.zeros((2, world))
    for owner, load in there:
        shares[:, owner] += np.array(load) / totals
    for i in sorted(left, key=lambda i: (-share[loads[i]], i)):
        mine = np.array([[x / total] for x, total in zip(loads[i], totals, strict=True)])
        owners[i] = int((shares + mine).max(0).argmin())
        shares[:, owners[i]] += mine[:, 0]
    return owners


Span = tuple[int, int]  # positions [a, b) along one dimension


class Chunk(NamedTuple):
    """What a rank has of a dimension that is cut."""

    which: int
    of: int
    factor: int
    """See `Split`."""


def _in_order(cuts: list[Chunk]) -> list[Chunk]:
    """Cuts of a dimension, given in the mesh's order, in that in which they were made."""
    if not cuts:
        return []
    first, rest = cuts[0], _in_order(cuts[1:])
    if first.factor > 1 and first.factor == math.prod(chunk.of for chunk in rest):
        return [*rest, first._replace(factor=1)]
    return [first, *rest]


def _held_along(side: int, cuts: Sequence[Chunk]) -> list[Span]:
    """What is held of a dimension after cuts one after the other."""
    spans = [(0, side)]
    for which, of, factor in cuts:
        held = sum(b - a for a, b in spans)
        size = -(-held // factor)
        mine: list[Span] = []
        for start in range(0, held, max(size, 1)):
            width = min(size, held - start)
            chunk = -(-width // of)
            a, b = (min(i * chunk, width) for i in (which, which + 1))
            mine += _within(spans, start + a, start + b)
        spans = mine
    return _joined(spans)


def _within(spans: list[Span], first: int, last: int) -> Iterator[Span]:
    """Positions [first, last) of the spans, one after the other."""
    at = 0
    for a, b in spans:
        low, high = max(first - at, 0), min(last - at, b - a)
        if low < high:
            yield a + low, a + high
        at += b - a


def _joined(spans: list[Span]) -> list[Span]:
    """Spans that follow each other as one, without empty ones."""
    found: list[Span] = []
    for a, b in spans:
        if found and found[-1][1] == a:
            a = found.pop()[0]
        if a < b:
            found.append((a, b))
    return found


def _product(shape: tuple[int, ...], held: Sequence[list[Span]]) -> Region:
    """What a rank holds of a parameter that holds these spans of each dimension."""
    found, numel, local = [Runs(0, 1, 1, 1, 0, 1)], 1, 1  # of the dimensions so far, from the last one on
    for side, spans in zip(reversed(shape), reversed(held), strict=True):
        places = accumulate((b - a for a, b in spans), initial=0)
        found = [
            repeated
            for (a, b), at in zip(spans, places, strict=False)
            for runs in found
            for repeated in _repeated(runs._replace(start=runs.start + a * numel, offset=runs.offset + at * local),
                                      b - a, numel, local)
        ]  # fmt: skip
        numel, local = numel * side, local * sum(b - a for a, b in spans)
    return Region(tuple(found))


def _repeated(runs: Runs, times: int, step: int, stride: int) -> list[Runs]:
    """Runs `times` over, `step` apart, in the rank's flat tensor `stride`; as few as can be."""
    if times == 1:
        return [runs]
    if runs.number == 1 and runs.length == step:  # they follow each other
        size = times * step
        return [runs._replace(length=size, step=size, stride=size)]
    if runs.number == 1:
        return [runs._replace(number=times, step=step, stride=stride)]
    if runs.number * runs.step == step and runs.number * runs.stride == stride:
        return [runs._replace(number=times * runs.number)]
    return [runs._replace(start=runs.start + i * step, offset=runs.offset + i * stride) for i in range(times)]


def _rectangles(start: int, stop: int, view: MatrixView) -> list[LocalRect]:
    """Entries [start, stop) of the view: part of a row, whole rows, part of a row, in each matrix."""
    found = []
    at = start
    while at < stop:
        row, column = divmod(at, view.columns)
        matrix, r = divmod(row, view.rows)
        if column or stop - at < view.columns:
            size = min(view.columns - column, stop - at)
            rect = Rect(matrix, r, r + 1, column, column + size)
        else:
            rows = min((stop - at) // view.columns, view.rows - r)
            size = rows * view.columns
            rect = Rect(matrix, r, r + rows, 0, view.columns)
        found.append(LocalRect(rect, at - start, view.columns))
        at += size
    return found
