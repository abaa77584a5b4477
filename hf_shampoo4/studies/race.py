"""`hf-shampoo4 race GRID`: every contestant of a grid, at its own best learning rate, from several seeds, side by side.

Grids are in `configs/race.yaml`.  A run trains a small model from the seed's weights on the seed's order of the data,
the same for all contestants; the first seed sweeps a contestant's learning rates, and the best serves the other seeds.
A finished run is kept at once in `runs.I.json`, one file for each process that shares the work (`--shard I/N`), and
never run again.  The report is a table, a JSON with everything and a picture: curves against steps and training time,
or, for a grid that asks how much of one contestant's gain the others keep, the shares.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.studies.demo import COLOURS, Settings, machine, read_plan, run_one, steps_to, write_json
from hf_shampoo4.studies.peers import PEERS
from hf_shampoo4.training.config import config_root, read_config

Curve = list[tuple[float, float]]


# ---------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Contestant:
    """One entry of a grid."""

    name: str
    label: str
    learning_rates: tuple[float, ...]
    """The sweep; a single one is taken as it is."""
    settings: Settings
    """All else that a run depends on, but the seed: settings of `hf-shampoo4 train`; a `peer` in place of `optim`."""
    paper: tuple[float, float] | None
    """The published share, as a range."""

    def run(self, learning_rate: float, seed: int) -> Settings:
        """The settings of one run."""
        return {**self.settings, "learning_rate": learning_rate, "seed": seed}


@dataclass(frozen=True)
class Grid:
    """Contestants, and what is asked of them."""

    name: str
    title: str
    zero: str
    """The contestant that the others are measured against."""
    one: str | None
    """If given: the question is what share of the way from `zero`'s loss to this one's each contestant goes."""
    seeds: tuple[int, ...]
    common: Settings
    contestants: tuple[Contestant, ...]
    curves: tuple[str, ...] = ()
    """The contestants that the picture shows; none: all of them."""


def read_grid(name: str, quick: bool = False, changes: Mapping[str, Any] | None = None) -> Grid:
    """A grid of `configs/race.yaml`, over the demo's settings.

    Args:
        name: of the grid.
        quick: a few steps of a tiny model, one seed, one learning rate.
        changes: settings over all of these, for every run.

    Raises:
        ConfigError: there is no such grid.
    """
    plan, demo = read_config(config_root() / "race.yaml"), read_plan()
    if name not in plan["grids"]:
        raise ConfigError(f"race has no grid {name!r}; it has: {', '.join(plan['grids'])}")
    given = _with_likes(plan["grids"], name)
    common = {**demo["common"], **plan["common"], **given.get("settings", {})}
    if quick:
        common |= {**demo["quick"], **plan["quick"]}
    common |= changes or {}
    contestants = tuple(
        _contestant(key, entry, common, 1 if quick else None) for key, entry in given["contestants"].items()
    )
    seeds = tuple(given["seeds"][: 1 if quick else None])
    curves = tuple(given.get("curves", ()))
    return Grid(name, given["title"], given["zero"], given.get("one"), seeds, common, contestants, curves)


def _with_likes(grids: Mapping[str, Any], name: str) -> Settings:
    """A grid laid over the one that it is `like`, and that over the one that it is like; settings one by one."""
    given = grids[name]
    if "like" not in given:
        return given
    base = _with_likes(grids, given["like"])
    return {**base, **given, "settings": {**base.get("settings", {}), **given.get("settings", {})}}


def _contestant(name: str, given: Mapping[str, Any], common: Settings, rates: int | None) -> Contestant:
    entry = dict(given)
    label, paper, rate = entry.pop("label"), entry.pop("paper", None), entry.pop("learning_rate")
    sweep = tuple(rate if isinstance(rate, list) else [rate])[:rates]
    shares = None if paper is None else (paper[0] / 100, paper[1] / 100)
    return Contestant(name, label, sweep, {**common, **entry}, shares)


def some_of(grid: Grid, names: Sequence[str]) -> Grid:
    """The grid with the named contestants alone, in the order of the names; no name at all: with all of them.

    Raises:
        ConfigError: a name that the grid does not have.
    """
    known = {contestant.name: contestant for contestant in grid.contestants}
    wanted = [name.strip() for name in names if name.strip()]
    if strange := [name for name in wanted if name not in known]:
        raise ConfigError(f"race {grid.name!r} has no contestant {strange[0]!r}; it has: {', '.join(known)}")
    return replace(grid, contestants=tuple(known[name] for name in wanted or known))


def read_finished(folder: Path) -> list[Settings]:
    """The finished runs in a folder, of all processes and grids."""
    files = sorted(folder.glob("runs.*.json"))
    return [run for file in files for run in json.loads(file.read_text(encoding="utf-8"))["runs"]]


def find(finished: Sequence[Settings], settings: Settings) -> Settings | None:
    """The result of a run, if it is finished."""
    return next((result for result in finished if result["settings"] == settings), None)


def best_rate(contestant: Contestant, seed: int, finished: Sequence[Settings]) -> float | None:
    """The learning rate with the lowest final loss at `seed`, one that diverged being the worst; None: no run."""
    losses = {}
    for rate in contestant.learning_rates:
        if result := find(finished, contestant.run(rate, seed)):
            losses[rate] = result["final_loss"] if math.isfinite(result["final_loss"]) else math.inf
    return min(losses, key=lambda rate: losses[rate], default=None)


def carry_out(grid: Grid, folder: Path, shard: tuple[int, int] = (0, 1)) -> None:
    """Run what is not finished, and keep each result in `runs.I.json` at once: all sweeps first, then the other seeds.

    Args:
        grid: the race.
        folder: for the files; results in it, of any process, are not computed again.
        shard: (I, N): this process takes every N-th contestant, from the I-th.

    Raises:
        ConfigError: a setting that does not exist or cannot be.
    """
    index, processes = shard
    first, *others = grid.seeds
    mine = grid.contestants[index::processes]
    for contestant in mine:
        if not contestant.learning_rates:
            raise ConfigError(f"contestant {contestant.name!r} of race {grid.name!r} needs a learning_rate")
        for rate in contestant.learning_rates:
            _run_once(contestant, contestant.run(rate, first), folder, index)
    for seed in others:
        for contestant in mine:
            if best := best_rate(contestant, first, read_finished(folder)):
                _run_once(contestant, contestant.run(best, seed), folder, index)


def _run_once(contestant: Contestant, settings: Settings, folder: Path, index: int) -> None:
    if find(read_finished(folder), settings):
        return
    result = train(contestant.label, settings)
    path = folder / f"runs.{index}.json"
    own = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    write_json(path, {"runs": [*own, result]})
    described = f"seed {settings['seed']}, lr {settings['learning_rate']:g}"
    print(f"{contestant.label}, {described}: {result['final_loss']:.4f}", flush=True)


def train(label: str, settings: Settings) -> Settings:
    """Train once; what came out, as JSON: `validation_seconds` is the training time before each evaluation."""
    rest = {key: value for key, value in settings.items() if key not in ("optim", "peer")}
    peer = PEERS[settings["peer"]] if "peer" in settings else None
    with tempfile.TemporaryDirectory() as folder, _torchao_sizes_cast():
        shown = {**rest, "label": f"{label}, seed {settings['seed']}"}
        outcome = run_one(settings.get("optim", "adamw_torch"), shown, Path(folder), peer)
    elapsed = [0.0, *accumulate(outcome.step_seconds)]
    kept = {key: value for key, value in asdict(outcome).items() if key not in ("training", "step_seconds")}
    return {
        **kept,
        "settings": settings,
        "final_loss": outcome.final_loss,
        "validation_seconds": [round(elapsed[step], 2) for step, _ in outcome.validation],
    }


@contextlib.contextmanager
def _torchao_sizes_cast() -> Iterator[None]:
    """Let `optim_args="block_size=128"` reach torchao as a number: transformers 5.23 passes on the text."""
    from transformers import Trainer

    original = Trainer.get_optimizer_cls_and_kwargs

    def cast(args: Any, model: Any = None) -> tuple[Any, Any]:
        chosen, kwargs = original(args, model)
        if isinstance(kwargs.get("block_size"), str):
            kwargs["block_size"] = int(kwargs["block_size"])
        return chosen, kwargs

    with mock.patch.object(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(cast)):
        yield


# ---------------------------------------------------------------------------------------------------- what they say


@dataclass(frozen=True)
class Row:
    """A contestant's runs at its learning rate, put together."""

    name: str
    label: str
    learning_rate: float
    sweep: dict[float, float]
    """Learning rate -> final validation loss at the first seed."""
    losses: dict[int, float]
    """Seed -> final validation loss."""
    curve: Curve
    """(step, validation loss), the mean over seeds."""
    seconds: list[float]
    """Training time before each point of the curve, the mean over seeds."""
    bytes_per_parameter: float
    optimizer_step_ms: float
    steps_to_zero: float | None
    """Steps that the mean curve takes to the loss at which `zero` ends."""
    share: float | None
    """Of the way from `zero`'s loss to `one`'s, over the seeds that all three have finished."""
    share_error: float | None
    """Its standard error; None with fewer than two seeds."""
    paper: tuple[float, float] | None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.losses.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None

    @property
    def at_the_edge(self) -> bool:
        """Whether the best learning rate is the smallest or the largest of several: a better one may lie outside."""
        return len(self.sweep) > 1 and self.learning_rate in (min(self.sweep), max(self.sweep))


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


