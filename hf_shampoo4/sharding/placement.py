"""Where a parameter's entries live, and who owns its blocks: integers only, the same on every rank.

Every sharding comes down to one fact a rank: the *region* of the parameter that it holds.

    one process, DDP              all of it, on every rank
    FSDP2, HSDP, tensor parallel  a box, as the DTensor's placements say
    FSDP1, ZeRO-1/2/3             a range of its entries in row-major order

Blocks are cut in the parameter's global coordinates whatever the sharding; `assign` gives each one owner.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .geometry import MatrixView, Rect


class Region(NamedTuple):
    """`runs` runs of `length` consecutive entries (row-major), `step` apart; the rank has them one after the other."""

    start: int
    runs: int
    length: int
    step: int

    @property
    def numel(self) -> int:
        return self.runs * self.length


class Patch(NamedTuple):
    """A rectangle of a parameter's matrix view that a rank holds, and where it lies in the rank's flat tensor."""

    rect: Rect
    offset: int
    """Of its first entry."""
    stride: int
    """From a row to the next."""


class Share(NamedTuple):
    """A region, and the ranks that hold it."""

    region: Region
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Where all of a parameter lives: every entry in one share."""

    shape: tuple[int, ...]
    """The parameter's global shape."""
    shares: tuple[Share, ...]

    @cached_property
    def share_of(self) -> dict[int, Share]:
        """By rank."""
        return {rank: share for share in self.shares for rank in share.ranks}

    def holders(self, entry: int) -> tuple[int, ...]:
        """The ranks that hold an entry, by its row-major position."""
        last = bisect.bisect_right(self._starts, entry) if self._starts else len(self.shares)
        for region, ranks in reversed(self.shares[:last]):
            run, within = divmod(entry - region.start, max(region.step, 1))
            if 0 <= run < region.runs and within < region.length:
                return ranks
        raise ValueError(f"nobody holds entry {entry} of a parameter of shape {self.shape}")

    @cached_property
    def _starts(self) -> list[int]:
        """Where the shares start, if they are in order."""
        starts = [share.region.start for share in self.shares if share.region.numel]
        filled = all(share.region.numel for share in self.shares[: len(starts)])
        return starts if filled and starts == sorted(starts) else []

    @property
    def whole(self) -> bool:
        """Whether every rank holds all of it."""
        return len(self.shares) == 1


def held_here(p: Tensor, rank: int, world: int) -> Placement:
    """The placement of a live parameter: a DTensor's, or whole on every rank.

    Raises:
        ValueError: a mesh that is not made of all ranks (expert or pipeline parallelism), a sharding that is neither a
            range nor a box, or a local tensor that is not what the placements say.
    """
    mesh = getattr(p, "device_mesh", None)
    if mesh is None:
        return whole(tuple(p.shape), world)
    ranks = tuple(mesh.mesh.flatten().tolist())
    if sorted(ranks) != list(range(world)):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} lives on a mesh of ranks {ranks[:8]}, which are not all {world}: "
            "meshes for a part of the ranks (expert or pipeline parallelism) are not supported; "
            "use FSDP, HSDP, tensor parallelism or DDP over all ranks"
        )
    sharding: Any = p
    placement = sharded(tuple(p.shape), ranks, tuple(mesh.mesh.shape), tuple(sharding.placements))
    region, held = placement.share_of[rank].region, sharding.to_local().numel()
    if region.numel != held:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} has {held} entries on rank {rank}, but its placements "
            f"{sharding.placements} on a mesh of {tuple(mesh.mesh.shape)} mean {region.numel}"
        )
    return placement


@cache
def whole(shape: tuple[int, ...], world: int) -> Placement:
    """All of it on every rank."""
    numel = math.prod(shape)
    return Placement(shape, (Share(Region(0, 1, numel, numel), tuple(range(world))),))


@cache
def sharded(
    shape: tuple[int, ...], ranks: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Any, ...]
) -> Placement:
    """A DTensor's placement.

    Args:
        ranks: of the mesh, flattened.
        mesh: its shape.
        placements: one a mesh dimension: Shard, Replicate or FSDP2's _StridedShard.

    Raises:
        ValueError: pending sums (Partial), or boxes with a gap in more than one dimension.
    """
    holders: dict[Region, list[int]] = {}
    for position, rank in enumerate(ranks):
        coordinate = np.unravel_index(position, mesh)
        holders.setdefault(_region(shape, mesh, coordinate, placements), []).append(rank)
    return Placement(shape, tuple(Share(region, tuple(held_by)) for region, held_by in holders.items()))


