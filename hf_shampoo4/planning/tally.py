"""What every rank keeps, computes and sends for the blocks that it owns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..execution.apply import bytes_of_a_step, bytes_of_refreshes, may_all_apply, refreshed_shares
from ..execution.blocking import Block, in_parts, in_waves, loads_of
from ..execution.waves import WaveParameter
from ..preconditioners.protocols import Algorithm
from ..preconditioners.together import ALONE, workspace
from ..sharding.geometry import Rect
from ..sharding.placement import Placement
from ..sharding.regions import Region
from .shardings import PlannedGroup

RANK_FIGURES = ("state", "working", "exchange", "work", "wire_step", "wire_all", "wire_refresh")


@dataclass
class Tally:
    """What every rank has and sends: int64 arrays over the ranks, bytes but for `work`."""

    world: int
    all_apply: bool = False
    """Whether every rank updates all blocks of its groups that are not refreshed in a step, as far as it may."""
    state: np.ndarray = field(init=False)
    working: np.ndarray = field(init=False)
    exchange: np.ndarray = field(init=False)
    work: np.ndarray = field(init=False)
    wire_step: np.ndarray = field(init=False)
    wire_all: np.ndarray = field(init=False)
    wire_refresh: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        for name in RANK_FIGURES:
            setattr(self, name, np.zeros(self.world, np.int64))
        self._held_of: dict[int, np.ndarray] = {}

    def add(self, group: PlannedGroup) -> None:
        """Count a group, wave by wave."""
        for batch in in_waves(group.members):
            self._add_wave(batch, group)

    def _add_wave(self, members: Sequence[WaveParameter], group: PlannedGroup) -> None:
        counts: np.ndarray = np.zeros((4, self.world), np.int64)
        owned, kept, held, asked = counts
        state: np.ndarray = np.zeros(self.world, np.int64)
        blocks: dict[Algorithm, np.ndarray] = {}
        for member in members:
            held += self._held(member.placement)
            asked += self._asked(member)
            for block, owner, load in zip(
                member.blocks, member.owners, loads_of(member.blocks, group.options), strict=True
            ):
                owned[owner] += math.prod(block.rect.shape)
                blocks.setdefault(block.algorithm, np.zeros(self.world, np.int64))[owner] += 1
                kept[owner] += _overlap(block, member.placement.shard_of[owner].region)
                state[owner] += load.bytes
                self.work[owner] += load.flops
        self.state += state.sum() if group.replicated else state
        split = _parts(members)
        working = _working(blocks, owned, split, members[0].parameter.device)
        if self.all_apply and may_all_apply(*group.shared_out, self.world):
            working = np.maximum(working, _working_alone(members))
        self.working = np.maximum(self.working, 4 * working)
        if self.world > 1:
            self._add_traffic(members, group, split, *counts)

    def _held(self, placement: Placement) -> np.ndarray:
        """Entries of a parameter by rank; equal placements are one object."""
        if id(placement) not in self._held_of:
            found: np.ndarray = np.zeros(self.world, np.int64)
            for region, ranks in placement.shards:
                found[list(ranks)] += region.numel
            self._held_of[id(placement)] = found
        return self._held_of[id(placement)]

    def _asked(self, member: WaveParameter) -> np.ndarray:
        """Entries of the gradient that each rank gives to owners: of replicas, the one in the owner's place does."""
        replicas = next(len(ranks) for region, ranks in member.placement.shards if region.numel)
        if member.placement.whole or replicas == 1:
            return self._held(member.placement)
        found: np.ndarray = np.zeros(self.world, np.int64)
        for block, owner in zip(member.blocks, member.owners, strict=True):
            for region, ranks in member.placement.shards:
                found[ranks[owner * len(ranks) // self.world]] += _overlap(block, region)
        return found

    def _add_traffic(
        self,
        members: Sequence[WaveParameter],
        group: PlannedGroup,
        split: int,
        owned: Any,
        kept: Any,
        held: Any,
        asked: Any,
    ) -> None:
        """Entries that a rank gives and does not own travel to their owner, and back to all that hold them."""
        width, short = members[0].parameter.element_size(), group.options.wire == "bf16"
        gradient, update = (2, 2) if short else (width, 4)
        if members[0].placement.whole:  # the owner has the gradient and the weights; everybody needs the new ones
            weights = 2 if short else width
            out, into = (self.world - 1) * weights * owned, weights * (owned.sum() - owned)
        else:
            copies = held.sum() // owned.sum()
            out = gradient * (asked - kept) + update * (copies * owned - kept)
            into = gradient * (owned - kept) + update * (held - kept)
        often, seldom = _changed(members, group, self.world)
        self.wire_all += _of_refreshed(members, group, seldom, self.world)
        refresh = out + (self.world - 1) * sum(seldom.values(), often)
        self.wire_step += out + (self.world - 1) * often
        if group.options.stagger:
            for every, size in seldom.items():
                self.wire_step += (self.world - 1) * size // every
        self.wire_refresh += refresh
        arriving = into + (refresh - out).sum() // (self.world - 1) - (refresh - out) // (self.world - 1)
        self.exchange = np.maximum(self.exchange, -(-(refresh + arriving) // split))


def _changed(
    members: Sequence[WaveParameter], group: PlannedGroup, world: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Bytes of state that every rank's blocks change for all to have: at each step, and once in so many steps."""
    often: np.ndarray = np.zeros(world, np.int64)
    seldom: dict[int, np.ndarray] = {}
    blocks = Counter((b.algorithm, o) for m in members for b, o in zip(m.blocks, m.owners, strict=True))
    for (algorithm, owner), count in blocks.items() if group.replicated else ():
        often[owner] += count * bytes_of_a_step(algorithm)
        for every, size in bytes_of_refreshes(algorithm, group.options).items():
            seldom.setdefault(every, np.zeros(world, np.int64))[owner] += count * size
    return often, seldom


def _of_refreshed(
    members: Sequence[WaveParameter], group: PlannedGroup, seldom: Mapping[int, np.ndarray], world: int
) -> np.ndarray:
    """Bytes that every rank sends in a late step, on average, if only blocks that are refreshed travel.

    Args:
        seldom: what `_changed` gives.
    """
    exact: np.ndarray = np.zeros(world)
    if not (group.replicated and group.options.stagger):
        return exact.astype(np.int64)
    for every, size in seldom.items():
        exact += size / every
    width = 2 if group.options.wire == "bf16" else members[0].parameter.element_size()
    for member in members:
        shares = refreshed_shares(member, group.options)
        for block, owner, share in zip(member.blocks, member.owners, shares, strict=True):
            exact[owner] += share * (width * block.numel + bytes_of_a_step(block.algorithm))
    return (exact * (world - 1)).astype(np.int64)


def _working_alone(members: Sequence[WaveParameter]) -> np.ndarray:
    """`_working` of a rank that computes all blocks of a wave."""
    every = [block for member in members for block in member.blocks]
    counts = Counter(block.algorithm for block in every)
    blocks = {algorithm: np.array([count]) for algorithm, count in counts.items()}
    owned = np.array([sum(block.numel for block in every)])
    return _working(blocks, owned, _parts(members, alone=True), members[0].parameter.device)


def _parts(members: Sequence[WaveParameter], alone: bool = False) -> int:
    """In how many parts a wave is computed, by the owners or by a rank that computes all of it."""
    blocks = [block for member in members for block in member.blocks]
    owners = [0 if alone else owner for member in members for owner in member.owners]
    return len(in_parts(blocks, owners, members[0].shard_count, members[0].room)) or 1


def _overlap(block: Block, region: Region) -> int:
    """Entries of a block in a range of its parameter."""
    return _before(block, region.start + region.numel) - _before(block, region.start)


def _before(block: Block, position: int) -> int:
    """Entries of a block whose row-major position in the parameter is below `position`."""
    r: Rect = block.rect
    row, column = divmod(position, block.view.columns)
    row -= r.matrix * block.view.rows
    rows = min(max(row - r.r0, 0), r.r1 - r.r0)
    part = min(max(column - r.c0, 0), r.c1 - r.c0) if r.r0 <= row < r.r1 else 0
    return rows * (r.c1 - r.c0) + part


def _at_once(blocks: Mapping[Algorithm, np.ndarray], split: int) -> np.ndarray:
    """float32 numbers that each rank has at once while bases of all stacks are updated, beside gradients and updates.

    Args:
        blocks: as `_working`'s.
        split: the same.
    """
    counts = np.stack([-(-of_ranks // split) for of_ranks in blocks.values()])
    each, which = np.unique(counts, axis=1, return_inverse=True)
    found = np.array([workspace(dict(zip(blocks, map(int, column), strict=True))) for column in each.T])
    return found[which.reshape(-1)]


def _working(blocks: Mapping[Algorithm, np.ndarray], owned: np.ndarray, split: int, device: torch.device) -> np.ndarray:
    """float32 numbers that each rank has at once beside the state: gradients, updates, the largest stack's workspace,
    or that of all stacks whose bases are updated together.

    Args:
        blocks: of a wave, how many each rank owns.
        owned: their entries.
        split: in how many parts the wave is computed.
        device: that computes it.
    """
    workspace: np.ndarray = np.zeros_like(owned)
    for algorithm, counts in blocks.items():
        numbers, which = np.unique(-(-counts // split), return_inverse=True)
        workspace = np.maximum(workspace, np.array([max(algorithm.workspace(int(n)).values()) for n in numbers])[which])
    copies = 3 if any(algorithm.grafted for algorithm in blocks) else 2  # P of all stacks, before any has its update
    working: np.ndarray = workspace + copies * -(-owned // split)
    if device.type not in ALONE:
        working = np.maximum(working, _at_once(blocks, split) + 2 * -(-owned // split))
    return working