def rows_of(grid: Grid, finished: Sequence[Settings]) -> list[Row]:
    """One row for each contestant with a finished run, in the grid's order."""
    chosen = {}
    for contestant in grid.contestants:
        rate = best_rate(contestant, grid.seeds[0], finished)
        if rate is not None:
            results = [find(finished, contestant.run(rate, seed)) for seed in grid.seeds]
            chosen[contestant.name] = (contestant, rate, [result for result in results if result])
    losses = {name: {r["settings"]["seed"]: r["final_loss"] for r in runs} for name, (_, _, runs) in chosen.items()}
    target = statistics.mean(losses[grid.zero].values()) if grid.zero in losses else None
    rows = []
    for name, (contestant, rate, runs) in chosen.items():
        curve, seconds = _mean_curve(runs)
        sweep = {r: find(finished, contestant.run(r, grid.seeds[0])) for r in contestant.learning_rates}
        share = share_of_way(losses.get(grid.zero, {}), losses.get(grid.one or "", {}), losses[name])
        rows.append(
            Row(
                name=name, label=contestant.label, learning_rate=rate, losses=losses[name], curve=curve,
                sweep={r: result["final_loss"] for r, result in sweep.items() if result}, seconds=seconds,
                bytes_per_parameter=runs[0]["bytes_per_parameter"],
                optimizer_step_ms=round(statistics.mean(run["optimizer_step_ms"] for run in runs), 1),
                steps_to_zero=None if target is None else steps_to(curve, target),
                share=share[0], share_error=share[1], paper=contestant.paper,
            )
        )  # fmt: skip
    return rows


