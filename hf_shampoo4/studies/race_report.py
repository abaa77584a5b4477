"""The report of a race: NAME.json, NAME.md and NAME.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.studies.grid import Grid, Point, Settings
from hf_shampoo4.studies.machine import machine
from hf_shampoo4.studies.race_results import Row, gain_and_noise, rows_of
from hf_shampoo4.utils.files import write_json, write_text
from hf_shampoo4.utils.plots import COLOURS, label_ends, picture, style

PUBLISHED: Settings = {"facecolor": "#fde3d3", "edgecolor": COLOURS[1], "hatch": "///", "linewidth": 0}
LINES = 6  # of a picture: more cannot be followed
REMARKS = "<!-- below this line: written by hand, kept when the table is written again -->"


def report(grid: Grid, finished: Sequence[Settings], folder: Path) -> None:
    """Write NAME.json, NAME.md and NAME.png into the folder from the runs finished so far.

    Args:
        grid: the race.
        finished: runs, of any grid.
        folder: for the three files.

    Raises:
        ConfigError: the contestants that the others are measured against have not finished a run.
    """
    rows = rows_of(grid, finished)
    needed = [name for name in (grid.baseline, grid.target) if name]
    if not set(needed) <= {row.name for row in rows}:
        raise ConfigError(f"nothing to report yet: {' and '.join(needed)} need a finished run each, of this code")
    write_json(folder / f"{grid.name}.json", as_json(grid, rows))
    told = as_markdown(grid, rows)
    write_markdown(folder / f"{grid.name}.md", told)
    drawn = folder / f"{grid.name}.png"
    if grid.target:
        draw_shares(grid.title, rows, drawn)
    else:
        draw_curves(grid, rows, drawn)
    print("\n".join(line for line in told.splitlines() if not line.startswith("![")))
    print(f"{folder / grid.name}.md, .json and .png")


def as_json(grid: Grid, rows: Sequence[Row]) -> Settings:
    """Everything that is known."""
    return {
        "title": grid.title,
        "baseline": grid.baseline,
        "target": grid.target,
        "common": grid.common,
        "machine": machine(),
        "contestants": {
            row.name: {
                **vars(row),
                "point": row.point.settings(),
                "sweep": [{**point.settings(), "loss": loss} for point, loss in row.sweep.items()],
                "mean": row.mean,
                "spread": row.spread,
            }
            for row in rows
        },
    }


def write_markdown(path: Path, text: str) -> None:
    """Write a report, and keep what stands below the line of `REMARKS` in the file that is there."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    remarks = old.partition(REMARKS)[2].strip()
    write_text(path, f"{text}\n{REMARKS}\n" + (f"\n{remarks}\n" if remarks else ""))


