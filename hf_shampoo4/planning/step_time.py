"""A prediction of the time that the optimizer takes in a step, from what is counted and what a device reaches.

Every launch takes the longest of what it takes to launch anything, to move its bytes, to do its products, to look up or
code its numbers one by one (on a CPU); and decompositions take as long for each matrix as one was measured to.  Nothing
overlaps, and nothing is waited for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import OptionError
from ..execution.blocking import meta_has_memory
from ..groups import is_of_matrices, param_groups
from ..options import Options
from ..preconditioners.algorithms import intervals
from ..utils.ceilings import Ceilings
from .figures import Plan
from .launches import Counted, Launch, LaunchCounter, steps_of

FIRST = 1000  # steps, in which bases are updated more often than later
UTILISATION = 0.4  # of a device's published bfloat16 rate by the model's forward and backward pass
FUSED_BYTES = 28  # a parameter and step of fused AdamW in float32: reads p, g, m, v, writes p, m, v
FUSED_ENTRIES = 320 * 65536  # that one launch of it takes


@dataclass(frozen=True)
class Seconds:
    """Of an optimizer in one step."""

    late: float
    """On average, when bases are updated as rarely as they ever are."""
    worst: float
    """When all of them are updated."""
    first: float
    """On average over the first 1,000 steps."""

    @classmethod
    def over_schedule(cls, late: float, worst: float, options: Options) -> Seconds:
        """From the mean of late steps, over whole periods, and one that updates all bases."""
        every = max(intervals(options).values(), default=1)
        none = (late - worst / every) / (1 - 1 / every) if every > 1 else late
        updates = sum(1 / max(intervals(options, step).values(), default=1) for step in range(1, FIRST + 1)) / FIRST
        return cls(late, worst, max(none + updates * (worst - none), 0.0))


@dataclass(frozen=True)
class Prediction:
    """Nothing in it was measured on the card."""

    card: str
    sources: Mapping[str, str]
    tokens: int
    """Of a step, over all ranks."""
    utilisation: float
    with_triton: bool
    model: float
    """Seconds of the forward and backward pass, 6 N D operations."""
    optimizers: Mapping[str, Seconds]
    """Ours is the first."""
    counts: Mapping[str, Any]
    """What was counted of ours: in a late step, and where all bases are updated."""
    unknown: Sequence[str] = ()
    """What the card's table has no time of, so that it is in none of these figures."""
    apply: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a late step by who updates the blocks, the one that is taken first; empty where that is no choice."""

    @property
    def ours(self) -> str:
        """The name that a user types for these options."""
        return next(iter(self.optimizers))

    def share(self, name: str) -> float:
        """Of a late step that the optimizer takes."""
        late = self.optimizers[name].late
        return late / (self.model + late)

    def fewer_steps(self, other: str) -> float:
        """The share of another optimizer's steps that ours must save to be as fast by the clock."""
        ours, theirs = self.optimizers[self.ours].late, self.optimizers[other].late
        return 1 - (self.model + theirs) / (self.model + ours)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        return {**asdict(self), "fewer_steps": {name: self.fewer_steps(name) for name in [*self.optimizers][1:]}}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def seconds(launches: Mapping[Launch, int], ceilings: Ceilings, share: float = 1.0) -> float:
    """Of launches one after the other.

    Args:
        launches: and how often each.
        ceilings: of the device.
        share: of the work of each launch that this rank has.
    """
    return sum(times * _seconds(launch, ceilings, share) for launch, times in launches.items())


def _seconds(launch: Launch, ceilings: Ceilings, share: float) -> float:
    moved = ceilings.moving(launch.bytes, launch.written)
    rate = ceilings.one_by_one.get(launch.operation, 0.0)
    coded = launch.numbers / rate if rate else 0.0
    multiplied = launch.products / ceilings.of_products(launch.precision) if launch.products else 0.0
    of_one = ceilings.decomposition(launch.operation, launch.order) if launch.matrices else None
    decomposed = launch.matrices * (of_one or 0.0)
    return max(ceilings.launch, share * max(moved, multiplied, decomposed, coded))


def unknown(launches: Mapping[Launch, int], ceilings: Ceilings) -> list[str]:
    """The decompositions among launches that the table has no time of."""
    found: Counter[str] = Counter()
    for launch, times in launches.items():
        if launch.matrices and ceilings.decomposition(launch.operation, launch.order) is None:
            found[f"{launch.operation} of order {launch.order}"] += times * launch.matrices
    return [f"{count} x {what}" for what, count in found.items()]


