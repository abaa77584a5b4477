"""The report of the fine-tuning grids: a .json, an .md and a .png of one name."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_shampoo4.studies.finetuning import Base
from hf_shampoo4.studies.grid import Contestant, Grid, Settings, tokens_a_step
from hf_shampoo4.studies.machine import machine
from hf_shampoo4.studies.race_report import sweep_state, write_markdown
from hf_shampoo4.studies.race_results import Row, rows_of
from hf_shampoo4.utils.files import write_json
from hf_shampoo4.utils.plots import picture, style

COLUMNS = ("task, way", "optimizer", "learning rate", "sweep", "seeds", "loss, mean ± spread", "steps to AdamW's loss",
           "seconds to it", "first corpus: loss more than before", "loss at AdamW's rise of that one",
           "state, bytes a trained parameter",
           "optimizer, ms a step")  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A contestant of a grid, at its best rate."""

    row: Row
    base_losses: list[float]
    """Loss on the pretraining's validation sequences after fine-tuning, by seed."""
    tried: list[tuple[float, float, float]]
    """(learning rate, loss of the task, loss of the pretraining) of every run of the first seed."""

    @property
    def base_mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.base_losses)

    def loss_at(self, base_loss: float) -> float | None:
        """Loss of the task where that of the pretraining is `base_loss`, on a line between two rates of the first seed;
        None: it is outside of what was tried."""
        for (_, loss_a, a), (_, loss_b, b) in itertools.pairwise(self.tried):
            if a <= base_loss <= b:
                return loss_a + (loss_b - loss_a) * (base_loss - a) / (b - a) if b > a else loss_a
        return None

    @property
    def base_at_best(self) -> float:
        """Loss of the pretraining at the best rate, at the first seed."""
        return next(base for rate, _, base in self.tried if rate == self.row.point.learning_rate)


Lines = dict[str, list[Line]]
"""By the name of their grid, which has finished runs."""


def report(grids: Sequence[Grid], finished: Sequence[Settings], base: Base, folder: Path, size: str = "") -> None:
    """Write the three files from the runs finished so far, and print the table.

    Args:
        grids: in the order of the table.
        finished: runs of them.
        base: the model that they start from.
        folder: of the files.
        size: of the model, as `read_grids` has it; part of the files' names and of the command that makes them.
    """
    lines = {grid.name: found for grid in grids if (found := lines_of(grid, finished))}
    told = [grid for grid in grids if grid.name in lines]
    path = folder / _name(size)
    write_json(path.with_suffix(".json"), as_json(told, lines, base))
    text = as_markdown(told, lines, base, size)
    write_markdown(path.with_suffix(".md"), text)
    draw(told, lines, before(base), path.with_suffix(".png"))
    print(text)


def _name(size: str) -> str:
    """Of the three files, without their endings."""
    return f"finetuning_{size}" if size else "finetuning"


def lines_of(grid: Grid, finished: Sequence[Settings]) -> list[Line]:
    """One for each contestant with a finished run."""
    contestants = {contestant.name: contestant for contestant in grid.contestants}
    return [_line_of(row, contestants[row.name], grid.seeds, finished) for row in rows_of(grid, finished)]


def _line_of(row: Row, contestant: Contestant, seeds: Sequence[int], finished: Sequence[Settings]) -> Line:
    def of(point: Any, seed: int) -> Settings | None:
        wanted = contestant.run(point, seed)
        return next((run for run in finished if run["settings"] == wanted), None)

    best = [run for seed in seeds if (run := of(row.point, seed))]
    points = sorted(row.sweep, key=lambda point: point.learning_rate)
    runs = [(point.learning_rate, run) for point in points if (run := of(point, seeds[0]))]
    tried = [(rate, run["final_loss"], run["base_loss"]) for rate, run in runs]
    return Line(row, [run["base_loss"] for run in best], tried)


def before(base: Base) -> float:
    """The loss of the pretraining at its end."""
    return float(base.run["validation"][-1][1])


def as_json(grids: Sequence[Grid], lines: Lines, base: Base) -> Settings:
    """Everything that is known."""
    return {
        "machine": machine(),
        "pretraining": {
            "settings": base.run["settings"],
            "parameters": base.run["parameters"],
            "validation": base.run["validation"],
            "loss": before(base),
            "commit": base.run["commit"],
        },
        "grids": {
            grid.name: {
                "title": grid.title,
                "settings": {key: value for key, value in grid.common.items() if key != "pretraining"},
                "loss_before": lines[grid.name][0].row.curve[0][1],
                "contestants": {
                    line.row.name: _entry(line, lines[grid.name][0], before(base)) for line in lines[grid.name]
                },
            }
            for grid in grids
        },
    }


def _entry(line: Line, baseline: Line, loss_before: float) -> Settings:
    row = line.row
    return {
        "label": row.label,
        "learning_rate": row.point.learning_rate,
        "closed": all(row.closed.values()) and bool(row.closed),
        "sweep": [{"learning_rate": rate, "loss": loss, "base_loss": base} for rate, loss, base in line.tried],
        "losses": row.losses,
        "mean": row.mean,
        "spread": row.spread,
        "curve": row.curve,
        "seconds": row.seconds,
        "steps_to_baseline": row.steps_to_baseline,
        "seconds_to_baseline": row.seconds_to_baseline,
        "base_losses": line.base_losses,
        "base_mean": line.base_mean,
        "forgetting": line.base_mean - loss_before,
        "loss_at_baselines_forgetting": line.loss_at(baseline.base_at_best),
        "bytes_per_parameter": row.bytes_per_parameter,
        "optimizer_step_ms": row.optimizer_step_ms,
        "model_step_ms": row.model_step_ms,
        "commits": row.commits,
    }


