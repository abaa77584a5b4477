"""Who updates the blocks of parameters that every rank has whole: their owners, or every rank all of them.

Owners divide the work of a step, and send each other the new weights and state of every block.  Where every rank
updates all blocks itself (`all`), only those that are refreshed in a step are their owners', as a refresh takes long.
Both give the same bits where the wire is exact, so what a late step takes less time with is taken.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from ..numerics.precision import multiplies_bfloat16
from ..numerics.quantize import builder_of_kernels
from ..numerics.storage import nbytes
from ..options import Options, require, users_of
from ..preconditioners.protocols import Algorithm
from ..sharding.exchange import host
from ..utils.ceilings import MACHINE, Ceilings, ceilings_of_device
from .waves import WaveParameter

# What a late step of a rank has more where all apply, for an entry that others own: bytes of rotations, and of all else
# less what goes through the memory to be sent.  And launches: of llama_60m 24 on 8 ranks and 205 on 64.  Counted on the
# meta device with Triton's kernels, which KL-Shampoo has (tests/execution/test_apply.py holds it).
MOVED = {"kl_shampoo": 45}
MOVED_BY_OTHERS = 200
ROTATED = 22
LAUNCHES = 120

Group = tuple[Options, Sequence[WaveParameter]]


class Machine(NamedTuple):
    """Where a rank computes."""

    devices: tuple[str, ...]
    """What torch calls the GPUs that its parameters are on; of a CPU what its products' rounding goes by."""
    host: str
    """Which computer that is, see `host`."""
    kernels: str = ""
    """What builds kernels there, see `builder_of_kernels`; "" if nothing does."""
    versions: str = ""
    """Of what computes there."""


@dataclass(frozen=True)
class Difference:
    """What a late step of the busiest rank has more of where every rank applies all, and less; refreshes have none."""

    bytes: float
    """Moved more in the GPU's memory."""
    rotated: float
    """Moved more by products."""
    products: Mapping[str, float]
    """More operations, by precision."""
    launches: int
    """More."""
    sent: float
    """Fewer bytes to others."""
    world: int

    def seconds(self, ceilings: Ceilings, machine: int = MACHINE) -> float:
        """That the step takes longer if every rank applies all; below 0: it takes less."""
        multiplied = sum(count / ceilings.of_products(precision) for precision, count in self.products.items())
        more = self.bytes / ceilings.memory + max(self.rotated / ceilings.memory, multiplied)
        return more + self.launches * ceilings.launch - ceilings.sending(self.sent, self.world, machine)


def difference(groups: Sequence[Group], world: int) -> Difference:
    """Of parameters that every rank has whole, with the state; by counts alone."""
    owned, sent = np.zeros(world), np.zeros(world)
    moved, rotated, products, launches = 0.0, 0.0, defaultdict[str, float](float), 0
    for options, members in groups:
        precision = _precision(options)
        for member in members:
            width = 2 if options.wire == "bf16" else member.local.buffer.element_size()
            shares = refreshed_shares(member, options)
            launches = LAUNCHES if any(shares) else launches
            for block, owner, refreshed in zip(member.blocks, member.owners, shares, strict=True):
                rest = 1 - refreshed
                owned[owner] += block.numel
                moved += rest * MOVED.get(options.algorithm, MOVED_BY_OTHERS) * block.numel
                rotated += rest * ROTATED * block.numel
                products[precision] += rest * block.algorithm.work()["step"].products
                sent[owner] += rest * (width * block.numel + bytes_of_a_step(block.algorithm))
    others = 1 - owned.max() / max(owned.sum(), 1)
    return Difference(
        bytes=others * moved,
        rotated=others * rotated,
        products={p: others * n for p, n in products.items()},
        launches=launches,
        sent=(world - 1) * float(sent.max()),
        world=world,
    )


def refreshed_shares(member: WaveParameter, options: Options) -> list[float]:
    """On what share of late steps each block of a parameter is refreshed; where norms go over it, any of its blocks."""
    due = [_due(block.algorithm, options, phase) for block, phase in zip(member.blocks, member.phases, strict=True)]
    if options.graft == "norm" and any(block.algorithm.grafted for block in member.blocks):
        due = [(set().union(*(steps for steps, _ in due)), period) for _, period in due]
    return [len(steps) / period for steps, period in due]


def _due(algorithm: Algorithm, options: Options, phase: float) -> tuple[set[int], int]:
    """The steps of a period of so many in which a block is refreshed."""
    every = [n for refresh, n in algorithm.intervals(options).items() if refresh in algorithm.refreshes()]
    period = math.lcm(*every)
    first = [-int(phase * n * options.stagger) % n for n in every]
    return {step for n, at in zip(every, first, strict=True) for step in range(at, period, n)}, period


@lru_cache(maxsize=1 << 12)
def bytes_of_a_step(algorithm: Algorithm) -> int:
    """Of a block's state that changes at every step."""
    rare = {name for names in algorithm.refreshes().values() for name in names}
    return sum(nbytes(storage) for name, storage in algorithm.storages().items() if name not in rare)