def predict(
    model: nn.Module, plan: Plan, ceilings: Ceilings, tokens: int, utilisation: float = UTILISATION
) -> Prediction:
    """A prediction for one of the devices of a plan.

    Args:
        model: on the meta device.
        plan: of it; what the busiest rank computes and sends is taken from it.
        ceilings: of the card.
        tokens: of a step, over all ranks.
        utilisation: of the card's published bfloat16 rate, by the model.

    Raises:
        OptionError: a number of tokens or a utilisation that cannot be.
    """
    if tokens < 1:
        raise OptionError(f"--tokens-per-step {tokens} is not allowed: it must be an integer >= 1")
    if not 0 < utilisation <= 1:
        raise OptionError(f"--utilisation {utilisation} is not allowed: it must be a number in (0, 1]")
    triton = find_spec("triton") is not None
    against = plan.all_against_owners
    more = against.seconds(ceilings) if against else 0.0
    with meta_has_memory(ceilings.capacity):
        counted = steps_of(model, plan.options, triton)
    owners, ours = (_ours(counted, plan, ceilings, longer) for longer in (0.0, more if plan.apply == "all" else 0.0))
    late = {"owners": owners.late, "all": owners.late + more} if against else {}
    return Prediction(
        card=ceilings.name,
        sources=ceilings.sources,
        tokens=tokens,
        utilisation=utilisation,
        with_triton=triton,
        model=6 * plan.parameters * tokens / (plan.world_size * utilisation * ceilings.peak),
        optimizers={plan.optimizer: ours, **_others(model, ceilings)},
        apply=dict(sorted(late.items(), key=lambda item: item[0] != plan.apply)),
        counts={name: of_step.summary() for name, of_step in counted.items()},
        unknown=unknown(counted["all"].launches(), ceilings),
    )


def _ours(counted: Mapping[str, Counted], plan: Plan, ceilings: Ceilings, longer: float) -> Seconds:
    """Of the busiest rank if owners apply, late steps so many seconds longer."""
    share = plan.work.largest / max(plan.work.total, 1)
    late, worst = (
        seconds(counted[name].launches(), ceilings, share) + ceilings.sending(wire.largest, plan.world_size)
        for name, wire in (("late", plan.wire_step), ("all", plan.wire_refresh))
    )
    late = max(late + longer, 0.0)
    options = Options(**plan.options)
    every = max(intervals(options).values(), default=1)
    if not options.stagger:  # the late step that was counted updates nothing; staggered it has its part of the updates
        late += (worst - late) / every
    return Seconds.over_schedule(late, worst, options)


def _others(model: nn.Module, ceilings: Ceilings) -> dict[str, Seconds]:
    """AdamW and Muon on one rank: data parallelism repeats them on each."""
    hidden = [p for group in param_groups(model) if is_of_matrices(group) for _, p in group["params"] if p.dim() == 2]
    rest = {id(p) for p in model.parameters() if p.requires_grad} - {id(p) for p in hidden}
    adamw = _fused_adamw(sum(p.numel() for p in model.parameters() if p.requires_grad), ceilings)
    found = {"AdamW, fused": Seconds(adamw, adamw, adamw)}
    if hasattr(torch.optim, "Muon"):
        left = _fused_adamw(sum(p.numel() for p in model.parameters() if id(p) in rest), ceilings)
        muon = seconds(_muon(hidden), ceilings) + left
        found["Muon, AdamW for the rest"] = Seconds(muon, muon, muon)
    return found


def _fused_adamw(entries: int, ceilings: Ceilings) -> float:
    return max(math.ceil(entries / FUSED_ENTRIES) * ceilings.launch, FUSED_BYTES * entries / ceilings.memory)


def _muon(matrices: list[Tensor]) -> Counter[Launch]:
    """What torch's Muon launches: one matrix after another, so each shape is counted once."""
    found: Counter[Launch] = Counter()
    for shape, times in Counter(tuple(p.shape) for p in matrices).items():
        p = nn.Parameter(torch.empty(shape, device="meta"))
        p.grad = torch.empty_like(p)
        optimizer = torch.optim.Muon([p])
        optimizer.step()
        counter = LaunchCounter()
        with counter:
            optimizer.step()
        for launch, of_one in counter.found.launches().items():
            found[launch] += times * of_one
    return found


def _lines(p: Prediction) -> list[str]:
    kernels = "with" if p.with_triton else "without (Triton is not installed here)"
    rows = [
        f"{name:<28}{1e3 * t.late:>10.2f}{1e3 * t.worst:>12.2f}{1e3 * t.first:>14.2f}{p.share(name):>12.1%}"
        for name, t in p.optimizers.items()
    ]
    breaks = [
        f"{p.ours} is faster than {name} to the same loss if it needs {p.fewer_steps(name):.1%} fewer steps"
        for name in [*p.optimizers][1:]
    ]
    counts, (taken, *_) = p.counts["late"], (*p.apply, "")
    applied = [
        f"a late step with apply={name}: {1e3 * late:.2f} ms" + (" (taken)" if name == taken else "")
        for name, late in p.apply.items()
    ]
    return [
        f"A prediction for the {p.card}; nothing of it was measured there (docs/gpu.md)",
        f"the model's own step: {1e3 * p.model:.1f} ms, 6 N D operations for {p.tokens:,} tokens at "
        f"{p.utilisation:.0%} of the card's published bfloat16 rate",
        f"{'optimizer, ms a step':<28}{'late':>10}{'all bases':>12}{'first 1,000':>14}{'of a step':>12}",
        *rows,
        *(f"NOT in these figures, for the card's table has no time of it: {what}" for what in p.unknown),
        *applied,
        *breaks,
        f"counted in a late step, {kernels} Triton kernels: {counts['launches']:,} launches, "
        f"{counts['bytes'] / 1e9:.2f} GB, {sum(counts['products'].values()) / 1e9:.0f} GFLOP",
    ]
