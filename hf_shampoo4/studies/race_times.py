"""`hf-shampoo4 race GRID --time`: what a step of every contestant takes, measured side by side on a quiet machine.

All contestants live in one process and take their steps in turn, on one thread, so that whatever else the machine does
falls on all of them.  Model and optimizer are timed apart, and so are the first steps, which allocate.  Bases are
updated at every step to begin with and seldom later: both paces are measured, and what lies between follows from the
schedule.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_shampoo4.integrations.trainer import OPTIMS, optim_options
from hf_shampoo4.options import Options, users_of
from hf_shampoo4.preconditioners.algorithms import intervals
from hf_shampoo4.studies.bench import peak_beyond
from hf_shampoo4.studies.code_version import commit
from hf_shampoo4.studies.grid import Contestant, Settings, pieces
from hf_shampoo4.studies.machine import machine, state_bytes
from hf_shampoo4.studies.peers import optimizer_of, train_settings
from hf_shampoo4.training.model import build_model
from hf_shampoo4.training.pretrain import parse
from hf_shampoo4.utils.files import write_json

FIRST, STEPS = 3, 30
"""Steps that are not counted, and those that are: whole periods of every contestant's refreshes."""


@dataclass(frozen=True)
class StepTime:
    """Of one contestant."""

    optimizer_ms: float
    """Mean over steps at the pace of the beginning: refreshes fall on some steps only, which a median would not see."""
    late_ms: float
    """The same at the slowest pace."""
    first_ms: float
    """The first step, in which the state is made."""


@dataclass(frozen=True)
class Times:
    """Of a grid's contestants, by name."""

    model_ms: float
    """Median of forward and backward, of all pieces of a step."""
    steps: Mapping[str, StepTime]
    machine: Mapping[str, Any]
    commit: str

    @classmethod
    def read(cls, path: Path) -> Times | None:
        """From the file that `measure_times` writes; None: there is none."""
        if not path.exists():
            return None
        told = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**told, "steps": {name: StepTime(**found) for name, found in told["steps"].items()}})

    def seconds(self, name: str, settings: Settings, steps: Sequence[float]) -> list[float]:
        """Training time before each of some steps, in ascending order."""
        found, pace = self.steps[name], pace_of(settings)
        slowest = pace(10**9)
        per_refresh = (found.optimizer_ms - found.late_ms) / (1 - slowest) if slowest < 1 else 0.0
        taken, at, step = [], 0.0, 0
        for wanted in steps:
            for n in range(step + 1, int(wanted) + 1):
                at += self.model_ms + found.optimizer_ms - per_refresh * (1 - pace(n))
            step = max(step, int(wanted))
            taken.append(at / 1e3)
        return taken


def pace_of(settings: Settings) -> Callable[[int], float]:
    """How many of its bases a run turns at step n, as a share of all of them; 1 for optimizers without a schedule."""
    options = _options(settings)
    if options is None or options.algorithm not in users_of("refresh_warmup") or not options.refresh_warmup:
        return lambda n: 1.0
    return lambda n: 1 / max(intervals(options, n).values())


def _options(settings: Settings) -> Options | None:
    if settings.get("optim") not in OPTIMS or "peer" in settings:
        return None
    return Options(**optim_options(settings["optim"], settings.get("optim_args", "")))


def _late(settings: Settings) -> Settings | None:
    """The same at the slowest pace of its schedule; None: there is but one pace."""
    if pace_of(settings)(10**9) == 1:
        return None
    given = settings.get("optim_args", "")
    return {**settings, "optim_args": ",".join(filter(None, (given, "refresh_warmup=0")))}


class Racer:
    """A model and an optimizer of its own."""

    def __init__(self, settings: Settings) -> None:
        with tempfile.TemporaryDirectory() as folder:
            chosen = parse({**train_settings(settings), "eval_strategy": "no", "output_dir": folder})
        torch.manual_seed(0)
        is_masked = chosen.data.mask_fraction > 0  # which takes one more token
        self.vocabulary = settings["vocab_size"]
        self.model = build_model(chosen.model, self.vocabulary + is_masked, masked=is_masked)
        made = optimizer_of(settings)(self.model, chosen.training)
        trainer = Trainer(self.model, chosen.training, optimizer_cls_and_kwargs=made)
        self.optimizer = trainer.create_optimizer()  # in which embeddings are not bitsandbytes' 8 bits
        self.model_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

    def gradients(self, tokens: torch.Tensor) -> None:
        """Forward and backward."""
        self.optimizer.zero_grad()
        began = time.process_time()
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.model_seconds.append(time.process_time() - began)

    def update(self) -> None:
        """The optimizer's step."""
        began = time.process_time()
        self.optimizer.step()
        self.optimizer_seconds.append(time.process_time() - began)

    def bytes(self) -> tuple[float, float]:
        """State, and at the peak of the next step, whose gradients are there; a parameter's."""
        parameters = sum(p.numel() for p in self.model.parameters())
        beyond = peak_beyond(self.optimizer.step, torch.device("cpu"))
        state = state_bytes(self.optimizer)
        return state / parameters, (state + beyond) / parameters


def measure_times(contestants: Sequence[Contestant], path: Path, steps: int = STEPS) -> Times:
    """Time all contestants at the first of their points, and keep it in a file.

    Args:
        contestants: of one grid, whose runs all train the same model on batches of one size.
        path: of the JSON file.
        steps: that are counted.

    Returns:
        What is in the file.
    """
    torch.set_num_threads(1)
    racers: dict[tuple[str, str], Racer] = {}
    for contestant in contestants:
        settings = contestant.run(contestant.points[0], 0)
        racers[contestant.name, "early"] = Racer(settings)
        if late := _late(settings):
            racers[contestant.name, "late"] = Racer(late)
    common = contestants[0].settings
    shape = (common["per_device_train_batch_size"], common["seq_len"])
    generator = torch.Generator().manual_seed(0)
    for step in range(FIRST + steps):
        tokens = torch.randint(common["vocab_size"], shape, generator=generator)
        for racer in racers.values():
            racer.gradients(tokens)
            racer.update()
        print(f"round {step + 1} of {FIRST + steps}", flush=True)
    unit = statistics.median(s for racer in racers.values() for s in racer.model_seconds[FIRST:])
    rounds = [statistics.median(each) for each in zip(*(r.model_seconds for r in racers.values()), strict=True)]
    found = {c.name: _told(c.name, racers, [1e3 * unit / s for s in rounds]) for c in contestants}
    times = Times(round(1e3 * unit * pieces(common), 2), found, machine(), commit())
    write_json(path, asdict(times))
    return times


def _told(name: str, racers: Mapping[tuple[str, str], Racer], scale: Sequence[float]) -> StepTime:
    """`scale`: milliseconds a second by round, at the speed that the machine has on the whole."""
    early, late = racers[name, "early"], racers.get((name, "late"))

    def mean(racer: Racer) -> float:
        scaled = [a * s for a, s in zip(racer.optimizer_seconds, scale, strict=True)]
        return round(statistics.mean(scaled[FIRST:]), 3)

    return StepTime(
        optimizer_ms=mean(early),
        late_ms=mean(late or early),
        first_ms=round(early.optimizer_seconds[0] * scale[0], 3),
    )
