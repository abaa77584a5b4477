"""How the ranks share a model: who holds which entries of its parameters, and who owns which of their blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from ..exceptions import OptionError
from ..execution.apply import Group
from ..execution.blocking import blocks_of, phases_of, wave_elements
from ..execution.build import assign_owners
from ..execution.waves import WaveParameter
from ..groups import options_of, param_groups
from ..integrations.trainer import head_options
from ..options import Options
from ..sharding.dtensor import sharded
from ..sharding.local_parameter import local_parameter
from ..sharding.placement import Layout, Placement, Split, ranges, whole

NODE = 8  # ranks that share a copy of the model under HSDP, unless said otherwise: the GPUs of a machine
SUB_GROUP = 1_000_000_000  # entries of a rank that ZeRO-3 updates together: DeepSpeed's default sub_group_size


@dataclass(frozen=True)
class Sharding:
    """How the ranks share the parameters."""

    name: str
    world: int
    shards: int
    """Ranks that share one copy of the model's weights."""

    @property
    def in_deepspeed(self) -> bool:
        """DeepSpeed has the optimizer update one parameter group at a time, so owners are chosen for each alone."""
        return self.name.startswith("zero")

    def units(self, named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
        """The parameters of a group that are updated together."""
        if self.name != "zero3":
            return [named]
        units: list[list[tuple[str, nn.Parameter]]] = [[]]
        filled = 0
        for name, p in named:
            if filled >= SUB_GROUP:
                units.append([])
                filled = 0
            units[-1].append((name, p))
            filled += -(-p.numel() // self.world)
        return units

    def placements(self, shapes: list[tuple[int, ...]]) -> list[Placement]:
        """Where the parameters of a unit live."""
        ranks, rows = tuple(range(self.world)), Split(0, 1)
        if self.name == "ddp":
            return [whole(shape, self.world) for shape in shapes]
        if self.name == "fsdp2":
            return [sharded(shape, Layout((ranks,), (self.world,), (rows,))) for shape in shapes]
        if self.name == "hsdp":
            mesh = (self.world // self.shards, self.shards)
            return [sharded(shape, Layout((ranks,), mesh, (None, rows))) for shape in shapes]
        if self.name == "zero3":
            return [_cut_evenly(shape, self.world) for shape in shapes]
        return _in_one_buffer(shapes, self.world)


def sharding_of(sharding: str, world: int, shards: int | None) -> Sharding:
    """A name of `SHARDINGS` with the number of ranks that share a copy of the model.

    Raises:
        OptionError: `shards` without hsdp, or ranks that it does not divide.
    """
    if sharding != "hsdp":
        if shards is not None:
            raise OptionError(f"shards={shards!r} is for sharding='hsdp'; with {sharding!r} leave it out")
        return Sharding(sharding, world, 1 if sharding == "ddp" else world)
    chosen = min(NODE, world) if shards is None else shards
    if chosen < 1 or world % chosen:
        raise OptionError(f"shards={chosen!r} is not allowed: it must divide world_size={world}")
    return Sharding(sharding, world, chosen)


@cache
def _cut_evenly(shape: tuple[int, ...], world: int) -> Placement:
    """ZeRO-3: every parameter in equal ranges, the last ones shorter."""
    numel = math.prod(shape)
    size = -(-numel // world)
    return ranges(shape, [(min(r * size, numel), min((r + 1) * size, numel)) for r in range(world)])


def _in_one_buffer(shapes: list[tuple[int, ...]], world: int) -> list[Placement]:
    """ZeRO-1 and ZeRO-2: the parameters of a group one after the other, and that in equal ranges (aligned to 2)."""
    size = 2 * -(-sum(map(math.prod, shapes)) // (2 * world))
    placements, at = [], 0
    for shape in shapes:
        numel = math.prod(shape)
        bounds = [(0, 0)] * world
        for rank in range(at // size, min(-(-(at + numel) // size), world)):
            bounds[rank] = max(rank * size - at, 0), min((rank + 1) * size - at, numel)
        placements.append(ranges(shape, bounds))
        at += numel
    return placements


@dataclass(frozen=True)
class PlannedGroup:
    """A parameter group as the optimizer would treat it; the blocks have their owners."""

    options: Options
    members: list[WaveParameter]
    replicated: bool
    """Whether every rank keeps all of the state."""

    @property
    def shared_out(self) -> Group:
        """As `execution.apply` takes it."""
        return self.options, self.members


def planned_groups(model: nn.Module, chosen: Mapping[str, Any], layout: Sharding) -> list[PlannedGroup]:
    """The parameter groups of a model as `Shampoo4bit` would treat them with these options; blocks have owners."""
    groups = []
    for group in param_groups(model, head=head_options(chosen)):
        options = options_of(group, chosen)
        replicated = layout.world == 1 or (layout.name == "ddp" and not options.shard_state)
        cut = {shape: blocks_of(shape, options) for shape in {tuple(p.shape) for _, p in group["params"]}}
        phases = phases_of({name: len(cut[tuple(p.shape)]) for name, p in group["params"]})
        for unit in layout.units(group["params"]):
            placements = layout.placements([tuple(p.shape) for _, p in unit])
            members = [
                WaveParameter(local_parameter(name, p), placement, blocks, [0] * len(blocks), room, phases[name])
                for (name, p), placement in zip(unit, placements, strict=True)
                for blocks in [cut[tuple(p.shape)]]
                for room in [wave_elements(p.device, options.working_memory)]
            ]
            groups.append(PlannedGroup(options, members, replicated))
    for assigned in [[group] for group in groups] if layout.in_deepspeed else [groups]:
        assign_owners([group.members for group in assigned], [group.options for group in assigned], layout.world)
    return groups
