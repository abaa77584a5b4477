"""From parameters to waves: placements that all ranks agree on, blocks, owners, stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..numerics.storage import allocate
from ..options import Options
from ..preconditioners.algorithms import Elementwise
from ..preconditioners.protocols import Algorithm
from ..sharding.agreement import of_each
from ..sharding.exchange import Ranks
from ..sharding.local_parameter import Held, alike, sharing
from ..sharding.placement import Placement, Sharding, assign, placed, ranges, sharding_of
from .blocking import Block, _in_waves, blocks_of, loads_of, places_of
from .waves import Member, Stack, Wave

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