def _mean_curve(runs: Sequence[Settings]) -> tuple[Curve, list[float]]:
    """Means over runs that were evaluated at the same steps."""
    points = zip(*(run["validation"] for run in runs), strict=True)
    curve = [(float(point[0][0]), statistics.mean(loss for _, loss in point)) for point in points]
    return curve, [statistics.mean(values) for values in zip(*(run["validation_seconds"] for run in runs), strict=True)]


def gain_and_noise(zero: Row, one: Row) -> tuple[float, float | None]:
    """What there is to keep: the difference of two mean losses, and their spread over seeds, pooled."""
    spreads = [row.spread for row in (zero, one) if row.spread is not None]
    noise = math.sqrt(statistics.mean(s**2 for s in spreads)) if spreads else None
    return zero.mean - one.mean, noise


# ---------------------------------------------------------------------------------------------------- the report


def report(grid: Grid, folder: Path) -> None:
    """Write NAME.json, NAME.md and NAME.png into the folder from the runs finished so far.

    Args:
        grid: the race.
        folder: with the `runs.I.json`.

    Raises:
        ConfigError: the contestants that the others are measured against have not finished a run.
    """
    finished = read_finished(folder)
    rows = rows_of(grid, finished)
    needed = [name for name in (grid.zero, grid.one) if name]
    if not set(needed) <= {row.name for row in rows}:
        raise ConfigError(f"nothing to report yet: {' and '.join(needed)} need a finished run each")
    write_json(folder / f"{grid.name}.json", as_json(grid, rows))
    write_markdown(folder / f"{grid.name}.md", as_markdown(grid, rows))
    picture = folder / f"{grid.name}.png"
    if grid.one:
        draw_shares(grid.title, rows, picture)
    else:
        draw_curves(grid, rows, picture)
    print((folder / f"{grid.name}.md").read_text(encoding="utf-8"))


def as_json(grid: Grid, rows: Sequence[Row]) -> Settings:
    """Everything that is known."""
    return {
        "title": grid.title,
        "zero": grid.zero,
        "one": grid.one,
        "common": grid.common,
        "machine": machine(),
        "contestants": {
            row.name: {**asdict(row), "mean": row.mean, "spread": row.spread, "at_the_edge": row.at_the_edge}
            for row in rows
        },
    }


