"""`hf-shampoo4 report RUN_DIR...`: training runs as one HTML page that opens from disk.

A run is a folder with the Trainer's `trainer_state.json` (in it or, while it is at work, in its newest checkpoint), or
with `metrics.jsonl`, a line of JSON for each logged step, as a loop of one's own writes it with `hf_shampoo4.metrics`.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpointing.completeness import STATE, noted
from ..exceptions import ConfigError
from ..utils.files import check_writable, write_text
from ..utils.plots import GRID, label_ends, style

# what a run may have logged -> the title of its curve, and what its values are
CURVES = {
    "eval_loss": ("Validation loss", "nats a token"),
    "loss": ("Training loss", "nats a token"),
    "learning_rate": ("Learning rate", "factor on the update"),
    "grad_norm": ("Gradient norm, before clipping", "2-norm"),
    "optim/refresh_seconds": ("Time spent on factors and bases so far", "seconds"),
    "optim/skipped_steps": ("Steps skipped for a gradient that was not finite", "steps so far"),
    "optim/failed_refreshes": ("Blocks whose refresh failed and kept the last good one", "blocks so far"),
    "optim/unmoved_first": ("First moment: codes that a step left as they were", "share"),
    "optim/unmoved_second": ("Second moment: codes that a step left as they were", "share"),
    "optim/radial_bias": ("First moment: how much storing stretches it", "share; below 0 it shrinks"),
    "optim/basis_turn": ("How far an update turned the bases", "1 - mean |cosine|"),
    "optim/condition": ("Condition of the worst factor", "log10 of largest over smallest eigenvalue"),
}
COUNTS = ("optim/skipped_steps", "optim/failed_refreshes")  # of things that should not happen: drawn if they did
AGAINST_TIME = ("eval_loss", "loss")
LABELLED = 6  # lines that are named at their ends; more of them are told by the marks of the table


LARGEST = 1e15
FIGURES = ("step", "train_runtime", "train_samples_per_second", "optim/state_bytes", "train_optimizer_state_mb")


@dataclass(frozen=True)
class Run:
    """What a folder holds."""

    name: str
    log: list[dict[str, Any]]
    """What was logged, by step."""
    results: dict[str, Any]
    """`all_results.json`, if there."""
    optimizer: str = ""
    """Name and options, if the run says them."""
    seconds: dict[float, float] = field(default_factory=dict)
    """Step -> seconds since the run began, of the steps that were logged."""

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value), in order of steps."""
        return sorted({entry["step"]: entry[key] for entry in self.log if key in entry and "step" in entry}.items())

    def curve_in_time(self, key: str) -> list[tuple[float, float]]:
        """(seconds, value); of an evaluation, the time of the last log before it."""
        logged = sorted(self.seconds)
        before = [(bisect_right(logged, step), value) for step, value in self.curve(key)]
        return [(self.seconds[logged[count - 1]], value) for count, value in before if count]

    def last(self, key: str) -> float | None:
        """The last value logged."""
        found = self.curve(key)
        return found[-1][1] if found else self.results.get(key)


def read_run(folder: Path) -> Run:
    """A run's log and results.

    Raises:
        ConfigError: nothing to read there, or not JSON.
    """
    lines, results = folder / "metrics.jsonl", folder / "all_results.json"
    try:
        file = _newest_state(folder)
        if file is not None:
            state = json.loads(file.read_text(encoding="utf-8"))
            log, told = state["log_history"], noted(state.get("stateful_callbacks", {}))
            optimizer, seconds = str(told.get("optimizer", "")), dict(told.get("seconds", ()))
        elif lines.is_file():
            log = _lines(lines)
            optimizer = next((str(entry["optimizer"]) for entry in log if "optimizer" in entry), "")
            seconds = {entry["step"]: entry["seconds"] for entry in log if {"step", "seconds"} <= set(entry)}
        else:
            missing = "it has neither trainer_state.json nor metrics.jsonl"
            raise ConfigError(missing if folder.is_dir() else "there is no such folder")
        of_another = (folder / STATE).is_file() and file != folder / STATE  # a training that ended before this one
        found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() and not of_another else {}
        _check([*log, found, *({"step": step, "seconds": spent} for step, spent in seconds.items())])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # a ConfigError is the first
        raise ConfigError(f"run {str(folder)!r} cannot be read: {error}") from error
    return Run(folder.resolve().name, log, found, optimizer, seconds)


