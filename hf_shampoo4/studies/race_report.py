"""The report of a race: NAME.json, NAME.md, NAME.png and NAME-bytes.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.studies.grid import RATE, Grid, Point, Settings, tokens_a_step
from hf_shampoo4.studies.machine import machine
from hf_shampoo4.studies.race_pictures import draw_bytes, draw_curves, draw_shares
from hf_shampoo4.studies.race_results import Row, gain_and_noise, rows_of
from hf_shampoo4.studies.race_times import Times
from hf_shampoo4.utils.files import write_json, write_text

REMARKS = "<!-- below this line: written by hand, kept when the table is written again -->"


def report(
    grid: Grid,
    finished: Sequence[Settings],
    folder: Path,
    times: Times | None = None,
    peaks: Mapping[str, float] | None = None,
) -> None:
    """Write NAME.json, NAME.md and the pictures into the folder from the runs finished so far.

    Args:
        grid: the race.
        finished: runs, of any grid.
        folder: for the files.
        times: of steps, see `race_times`.
        peaks: bytes a parameter, see `race_peaks`.

    Raises:
        ConfigError: the contestants that the others are measured against have not finished a run.
    """
    rows = rows_of(grid, finished, times, peaks)
    needed = [name for name in (grid.baseline, grid.target) if name]
    if not set(needed) <= {row.name for row in rows}:
        raise ConfigError(f"nothing to report yet: {' and '.join(needed)} need a finished run each, of this code")
    write_json(folder / f"{grid.name}.json", as_json(grid, rows, times))
    told = as_markdown(grid, rows, times)
    write_markdown(folder / f"{grid.name}.md", told)
    drawn = folder / f"{grid.name}.png"
    if grid.target:
        draw_shares(grid.title, rows, drawn)
    else:
        draw_curves(grid, rows, drawn)
        draw_bytes(grid, rows, folder / f"{grid.name}-bytes.png")
    print("\n".join(line for line in told.splitlines() if not line.startswith("![")))
    print(f"{folder / grid.name}.md, .json and .png")


def as_json(grid: Grid, rows: Sequence[Row], times: Times | None = None) -> Settings:
    """Everything that is known."""
    return {
        "title": grid.title,
        "baseline": grid.baseline,
        "target": grid.target,
        "common": grid.common,
        "machine": machine(),
        "times": times and {"machine": times.machine, "commit": times.commit, "model_ms": times.model_ms},
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


def as_markdown(grid: Grid, rows: Sequence[Row], times: Times | None = None) -> str:
    """The table and how it was made."""
    baseline = next(row for row in rows if row.name == grid.baseline)
    target = next((row for row in rows if row.name == grid.target), None)
    has_peaks = any(row.peak_bytes_per_parameter is not None for row in rows)  # known from `--peaks`
    columns = ["contestant", "learning rate", "times, by kind", "sweep", "seeds", "loss, mean ± spread",
               f"steps to the loss of {baseline.label}", "seconds to it", "state, bytes a parameter",
               *(["at the peak"] if has_peaks else []), "optimizer, ms a step"]  # fmt: skip
    lines = [*_heading(grid, rows), *_how_it_was_made(grid, baseline, times)]
    if target:
        columns += ["share", "published"]
        lines += [*_question(baseline, target), ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [_line(row, baseline, has_peaks, target is not None) for row in rows]
    swept = [row for row in rows if len(row.sweep) > 1]
    if swept:
        lines += ["", "All points of the first seed:", "", "| contestant | learning rate, times by kind: loss |"]
        lines += ["|---|---|", *(f"| {row.label} | {_sweep(row)} |" for row in swept)]
    pictures = [f"![{grid.title}]({grid.name}.png)"]
    if not target:
        pictures += ["", f"![Loss against bytes of state: {grid.title}]({grid.name}-bytes.png)"]
    return "\n".join([*lines, "", *pictures, ""])


def _heading(grid: Grid, rows: Sequence[Row]) -> list[str]:
    commits = ", ".join(sorted({commit for row in rows for commit in row.commits})) or "unknown"
    told = f"`hf-shampoo4 race {grid.name}` (settings: `configs/race.yaml`; all numbers: `{grid.name}.json`), commit"
    return [f"# {grid.title}", "", f"{told} {commits}.", ""]


def _how_it_was_made(grid: Grid, baseline: Row, times: Times | None) -> list[str]:
    c = grid.common
    measured = "Seconds are processor time for training, in which"
    if times:
        measured = (
            "Seconds are steps times what a step takes, measured side by side on one thread "
            f"(`--time`, commit {times.commit or 'unknown'}, {times.machine.get('processor')}), where"
        )
    return [
        f"Model {c['model']}{' with ' + c['model_overrides'] if c.get('model_overrides') else ''}, corpus "
        f"{c['dataset']}, {c['max_steps']} steps of {tokens_a_step(c):,} tokens; final validation loss on "
        f"{c['max_validation_sequences']} sequences. A seed is that of the weights and of the data's order, the same "
        "for all contestants. A kind's learning rate is the one in the second column times the factor in the third (1 "
        f"where none is given). {measured} the model's forward and backward "
        f"take {baseline.model_step_ms:.0f} ms a step in every run.",
        "",
        "Sweep: the coordinates of the rate in which the best point has a worse one on either side (closed), and those "
        "in which it is the first, the last or the only one, so that a better one may lie beyond (open).",
        "",
    ]


def _question(baseline: Row, target: Row) -> list[str]:
    gain, noise = gain_and_noise(baseline, target)
    times = f", {gain / noise:.1f} times that" if noise else ""
    return [
        f"Share: the mean gain over {baseline.label}, by that of {target.label}; ± its standard error over paired "
        f"seeds. From {baseline.label} to {target.label}: {gain:.4f}. Spread over seeds (standard deviation, pooled "
        f"over these two): {_number(noise)}{times}."
    ]


def _line(row: Row, baseline: Row, has_peaks: bool, shares: bool) -> str:
    peak = row.peak_bytes_per_parameter
    peaks = ["?" if peak is None else f"{peak:.2f}"] if has_peaks else []
    cells = [
        row.label, f"{row.point.learning_rate:g}", factors(row.point), sweep_state(row), str(len(row.losses)),
        f"{row.mean:.4f} ± {_number(row.spread)}",
        _of(row.steps_to_baseline, baseline.curve[-1][0], row.steps_spread),
        _of(row.seconds_to_baseline, baseline.seconds[-1], row.seconds_spread), f"{row.bytes_per_parameter:.2f}",
        *peaks, f"{row.optimizer_step_ms:.0f}",
    ]  # fmt: skip
    if shares:
        error = "" if not row.share_error else f" ± {100 * row.share_error:.0f}"
        cells.append("" if row.share is None else f"{row.share:.0%}{error}")
        cells.append("" if row.paper is None else " to ".join(f"{share:.0%}" for share in sorted(set(row.paper))))
    return f"| {' | '.join(cells)} |"


def sweep_state(row: Row) -> str:
    """Such as `closed`, or `open: vector; closed: rate, head`; `one point` without a sweep."""
    if not row.closed:
        return "one point"
    names = {
        closed: ", ".join(_short(c) for c, is_so in row.closed.items() if is_so is closed) for closed in (False, True)
    }
    if not names[False]:
        return f"closed: {names[True]}"
    return f"**open: {names[False]}**" + (f"; closed: {names[True]}" if names[True] else "")


def _short(coordinate: str) -> str:
    return "rate" if coordinate == RATE else coordinate


def factors(point: Point) -> str:
    """Of the kinds whose rate is another, such as `embedding 16, head 16`."""
    return ", ".join(f"{kind} {factor:g}" for kind, factor in point.rates)


def _of(value: float | None, whole: float, spread: float | None = None) -> str:
    if value is None:
        return "never"
    return f"{value:.0f}{'' if spread is None else f' ± {spread:.0f}'} ({value / whole:.0%})"


def _sweep(row: Row) -> str:
    def told(point: Point) -> str:
        return " ".join(filter(None, (f"{point.learning_rate:g}", factors(point))))

    points = sorted(row.sweep.items(), key=lambda item: (item[0].learning_rate, item[0].rates))
    return "; ".join(f"{told(point)}: {loss:.4f}" for point, loss in points)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"
