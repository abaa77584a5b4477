"""The runs of a race: each point of each contestant once, by one code; `commands.race` says in which order and why."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

from hf_shampoo4.studies.grid import Contestant, Grid, Point, Settings
from hf_shampoo4.studies.measured_run import run_one
from hf_shampoo4.studies.peers import code_of, optimizer_of, train_settings
from hf_shampoo4.studies.runner import Runs


def carry_out(grid: Grid, runs: Runs, shard: tuple[int, int] = (0, 1), sweep: bool = False) -> None:
    """Run what is not finished: all points of the first seed and, if asked for, the sweeps; then the other seeds.

    Args:
        grid: the race.
        runs: where results are kept; those in it, of any process, are not computed again.
        shard: (I, N): this process takes every N-th contestant, from the I-th.
        sweep: look for better points.

    Raises:
        ConfigError: a setting that does not exist or cannot be.
    """
    index, processes = shard
    first, *others = grid.seeds
    mine = grid.contestants[index::processes]
    for contestant in mine:
        for point in contestant.points:
            _once(contestant, point, first, runs)
    for contestant in mine if sweep else ():
        while (better := contestant.next_point(first, runs.of(code_of))) is not None:
            _once(contestant, better, first, runs)
    for seed in others:
        for contestant in mine:
            if best := contestant.best(first, runs.of(code_of)):
                _once(contestant, best, seed, runs)


def _once(contestant: Contestant, point: Point, seed: int, runs: Runs) -> None:
    settings = contestant.run(point, seed)
    if runs.find(settings, code_of(settings)) is None:
        result = runs.once(settings, code_of(settings), lambda: train(contestant.label, settings))
        factors = "".join(f", {kind} x{factor:g}" for kind, factor in point.rates)
        print(
            f"{contestant.label}, seed {seed}, lr {point.learning_rate:g}{factors}: {result['final_loss']:.4f}",
            flush=True,
        )


def train(label: str, settings: Settings) -> Settings:
    """Train once; what came out, as JSON: `validation_seconds` is the training time before each evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        shown = {**train_settings(settings), "label": f"{label}, seed {settings['seed']}"}
        outcome = run_one(shown.pop("optim"), shown, Path(folder), optimizer_of(settings))
    first, *others = outcome.step_seconds  # the first allocates and may compile
    elapsed = [0.0, *accumulate([others[0] if others else first, *others])]
    kept = {key: value for key, value in asdict(outcome).items() if key not in ("training", "step_seconds", "settings")}
    return {
        **kept,
        "final_loss": outcome.final_loss,
        "validation_seconds": [round(elapsed[step], 2) for step, _ in outcome.validation],
    }