def as_markdown(grids: Sequence[Grid], lines: Lines, base: Base, size: str) -> str:
    """The table, how it was made, and every rate that was tried; `size`: as for `report`."""
    p = base.run["settings"]
    name, command = _name(size), f"python -m benchmarks.finetuning FOLDER{f' --size {size}' if size else ''}"
    commits = sorted({commit for found in lines.values() for line in found for commit in line.row.commits})
    text = [
        "# Fine-tuning",
        "",
        f"`{command}` (settings: `configs/finetuning.yaml`; all numbers: `{name}.json`), commit "
        f"{', '.join(commits) or 'unknown'}.",
        "",
        f"A LLaMA of {base.run['parameters'] / 1e6:.1f}M parameters, pretrained by AdamW on {p['dataset']} for "
        f"{p['max_steps']} steps of {tokens_a_step(p):,} tokens to a validation loss of {before(base):.3f}, then "
        f"fine-tuned for {grids[0].common['max_steps'] if grids else 0} steps. Loss: validation, of the task, at the "
        "best rate; the last rates of a sweep lie factors of 2 apart, and it is closed when the best has a worse one "
        "on either side. "
        "Seconds: processor time for training, on one thread. First corpus: how much the validation loss of the "
        "pretraining has risen, at that rate; and the loss of the task where that rise is AdamW's, on a line "
        "between two rates of the first seed.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(_cells(grid.title, line, lines[grid.name], before(base)) for grid in grids for line in lines[grid.name]),
        "",
        "All rates of the first seed: loss of the task, and of the first corpus after it.",
        "",
        "| task, way | optimizer | learning rate: loss, loss of the first corpus |",
        "|---|---|---|",
        *(f"| {grid.title} | {line.row.label} | {_tried(line)} |" for grid in grids for line in lines[grid.name]),
        "",
        f"![Loss of the task against what was forgotten]({name}.png)",
        "",
    ]
    return "\n".join(text)


def _cells(title: str, line: Line, beside: Sequence[Line], loss_before: float) -> str:
    row = line.row
    level = line.loss_at(beside[0].base_at_best)
    best = row.mean == min(other.row.mean for other in beside)
    loss = f"{row.mean:.3f}" + ("" if row.spread is None else f" ± {row.spread:.3f}")
    cells = [
        title, row.label, f"{row.point.learning_rate:g}", sweep_state(row), str(len(row.losses)),
        f"**{loss}**" if best else loss,
        "never" if row.steps_to_baseline is None else f"{row.steps_to_baseline:.0f}",
        "never" if row.seconds_to_baseline is None else f"{row.seconds_to_baseline:.1f}",
        f"{line.base_mean - loss_before:+.3f}", "not tried" if level is None else f"{level:.3f}",
        f"{row.bytes_per_parameter:.2f}", f"{row.optimizer_step_ms:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _tried(line: Line) -> str:
    return "; ".join(f"{rate:g}: {loss:.3f}, {base:.3f}" for rate, loss, base in line.tried)


def draw(grids: Sequence[Grid], lines: Lines, loss_before: float, path: Path) -> None:
    """Loss of the task against how much that of the pretraining has risen, every rate a point, as a PNG.

    Args:
        grids: a panel each, those of one task below one another.
        lines: of the grids.
        loss_before: of the pretraining, at its end.
        path: the file, replaced at once.
    """
    tasks = list(dict.fromkeys(grid.common["task"] for grid in grids))
    ways = [[grid for grid in grids if grid.common["task"] == task] for task in tasks]
    if not ways:
        return
    size = (5.2 * len(tasks), 0.6 + 3.4 * max(map(len, ways)))
    with picture(path, size, (max(map(len, ways)), len(tasks)), font=10) as (figure, axes):
        for column, of_task in enumerate(ways):
            for place, grid in enumerate(of_task):
                _draw_grid(axes[place][column], grid, lines[grid.name], loss_before)
        for panel in axes[-1]:
            panel.set_xlabel("first corpus: loss more than before, nats a token")
        handles, labels = axes[0][0].get_legend_handles_labels()
        title = "a point: one learning rate; filled: the best, mean over seeds"
        figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels), title=title)


def _draw_grid(axes: Any, grid: Grid, found: Sequence[Line], loss_before: float) -> None:
    for index, line in enumerate(found):
        look = {**style(index), "linewidth": 1.4}
        rises, losses = [base - loss_before for _, _, base in line.tried], [loss for _, loss, _ in line.tried]
        axes.plot(rises, losses, label=line.row.label, markerfacecolor="white", markersize=5, **look)
        axes.plot(
            [line.base_mean - loss_before], [line.row.mean], color=look["color"], marker=look["marker"], markersize=9
        )
    low, high = min(line.row.mean for line in found), max(line.row.mean for line in found)
    axes.set_ylim(low - 0.02, high + max(0.15, 3 * (high - low)))
    axes.set(title=grid.title, ylabel="loss of the task, nats a token")
