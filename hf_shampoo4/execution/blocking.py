"""From shapes to what is computed: blocks, their algorithms, what they cost, and the layout of their state.

Nothing here looks at a number of a parameter, so it plans for models that do not fit this machine as well.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeVar

import torch

from ..exceptions import OptionError
from ..numerics.storage import SMALL, nbytes
from ..options import FALLBACK, Options
from ..preconditioners.algorithms import algorithm_class
from ..preconditioners.operations import amortised
from ..preconditioners.protocols import Algorithm
from ..sharding.geometry import MatrixView, Rect, entries_view, matrix_view, partition
from ..sharding.owners import Load

WAVE_ELEMENTS = 1 << 24  # of a wave on a CPU: 64 MiB of float32 gradient, and the least elsewhere
WAVE_SHARE = 8  # of a GPU's memory a wave may take one part in so many, for a step's launches are as many as its waves
WAVE_BYTES = 44  # that an entry takes at most: gradient, update, and nine float32 numbers while two bases are updated
VOCABULARY = 4  # a vocabulary has at least this many times as many rows as columns


@dataclass(frozen=True)
class Block:
    """One rectangle of a parameter's matrix view, and the algorithm that runs on it."""

    view: MatrixView
    rect: Rect
    algorithm: Algorithm

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), as the algorithm sees it."""
        *rows, columns = self.algorithm.shape
        return math.prod(rows), columns

    @property
    def numel(self) -> int:
        """Entries of it."""
        return math.prod(self.rect.shape)


def blocks_of(shape: tuple[int, ...], options: Options) -> list[Block]:
    """How a parameter of `shape` (the global one) is treated, from geometry alone; empty for one without elements.

    Raises:
        OptionError: fused matrices (`row_splits`) with equal blocks that are to be treated differently.
    """
    numel = math.prod(shape)
    if not numel:
        return []
    quantise = numel >= SMALL
    algorithm = algorithm_class(options.algorithm)
    view = matrix_view(shape, options.matrix_view) if algorithm.preconditions else None
    if view is not None and options.vocabulary and view.rows < VOCABULARY * view.columns:
        view = None  # hardly a vocabulary: learned positions, a class token, the classes of a classifier
    if view is None:
        view, options = entries_view(shape), dataclasses.replace(options, algorithm=FALLBACK, row_splits=())
        algorithm = algorithm_class(FALLBACK)
    fused = options.row_splits if sum(options.row_splits) == view.rows else (view.rows,)
    ends = list(accumulate(fused))
    found: dict[tuple[tuple[int, int], int], Algorithm] = {}
    blocks = []
    for rect in partition(view, lambda rows, columns: algorithm.largest_block(rows, columns, options), fused):
        kind = rect.shape, fused[bisect_right(ends, rect.r0)]
        if kind not in found:
            of_block, whole = rect.shape if len(shape) > 1 else (numel,), (kind[1], view.columns)
            found[kind] = algorithm.make(of_block, options, quantise, whole)
        blocks.append(Block(view, rect, found[kind]))
    if len({of_block.shape for of_block in found.values()}) < len(set(found.values())):
        raise OptionError(
            f"row_splits={options.row_splits} cut a parameter of shape {shape} into matrices with blocks of one shape, "
            "of which some have two bases and some have one: set sides=both or sides=short"
        )
    return blocks if algorithm.preconditions else [_by_last_dimension(block, shape) for block in blocks]


def _by_last_dimension(block: Block, shape: tuple[int, ...]) -> Block:
    """A block of whole rows, as rows of the parameter's last dimension: tensor parallelism may cut that one."""
    columns = shape[-1] if shape else 1
    times = block.view.columns // columns
    rows = Rect(0, block.rect.r0 * times, block.rect.r1 * times, 0, columns)
    return Block(MatrixView(1, block.view.rows * times, columns), rows, block.algorithm)


def loads_of(blocks: Sequence[Block], options: Options) -> list[Load]:
    """What each block asks of its owner, from shapes alone: exact in bytes, in flops as `operations.Work.cost`."""
    found: dict[tuple[int, int], Load] = {}
    for block in blocks:
        if block.rect.shape not in found:
            found[block.rect.shape] = _load(block, options)
    return [found[block.rect.shape] for block in blocks]