def as_markdown(grid: Grid, rows: Sequence[Row]) -> str:
    """The table and how it was made."""
    c, baseline = grid.common, next(row for row in rows if row.name == grid.baseline)
    target = next((row for row in rows if row.name == grid.target), None)
    columns = ["contestant", "learning rate", "times, by kind", "seeds", "loss, mean ± spread",
               f"steps to the loss of {baseline.label}", "seconds to it", "bytes a parameter",
               "optimizer, ms a step"]  # fmt: skip
    tokens = c["per_device_train_batch_size"] * c["seq_len"]
    lines = [
        f"# {grid.title}",
        "",
        f"`hf-shampoo4 race {grid.name}` (settings: `configs/race.yaml`; all numbers: `{grid.name}.json`), commit "
        f"{', '.join(sorted({commit for row in rows for commit in row.commits})) or 'unknown'}.",
        "",
        f"Model {c['model']}{' with ' + c['model_overrides'] if c.get('model_overrides') else ''}, corpus "
        f"{c['dataset']}, {c['max_steps']} steps of {tokens:,} tokens; final validation loss on "
        f"{c['max_validation_sequences']} sequences. A seed is that of the weights and of the data's order, the same "
        "for all contestants. A kind's learning rate is the one in the second column times the factor in the third (1 "
        "where none is given). Seconds are processor time for training, in which the model's forward and backward "
        f"take {baseline.model_step_ms:.0f} ms a step in every run.",
        "",
    ]
    if target:
        columns += ["share", "published"]
        lines += [*_question(baseline, target), ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [_line(row, baseline, target is not None) for row in rows]
    swept = [row for row in rows if len(row.sweep) > 1]
    if swept:
        lines += ["", "All points of the first seed; behind the name, what the best is at the edge of:", ""]
        lines += ["| contestant | learning rate, times by kind: loss |", "|---|---|"]
        lines += [f"| {row.label}{_edges(row)} | {_sweep(row)} |" for row in swept]
    return "\n".join([*lines, "", f"![{grid.title}]({grid.name}.png)", ""])


def _question(baseline: Row, target: Row) -> list[str]:
    gain, noise = gain_and_noise(baseline, target)
    times = f", {gain / noise:.1f} times that" if noise else ""
    return [
        f"Share: the mean gain over {baseline.label}, by that of {target.label}; ± its standard error over paired "
        f"seeds. From {baseline.label} to {target.label}: {gain:.4f}. Spread over seeds (standard deviation, pooled "
        f"over these two): {_number(noise)}{times}."
    ]


def _line(row: Row, baseline: Row, shares: bool) -> str:
    cells = [
        row.label, f"{row.point.learning_rate:g}", factors(row.point), str(len(row.losses)),
        f"{row.mean:.4f} ± {_number(row.spread)}", _of(row.steps_to_baseline, baseline.curve[-1][0]),
        _of(row.seconds_to_baseline, baseline.seconds[-1]), f"{row.bytes_per_parameter:.2f}",
        f"{row.optimizer_step_ms:.0f}",
    ]  # fmt: skip
    if shares:
        error = "" if not row.share_error else f" ± {100 * row.share_error:.0f}"
        cells.append("" if row.share is None else f"{row.share:.0%}{error}")
        cells.append("" if row.paper is None else " to ".join(f"{share:.0%}" for share in sorted(set(row.paper))))
    return f"| {' | '.join(cells)} |"


def factors(point: Point) -> str:
    """Of the kinds whose rate is another, such as `embedding 16, head 16`."""
    return ", ".join(f"{kind} {factor:g}" for kind, factor in point.rates)


def _of(value: float | None, whole: float) -> str:
    return "never" if value is None else f"{value:.0f} ({value / whole:.0%})"


def _edges(row: Row) -> str:
    return f" * {', '.join(row.edges)}" if row.edges else ""


def _sweep(row: Row) -> str:
    def told(point: Point) -> str:
        return " ".join(filter(None, (f"{point.learning_rate:g}", factors(point))))

    points = sorted(row.sweep.items(), key=lambda item: (item[0].learning_rate, item[0].rates))
    return "; ".join(f"{told(point)}: {loss:.4f}" for point, loss in points)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def draw_curves(grid: Grid, rows: Sequence[Row], path: Path) -> None:
    """Mean validation loss against steps and against training time, as a PNG; the first of `curves` is thick.

    At most `LINES` of them: without `curves` the baseline and the best of the others.
    """
    names = grid.curves or [contestant.name for contestant in grid.contestants]
    named = [row for row in rows if row.name in names]
    kept = sorted(named, key=lambda row: (row.name != grid.baseline, row.mean))[:LINES]
    shown, labels = sorted(kept, key=lambda row: row.mean), []
    with picture(path, (13, 6.4), (1, 2), sharey=True) as (figure, axes):
        by_step, by_time = axes[0]
        for row in shown:
            losses = [loss for _, loss in row.curve]
            label = f"{row.mean:.3f}  {row.label} ({row.bytes_per_parameter:.1f} B/param)"
            look = {**style(shown.index(row)), "linewidth": 3.2 if row.name == names[0] else 1.8, "markersize": 5}
            look |= {"color": "black", "linestyle": "--"} if row.name == grid.baseline else {}
            if row.curve:
                labels.append((*row.curve[-1], row.label.partition(" (")[0], look["color"]))
            by_step.plot([step for step, _ in row.curve], losses, label=label, **look)
            by_time.plot([seconds / 60 for seconds in row.seconds], losses, **look)
        if ends := [row.mean for row in shown if math.isfinite(row.mean)]:  # all may have diverged
            by_step.set_ylim(min(ends) - 0.05, max(ends) + 4 * (max(ends) - min(ends)) + 0.2)
        by_step.set(title=f"{grid.title}: by steps", xlabel="step", ylabel="validation loss, nats a token")
        by_step.set_xlim(right=1.3 * by_step.get_xlim()[1])  # room for the names
        label_ends(by_step, labels)
        by_time.set(title="by time", xlabel="training time, minutes of processor time")
        title = "final loss, best first down the columns"
        figure.legend(frameon=False, fontsize=9, title=title, loc="outside lower center", ncols=3, alignment="left")


def draw_shares(title: str, rows: Sequence[Row], path: Path) -> None:
    """Losses by seed, and the share of each contestant beside the published one, as a PNG.

    Args:
        title: of the right half.
        rows: the contestants, drawn from the top.
        path: the file, replaced at once.
    """
    with picture(path, (14, 1.6 + 0.45 * len(rows)), (1, 2), grid="x", sharey=True) as (_, axes):
        losses, shares = axes[0]
        for place, row in enumerate(rows):
            _draw_losses(losses, place, row)
            _draw_share(shares, place, row)
        losses.set_yticks(range(len(rows)), [f"{row.label}  ({row.bytes_per_parameter:.2f} B/param)" for row in rows])
        losses.invert_yaxis()
        losses.set(title="Final validation loss: each seed (dot), the mean (|)", xlabel="nats a token")
        shares.set(title=title, xlabel="per cent (bar: standard error)")
        _finish(shares, any(row.paper for row in rows))


def _draw_losses(axes: Any, place: int, row: Row) -> None:
    axes.scatter(list(row.losses.values()), [place] * len(row.losses), color=COLOURS[2], s=26, alpha=0.55, linewidths=0)
    axes.scatter([row.mean], [place], color=COLOURS[0], marker="|", s=220, linewidths=2)


def _draw_share(axes: Any, place: int, row: Row) -> None:
    if row.paper is not None:
        low, high = 100 * min(row.paper) - 0.7, 100 * max(row.paper) + 0.7
        axes.barh(place, high - low, left=low, height=0.7, **PUBLISHED)
    if row.share is not None:
        error = 100 * (row.share_error or 0.0)
        axes.errorbar(100 * row.share, place, xerr=error, color=COLOURS[2], fmt="o", markersize=6, capsize=4)
        axes.annotate(
            f"{row.share:.0%}", (100 * row.share, place), xytext=(0, 7), textcoords="offset points", ha="center",
            fontsize=9, color=COLOURS[2], bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip


def _finish(axes: Any, has_published: bool) -> None:
    """The two ends of the way, and what the shaded range is."""
    from matplotlib.patches import Patch

    for end in (0, 100):
        axes.axvline(end, color=COLOURS[0], linewidth=1, linestyle=(0, (4, 3)))
    if has_published:
        hatched = [Patch(label="published, other models", **PUBLISHED)]
        axes.figure.legend(handles=hatched, frameon=False, loc="outside lower right")
