"""`hf-shampoo4 demo`: one small LLaMA, pretrained with each optimizer from the same weights on the same batches.

Prints a table and writes `demo.json` and `demo.png`.  The settings are in `configs/demo.yaml`; every run is
`training.pretrain.run`, the path that `hf-shampoo4 train` takes.  Learning rates are swept by `hf-shampoo4 race`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_shampoo4.studies.grid import read_plan
from hf_shampoo4.studies.machine import machine, peak_memory_bytes
from hf_shampoo4.studies.measured_run import Outcome, Settings, run_one
from hf_shampoo4.studies.peers import optimizer_of
from hf_shampoo4.utils.files import write_json
from hf_shampoo4.utils.plots import picture, style


def demo(
    folder: Path, optims: Sequence[str] = (), common: Mapping[str, Any] | None = None, quick: bool = False
) -> list[Outcome]:
    """Run every optimizer, print the table, write `demo.json` and `demo.png`.

    Args:
        folder: for the two files and a sub-folder for each model.
        optims: entries of `configs/demo.yaml` (default: all), or else names of `--optim`, which get the learning rate
            of its first entry; the first is the reference.
        common: settings over those of the file, for every optimizer.
        quick: a few steps of a tiny model, to see that it works.

    Returns:
        The runs, in order.

    Raises:
        ConfigError: a setting that does not exist or cannot be.
    """
    plan = read_plan()
    shared = {**plan["common"], **(plan["quick"] if quick else {}), **(common or {})}
    fallback = {"learning_rate": next(iter(plan["optims"].values()))["learning_rate"]}
    names = list(optims or plan["optims"])
    print(f"{len(names)} trainings of {shared['max_steps']} steps: {', '.join(names)}", flush=True)
    outcomes = [_run(name, {**shared, **plan["optims"].get(name, fallback)}, folder / name) for name in names]
    write_json(folder / "demo.json", summary(outcomes, shared))
    draw(outcomes, folder / "demo.png")
    print_table(outcomes)
    print(f"\nCurves: {folder / 'demo.png'}   numbers: {folder / 'demo.json'}")
    if quick:
        print("All of it works here. So few steps do not tell which optimizer is better: leave --quick out for that.")
    return outcomes


def _run(name: str, settings: Settings, folder: Path) -> Outcome:
    """One entry: `optim` is its name unless it says another, `rates` are factors on the learning rate by kind."""
    optim, rates = settings.pop("optim", name), settings.pop("rates", {})
    outcome = run_one(optim, settings, folder, optimizer_of({"optim": optim, "rates": rates}) if rates else None)
    return replace(outcome, optim=name, settings={**outcome.settings, **({"rates": rates} if rates else {})})


def summary(outcomes: Sequence[Outcome], common: Settings) -> Settings:
    """Everything about the runs as JSON: what was run, where, and what came out."""
    reference = outcomes[0].final_loss
    return {
        "reference": outcomes[0].optim,
        "common": common,
        "machine": machine(),
        "peak_memory_bytes": peak_memory_bytes(),
        "runs": {
            o.optim: {**asdict(o), "final_loss": o.final_loss, "steps_to_reference_loss": o.steps_to(reference)}
            for o in outcomes
        },
    }


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Compare the runs: one column each, fit for a terminal of 80 characters."""
    from rich.console import Console
    from rich.table import Table

    last = outcomes[0].validation[-1][0]
    title = f"LLaMA of {outcomes[0].parameters / 1e6:.2f} M parameters, {last} steps from the same weights"
    table = Table("", *(o.label for o in outcomes), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in _comparison(outcomes).items():
        table.add_row(name, *values)
    Console().print(table)


def _comparison(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """Rows of the table; at each step the lowest loss is bold."""
    reference, last = outcomes[0], outcomes[0].validation[-1][0]
    rows = {"learning rate": [f"{float(o.settings['learning_rate']):g}" for o in outcomes]}
    for share in (0.25, 0.5, 0.75, 1.0):
        losses = [o.loss_at(share * last) for o in outcomes]
        rows[f"validation loss, step {share * last:.0f}"] = [
            f"[bold]{loss:.4f}[/]" if loss == min(losses) else f"{loss:.4f}" for loss in losses
        ]
    reached = [o.steps_to(reference.final_loss) for o in outcomes]
    return {
        **rows,
        f"steps to {reference.label}'s final loss": ["never" if n is None else f"{n:.0f}" for n in reached],
        "optimizer state, bytes a parameter": [f"{o.bytes_per_parameter:.2f}" for o in outcomes],
        "a training step, ms": [f"{o.step_ms:.0f}" for o in outcomes],
        "of it the optimizer, ms": [f"{o.optimizer_step_ms:.1f}" for o in outcomes],
        "the whole run, s": [f"{o.seconds:.0f}" for o in outcomes],
    }


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Validation loss against steps and against training time, as a PNG.

    Args:
        outcomes: the runs; the first is the reference.
        path: the file, replaced at once.
    """
    with picture(path, (11, 4.6), (1, 2), dpi=160, sharey=True) as (figure, axes):
        by_step, by_time = axes[0]
        for i, o in enumerate(outcomes):
            _draw_run(by_step, by_time, o, style(i))
        _mark_reached(by_step, outcomes)
        by_step.set(xlabel="step", ylabel="validation loss, nats a token", ylim=_loss_range(outcomes))
        by_time.set(xlabel="training time, s (evaluation left out)")
        by_step.legend(frameon=False, loc="upper right")
        figure.suptitle("The same small LLaMA, weights and batches; only the optimizer differs", fontsize=12)


def _draw_run(by_step: Any, by_time: Any, o: Outcome, look: Mapping[str, Any]) -> None:
    elapsed = [0.0, *itertools.accumulate(o.step_seconds)]
    steps, losses = zip(*o.validation, strict=True)
    look = {**look, "linewidth": 2, "markersize": 4.5}
    label = f"{o.label}: {o.final_loss:.3f}, {o.bytes_per_parameter:.2f} bytes/param"
    by_step.plot(steps, losses, label=label, **look)
    by_time.plot([elapsed[step] for step in steps], losses, **look)


def _mark_reached(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """Where the best of the others passes the reference's final loss."""
    reference = outcomes[0]
    axes.axhline(reference.final_loss, color=style(0)["color"], linewidth=1, linestyle=(0, (4, 3)))
    reached = [(step, i) for i, o in enumerate(outcomes[1:], 1) if (step := o.steps_to(reference.final_loss))]
    if reached and min(reached)[0] < reference.validation[-1][0]:
        step, index = min(reached)
        axes.annotate(
            f"{reference.label}'s final loss\nat step {step:.0f}", (step, reference.final_loss),
            xytext=(0, 75), textcoords="offset points", ha="center", color=style(index)["color"],
            arrowprops={"arrowstyle": "->", "color": style(index)["color"]},
        )  # fmt: skip


def _loss_range(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Leave out the fall of the first tenth of the steps, where all curves are the same steep line."""
    lowest = min(loss for o in outcomes for _, loss in o.validation)
    highest = max(o.loss_at(0.1 * o.validation[-1][0]) for o in outcomes)
    margin = 0.05 * max(highest - lowest, 1e-3)
    return lowest - margin, highest + margin