REMARKS = "<!-- below this line: written by hand, kept when the table is written again -->"


def write_markdown(path: Path, text: str) -> None:
    """Write a report, and keep what stands below the line of `REMARKS` in the file that is there."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    remarks = old.partition(REMARKS)[2].strip()
    path.write_text(f"{text}\n{REMARKS}\n" + (f"\n{remarks}\n" if remarks else ""), encoding="utf-8")


def as_markdown(grid: Grid, rows: Sequence[Row]) -> str:
    """The table and how it was made."""
    c, zero = grid.common, next(row for row in rows if row.name == grid.zero)
    columns = ["contestant", "learning rate", "seeds", "loss, mean ± spread", f"steps to {zero.label}'s loss",
               "bytes a parameter", "optimizer, ms a step"]  # fmt: skip
    lines = [
        f"# {grid.title}",
        "",
        f"`hf-shampoo4 race {grid.name}` (settings: `configs/race.yaml`; all numbers: `{grid.name}.json`).",
        "",
        f"Model {c['model']}{' with ' + c['model_overrides'] if c.get('model_overrides') else ''}, corpus "
        f"{c['dataset']}, {c['max_steps']} steps of {c['per_device_train_batch_size']} x {c['seq_len']} tokens; final "
        f"validation loss on {c['max_validation_sequences']} sequences. A seed is that of the weights and of the "
        "data's order, the same for all contestants.",
        "",
    ]
    if grid.one:
        columns += ["share", "published"]
        lines += [*_question(zero, next(row for row in rows if row.name == grid.one)), ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [_line(row, c["max_steps"], bool(grid.one)) for row in rows]
    swept = [row for row in rows if len(row.sweep) > 1]
    if swept:
        lines += ["", "The sweep, first seed (`*`: the best is at its edge):", ""]
        lines += ["| contestant | learning rate: loss |", "|---|---|"]
        lines += [f"| {row.label}{' *' * row.at_the_edge} | {_sweep(row)} |" for row in swept]
    return "\n".join([*lines, "", f"![{grid.title}]({grid.name}.png)", ""])


def _question(zero: Row, one: Row) -> list[str]:
    gain, noise = gain_and_noise(zero, one)
    times = f", {gain / noise:.1f} times that" if noise else ""
    return [
        f"Share: the mean gain over {zero.label}, by that of {one.label}; ± its standard error over paired seeds. From "
        f"{zero.label} to {one.label}: {gain:.4f}. Spread over seeds (standard deviation, pooled over these two): "
        f"{_number(noise)}{times}."
    ]


def _line(row: Row, steps: int, shares: bool) -> str:
    reached = "never" if row.steps_to_zero is None else f"{row.steps_to_zero:.0f} ({row.steps_to_zero / steps:.0%})"
    cells = [
        row.label, f"{row.learning_rate:g}", str(len(row.losses)), f"{row.mean:.4f} ± {_number(row.spread)}", reached,
        f"{row.bytes_per_parameter:.2f}", f"{row.optimizer_step_ms:.0f}",
    ]  # fmt: skip
    if shares:
        error = "" if not row.share_error else f" ± {100 * row.share_error:.0f}"
        cells.append("" if row.share is None else f"{row.share:.0%}{error}")
        cells.append("" if row.paper is None else " to ".join(f"{share:.0%}" for share in sorted(set(row.paper))))
    return f"| {' | '.join(cells)} |"


def _sweep(row: Row) -> str:
    return ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(row.sweep.items()))


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def draw_curves(grid: Grid, rows: Sequence[Row], path: Path) -> None:
    """Mean validation loss against steps and against training time, as a PNG, replaced at once."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    names = grid.curves or [contestant.name for contestant in grid.contestants]
    rows = sorted((row for row in rows if row.name in names), key=lambda row: row.mean)
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 6.4), dpi=150, layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        palette = matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"]
        for row in rows:
            losses = [loss for _, loss in row.curve]
            label = f"{row.mean:.3f}  {row.label} ({row.bytes_per_parameter:.1f} B/param)"
            style = {
                "color": palette(names.index(row.name) % palette.N),
                "linewidth": 1.8,
                "linestyle": "--" if row.name == grid.zero else "-",
            }
            by_step.plot([step for step, _ in row.curve], losses, label=label, **style)
            by_time.plot([seconds / 60 for seconds in row.seconds], losses, **style)
        if ends := [row.mean for row in rows if math.isfinite(row.mean)]:  # all may have diverged
            by_step.set_ylim(min(ends) - 0.05, max(ends) + 4 * (max(ends) - min(ends)) + 0.2)
        by_step.set(title=f"{grid.title}: by steps", xlabel="step", ylabel="validation loss, mean over seeds")
        by_time.set(title="by time", xlabel="training time, minutes on this machine")
        title = "final loss, best first down the columns"
        figure.legend(frameon=False, fontsize=9, title=title, loc="outside lower center", ncols=3, alignment="left")
        for axes in (by_step, by_time):
            axes.grid(color="#e5e7eb", linewidth=0.8)
        _save(figure, path)