def _newest_state(folder: Path) -> Path | None:
    """What the Trainer wrote last: at the end of a training, or with a checkpoint of one that is at work or was killed.

    What it wrote at the end of the checkpoint's own training is newer, whatever the files' times: they may be copies.
    """
    end = folder / STATE
    found = [path for path in (end, *folder.glob(f"checkpoint-*/{STATE}")) if path.is_file()]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest in (None, end) or end not in found:
        return newest
    before, whole = (json.loads(path.read_text(encoding="utf-8"))["log_history"] for path in (newest, end))
    return end if whole[: len(before)] == before else newest


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a log; the last one may be cut, as its run is at work or was killed.

    Raises:
        ValueError: another line is no JSON, or there is none.
    """
    found, texts = [], [(i, t) for i, t in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if t.strip()]
    for number, text in texts:
        try:
            found.append(json.loads(text))
        except ValueError as error:
            if number == texts[-1][0]:
                break
            raise ValueError(f"{file.name}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{file.name} has no line yet")
    return found


def _told_apart(runs: Sequence[Run], folders: Sequence[Path]) -> list[Run]:
    """Runs whose folders have the same name are called by their folders' parents too."""
    names = [run.name for run in runs]
    return [
        replace(run, name="/".join(folder.resolve().parts[-2:])) if names.count(run.name) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def _check(entries: list[Any]) -> None:
    """Figures must be numbers: what is drawn and printed of a run comes from a file that anybody may have written."""
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"a line of the log is {type(entry).__name__}, not names and numbers")
        for name in (*FIGURES, *CURVES, "seconds"):
            value = entry.get(name, 0)
            finite_if_exact = isinstance(value, float) or (type(value) is int and abs(value) < LARGEST)
            if not finite_if_exact or (name == "step" and not abs(value) < LARGEST):
                raise ValueError(f"{name} in the log is no number")


def page(runs: Sequence[Run]) -> str:
    """The runs as an HTML page without any other file: a table, and a picture for every curve that one of them has."""
    drawn = [key for key in CURVES if any(_is_drawn(run, key) for run in runs)]
    timed = [key for key in drawn if key in AGAINST_TIME and any(len(run.curve_in_time(key)) > 1 for run in runs)]
    pictures = [text for key in drawn for text in _pictures(key, runs, key in timed)]
    names = ", ".join(html.escape(run.name) for run in runs)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{names}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #212529; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }}
