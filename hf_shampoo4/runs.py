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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import ConfigError
from .files import write_text

COLOURS = ("#d9480f", "#1971c2", "#2f9e44", "#862e9c", "#e8590c", "#495057", "#0b7285", "#c2255c")

# what a run may have logged -> the title of its curve
CURVES = {
    "loss": "Training loss",
    "eval_loss": "Validation loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "optim/refresh_seconds": "Seconds spent on factors and bases so far",
    "optim/skipped_steps": "Steps skipped for a gradient that was not finite",
    "optim/failed_refreshes": "Blocks whose refresh failed and kept the last good one",
}


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
            raise ConfigError(f"run {str(folder)!r} has neither trainer_state.json nor metrics.jsonl")
        found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise ConfigError(f"run {str(folder)!r} cannot be read: {error}") from error
    return Run(folder.resolve().name, log, found)


def page(runs: Sequence[Run]) -> str:
    """The runs as an HTML page without any other file: a table, and a picture for every curve that one of them has."""
    pictures = [_picture(title, key, runs) for key, title in CURVES.items() if any(len(r.curve(key)) > 1 for r in runs)]
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
th, td {{ padding: .35rem .8rem; border-bottom: 1px solid #dee2e6; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem }}
svg {{ width: 100%; height: auto }}
</style>
<h1>{names}</h1>
<div class="wide">{_table(runs)}</div>
<div class="curves">
{"".join(pictures)}
</div>
</html>
"""


def _table(runs: Sequence[Run]) -> str:
    """Final figures, one row a run; columns that no run has are left out."""
    rows = [_figures(run) for run in runs]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    head = "".join(f"<th>{name}</th>" for name in ("run", *columns))
    body = "".join(
        f"<tr><td>{html.escape(run.name)}</td>" + "".join(f"<td>{row[name]}</td>" for name in columns) + "</tr>\n"
        for run, row in zip(runs, rows, strict=True)
    )
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def _figures(run: Run) -> dict[str, str]:
    evaluated, rates = run.curve("eval_loss"), run.curve("learning_rate")
    size = run.last("optim/state_bytes") or run.last("train_mem_optimizer_state")
    return {
        "steps": _number(max((entry["step"] for entry in run.log if "step" in entry), default=None), ".0f"),
        "peak learning rate": _number(max((value for _, value in rates), default=None), ".3g"),
        "training loss": _number(run.last("loss"), ".4f"),
        "validation loss": _number(run.last("eval_loss"), ".4f"),
        "lowest": _number(min((value for _, value in evaluated), default=None), ".4f"),
        "time, s": _number(run.last("train_runtime"), ".1f"),
        "samples/s": _number(run.last("train_samples_per_second"), ".1f"),
        "of it refreshes, s": _number(run.last("optim/refresh_seconds"), ".1f"),
        "optimizer state, MB": _number(size / 1e6 if size else None, ".2f"),
        "skipped steps": _number(run.last("optim/skipped_steps") or None, ".0f"),
        "failed refreshes": _number(run.last("optim/failed_refreshes") or None, ".0f"),
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _picture(title: str, key: str, runs: Sequence[Run]) -> str:
    """One curve of every run, as SVG without its XML header."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": key}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for i, run in enumerate(runs):
            if curve := run.curve(key):
                axes.plot(*zip(*curve, strict=True), color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=run.name)
        axes.set(title=title, xlabel="step")
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
    write_text(output, page([read_run(folder) for folder in chosen.runs]))
    print(output)
