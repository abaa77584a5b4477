"""From parameters to waves: placements that all ranks agree on, blocks, owners, stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from ..numerics.memory import keep_freed_memory
from ..numerics.precision import lacks
from ..numerics.quantize import without_kernels
from ..options import Options, require
from ..preconditioners.protocols import Algorithm
from ..sharding.agreement import gather_or_raise
from ..sharding.dtensor import Sharding, placed, sharding_of
from ..sharding.exchange import Ranks
from ..sharding.local_parameter import LocalParameter, may_be_replicas, overlapping
from ..sharding.owners import assign
from ..sharding.placement import Placement, ranges
from .apply import Machine, agree_on_kernels, all_apply, this_machine
from .blocking import Block, blocks_of, in_waves, loads_of, phases_of, wave_elements
from .waves import BlockStack, Wave, WaveParameter, new_state

Shapes = Mapping[str, tuple[int, ...]]


def build(groups: Sequence[tuple[Options, Sequence[LocalParameter], Shapes]], ranks: Ranks) -> list[list[Wave]]:
    """Waves over the parameters of each group, with freshly initialised state; the same plan on every rank.

    Args:
        groups: options, the parameters in the same order on every rank, and the shapes of all that the group has: with
            DeepSpeed, the parameters may be a part of these.

    Raises:
        OptionError: a device cannot multiply in the `rotation_precision` that is asked for; see `all_apply`.
        ValueError: a parameter that lives in a way that is not known, or not completely on these ranks, or that shares
            memory with another one where owners send new weights.
    """
    every = [(local, options.working_memory) for options, of_group, _ in groups for local in of_group]
    machines, by_rank = zip(*gather_or_raise(ranks, lambda: _seen(every, ranks)), strict=True)
    kernels = agree_on_kernels(machines)
    reports = zip(*by_rank, strict=True)
    found = iter(
        [(placement_of(local, of), min(r.room for r in of)) for (local, _), of in zip(every, reports, strict=True)]
    )
    if any(local.buffer.device.type == "cpu" for local, _ in every):
        keep_freed_memory()
    members = []
    for options, of_group, shapes in groups:
        _require_precision(options, of_group)
        blocks = {name: blocks_of(shape, options) for name, shape in shapes.items()}
        phases = phases_of({name: len(of_one) for name, of_one in blocks.items()})
        members.append([_member(h, *next(found), blocks[h.name], phases[h.name]) for h in of_group])
    if ranks.world > 1:
        _refuse_sharing([member.local for of_group in members for member in of_group if member.placement.whole])
    assign_owners(members, [options for options, _, _ in groups], ranks.world)
    planned = [(options, found) for found, (options, _, _) in zip(members, groups, strict=True)]
    with nullcontext() if kernels else without_kernels():
        return [
            [make_wave(batch, options, ranks, by_all, kernels) for batch in in_waves(found)]
            for (options, found), by_all in zip(planned, all_apply(planned, machines), strict=True)
        ]


def _require_precision(options: Options, members: Sequence[LocalParameter]) -> None:
    for device in {local.buffer.device for local in members}:
        why = lacks(options.rotation_precision, device)
        allowed = f"auto or float32 for parameters on {device}: {why}"
        require("rotation_precision", options.rotation_precision, not why, allowed)


def _refuse_sharing(members: Sequence[LocalParameter]) -> None:
    pair = next(overlapping(members), None)
    if pair is not None:
        raise ValueError(
            f"parameters {pair[0]!r} and {pair[1]!r} share memory, and with several ranks each one's owner would "
            "overwrite what the other's has done: make them one parameter, used twice, or clone() one of them"
        )


class _Report(NamedTuple):
    """What a rank says of a parameter; with neither a range nor a sharding, it has all of it."""

    range: tuple[int, int] | None
    sharding: Sharding | None
    digest: list[tuple[float, ...]]
    """Where its mesh has a part of the ranks."""
    room: int
    """How many entries a wave may have on its device."""


def _seen(every: Sequence[tuple[LocalParameter, float]], ranks: Ranks) -> tuple[Machine, list[_Report]]:
    """What a rank says of itself and of parameters, each with its `working_memory`."""
    machine = this_machine([local.buffer.device for local, _ in every])
    return machine, [_reported(*one, ranks) for one in every]


def _reported(local: LocalParameter, working_memory: float, ranks: Ranks) -> _Report:
    room = wave_elements(local.buffer.device, working_memory)
    if local.range is not None:
        return _Report((local.range.start, local.range.start + local.range.numel), None, [], room)
    sharding = sharding_of(local.parameter)
    if sharding is None:
        return _Report(None, None, [], room)
    if ranks.group is not None:
        sharding = sharding._replace(mesh=ranks.from_global(sharding.mesh, local.name))
    return _Report(None, sharding, local.digest() if len(sharding.mesh) < ranks.world else [], room)


def placement_of(local: LocalParameter, by_rank: Sequence[_Report]) -> Placement:
    """Where all of a parameter is, from what each rank says."""
    if local.range is None:
        placement = placed(local.name, local.shape, [report.sharding for report in by_rank])
        for _, ranks in placement.shards:
            if not may_be_replicas([by_rank[rank].digest for rank in ranks]):
                raise ValueError(
                    f"parameter {local.name!r} has other numbers on each of the meshes of ranks "
                    f"{list(placement.layout.meshes[:4] if placement.layout else ())}, which should be replicas: "
                    "parameters that only some ranks train (expert and pipeline parallelism) are not supported"
                )
        return placement
    bounds = [report.range for report in by_rank if report.range]
    placement = ranges(local.shape, bounds)
    if sum(shard.region.numel for shard in placement.shards) != local.numel:
        raise ValueError(
            f"the {len(by_rank)} ranks that train together hold entries {bounds[:4]} of the {local.numel} of "
            f"{local.name!r}: leave out communicate=false, and use FSDP or DeepSpeed over all ranks"
        )
    return placement


def _member(
    local: LocalParameter, placement: Placement, room: int, blocks: list[Block], phases: list[float]
) -> WaveParameter:
    return WaveParameter(local, placement, blocks, [0] * len(blocks), room, phases)


def assign_owners(groups: list[list[WaveParameter]], options: list[Options], world: int) -> None:
    """Give every block its owner; an elementwise one stays where it is, if one rank has most of it."""
    if world == 1:
        return
    loads, free, there = [], [], []
    for members, of_group in zip(groups, options, strict=True):
        for member in members:
            for k, load in enumerate(loads_of(member.blocks, of_group)):
                block = member.blocks[k]
                if not block.algorithm.preconditions and not member.placement.whole:
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


def make_wave(
    members: list[WaveParameter], options: Options, ranks: Ranks, by_all: bool = False, kernels: bool = True
) -> Wave:
    """One wave with freshly initialised state.

    Args:
        members: with the owners of their blocks.
        options: of their group.
        ranks: that train together.
        by_all: see `Wave.all_apply`.
        kernels: see `Wave.kernels`.
    """
    replicated = ranks.world == 1 or (members[0].placement.whole and not options.shard_state)
    rows: dict[Algorithm, list[tuple[int, int, int, float]]] = {}
    first = 0
    for m, member in enumerate(members):
        for k, (block, owner) in enumerate(zip(member.blocks, member.owners, strict=True)):
            if replicated or owner == ranks.rank:
                rows.setdefault(block.algorithm, []).append((m, first + k, member.seed_offsets[k], member.phases[k]))
        first += len(member.blocks)
    device = members[0].local.buffer.device
    stacks = [_stack(a, found, len(members), device) for a, found in rows.items()]
    return Wave(members, stacks, ranks, replicated, by_all, kernels, options.wire)


def _stack(
    algorithm: Algorithm, rows: list[tuple[int, int, int, float]], members: int, device: torch.device
) -> BlockStack:
    membership = torch.zeros((members, len(rows)), dtype=torch.float32, device="cpu")
    membership[[m for m, *_ in rows], list(range(len(rows)))] = 1.0
    state = new_state(algorithm, len(rows), device)
    seed_offsets = torch.tensor([seed_offset for _, _, seed_offset, _ in rows], dtype=torch.int32, device=device)
    phases = [phase for *_, phase in rows]
    return BlockStack(algorithm, [block for _, block, *_ in rows], membership.to(device), seed_offsets, phases, state)