def ranges(shape: tuple[int, ...], bounds: Sequence[tuple[int, int]]) -> Placement:
    """Entries [start, stop) of the flattened parameter, by rank; equal bounds are replicas."""
    holders: dict[tuple[int, int], list[int]] = {}
    for rank, bound in enumerate(bounds):
        holders.setdefault(bound, []).append(rank)
    shares = [Share(Region(a, 1, b - a, b - a), tuple(held_by)) for (a, b), held_by in holders.items()]
    return Placement(shape, tuple(shares))


def patches(region: Region, view: MatrixView) -> list[Patch]:
    """The region as rectangles of the matrix view: for a range at most three a matrix, for a box one.

    Raises:
        ValueError: runs that are no rectangles of this view.
    """
    if region.numel == 0:
        return []
    if region.runs > 1 and region.step == view.columns:  # a box of columns: one rectangle a matrix
        row, column = divmod(region.start, view.columns)
        tall = _rectangles(row * view.columns, (row + region.runs) * view.columns, view)
        rects = [Rect(r.matrix, r.r0, r.r1, column, column + region.length) for r, _, _ in tall]
        return [
            Patch(r, p.offset // view.columns * region.length, region.length) for r, p in zip(rects, tall, strict=True)
        ]
    if region.runs > 1 and region.step % view.columns:
        raise ValueError(f"sharding in runs of {region.length} entries does not fit matrices of {view.columns} columns")
    return [
        Patch(rect, i * region.length + offset, stride)
        for i in range(region.runs)
        for start in [region.start + i * region.step]
        for rect, offset, stride in _rectangles(start, start + region.length, view)
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

    Equal blocks are dealt out in turn, but for the last full round and the rest: those go, the largest first, to the
    rank on which the larger of its two shares (of all flops, of all bytes) stays smallest, ties to the lowest.
    """
    counts = Counter(loads)
    dealt = {load: (count // world - 1) * world for load, count in counts.items()}
    owners, seen, left = [0] * len(loads), Counter[Load](), []
    for i, load in enumerate(loads):
        if seen[load] < dealt[load]:
            owners[i] = seen[load] % world
        else:
            left.append(i)
        seen[load] += 1
    totals = [max(sum(load[k] for load in (*loads, *(load for _, load in there))), 1) for k in range(2)]
    shares = np.zeros((2, world))
    for owner, load in there:
        shares[:, owner] += np.array(load) / totals
    for i in sorted(left, key=lambda i: (-max(x / total for x, total in zip(loads[i], totals, strict=True)), i)):
        mine = np.array([[x / total] for x, total in zip(loads[i], totals, strict=True)])
        owners[i] = int((shares + mine).max(0).argmin())
        shares[:, owners[i]] += mine[:, 0]
    return owners


def _region(shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: Any, placements: tuple[Any, ...]) -> Region:
    box = [(0, side) for side in shape]
    dims = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if any(placements[i].is_partial() for i in dims):
        raise ValueError(f"a parameter of shape {shape} is a pending sum over ranks (placements {placements})")
    # _StridedShard: tensor parallelism has cut the dimension before FSDP does, though it comes later in the mesh
    for i in sorted(dims, key=lambda i: type(placements[i]).__name__ == "_StridedShard"):
        start, stop = box[placements[i].dim]
        chunk = -(-(stop - start) // mesh[i])
        first = min(start + int(coordinate[i]) * chunk, stop)
        box[placements[i].dim] = (first, min(first + chunk, stop))
    return _runs(shape, box)


def _runs(shape: tuple[int, ...], box: list[tuple[int, int]]) -> Region:
    """A box as runs of entries."""
    if any(start == stop for start, stop in box):
        return Region(0, 1, 0, 0)
    cut = [d for d, bounds in enumerate(box) if bounds != (0, shape[d])]
    inner = max(cut, default=0)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    start = sum(bounds[0] * stride for bounds, stride in zip(box, strides, strict=True))
    length = (box[inner][1] - box[inner][0]) * strides[inner] if shape else 1
    runs = math.prod(stop - start for start, stop in box[:inner])
    if any(0 < d < inner for d in cut):
        raise ValueError(
            f"a parameter of shape {shape} is sharded in dimensions {cut}: at most dim 0 and one more can be"
        )
    step = shape[inner] * strides[inner] if runs > 1 else length
    return Region(start, runs, length, step)


def _rectangles(start: int, stop: int, view: MatrixView) -> list[Patch]:
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
        found.append(Patch(rect, at - start, view.columns))
        at += size
    return found