h1 {{ font-size: 1.4rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; margin: 1rem 0 2rem }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid #dee2e6; text-align: right; vertical-align: bottom }}
th {{ font-weight: 600; color: #495057 }}
th:first-child, td:first-child {{ text-align: left; white-space: nowrap }}
td.text {{ text-align: left; min-width: 12rem; overflow-wrap: anywhere }}
.mark {{ width: 2.2rem; height: .8rem; margin-right: .5rem }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem }}
svg {{ width: 100%; height: auto }}
</style>
<h1>Training runs: {names}</h1>
<div class="wide">{_table(runs)}</div>
<div class="curves">
{"".join(pictures)}
</div>
</html>
"""


def _is_drawn(run: Run, key: str) -> bool:
    curve = run.curve(key)
    return len(curve) > 1 and (key not in COUNTS or curve[-1][1] > 0)


def _table(runs: Sequence[Run]) -> str:
    """Final figures, one row a run beside the line of its curves; the best validation loss is bold."""
    rows = [_figures(run) for run in runs]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    head = "".join(f"<th>{name}</th>" for name in ("run", *columns))
    best = min((row[BEST] for row in rows if row[BEST]), key=float, default="")
    body = ""
    for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
        bold = {BEST: f"<b>{best}</b>"} if len(runs) > 1 and best and row[BEST] == best else {}
        cells = "".join(_cell(name, value) for name, value in ({**row, **bold}).items() if name in columns)
        body += f"<tr><td>{_mark(i)}{html.escape(run.name)}</td>{cells}</tr>\n"
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def _cell(column: str, value: str) -> str:
    return f'<td class="text">{html.escape(value)}</td>' if column == "optimizer" else f"<td>{value}</td>"


def _mark(i: int) -> str:
    """A piece of run number `i`'s line."""
    look = style(i)
    dashes = {"-": "", "--": "6 3", ":": "1.5 2.5", "-.": "7 2 1.5 2"}[look["linestyle"]]
    line = (
        f'<line x1="0" y1="6" x2="34" y2="6" stroke="{look["color"]}" stroke-width="2.5" stroke-dasharray="{dashes}"/>'
    )
    return f'<svg class="mark" viewBox="0 0 34 12" aria-hidden="true">{line}</svg>'


BEST = "lowest validation loss"


def _figures(run: Run) -> dict[str, str]:
    evaluated, rates = run.curve("eval_loss"), run.curve("learning_rate")
    size = run.last("optim/state_bytes")
    noted_time, last_session = max(run.seconds.values(), default=0.0), run.last("train_runtime") or 0.0
    speed = run.last("train_samples_per_second") if last_session >= noted_time else None  # else it is of a part alone
    return {
        "optimizer": run.optimizer,
        "steps": _number(max((entry["step"] for entry in run.log if "step" in entry), default=None), ".0f"),
        "training loss": _number(run.last("loss"), ".4f"),
        "validation loss": _number(run.last("eval_loss"), ".4f"),
        BEST: _number(min((value for _, value in evaluated if math.isfinite(value)), default=None), ".4f"),
        "optimizer state, MB": _number(size / 1e6 if size else run.last("train_optimizer_state_mb"), ".2f"),
        "time, s": _number(max(noted_time, last_session) or None, ".1f"),
        "of it on factors and bases, s": _number(run.last("optim/refresh_seconds"), ".1f"),
        "samples/s": _number(speed, ".1f"),
        "peak learning rate": _number(max((value for _, value in rates), default=None), ".3g"),
        "skipped steps": _number(run.last("optim/skipped_steps") or None, ".0f"),
        "failed refreshes": _number(run.last("optim/failed_refreshes") or None, ".0f"),
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _pictures(key: str, runs: Sequence[Run], timed: bool) -> list[str]:
    """A curve of every run against steps and, where the runs say it, against time."""
    title, unit = CURVES[key]
    found = [_picture(title, unit, "steps", key, [run.curve(key) for run in runs], runs)]
    if timed:
        against = [run.curve_in_time(key) for run in runs]
        across, length = _unit_of_time(max((at for curve in against for at, _ in curve), default=0.0))
        against = [[(at / length, value) for at, value in curve] for curve in against]
        found.append(_picture(f"{title}, against time", unit, across, key, against, runs))
    return found


def _unit_of_time(longest: float) -> tuple[str, int]:
    """What an axis up to so many seconds counts, and how many seconds that is."""
    return next((unit for unit in (("hours", 3600), ("minutes", 60)) if longest >= 2 * unit[1]), ("seconds", 1))


def _picture(
    title: str, unit: str, across: str, key: str, curves: Sequence[Sequence[tuple[float, float]]], runs: Sequence[Run]
) -> str:
    """One curve of every run, as SVG without its XML header."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    look = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": key + across}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes, ends = figure.subplots(), []
        for i, (run, curve) in enumerate(zip(runs, curves, strict=True)):
            if curve:
                xs, ys = zip(*curve, strict=True)
                axes.plot(xs, ys, linewidth=1.8, markersize=5, markevery=max(1, len(xs) // 8), **style(i))
            if seen := [point for point in curve if math.isfinite(point[1])]:
                ends.append((*seen[-1], run.name[:24], style(i)["color"]))
        axes.set(title=title, xlabel=across, ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=across == "steps"))
        if key in COUNTS:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if 1 < len(ends) <= LABELLED:
            label_ends(axes, ends)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    svg = written.getvalue()
    return f'<figure role="img" aria-label="{html.escape(title)}">{svg[svg.index("<svg") :]}</figure>\n'


def main(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 report`."""
    parser = argparse.ArgumentParser(prog="hf-shampoo4 report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="output folder of a training")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the first folder)")
    chosen = parser.parse_args(arguments)
    output = chosen.output or chosen.runs[0] / "report.html"
    runs = _told_apart([read_run(folder) for folder in chosen.runs], chosen.runs)
    check_writable(output.parent)
    write_text(output, page(runs))
    print(output)
