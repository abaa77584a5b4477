"""README.md of a folder of races: on which grids `shampoo4bit` is ahead of whom, by what, and how surely."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_shampoo4.integrations.trainer import OPTIMS
from hf_shampoo4.studies.grid import RATE, Settings, read_grid, tokens_a_step
from hf_shampoo4.studies.measured_run import steps_to
from hf_shampoo4.studies.race_report import write_markdown
from hf_shampoo4.training.config import config_root, read_config

OURS = ("shampoo4bit", "shampoo4bit_one")
"""Of these the first that a grid has is compared."""
NAMED = {"AdamW": ("adamw", "adamw_one"), "Muon": ("muon",)}
BEST = "the best of the others"
NOISE = 0.02
"""By which two trainings differ that differ in nothing but the seed, where only one seed has run; nats a token."""
COLUMNS = ("grid", "steps, tokens a step", "against", "seeds", "its loss", "`shampoo4bit` minus it",
           "steps to its loss", "seconds to it", "sweeps")  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Ours and one other contestant on one grid."""

    grid: str
    title: str
    size: str
    role: str
    """A key of `NAMED`, or `BEST`."""
    label: str
    seeds: int
    """That both have finished."""
    loss: float
    """The other's, the mean over its seeds."""
    difference: float
    """Ours minus it, the mean over common seeds."""
    spread: float | None
    """Standard deviation of that over seeds; None: one seed."""
    steps: float | None
    """Share of its steps after which our mean curve is at the loss at which it ends; None: it does not get there."""
    seconds: float | None
    """The same of its training time."""
    open: tuple[str, ...]
    """Whose sweep has no worse point on both sides of the best, and along what; none: both are closed."""

    @property
    def ahead(self) -> bool:
        """Of a lower loss after the same steps, by more than seeds differ."""
        return self.difference < -(NOISE if self.spread is None else self.spread)

    @property
    def faster(self) -> bool:
        """At its loss in less time."""
        return self.seconds is not None and self.seconds < 1


def write_summary(folder: Path) -> None:
    """Write README.md from the reports NAME.json in a folder; nothing where none of them has both ours and another.

    Grids with a `target` ask something else and are left out.
    """
    found: list[Comparison] = []
    for name in read_config(config_root() / "race.yaml")["grids"]:
        path = folder / f"{name}.json"
        if path.exists():
            found += comparisons(name, json.loads(path.read_text(encoding="utf-8")))
    if found:
        write_markdown(folder / "README.md", as_markdown(found))


def comparisons(name: str, told: Settings) -> list[Comparison]:
    """Ours against AdamW, Muon and the best of the other contestants that are not this package's.

    Args:
        name: of a grid of `configs/race.yaml`.
        told: its report, as in NAME.json.
    """
    there = told["contestants"]
    ours = next((there[key] for key in OURS if key in there), None)
    if told["target"] or ours is None:
        return []
    not_ours = [c.name for c in read_grid(name).contestants if c.settings.get("optim") not in OPTIMS]
    chosen = {role: next((key for key in keys if key in there), "") for role, keys in NAMED.items()}
    named = {key for keys in NAMED.values() for key in keys}
    others = sorted(
        (key for key in not_ours if key in there and key not in named), key=lambda key: _or_inf(there[key]["mean"])
    )
    chosen[BEST] = next(iter(others), "")
    common = told["common"]
    size = f"{common['max_steps']:,}, {tokens_a_step(common):,}"
    return [
        _compared(name, told["title"], size, role, ours, there[key])
        for role, key in chosen.items()
        if key and set(ours["losses"]) & set(there[key]["losses"])
    ]


def _or_inf(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _compared(grid: str, title: str, size: str, role: str, ours: Settings, other: Settings) -> Comparison:
    seeds = sorted(set(ours["losses"]) & set(other["losses"]))
    differences = [ours["losses"][seed] - other["losses"][seed] for seed in seeds]
    curve, goal = ours["curve"], other["mean"]
    steps = steps_to(curve, goal)
    seconds = steps_to([(s, loss) for s, (_, loss) in zip(ours["seconds"], curve, strict=True)], goal)
    return Comparison(
        grid=grid, title=title, size=size, role=role, label=other["label"], seeds=len(seeds), loss=goal,
        difference=statistics.mean(differences), spread=statistics.stdev(differences) if len(seeds) > 1 else None,
        steps=None if steps is None else steps / other["curve"][-1][0],
        seconds=None if seconds is None else seconds / other["seconds"][-1],
        open=tuple(f"{whose} ({at})" for whose, row in (("ours", ours), ("its", other)) if (at := _open(row))),
    )  # fmt: skip


def _open(row: Settings) -> str:
    if not row["closed"]:
        return "one point"
    return ", ".join("rate" if c == RATE else c for c, closed in row["closed"].items() if not closed)


def as_markdown(found: Sequence[Comparison]) -> str:
    """What holds everywhere and where it does not, and a row for each comparison."""
    lines = ["# Races at one look", "", "Made by `hf-shampoo4 race` from the reports in this folder.", ""]
    lines += [line for role in (*NAMED, BEST) if (line := _verdict(role, [c for c in found if c.role == role]))]
    lines += [
        "",
        "Losses are validation losses, nats a token, each contestant at its best rates; ± is the standard deviation of "
        f"the paired difference over seeds, and a loss is lower where it is so by more than that (one seed: {NOISE}). "
        "Steps and seconds: after what share of the other's whole training our mean curve is at the loss at which it "
        "ends; bold: not ahead. Sweeps: open, if along these coordinates the best point is the first, the last or the "
        "only one, so that a better one may lie beyond.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    return "\n".join([*lines, *(_line(each) for each in found), ""])


def _verdict(role: str, found: Sequence[Comparison]) -> str:
    """Such as `* Against Muon: a lower loss on 3 of 3 grids, its loss in less time on 2 (not: tiny_long).`"""
    if not found:
        return ""

    def where(fails: Sequence[Comparison]) -> str:
        return f" (not: {', '.join(each.grid for each in fails)})" if fails else ""

    behind, slower = [c for c in found if not c.ahead], [c for c in found if not c.faster]
    unsure = [c for c in found if c.open]
    return (
        f"* Against {role}: a lower loss on {len(found) - len(behind)} of {len(found)} grids{where(behind)}, "
        f"at its loss in less time on {len(found) - len(slower)}{where(slower)}; "
        f"both sweeps closed on {len(found) - len(unsure)}{where(unsure)}."
    )


def _line(each: Comparison) -> str:
    spread = "" if each.spread is None else f" ± {each.spread:.4f}"
    difference = f"{each.difference:+.4f}{spread}" if math.isfinite(each.difference) else "diverged"
    cells = [
        f"[{each.title}]({each.grid}.md)", each.size, each.label, str(each.seeds), f"{each.loss:.4f}",
        _marked(difference, each.ahead), _marked(_share(each.steps), each.steps is not None and each.steps < 1),
        _marked(_share(each.seconds), each.faster), "open: " + ", ".join(each.open) if each.open else "closed",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _share(value: float | None) -> str:
    return "never" if value is None else f"{value:.0%}"


def _marked(text: str, good: bool) -> str:
    return text if good else f"**{text}**"
