"""What the finished runs of a race say: a row for each contestant, and the arithmetic between them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_shampoo4.studies.grid import Contestant, Grid, Point, Settings
from hf_shampoo4.studies.measured_run import steps_to
from hf_shampoo4.studies.race_times import Times

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """A contestant's runs at its best point, put together."""

    name: str
    label: str
    point: Point
    sweep: dict[Point, float]
    """Final validation loss at the first seed at every point that was tried."""
    closed: dict[str, bool]
    """Coordinate of the sweep -> whether worse points lie on both sides of the best; else a better may lie beyond."""
    losses: dict[int, float]
    """Seed -> final validation loss."""
    curve: Curve
    """(step, validation loss), the mean over seeds."""
    seconds: list[float]
    """Training time before each point of the curve: as measured in the runs, the mean over seeds, see `time_scale`; or
    from step times that were measured side by side, if there are any."""
    bytes_per_parameter: float
    peak_bytes_per_parameter: float | None
    """State, and what a step holds beyond it at most; None: not measured."""
    optimizer_step_ms: float
    model_step_ms: float
    """The rest of a training step, the same work for all contestants."""
    steps_to_baseline: float | None
    """Steps that the mean curve takes to the loss at which the baseline ends; None: it does not get there."""
    steps_spread: float | None
    """Standard deviation of these steps over seeds, each against the baseline's loss at that seed."""
    seconds_to_baseline: float | None
    seconds_spread: float | None
    """As `steps_spread`, of the seconds."""
    share: float | None
    """Of the way from the baseline's loss to the target's, over the seeds that all three have finished."""
    share_error: float | None
    """Its standard error; None with fewer than two seeds."""
    paper: tuple[float, float] | None
    commits: list[str]
    """Of the code that made the runs."""

    @property
    def open(self) -> bool:
        """Whether a better point may lie beyond those that were tried."""
        return not self.closed or not all(self.closed.values())

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.losses.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None


def rows_of(
    grid: Grid, finished: Sequence[Settings], times: Times | None = None, peaks: Mapping[str, float] | None = None
) -> list[Row]:
    """One row for each contestant with a finished run, in the grid's order.

    Args:
        grid: the race.
        finished: runs, of any grid; of two with equal settings the first counts.
        times: of steps, measured side by side; without them, and of contestants that they lack, times are the runs'.
        peaks: bytes a parameter at the peak of a step, of those contestants of which they were measured.
    """
    chosen = {c.name: found for c in grid.contestants if (found := _chosen(c, grid.seeds, finished))}
    losses = {name: {r["settings"]["seed"]: r["final_loss"] for r in runs} for name, (_, _, runs) in chosen.items()}
    unit = statistics.median(_model_ms(run) for _, _, runs in chosen.values() for run in runs) if chosen else 1.0
    clocks = {name: _Clock(unit, times if times and name in times.steps else None) for name in chosen}
    return [
        _row(grid, finished, found, losses, clocks[name], (peaks or {}).get(name)) for name, found in chosen.items()
    ]


@dataclass(frozen=True)
class _Clock:
    unit_ms: float
    """Of forward and backward, the median over runs."""
    times: Times | None

    def seconds(self, name: str, run: Settings) -> list[float]:
        """Before each evaluation of a run."""
        if self.times:
            return self.times.seconds(name, run["settings"], [step for step, _ in run["validation"]])
        return [time_scale(run, self.unit_ms) * s for s in run["validation_seconds"]]

    def optimizer_ms(self, name: str, runs: Sequence[Settings]) -> float:
        """Of a step, the mean over a run."""
        if self.times:
            steps = runs[0]["validation"][-1][0]
            return 1e3 * self.times.seconds(name, runs[0]["settings"], [steps])[0] / steps - self.times.model_ms
        return statistics.mean(r["optimizer_step_ms"] * time_scale(r, self.unit_ms) for r in runs)