def bytes_of_refreshes(algorithm: Algorithm, options: Options) -> dict[int, int]:
    """Of a block's other state, which changes once in so many steps."""
    storages, found = algorithm.storages(), dict[int, int]()
    for refresh, names in algorithm.refreshes().items():
        every = algorithm.intervals(options)[refresh]
        found[every] = found.get(every, 0) + sum(nbytes(storages[name]) for name in names)
    return found


def _precision(options: Options) -> str:
    """Of most products of a step, on a GPU."""
    if options.algorithm not in users_of("rotation_precision"):
        return "float32"
    return {"auto": "tf32"}.get(options.rotation_precision, options.rotation_precision)


def may_all_apply(options: Options, members: Sequence[WaveParameter], world: int) -> bool:
    """Whether every rank has all it needs."""
    return world > 1 and not options.shard_state and all(member.placement.whole for member in members)


def all_is_shorter(groups: Sequence[Group], world: int, ceilings: Ceilings, machine: int = MACHINE) -> bool:
    """What `apply=auto` asks of groups that `may_all_apply`."""
    return difference(groups, world).seconds(ceilings, machine) < 0


def is_by_all(asked: str, shorter: bool) -> bool:
    """Whether every rank applies, where it may, by the option and by whether that is shorter."""
    return asked == "all" or (asked == "auto" and shorter)


def this_machine(devices: Sequence[torch.device]) -> Machine:
    """Of the devices that this rank's parameters are on."""
    kinds = {torch.cuda.get_device_name(device) for device in devices if device.type == "cuda"}
    if any(device.type == "cpu" for device in devices):
        half = " with bfloat16 products" if multiplies_bfloat16() else ""
        kinds.add(f"CPU, {torch.backends.cpu.get_cpu_capability()}{half}")
    return Machine(tuple(sorted(kinds)), host(), builder_of_kernels(devices), _versions(devices))


def _versions(devices: Sequence[torch.device]) -> str:
    found = [f"hf_shampoo4 {import_module('hf_shampoo4').__version__}", f"torch {torch.__version__}"]
    if any(device.type == "cuda" for device in devices):
        built, inner = cast("Any", torch.version), cast("Any", torch._C)
        found.append(
            f"CUDA {built.cuda}, driver of {inner._cuda_getDriverVersion()}" if built.cuda else f"ROCm {built.hip}"
        )
    return ", ".join(found)


def agree_on_kernels(machines: Sequence[Machine]) -> bool:
    """Whether all ranks have the same kernels, or none; else they round differently, and replicas would go apart."""
    found = [f"{machine.kernels}, {machine.versions}" if machine.kernels else "none" for machine in machines]
    if len(set(found)) > 1:
        warnings.warn(
            f"ranks build different kernels ({_by_rank(found)}), which may round differently: plain PyTorch works in "
            "their place on all, and takes longer.  Make Triton work, in one version and of one torch, on every rank",
            stacklevel=2,
        )
    return len(set(found)) == 1


def _by_rank(found: Sequence[str]) -> str:
    """What is found on which ranks."""
    ranks = {name: [rank for rank, there in enumerate(found) if there == name][:8] for name in sorted(set(found))}
    return "; ".join(f"{name}: ranks {of_name}" for name, of_name in ranks.items())


def all_apply(groups: Sequence[Group], machines: Sequence[Machine]) -> list[bool]:
    """For each group whether every rank updates its blocks; the same on every rank.

    Args:
        groups: that are planned together.
        machines: of every rank.

    Raises:
        OptionError: `apply=all` where not every rank has all it needs, or where unlike devices or versions would round
            differently.
    """
    world, kinds = len(machines), {machine.devices for machine in machines}
    versions = [machine.versions for machine in machines]
    able = [may_all_apply(options, members, world) for options, members in groups]
    for (options, members), is_able in zip(groups, able, strict=True):
        asked = options.apply == "all" and world > 1 and bool(members)
        cut = "auto or owners where ranks have a part of the parameters or of the state each: owners alone can apply"
        require("apply", options.apply, not asked or is_able, cut)
        unlike = f"auto or owners on unlike GPUs or CPUs, which round differently: {sorted(kinds)}"
        require("apply", options.apply, not asked or len(kinds) == 1, unlike)
        unlike = f"auto or owners on unlike versions, which may round differently ({_by_rank(versions)})"
        require("apply", options.apply, not asked or len(set(versions)) == 1, unlike)
    free = [group for group, is_able in zip(groups, able, strict=True) if is_able and group[0].apply == "auto"]
    gpus = min(Counter(machine.host for machine in machines).values())
    alike = len(kinds) == len(set(versions)) == 1 and len(machines[0].devices) == 1
    ceilings = ceilings_of_device(machines[0].devices[0]) if alike else None
    shorter = bool(free) and ceilings is not None and all_is_shorter(free, world, ceilings, gpus)
    return [is_able and is_by_all(options.apply, shorter) for (options, _), is_able in zip(groups, able, strict=True)]
