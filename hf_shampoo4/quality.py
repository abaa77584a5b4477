"""`hf-shampoo4 quality seeds|moments`: how much of the quality each way to store the state in 4 bits keeps.

Every contestant of a grid in `configs/quality.yaml` trains the demo's small LLaMA from several seeds.  A finished run
is kept at once in `runs.I.json`, one file for each process that shares the work (`--shard I/N`), and never run again.
The report says, with its standard error, what share of the way from one contestant's loss to another's each one goes;
a process that has only a shard leaves it to a last call without `--shard`.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hf_shampoo4.data import ConfigError
from hf_shampoo4.demo import COLOURS, Settings, read_plan, run_one, write_json
from hf_shampoo4.train import config_root, read_config

REPORT_KEYS = ("label", "paper", "also_learning_rates")


# ---------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Run:
    """One run of a grid."""

    contestant: str
    label: str
    settings: Settings
    """Everything that the run depends on: `optim`, `seed` and settings of `hf-shampoo4 train`."""
    is_check: bool
    """Another learning rate, to check the contestant's: not in its mean."""


def read_grid(name: str) -> Settings:
    """A grid of `configs/quality.yaml`.

    Raises:
        ConfigError: there is no such grid.
    """
    grids = read_config(config_root() / "quality.yaml")["grids"]
    if name not in grids:
        raise ConfigError(f"quality has no grid {name!r}; it has: {', '.join(grids)}")
    return grids[name]


def common_settings(grid: Mapping[str, Any], quick: bool = False, steps: int | None = None) -> Settings:
    """Settings of every run: the demo's, with the changes of `configs/quality.yaml` and of the command line."""
    demo, own = read_plan(), read_config(config_root() / "quality.yaml")
    merged = {**demo["common"], **own["common"], **grid.get("settings", {})}
    if quick:
        merged |= {**demo["quick"], **own["quick"]}
    return {**merged, **({"max_steps": steps} if steps else {})}


def runs_of(grid: Mapping[str, Any], common: Mapping[str, Any]) -> list[Run]:
    """All runs of a grid in their order: a contestant's seeds, its other learning rates, then the next one."""
    found = []
    for name, given in grid["contestants"].items():
        settings = {**common, **{key: value for key, value in given.items() if key not in REPORT_KEYS}}
        seeds = grid["seeds"]
        found += [Run(name, given["label"], {**settings, "seed": seed}, False) for seed in seeds]
        for rate in given.get("also_learning_rates", ()):
            other = {**settings, "seed": seeds[0], "learning_rate": rate}
            found.append(Run(name, given["label"], other, True))
    return found


def read_finished(folder: Path) -> list[Settings]:
    """The finished runs in a folder, of all processes and grids."""
    files = sorted(folder.glob("runs.*.json"))
    return [run for file in files for run in json.loads(file.read_text(encoding="utf-8"))["runs"]]


def find(finished: Sequence[Settings], run: Run) -> Settings | None:
    """The result of a run, if it is finished."""
    return next((result for result in finished if result["settings"] == run.settings), None)


def carry_out(runs: Sequence[Run], folder: Path, shard: tuple[int, int] = (0, 1)) -> None:
    """Run what is not finished, and keep each result in `runs.I.json` at once.

    Args:
        runs: the runs of a grid.
        folder: for the files; results in it, of any process, are not computed again.
        shard: (I, N): this process takes every N-th run of those left, from the I-th.

    Raises:
        ConfigError: a setting that does not exist or cannot be.
    """
    index, processes = shard
    path = folder / f"runs.{index}.json"
    for run in [run for number, run in enumerate(runs) if number % processes == index]:
        if find(read_finished(folder), run):
            continue
        result = train(run)
        own = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        write_json(path, {"runs": [*own, result]})
        described = f"seed {run.settings['seed']}, lr {run.settings['learning_rate']:g}"
        print(f"{run.label}, {described}: {result['final_loss']:.4f}", flush=True)


def train(run: Run) -> Settings:
    """Train once; the outcome without its long lists."""
    settings = {key: value for key, value in run.settings.items() if key != "optim"}
    with tempfile.TemporaryDirectory() as folder, _torchao_sizes_cast():
        label = f"{run.label}, seed {settings['seed']}"
        outcome = run_one(run.settings["optim"], {**settings, "label": label}, Path(folder))
    kept = {key: value for key, value in asdict(outcome).items() if key not in ("training", "step_seconds")}
    return {**kept, "final_loss": outcome.final_loss}


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
    """A contestant's runs, put together."""

    name: str
    label: str
    losses: dict[int, float]
    """Final validation loss by seed."""
    bytes_per_parameter: float
    share: float | None
    """Of the way from `zero`'s loss to `one`'s, over the seeds that all three have finished."""
    share_error: float | None
    """Its standard error; None with fewer than two seeds."""
    paper: tuple[float, float] | None
    """The published share, as a range."""
    settings: Settings

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.losses.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None


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


