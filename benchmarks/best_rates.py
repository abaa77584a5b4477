"""Where the best learning rates lie against width, depth, batch, length and tying: AdamW and the default.

`python -m benchmarks.best_rates` reads the grids transfer_* of docs/results/race, as far as they are finished, and
writes docs/results/best_rates.json and .png.  It trains nothing.

A point is the rate of matrices and vectors, and a factor on it for embedding and head.  The best rate is where a
parabola through the lowest loss and its two neighbours at the same factor is lowest, over the rate's logarithm; the
best factor the same at the same rate.  Errors are the middle 68% when each loss is uncertain by `NOISE`.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_shampoo4.studies.grid import Point, best_of
from hf_shampoo4.studies.race_summary import NOISE
from hf_shampoo4.utils.files import write_json
from hf_shampoo4.utils.plots import COLOURS, DASHES, MARKERS, picture

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
GRIDS = {
    "transfer_128": "width 128, 3 layers,\n250 steps of 512 tokens",
    "transfer_64": "width 64",
    "transfer_256": "width 256",
    "transfer_512": "width 512",
    "transfer_deep": "12 layers",
    "transfer_batch": "2,048 tokens a step",
    "transfer_length": "1,000 steps",
    "transfer_tied": "embedding tied to the head",
}
"""The first is what the others differ from in one thing."""
CONTESTANTS = {"adamw": "AdamW", "shampoo4bit": "shampoo4bit"}
FACTORS = (1.0, 4.0, 16.0, 64.0)
"""On the rate of embedding and head, those that the picture shows."""
SHOWN_ABOVE_BEST = 1.0
"""Nats above the lowest loss of a grid, up to which the picture shows losses."""
DRAWS = 2000
"""Noisy copies of the losses, of which an error is made."""

Losses = Mapping[Point, float]


def main() -> None:
    found = {}
    for grid in GRIDS:
        path = RESULTS / "race" / f"{grid}.json"
        if path.exists():
            found[grid] = losses_of(json.loads(path.read_text(encoding="utf-8"))["contestants"])
    told = {grid: summary(losses) for grid, losses in found.items()}
    write_json(RESULTS / "best_rates.json", {"noise": NOISE, "grids": told})
    draw(found, RESULTS / "best_rates.png")
    for grid, entry in told.items():
        print(grid, json.dumps(entry))


def losses_of(contestants: Mapping[str, Any]) -> dict[str, dict[Point, float]]:
    """Final losses of the contestants of one grid, with one rate for all or with a factor for embedding and head."""
    found: dict[str, dict[Point, float]] = {name: {} for name in CONTESTANTS}
    for name, losses in found.items():
        for entry in (contestants.get(f"{name}_one", {}), contestants.get(name, {})):
            for tried in entry.get("sweep", []):
                point = Point.of(tried)
                factors = dict(point.rates)
                if set(factors) <= {"embedding", "head"} and len(set(factors.values())) <= 1:
                    losses[point] = tried["loss"]
    return found


def factor_of(point: Point) -> float:
    """On the rate of embedding and head, which is one number where `losses_of` has taken the point."""
    return point.get("embedding")


def summary(found: Mapping[str, Losses]) -> dict[str, Any]:
    """Each contestant's best point of a grid, its best rate and factor with their errors, and its best rate where all
    parameters have one; the ratios of ours to AdamW's, of the matrices' best rates and of the best ones for all.
    """
    told: dict[str, Any] = {}
    for name, losses in found.items():
        best = best_of(losses)
        at_its_rate = {p: loss for p, loss in losses.items() if p.learning_rate == best.learning_rate}
        told[name] = {
            "learning_rate": best.learning_rate,
            "factor": factor_of(best),
            "loss": round(losses[best], 3),
            "best_rate": estimate(rates_at(losses, factor_of(best))),
            "best_factor": estimate({factor_of(p): loss for p, loss in at_its_rate.items()}),
            "one_rate": estimate(rates_at(losses, 1.0)),
        }
    theirs, ours = (told[name] for name in CONTESTANTS)
    told["ratio"] = ratio(theirs["best_rate"], ours["best_rate"])
    told["one_rate_ratio"] = ratio(theirs["one_rate"], ours["one_rate"])
    return told


def rates_at(losses: Losses, factor: float) -> dict[float, float]:
    """Rate -> loss at one factor."""
    return {p.learning_rate: loss for p, loss in losses.items() if factor_of(p) == factor}


def estimate(losses: Mapping[float, float]) -> dict[str, float] | None:
    """The best value and its error; None: the lowest loss has no worse one on either side."""
    value = lowest(losses)
    if value is None:
        return None
    generator = random.Random(0)
    copies = [{x: loss + generator.gauss(0, NOISE) for x, loss in losses.items()} for _ in range(DRAWS)]
    drawn = [lowest(copy) or min(copy, key=lambda x: copy[x]) for copy in copies]
    cut = statistics.quantiles(drawn, n=100)
    return {"value": _short(value), "low": _short(cut[15]), "high": _short(cut[83])}


def lowest(losses: Mapping[float, float]) -> float | None:
    """Where the parabola through the lowest loss and its neighbours is lowest, over the logarithm; None: the lowest is
    the first or the last."""
    values = sorted(losses)
    at = min(range(len(values)), key=lambda i: losses[values[i]], default=0)
    if not 0 < at < len(values) - 1:
        return None
    near = values[at - 1 : at + 2]
    (a, b, c), (x, y, z) = [math.log(value) for value in near], [losses[value] for value in near]
    left, right = (y - x) / (b - a), (z - y) / (c - b)
    return math.exp((a + b) / 2 - left * (c - a) / 2 / (right - left))


def ratio(theirs: Mapping[str, float] | None, ours: Mapping[str, float] | None) -> dict[str, float] | None:
    """Ours over theirs, with the errors of both in its own; None where one of them has none."""
    if theirs is None or ours is None:
        return None
    value = ours["value"] / theirs["value"]
    up, down = (
        math.hypot(math.log(ours[a] / ours["value"]), math.log(theirs[b] / theirs["value"]))
        for a, b in (("high", "low"), ("low", "high"))
    )
    return {"value": round(value, 1), "low": round(value / math.exp(down), 1), "high": round(value * math.exp(up), 1)}


def _short(value: float) -> float:
    return float(f"{value:.2g}")


def draw(found: Mapping[str, Mapping[str, Losses]], path: Path) -> None:
    """A panel a grid: final loss against the matrices' rate, a line for each contestant and factor."""
    columns = 4
    rows = -(-len(found) // columns)
    with picture(path, (14, 3.5 * rows + 0.7), (rows, columns), font=10) as (figure, axes):
        for panel in axes.flat[len(found) :]:
            panel.set_visible(False)
        handles: dict[tuple[str, float], Any] = {}
        for panel, (grid, losses) in zip(axes.flat, found.items(), strict=False):
            handles |= _draw_grid(panel, losses)
            panel.set_title(GRIDS[grid])
            panel.set_xlabel("learning rate of matrices")
        for panel in axes[:, 0]:
            panel.set_ylabel("final validation loss")
        ordered = sorted(handles)
        figure.legend(
            [handles[key] for key in ordered],
            [f"{CONTESTANTS[name]}, {factor:g}" for name, factor in ordered],
            title="optimizer, factor on the rate of embedding and head",
            loc="outside lower center",
            ncols=len(ordered),
        )


def _draw_grid(panel: Any, found: Mapping[str, Losses]) -> dict[tuple[str, float], Any]:
    handles = {}
    for colour, name in zip(COLOURS, CONTESTANTS, strict=False):
        for dash, marker, factor in zip(DASHES, MARKERS, FACTORS, strict=False):
            if at := rates_at(found[name], factor):
                rates = sorted(at)
                (handles[name, factor],) = panel.plot(
                    rates, [at[rate] for rate in rates], dash, marker=marker, color=colour
                )
    best = min(loss for losses in found.values() for loss in losses.values())
    panel.set_ylim(best - 0.05, best + SHOWN_ABOVE_BEST)
    panel.set_xscale("log", base=2)
    ticks = sorted({point.learning_rate for losses in found.values() for point in losses})
    panel.set_xticks(ticks, [f"{tick:g}".removeprefix("0") for tick in ticks], rotation=45)
    panel.minorticks_off()
    return handles


if __name__ == "__main__":
    main()
