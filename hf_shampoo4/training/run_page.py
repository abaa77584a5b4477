"""`hf-shampoo4 report RUN_DIR...`: training runs as one HTML page that opens from disk.

A run is a folder with the Trainer's `trainer_state.json` (in it or in its newest checkpoint), or with `metrics.jsonl`,
a line of JSON for each logged step, as a loop of one's own writes it with `hf_shampoo4.metrics`.
"""

from __future__ import annotations

import argparse
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..exceptions import ConfigError
from ..utils.files import write_text

COLOURS = ("#d9480f", "#1971c2", "#2f9e44", "#862e9c", "#e8590c", "#495057", "#0b7285", "#c2255c")

# what a run may have logged -> the title of its curve
CURVES = {
    "eval_loss": "Validation loss",
    "loss": "Training loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "optim/refresh_seconds": "Seconds spent on factors and bases so far",
    "optim/skipped_steps": "Steps skipped for a gradient that was not finite",
    "optim/failed_refreshes": "Blocks whose refresh failed and kept the last good one",
}
COUNTS = ("optim/skipped_steps", "optim/failed_refreshes")  # of things that should not happen: drawn if they did


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

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value), in order of steps."""
        return sorted({entry["step"]: entry[key] for entry in self.log if key in entry and "step" in entry}.items())

    def last(self, key: str) -> float | None:
        """The last value logged."""
        found = self.curve(key)
        return found[-1][1] if found else self.results.get(key)


def read_run(folder: Path) -> Run:
    """A run's log and results.

    Raises:
        ConfigError: nothing to read there, or not JSON.
    """
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    states = [path for path in (folder / "trainer_state.json", *reversed(checkpoints)) if path.is_file()]
    lines, results = folder / "metrics.jsonl", folder / "all_results.json"
    try:
        if states:
            log = json.loads(states[0].read_text(encoding="utf-8"))["log_history"]
        elif lines.is_file():
            log = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            raise ConfigError("it has neither trainer_state.json nor metrics.jsonl")
        found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
        _check([*log, found])
    except (ValueError, TypeError, KeyError, RecursionError) as error:  # ConfigError is a ValueError too
        raise ConfigError(f"run {str(folder)!r} cannot be read: {error}") from error
    return Run(folder.resolve().name, log, found)


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
        for name in (*FIGURES, *CURVES):
            value = entry.get(name, 0)
            finite_if_exact = isinstance(value, float) or (type(value) is int and abs(value) < LARGEST)
            if not finite_if_exact or (name == "step" and not abs(value) < LARGEST):
                raise ValueError(f"{name} in the log is no number")


def page(runs: Sequence[Run]) -> str:
    """The runs as an HTML page without any other file: a table, and a picture for every curve that one of them has."""
    pictures = [_picture(title, key, runs) for key, title in CURVES.items() if any(_is_drawn(run, key) for run in runs)]
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
.swatch {{ display: inline-block; width: .8rem; height: .8rem; margin-right: .5rem; border-radius: .15rem }}
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
    """Final figures, one row a run in the colour of its curves; the best validation loss is bold."""
    rows = [_figures(run) for run in runs]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    head = "".join(f"<th>{name}</th>" for name in ("run", *columns))
    best = min((row[BEST] for row in rows if row[BEST]), default="")
    body = ""
    for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
        swatch = f'<span class="swatch" style="background:{COLOURS[i % len(COLOURS)]}"></span>'
        bold = {BEST: f"<b>{best}</b>"} if len(runs) > 1 and best and row[BEST] == best else {}
        cells = "".join(f"<td>{value}</td>" for value in ({**row, **bold}[name] for name in columns))
        body += f"<tr><td>{swatch}{html.escape(run.name)}</td>{cells}</tr>\n"
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


BEST = "lowest validation loss"


def _figures(run: Run) -> dict[str, str]:
    evaluated, rates = run.curve("eval_loss"), run.curve("learning_rate")
    size = run.last("optim/state_bytes")
    return {
        "steps": _number(max((entry["step"] for entry in run.log if "step" in entry), default=None), ".0f"),
        "training loss": _number(run.last("loss"), ".4f"),
        "validation loss": _number(run.last("eval_loss"), ".4f"),
        BEST: _number(min((value for _, value in evaluated), default=None), ".4f"),
        "optimizer state, MB": _number(size / 1e6 if size else run.last("train_optimizer_state_mb"), ".2f"),
        "time, s": _number(run.last("train_runtime"), ".1f"),
        "of it on factors and bases, s": _number(run.last("optim/refresh_seconds"), ".1f"),
        "samples/s": _number(run.last("train_samples_per_second"), ".1f"),
        "peak learning rate": _number(max((value for _, value in rates), default=None), ".3g"),
        "skipped steps": _number(run.last("optim/skipped_steps") or None, ".0f"),
        "failed refreshes": _number(run.last("optim/failed_refreshes") or None, ".0f"),
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _picture(title: str, key: str, runs: Sequence[Run]) -> str:
    """One curve of every run, as SVG without its XML header."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": key}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for i, run in enumerate(runs):
            if curve := run.curve(key):
                width = 1.6 + 1.4 * (len(runs) - 1 - i)  # equal curves lie under each other and are all seen
                colour = COLOURS[i % len(COLOURS)]
                axes.plot(*zip(*curve, strict=True), color=colour, linewidth=min(width, 6.0), label=run.name)
        axes.set(title=title, xlabel="step")
        if key in COUNTS:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        if len(runs) > 1:
            axes.legend(frameon=False)
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
    write_text(output, page(_told_apart([read_run(folder) for folder in chosen.runs], chosen.runs)))
    print(output)