def rows_of(grid: Mapping[str, Any], runs: Sequence[Run], finished: Sequence[Settings]) -> list[Row]:
    """One row for each contestant with a finished run, in the grid's order."""
    results: dict[str, list[Settings]] = {}
    for run in runs:
        if not run.is_check and (result := find(finished, run)):
            results.setdefault(run.contestant, []).append(result)
    losses = {name: {r["settings"]["seed"]: r["final_loss"] for r in found} for name, found in results.items()}
    ends = losses.get(grid["zero"], {}), losses.get(grid["one"], {})
    table = []
    for name, found in results.items():
        given = grid["contestants"][name]
        paper = tuple(percent / 100 for percent in given["paper"]) if "paper" in given else None
        own = {key: value for key, value in given.items() if key not in REPORT_KEYS}
        share = share_of_way(*ends, losses[name])
        table.append(Row(name, given["label"], losses[name], found[0]["bytes_per_parameter"], *share, paper, own))
    return table


def gain_and_noise(zero: Row, one: Row) -> tuple[float, float | None]:
    """What there is to keep: the difference of two mean losses, and their spread over seeds, pooled."""
    spreads = [row.spread for row in (zero, one) if row.spread is not None]
    noise = math.sqrt(statistics.mean(s**2 for s in spreads)) if spreads else None
    return zero.mean - one.mean, noise


def checks_of(runs: Sequence[Run], finished: Sequence[Settings]) -> list[tuple[str, float, float]]:
    """(label, learning rate, loss) at the first seed, for contestants that were run at other rates too."""
    checked = {run.contestant for run in runs if run.is_check}
    seed = runs[0].settings["seed"]
    chosen = [run for run in runs if run.contestant in checked and run.settings["seed"] == seed]
    pairs = ((run, find(finished, run)) for run in chosen)
    found = [(run.label, run.settings["learning_rate"], result["final_loss"]) for run, result in pairs if result]
    return sorted(found, key=lambda item: item[:2])


def report(name: str, runs: Sequence[Run], folder: Path, common: Mapping[str, Any]) -> None:
    """Write NAME.json, NAME.md and NAME.png into the folder from the runs finished so far.

    Args:
        name: a grid of `configs/quality.yaml`.
        runs: its runs.
        folder: with the `runs.I.json`.
        common: settings of every run.

    Raises:
        ConfigError: the two contestants that the others are measured against have not finished a run.
    """
    grid, finished = read_grid(name), read_finished(folder)
    rows = rows_of(grid, runs, finished)
    if not {grid["zero"], grid["one"]} <= {row.name for row in rows}:
        raise ConfigError(f"nothing to report yet: {grid['zero']} and {grid['one']} need a finished run each")
    own = [result for run in runs if (result := find(finished, run))]
    checks = checks_of(runs, finished)
    write_json(folder / f"{name}.json", as_json(grid, rows, checks, common, own))
    write_markdown(folder / f"{name}.md", as_markdown(name, grid, rows, checks, common))
    draw(grid["title"], rows, folder / f"{name}.png")
    print((folder / f"{name}.md").read_text(encoding="utf-8"))


def as_json(
    grid: Mapping[str, Any],
    rows: Sequence[Row],
    checks: Sequence[tuple[str, float, float]],
    common: Mapping[str, Any],
    runs: Sequence[Settings],
) -> Settings:
    """Everything that is known, each run included."""
    by_name = {row.name: row for row in rows}
    gain, noise = gain_and_noise(by_name[grid["zero"]], by_name[grid["one"]])
    return {
        "title": grid["title"],
        "zero": grid["zero"],
        "one": grid["one"],
        "difference": gain,
        "spread_over_seeds": noise,
        "common": dict(common),
        "contestants": {row.name: {**asdict(row), "mean": row.mean, "spread": row.spread} for row in rows},
        "learning_rate_checks": [dict(zip(("label", "learning_rate", "loss"), c, strict=True)) for c in checks],
        "runs": list(runs),
    }


REMARKS = "<!-- below this line: written by hand, kept when the table is written again -->"