def _load(block: Block, options: Options) -> Load:
    work = amortised(block.algorithm.work(), block.algorithm.intervals(options))
    return Load(work.cost(block.numel), sum(nbytes(storage) for storage in block.algorithm.storages().values()))


def phases_of(counts: Mapping[str, int]) -> dict[str, list[float]]:
    """What share of a group's blocks comes before each: staggered, neighbours are refreshed in one step or the next.

    So the owners of a wave, among whom its blocks are dealt, have work in the same steps, and other waves in others.

    Args:
        counts: parameter's name -> its number of blocks, in the group's order.
    """
    total, first, phases = sum(counts.values()), 0, {}
    for name, count in counts.items():
        phases[name] = [(first + k) / total for k in range(count)]
        first += count
    return phases


_of_meta: ContextVar[int] = ContextVar("_of_meta", default=80 * 10**9)


@contextmanager
def meta_has_memory(size: int) -> Iterator[None]:
    """Plan for a GPU with so many bytes of memory wherever the meta device stands for one; else it has 80 GB."""
    token = _of_meta.set(size)
    try:
        yield
    finally:
        _of_meta.reset(token)


def wave_elements(device: torch.device, working_memory: float = 0.0) -> int:
    """How many entries a wave may have on a device.

    A CPU has few, which stay near its caches.  A GPU has as many as a share of its memory allows: what it takes to
    launch a step's operations is what small waves cost there.

    Args:
        working_memory: GB that a step may take there, see the option.
    """
    if device.type not in ("cuda", "meta"):
        return WAVE_ELEMENTS
    if working_memory:
        return max(WAVE_ELEMENTS, int(working_memory * 1e9) // WAVE_BYTES)
    memory = _of_meta.get() if device.type == "meta" else torch.cuda.get_device_properties(device).total_memory
    return max(WAVE_ELEMENTS, memory // (WAVE_SHARE * WAVE_BYTES))


class Planned(Protocol):
    """A parameter that waits for its wave."""

    @property
    def kind(self) -> Hashable:
        """Only equal kinds share a wave."""

    @property
    def numel(self) -> int:
        """Entries of all of it."""

    @property
    def shard_count(self) -> int:
        """Into how many the ranks have cut it; 1: it is whole on every rank."""

    @property
    def room(self) -> int:
        """How many entries its wave may have, see `wave_elements`: alike for one kind, and on every rank."""


P = TypeVar("P", bound=Planned)


def in_waves(parameters: Iterable[P]) -> Iterator[list[P]]:
    """Parameters of one kind and number of parts, as many as have room on a rank; at least one."""
    alike: dict[Hashable, list[P]] = {}
    for p in parameters:
        alike.setdefault((p.kind, p.shard_count), []).append(p)
    for candidates in alike.values():
        wave: list[P] = []
        elements = 0
        for p in candidates:
            if wave and elements + p.numel > p.room * p.shard_count:
                yield wave
                wave, elements = [], 0
            wave.append(p)
            elements += p.numel
        yield wave


def in_parts(blocks: Sequence[Block], owners: Sequence[int], ranks: int, room: int) -> list[list[int]]:
    """Positions of the blocks of a wave, so that no rank computes many more entries of a part than there is room for.

    One part where the wave fits, and where norms go over whole parameters (Shampoo's graft).  Of several ranks each
    deals out its own blocks in turn: all are at work in every part, and so are those that hold the gradients.

    Args:
        owners: who computes each block.
        ranks: into how many parts the ranks have cut the parameters.
        room: entries that a wave may have on a rank.
    """
    grafted = any(block.algorithm.grafted for block in blocks)
    if grafted or sum(block.numel for block in blocks) <= room * ranks:
        return [list(range(len(blocks)))] if blocks else []
    of_owner: dict[int, list[int]] = {}
    for i, owner in enumerate(owners):
        of_owner.setdefault(owner, []).append(i)
    entries = (sum(blocks[i].numel for i in of_rank) for of_rank in of_owner.values())
    count = max(-(-numel // room) for numel in entries)
    parts: list[list[int]] = [[] for _ in range(count)]
    for of_rank in of_owner.values():
        for j, i in enumerate(of_rank):  # one rank alone: neighbours together, so that their state is one slice
            parts[j * count // len(of_rank) if len(of_owner) == 1 else j % count].append(i)
    return [sorted(part) for part in parts if part]
