"""The runs of a race: each point of each contestant once, by one code; `commands.race` says in which order and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from hf_shampoo4.studies.grid import Contestant, Grid, Point, Settings
from hf_shampoo4.studies.measured_run import Outcome, run_one
from hf_shampoo4.studies.peers import code_of, optimizer_of, train_settings
from hf_shampoo4.studies.runner import Runs

KEPT_EVERY = 300.0


class Study(NamedTuple):
    """How the runs of a grid are made."""

    train: Callable[[str, Settings, Path], Settings]
    """One run, from its label and settings, in a folder of its own, in which it may find what a killed one has left;
    what came out, as JSON, with a `final_loss`."""
    code_of: Callable[[Settings], Mapping[str, str]]
    """The versions of what makes it."""


def carry_out(
    grid: Grid, runs: Runs, shard: tuple[int, int] = (0, 1), sweep: bool = False, study: Study | None = None
) -> None:
    """Run what is not finished: all points of the first seed and, if asked for, the sweeps; then the other seeds.

    Args:
        grid: the race.
        runs: where results are kept; those in it, of any process, are not computed again.
        shard: (I, N): this process takes every N-th contestant, from the I-th.
        sweep: look for better points.
        study: how runs are made; default: pretrainings.

    Raises:
        ConfigError: a setting that does not exist or cannot be.
    """
    study = study or Study(train, code_of)
    index, processes = shard
    first, *others = grid.seeds
    mine = grid.contestants[index::processes]
    for contestant in mine:
        for point in contestant.points:
            _once(contestant, point, first, runs, study)
    for contestant in mine if sweep else ():
        while (better := contestant.next_point(first, runs.of(study.code_of))) is not None:
            _once(contestant, better, first, runs, study)
    for seed in others:
        for contestant in mine:
            if best := contestant.best(first, runs.of(study.code_of)):
                _once(contestant, best, seed, runs, study)


def _once(contestant: Contestant, point: Point, seed: int, runs: Runs, study: Study) -> None:
    settings = contestant.run(point, seed)
    code = study.code_of(settings)
    if runs.find(settings, code) is None:
        with runs.alone(settings, code) as folder:
            result = runs.once(settings, code, lambda: study.train(contestant.label, settings, folder))
        factors = "".join(f", {kind} x{factor:g}" for kind, factor in point.rates)
        print(
            f"{contestant.label}, seed {seed}, lr {point.learning_rate:g}{factors}: {result['final_loss']:.4f}",
            flush=True,
        )


def train(label: str, settings: Settings, folder: Path) -> Settings:
    """Train once; what came out, as JSON: `validation_seconds` is the training time before each evaluation.

    Every `KEPT_EVERY` seconds what is reached is kept in the folder, from which another call goes on.
    """
    shown = {**train_settings(settings), "label": f"{label}, seed {settings['seed']}"}
    return told(run_one(shown.pop("optim"), shown, folder, optimizer_of(settings), KEPT_EVERY))


def told(outcome: Outcome) -> Settings:
    """What a run keeps of a training."""
    first, *others = outcome.step_seconds  # the first allocates and may compile
    elapsed = [0.0, *accumulate([others[0] if others else first, *others])]
    kept = {key: value for key, value in asdict(outcome).items() if key not in ("training", "step_seconds", "settings")}
    return {
        **kept,
        "final_loss": outcome.final_loss,
        "validation_seconds": [round(elapsed[step], 2) for step, _ in outcome.validation],
    }