def write_markdown(path: Path, text: str) -> None:
    """Write a report, and keep what stands below the line of `REMARKS` in the file that is there."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    remarks = old.partition(REMARKS)[2].strip()
    path.write_text(f"{text}\n{REMARKS}\n" + (f"\n{remarks}\n" if remarks else ""), encoding="utf-8")


def as_markdown(
    name: str,
    grid: Mapping[str, Any],
    rows: Sequence[Row],
    checks: Sequence[tuple[str, float, float]],
    common: Mapping[str, Any],
) -> str:
    """The table and how it was made."""
    by_name = {row.name: row for row in rows}
    zero, one = by_name[grid["zero"]], by_name[grid["one"]]
    gain, noise = gain_and_noise(zero, one)
    times = f", {gain / noise:.1f} times that" if noise else ""
    lines = [
        f"# {grid['title']}",
        "",
        f"`hf-shampoo4 quality {name}` (settings: `configs/quality.yaml`; every run: `{name}.json`).",
        "",
        f"{common['max_steps']} steps of {common['per_device_train_batch_size']} x {common['seq_len']} tokens, the "
        f"demo's LLaMA and corpus; final validation loss on {common['max_validation_sequences']} sequences. A seed is "
        "that of the weights and of the data's order, the same for all contestants. Share: the mean gain over "
        f"{zero.label}, by that of {one.label}; ± its standard error over paired seeds.",
        "",
        f"From {zero.label} to {one.label}: {gain:.4f}. Spread over seeds (standard deviation, pooled over these two): "
        f"{_number(noise)}{times}.",
        "",
        "| contestant | learning rate | seeds | loss, mean ± spread | bytes a parameter | share | published |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
    ]  # fmt: skip
    if checks:
        lines += ["", "Other learning rates, first seed:", "", "| | learning rate | loss |", "|---|---|---|"]
        lines += [f"| {label} | {rate:g} | {loss:.4f} |" for label, rate, loss in checks]
    return "\n".join([*lines, "", f"![{grid['title']}]({name}.png)", ""])


def _line(row: Row) -> str:
    published = "" if row.paper is None else " to ".join(f"{share:.0%}" for share in sorted(set(row.paper)))
    share = "" if row.share is None else f"{row.share:.0%}"
    error = "" if not row.share_error else f" ± {100 * row.share_error:.0f}"
    cells = (
        row.label, f"{row.settings['learning_rate']:g}", str(len(row.losses)),
        f"{row.mean:.4f} ± {_number(row.spread)}", f"{row.bytes_per_parameter:.2f}", share + error, published,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def draw(title: str, rows: Sequence[Row], path: Path) -> None:
    """Losses by seed, and the share of each contestant beside the published one, as a PNG.

    Args:
        title: of the right half.
        rows: the contestants, drawn from the top.
        path: the file, replaced at once.
    """
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 1.6 + 0.45 * len(rows)), dpi=150, layout="constrained")
        losses, shares = figure.subplots(1, 2, sharey=True)
        for place, row in enumerate(rows):
            _draw_losses(losses, place, row)
            _draw_share(shares, place, row)
        labels = [f"{row.label}  ({row.bytes_per_parameter:.2f} B/param)" for row in rows]
        losses.set_yticks(range(len(rows)), labels)
        losses.invert_yaxis()
        losses.set(title="Final validation loss: each seed, and the mean", xlabel="loss")
        shares.set(title=title, xlabel="per cent (bar: standard error)")
        _finish(shares, any(row.paper for row in rows))
        for axes in (losses, shares):
            axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        figure.savefig(temporary, format="png")
    os.replace(temporary, path)


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


# ---------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 quality`."""
    chosen = _parser().parse_args(arguments)
    grid = read_grid(chosen.grid)
    folder = Path(chosen.output_dir)
    common = common_settings(grid, chosen.quick, chosen.steps)
    runs = runs_of(grid, common)
    if not chosen.report_only:
        carry_out(runs, folder, chosen.shard)
    if chosen.shard[1] == 1:
        report(chosen.grid, runs, folder, common)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 quality", description=__doc__)
    add = parser.add_argument
    add("grid", help="seeds or moments: a grid of configs/quality.yaml")
    add("--output_dir", default="runs/quality", help="default: runs/quality")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="this process takes every N-th run from the I-th")
    add("--steps", type=int, help="steps of each run")
    add("--report_only", action="store_true", help="no runs: put together what is finished, of all processes")
    add("--quick", action="store_true", help="a few steps of a tiny model: does it work here?")
    return parser


def _shard(text: str) -> tuple[int, int]:
    index, _, processes = text.partition("/")
    if not (index.isdecimal() and processes.isdecimal() and int(index) < int(processes)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I < N, such as 0/2")
    return int(index), int(processes)
