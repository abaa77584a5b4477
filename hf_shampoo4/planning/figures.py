"""The figures of a plan, and how they read as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..execution.apply import Difference
from .sharding_names import SHARDINGS
from .training_memory import TrainingMemory


@dataclass(frozen=True)
class OverRanks:
    """One quantity over the ranks."""

    total: int
    largest: int
    """Of one rank."""

    @classmethod
    def of(cls, ranks: np.ndarray) -> OverRanks:
        return cls(int(ranks.sum()), int(ranks.max()))


@dataclass(frozen=True)
class Plan:
    """What training a model takes; bytes, unless it says otherwise."""

    model: str
    world_size: int
    sharding: str
    shards: int
    """Ranks that share one copy of the model's weights."""
    copies: int
    """Of the state: 1 where the ranks share it, else one a rank."""
    options: dict[str, Any]
    """Those that were set; the others are at their default."""
    parameters: int
    """Elements of the trainable parameters."""
    preconditioned: int
    """Of them, elements of parameters that have factors."""
    tensors: int
    preconditioned_tensors: int
    blocks: int
    """Rectangles with a pair of factors."""
    largest_block: tuple[int, int]
    state: OverRanks
    working: OverRanks
    """Gradient copies and other temporaries of the largest wave; an estimate."""
    wave: int
    """Entries that a wave may have on a rank, on the device that is planned for."""
    exchange: OverRanks
    """What is sent and received of the largest wave, in buffers."""
    work: OverRanks
    """Operations of the blocks' owners, an average step: `preconditioners.operations.Work.cost`."""
    wire_step: OverRanks
    """Sent by the optimizer in a late step if owners apply, on average where refreshes are spread over the steps of a
    period; what the data parallelism itself sends is not in it."""
    wire_refresh: OverRanks
    """The same in a step that computes all factors, roots or bases."""
    wire_all: OverRanks
    """As `wire_step`, if every rank applies all (`apply=all`)."""
    apply: str
    """Who updates the blocks, `owners` or `all`; `working` is of that."""
    all_against_owners: Difference | None
    """What a late step takes more if every rank applies all; None: it cannot."""
    others: dict[str, OverRanks]
    """State of other optimizers of this model, cut evenly over the ranks where ours is."""
    training: TrainingMemory
    """Weights, gradients and activations."""

    @property
    def optimizer(self) -> str:
        """The name that a user types for these options."""
        return {"soap": "soap4bit", "elementwise": "adamw4bit"}.get(self.options.get("algorithm", ""), "shampoo4bit")

    @property
    def peak(self) -> int:
        """Optimizer memory of the fullest rank at the worst moment of a step."""
        return self.state.largest + self.working.largest + self.exchange.largest

    def bytes_per_parameter(self, load: OverRanks) -> float:
        """Of one copy of the state."""
        return load.total / self.parameters / self.copies

    @property
    def balance(self) -> float:
        """Work of the busiest rank over the mean: 1 is perfect."""
        return self.work.largest * self.world_size / max(self.work.total, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        return {**asdict(self), "peak": self.peak, "balance": self.balance}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(p: Plan) -> list[str]:
    """The plan as text."""
    settings = ", ".join(f"{name}={value}" for name, value in p.options.items()) or "default options"
    share = p.preconditioned / p.parameters
    return [
        f"{p.model}: {p.parameters:,} parameters in {p.tensors:,} tensors; {settings}",
        f"{ranks_text(p)}: {SHARDINGS[p.sharding]}",
        f"preconditioned: {p.preconditioned:,} parameters ({share:.1%}) of {p.preconditioned_tensors:,} tensors, "
        f"in {p.blocks:,} blocks of up to {p.largest_block[0]} x {p.largest_block[1]}",
        "",
        f"{'optimizer state':<16}{'bytes/param':>12}{'a rank':>12}{'all ranks':>12}",
        *(
            f"{name:<16}{p.bytes_per_parameter(load):>12.2f}{bytes_text(load.largest):>12}{bytes_text(load.total):>12}"
            for name, load in [(p.optimizer, p.state), *p.others.items()]
        ),
        "",
        f"{p.optimizer}, the fullest rank",
        f"{'  state':<40}{bytes_text(p.state.largest):>12}",
        f"{'  working memory of a step':<40}{bytes_text(p.working.largest):>12}",
        f"    for waves of up to {p.wave:,} entries",
        f"{'  exchange buffers':<40}{bytes_text(p.exchange.largest):>12}",
        f"{'  peak':<40}{bytes_text(p.peak):>12}",
        *_sent(p),
        f"{'  sent where every block is refreshed':<40}{bytes_text(p.wire_refresh.largest):>12}",
        f"work of the busiest rank: {p.balance:.2f} times the mean",
        "",
        *_whole_training(p),
    ]


def _sent(p: Plan) -> list[str]:
    """In a late step, by who updates the blocks where that may be chosen."""
    if p.all_against_owners is None:
        return [f"{'  sent in a step':<40}{bytes_text(p.wire_step.largest):>12}"]
    by = {"owners": p.wire_step, "all": p.wire_all}
    return [
        f"{f'  sent in a step with apply={name}':<40}{bytes_text(by[name].largest):>12}"
        + (" (taken)" if name == p.apply else "")
        for name in by
    ]


def _whole_training(p: Plan) -> list[str]:
    """Weights, gradients, activations, and what all of it comes to with each optimizer."""
    t, b = p.training, p.training.batch
    what = "forward pass: give --batch and --seq_len"
    if b:
        again = ", gradient checkpointing" if b.checkpointing else ""
        what = f"activations (estimate), {b.sequences} x {b.tokens:,}{again}"
    totals = {p.optimizer: t.peak(p.state.largest, p.working.largest + p.exchange.largest)}
    totals |= {name: t.peak(load.largest, 0) for name, load in p.others.items()}
    return [
        "the whole training, the fullest rank (of the others the working memory of a step is not counted)",
        f"{f'  weights, {t.dtype}':<58}{bytes_text(t.weights):>12}",
        f"{'  gradients':<58}{bytes_text(t.gradients):>12}",
        f"{f'  {what}':<58}{bytes_text(t.activations) if b else 'not counted':>12}",
        *(f"{f'  all together with {name}':<58}{bytes_text(total):>12}" for name, total in totals.items()),
    ]


def ranks_text(p: Plan) -> str:
    """The ranks, as people write them."""
    groups = f"{p.world_size // p.shards:,} x {p.shards:,}" if p.sharding == "hsdp" else f"{p.world_size:,}"
    return f"{groups} x {p.sharding}"


def bytes_text(size: int) -> str:
    """Bytes for people: three significant digits or more, in powers of 1,000."""
    unit = min(max(len(str(size)) - 1, 0) // 3, 4)
    return f"{size / 1000**unit:.{2 if unit else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"