def _row(
    grid: Grid,
    finished: Sequence[Settings],
    found: tuple[Contestant, Point, list[Settings]],
    losses: Mapping[str, Mapping[int, float]],
    clock: _Clock,
    peak: float | None,
) -> Row:
    contestant, point, runs = found
    name, first = contestant.name, grid.seeds[0]
    curve, of_runs = _mean_curve(runs), [clock.seconds(name, run) for run in runs]
    seconds = [statistics.mean(values) for values in zip(*of_runs, strict=True)]
    by_seed = {
        run["settings"]["seed"]: (run["validation"], _over(own, run["validation"]))
        for run, own in zip(runs, of_runs, strict=True)
    }
    goals = losses.get(grid.baseline, {})
    goal = statistics.mean(goals.values()) if goals else None
    share = share_of_way(goals, losses.get(grid.target or "", {}), losses[name])
    times = clock.times
    return Row(
        name=name, label=contestant.label, point=point, losses=dict(losses[name]), curve=curve, seconds=seconds,
        sweep=contestant.losses(first, finished), closed=contestant.closed(first, finished),
        bytes_per_parameter=runs[0]["bytes_per_parameter"],
        peak_bytes_per_parameter=peak,
        optimizer_step_ms=round(clock.optimizer_ms(name, runs), 1),
        model_step_ms=round(times.model_ms if times else clock.unit_ms, 1),
        steps_to_baseline=None if goal is None else steps_to(curve, goal),
        steps_spread=_spread_to({seed: curves[0] for seed, curves in by_seed.items()}, goals),
        seconds_to_baseline=None if goal is None else steps_to(_over(seconds, curve), goal),
        seconds_spread=_spread_to({seed: curves[1] for seed, curves in by_seed.items()}, goals),
        share=share[0], share_error=share[1], paper=contestant.paper,
        commits=sorted({run["commit"] for run in runs}),
    )  # fmt: skip


def _over(seconds: Sequence[float], curve: Curve) -> Curve:
    """A curve over steps as one over seconds."""
    return [(s, loss) for s, (_, loss) in zip(seconds, curve, strict=True)]


def _spread_to(curves: Mapping[int, Curve], goals: Mapping[int, float]) -> float | None:
    """Standard deviation of where each seed's curve comes down to the seed's goal; None: one seed, or it does not."""
    reached = [steps_to(curves[seed], goal) for seed, goal in goals.items() if seed in curves]
    values = [at for at in reached if at is not None]
    return statistics.stdev(values) if len(values) > 1 and len(values) == len(reached) else None


def _chosen(
    contestant: Contestant, seeds: Sequence[int], finished: Sequence[Settings]
) -> tuple[Contestant, Point, list[Settings]] | None:
    """The best point, and its runs by seed."""
    point = contestant.best(seeds[0], finished)
    if point is None:
        return None
    wanted = [contestant.run(point, seed) for seed in seeds]
    found = [next((run for run in finished if run["settings"] == settings), None) for settings in wanted]
    return contestant, point, [run for run in found if run]


def _model_ms(run: Settings) -> float:
    return run["step_ms"] - run["optimizer_step_ms"]


def time_scale(run: Settings, model_ms: float) -> float:
    """What a run's times are multiplied by: forward and backward are the same work in every run of a grid, and take
    `model_ms` in it; how much longer they took in this run is how much the machine had else to do."""
    return model_ms / _model_ms(run) if _model_ms(run) > 0 else 1.0


def _mean_curve(runs: Sequence[Settings]) -> Curve:
    """The mean over runs that were evaluated at the same steps."""
    points = zip(*(run["validation"] for run in runs), strict=True)
    return [(float(point[0][0]), statistics.mean(loss for _, loss in point)) for point in points]


def share_of_way(
    zero: Mapping[int, float], one: Mapping[int, float], x: Mapping[int, float]
) -> tuple[float | None, float | None]:
    """How far `x` goes from `zero` to `one`: the ratio of the mean gains, with its standard error over paired seeds.

    Args:
        zero: loss by seed where the way begins.
        one: where it ends.
        x: the losses in question.

    Returns:
        The share (None: no common seed, or no way) and its error (None: fewer than two seeds), by the delta method.
    """
    seeds = sorted(zero.keys() & one.keys() & x.keys())
    gains, ways = [zero[s] - x[s] for s in seeds], [zero[s] - one[s] for s in seeds]
    if not seeds or not sum(ways):
        return None, None
    share = sum(gains) / sum(ways)
    if len(seeds) < 2:
        return share, None
    residuals = [gain - share * way for gain, way in zip(gains, ways, strict=True)]
    return share, statistics.stdev(residuals) / math.sqrt(len(seeds)) / abs(statistics.mean(ways))


def gain_and_noise(baseline: Row, target: Row) -> tuple[float, float | None]:
    """What there is to keep: the difference of two mean losses, and their spread over seeds, pooled."""
    spreads = [row.spread for row in (baseline, target) if row.spread is not None]
    noise = math.sqrt(statistics.mean(s**2 for s in spreads)) if spreads else None
    return baseline.mean - target.mean, noise
