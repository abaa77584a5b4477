"""Where the entries of a DTensor are: FSDP2, HSDP and tensor parallelism, as its mesh and placements say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from .placement import Layout, Placement, Shard, Split, whole
from .regions import Region, Runs

T = TypeVar("T")


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