def draw_shares(title: str, rows: Sequence[Row], path: Path) -> None:
    """Losses by seed, and the share of each contestant beside the published one, as a PNG.

    Args:
        title: of the right half.
        rows: the contestants, drawn from the top.
        path: the file, replaced at once.
    """
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    look = {"font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(14, 1.6 + 0.45 * len(rows)), dpi=150, layout="constrained")
        losses, shares = figure.subplots(1, 2, sharey=True)
        for place, row in enumerate(rows):
            _draw_losses(losses, place, row)
            _draw_share(shares, place, row)
        labels = [f"{row.label}  ({row.bytes_per_parameter:.2f} B/param)" for row in rows]
        losses.set_yticks(range(len(rows)), labels)
        losses.invert_yaxis()
        losses.set(title="Final validation loss, each seed and the mean", xlabel="loss")
        shares.set(title=title, xlabel="per cent (bar: standard error)")
        _finish(shares, any(row.paper for row in rows))
        for axes in (losses, shares):
            axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
        _save(figure, path)


def _draw_losses(axes: Any, place: int, row: Row) -> None:
    axes.scatter(list(row.losses.values()), [place] * len(row.losses), color=COLOURS[2], s=26, alpha=0.55, linewidths=0)
    axes.scatter([row.mean], [place], color=COLOURS[0], marker="|", s=220, linewidths=2)


def _draw_share(axes: Any, place: int, row: Row) -> None:
    if row.paper is not None:
        low, high = 100 * min(row.paper) - 0.7, 100 * max(row.paper) + 0.7
        axes.barh(place, high - low, left=low, height=0.7, color=COLOURS[1], alpha=0.3, linewidth=0)
    if row.share is not None:
        error = 100 * (row.share_error or 0.0)
        axes.errorbar(100 * row.share, place, xerr=error, color=COLOURS[2], fmt="o", markersize=6, capsize=4)
        axes.annotate(
            f"{row.share:.0%}", (100 * row.share, place), xytext=(0, 6), textcoords="offset points", ha="center",
            fontsize=9, color=COLOURS[2],
        )  # fmt: skip


def _finish(axes: Any, has_published: bool) -> None:
    """The two ends of the way, and what the shaded range is."""
    from matplotlib.patches import Patch

    for end in (0, 100):
        axes.axvline(end, color=COLOURS[0], linewidth=1, linestyle=(0, (4, 3)))
    if has_published:
        shaded = [Patch(color=COLOURS[1], alpha=0.3, label="published, other models")]
        axes.legend(handles=shaded, frameon=False, loc="lower left")


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 race`."""
    chosen = _parser().parse_args(arguments)
    grid = read_grid(chosen.grid, chosen.quick, {"max_steps": chosen.steps} if chosen.steps else None)
    folder = Path(chosen.output_dir)
    if not chosen.report_only:
        carry_out(some_of(grid, chosen.contestants.split(",")), folder, chosen.shard)
    if chosen.shard[1] == 1:
        report(grid, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 race", description=__doc__)
    add = parser.add_argument
    add("grid", help="a grid of configs/race.yaml")
    add("--output_dir", default="runs/race", help="default: runs/race")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="take every N-th contestant from the I-th")
    add("--contestants", default="", help="run these alone, comma-separated; the report is of all that have finished")
    add("--steps", type=int, help="steps of each run")
    add("--report_only", action="store_true", help="no runs: put together what is finished, of all processes")
    add("--quick", action="store_true", help="a few steps of a tiny model: does it work here?")
    return parser


def _shard(text: str) -> tuple[int, int]:
    index, _, processes = text.partition("/")
    if not (index.isdecimal() and processes.isdecimal() and int(index) < int(processes)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I < N, such as 0/2")
    return int(index), int(processes)
