"""`hf-shampoo4 demo`: one small LLaMA, pretrained with each optimizer from the same weights on the same batches.

Prints a table and writes `demo.json` and `demo.png`.  The settings are in `configs/demo.yaml`; every run is
`train.run`, the path that `hf-shampoo4 train` takes.  `--sweep` runs a grid of settings and keeps each result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.training.config import config_root, read_config
from hf_shampoo4.training.pretrain import parse, run
from hf_shampoo4.utils.files import write_figure, write_json

Settings = dict[str, Any]


# ---------------------------------------------------------------------------------------------------- one run


class StepTimer(TrainerCallback):
    """Seconds of every training step and, of it, of the optimizer; evaluation is outside."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.optimizer_steps: list[float] = []
        self._began = self._optimizer_began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """A step begins."""
        self._began = _now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Gradients are ready and clipped."""
        self._optimizer_began = _now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        self.optimizer_steps.append(_now() - self._optimizer_began)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The step is over."""
        self.steps.append(_now() - self._began)


def _now() -> float:
    """Seconds; on a CPU processor time over the threads, so that nothing else the machine does counts."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def _mean_ms(seconds: Sequence[float]) -> float:
    """Mean without the first step, which allocates."""
    counted = seconds[1:] or seconds
    return round(1e3 * sum(counted) / len(counted), 2)


class LabelledProgress(ProgressCallback):
    """The Trainer's progress bar with the run's name and its latest losses instead of lines of logs."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar for an evaluation of a second."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show losses on the bar."""
        names = {"loss": "train", "eval_loss": "validation"}
        self.shown |= {names[key]: f"{value:.3f}" for key, value in (logs or {}).items() if key in names}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


@dataclass
class Outcome:
    """What is kept of a run: enough to draw it and to compare it."""

    optim: str
    label: str
    settings: Settings
    parameters: int
    bytes_per_parameter: float
    step_ms: float
    optimizer_step_ms: float
    seconds: float
    """The whole run, with evaluation and preparation."""
    validation: list[tuple[int, float]]
    """(step, loss) of every evaluation."""
    training: list[tuple[int, float]]
    """(step, loss since the one before)."""
    step_seconds: list[float] = field(repr=False)
    """Training time of each step."""

    @property
    def final_loss(self) -> float:
        """Validation loss after the last step."""
        return self.validation[-1][1]

    def loss_at(self, step: float) -> float:
        """Validation loss at a step, on a line between two evaluations."""
        for (a, loss_a), (b, loss_b) in itertools.pairwise(self.validation):
            if a <= step <= b:
                return loss_a + (loss_b - loss_a) * (step - a) / (b - a)
        return self.final_loss

    def steps_to(self, loss: float) -> float | None:
        """The first step with at most this validation loss, on a line between two evaluations; None: never."""
        return steps_to(self.validation, loss)


def steps_to(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Where a curve of (step, loss) first comes down to `loss`, on a line between two points; None: never."""
    for (a, loss_a), (b, loss_b) in itertools.pairwise(curve):
        if loss_b <= loss:
            return a + (b - a) * (loss_a - loss) / (loss_a - loss_b)
    return None


def run_one(optim: str, settings: Mapping[str, Any], folder: Path, optimizer: Any = None) -> Outcome:
    """Train with one optimizer.

    Args:
        optim: a name for `--optim`.
        settings: settings of `hf-shampoo4 train`, and a `label`.
        folder: where the model and its metrics go.
        optimizer: as in `train.run`.

    Returns:
        Curves, times and bytes.

    Raises:
        ConfigError: a setting that does not exist or cannot be.
    """
    settings = {**settings, "optim": optim}
    label = settings.pop("label", optim)
    timer, began = StepTimer(), time.perf_counter()
    result = run(parse({**settings, "output_dir": str(folder)}), [timer], LabelledProgress(label), optimizer)
    parameters = sum(p.numel() for p in result.trainer.model.parameters())
    return Outcome(
        optim=optim,
        label=label,
        settings=settings,
        parameters=parameters,
        bytes_per_parameter=round(state_bytes(result.trainer.optimizer) / parameters, 4),
        step_ms=_mean_ms(timer.steps),
        optimizer_step_ms=_mean_ms(timer.optimizer_steps),
        seconds=round(time.perf_counter() - began, 1),
        validation=_curve(result.trainer.state.log_history, "eval_loss"),
        training=_curve(result.trainer.state.log_history, "loss"),
        step_seconds=[round(seconds, 4) for seconds in timer.steps],
    )


def _curve(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) by step; the evaluation after training repeats the last one."""
    return sorted({entry["step"]: round(entry[key], 5) for entry in history if key in entry}.items())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of an optimizer's state, also of those in lists, where SOAP has its factors."""
    return sum(_nbytes(value) for entry in optimizer.state.values() for value in tree_leaves(dict(entry)))


def _nbytes(value: Any) -> int:
    """Bytes of what a tensor is made of: torchao's states are subclasses that look like float32."""
    if not isinstance(value, torch.Tensor):
        return 0
    if is_traceable_wrapper_subclass(value):
        inner, _ = value.__tensor_flatten__()
        return sum(_nbytes(getattr(value, name)) for name in inner)
    return value.numel() * value.element_size()


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------------------------------------------- the demo


def demo(
    folder: Path, optims: Sequence[str] = (), common: Mapping[str, Any] | None = None, quick: bool = False
) -> list[Outcome]:
    """Run every optimizer, print the table, write `demo.json` and `demo.png`.

    Args:
        folder: for the two files and a sub-folder for each model.
        optims: names of `--optim`; the first is the reference.  Default: those of `configs/demo.yaml`; one that is
            not there gets the learning rate of its first.
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
    outcomes = [
        run_one(optim, {**shared, **plan["optims"].get(optim, fallback)}, folder / optim)
        for optim in optims or plan["optims"]
    ]
    write_json(folder / "demo.json", summary(outcomes, shared))
    draw(outcomes, folder / "demo.png")
    print_table(outcomes)
    print(f"\nCurves: {folder / 'demo.png'}   numbers: {folder / 'demo.json'}")
    return outcomes


def read_plan() -> Settings:
    """`configs/demo.yaml`."""
    return read_config(config_root() / "demo.yaml")


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


def machine() -> Settings:
    """What the figures of this process were measured on."""
    return {
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
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


COLOURS = ("#6b7280", "#d9480f", "#1971c2", "#2f9e44", "#862e9c")


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Validation loss against steps and against training time, as a PNG.

    Args:
        outcomes: the runs; the first is the reference.
        path: the file, replaced at once.
    """
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.6), dpi=160, layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for o, colour in zip(outcomes, itertools.cycle(COLOURS)):
            _draw_run(by_step, by_time, o, colour)
        _mark_reached(by_step, outcomes)
        by_step.set(xlabel="step", ylabel="validation loss", ylim=_loss_range(outcomes))
        by_time.set(xlabel="training time, s (evaluation left out)")
        for axes in (by_step, by_time):
            axes.grid(color="#e5e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
        by_step.legend(frameon=False, loc="upper right")
        figure.suptitle("The same small LLaMA, weights and batches; only the optimizer differs", fontsize=12)
        write_figure(path, figure)


def _draw_run(by_step: Any, by_time: Any, o: Outcome, colour: str) -> None:
    elapsed = [0.0, *itertools.accumulate(o.step_seconds)]
    steps, losses = zip(*o.validation, strict=True)
    style = {"color": colour, "linewidth": 2, "marker": "o", "markersize": 3.5}
    label = f"{o.label}: {o.final_loss:.3f}, {o.bytes_per_parameter:.2f} bytes/param"
    by_step.plot(steps, losses, label=label, **style)
    by_time.plot([elapsed[step] for step in steps], losses, **style)


def _mark_reached(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """Where the best of the others passes the reference's final loss."""
    reference = outcomes[0]
    axes.axhline(reference.final_loss, color=COLOURS[0], linewidth=1, linestyle=(0, (4, 3)))
    reached = [(step, i) for i, o in enumerate(outcomes[1:], 1) if (step := o.steps_to(reference.final_loss))]
    if reached and min(reached)[0] < reference.validation[-1][0]:
        step, index = min(reached)
        axes.annotate(
            f"{reference.label}'s final loss\nat step {step:.0f}", (step, reference.final_loss),
            xytext=(0, 75), textcoords="offset points", ha="center", color=COLOURS[index % len(COLOURS)],
            arrowprops={"arrowstyle": "->", "color": COLOURS[index % len(COLOURS)]},
        )  # fmt: skip


def _loss_range(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Leave out the fall of the first tenth of the steps, where all curves are the same steep line."""
    lowest = min(loss for o in outcomes for _, loss in o.validation)
    highest = max(o.loss_at(0.1 * o.validation[-1][0]) for o in outcomes)
    margin = 0.05 * max(highest - lowest, 1e-3)
    return lowest - margin, highest + margin


# ---------------------------------------------------------------------------------------------------- the sweep


def sweep(path: Path, grid: Mapping[str, Any], common: Mapping[str, Any], optims: Sequence[str] = ()) -> list[Settings]:
    """Run a grid of settings with the demo's model and data; finished runs are kept in `path` and not run again.

    Args:
        path: the JSON file with the results.
        grid: optimizer -> setting -> list of values.
        common: settings of every run.
        optims: only these optimizers of the grid.

    Returns:
        All results in the file.

    Raises:
        ConfigError: a setting that does not exist or cannot be.
    """
    finished: list[Settings] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    for optim, settings in _combinations(grid, optims):
        settings = {**common, **settings}
        if any(r["settings"] == {**settings, "optim": optim} for r in finished):
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_one(optim, {**settings, "label": f"{optim} {grid_point(settings, common)}"}, Path(folder))
        kept = {key: value for key, value in asdict(outcome).items() if key not in ("training", "step_seconds")}
        finished.append({**kept, "final_loss": outcome.final_loss})
        write_json(path, {"runs": finished})
        print(f"{optim} {grid_point(settings, common)}: {outcome.final_loss:.4f}", flush=True)
    return finished


def _combinations(grid: Mapping[str, Any], optims: Sequence[str]) -> Iterator[tuple[str, Settings]]:
    for optim in optims or grid:
        if optim not in grid:
            raise ConfigError(f"the sweep has no optimizer {optim!r}; it has: {', '.join(grid)}")
        names = list(grid[optim])
        for values in itertools.product(*grid[optim].values()):
            yield optim, dict(zip(names, values, strict=True))


def grid_point(settings: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """What a run of the sweep sets beyond the common settings."""
    return " ".join(f"{k}={v}" for k, v in settings.items() if common.get(k) != v and k != "optim")


def print_sweep(results: Sequence[Mapping[str, Any]], common: Mapping[str, Any]) -> None:
    """One line a run, the best first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("optimizer", "settings", "val loss", "bytes/param", "ms a step", "of it optimizer")
    for r in sorted(results, key=lambda r: (r["optim"], r["final_loss"])):
        numbers = (r["bytes_per_parameter"], r["step_ms"], r["optimizer_step_ms"])
        table.add_row(r["optim"], grid_point(r["settings"], common), f"{r['final_loss']:.4f}", *map(str, numbers))
    Console().print(table)


# ---------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 demo`."""
    chosen = _parser().parse_args(arguments)
    common = {"seed": chosen.seed, **({"max_steps": chosen.steps} if chosen.steps else {})}
    optims = chosen.optims.split(",") if chosen.optims else ()
    folder = Path(chosen.output_dir or ("runs/demo_sweep" if chosen.sweep else "runs/demo"))
    if chosen.sweep:
        _sweep(chosen, folder, optims, common)
        return
    if folder.is_dir() and any(folder.iterdir()) and not chosen.overwrite_output_dir:
        raise ConfigError(f"output_dir {str(folder)!r} is not empty: choose another, or --overwrite_output_dir")
    demo(folder, optims, {**common, "overwrite_output_dir": chosen.overwrite_output_dir}, chosen.quick)


def _sweep(chosen: argparse.Namespace, folder: Path, optims: Sequence[str], common: Settings) -> None:
    plan = read_plan()
    grid = plan if chosen.sweep == "demo" else read_config(chosen.sweep)
    if "sweep" not in grid:
        raise ConfigError(f"{chosen.sweep!r} has no key 'sweep': optimizer -> setting -> list of values")
    shared = {**plan["common"], **grid.get("common", {}), **(plan["quick"] if chosen.quick else {}), **common}
    print_sweep(sweep(folder / "demo_sweep.json", grid["sweep"], shared, optims), shared)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 demo", description=__doc__)
    add = parser.add_argument
    add("--output_dir", help="default: runs/demo, runs/demo_sweep with --sweep")
    add("--overwrite_output_dir", action="store_true", help="replace what is in the folder")
    add("--steps", type=int, help="steps of each run")
    add("--optims", help="names of --optim, comma-separated; the first is the reference")
    add("--seed", type=int, default=0, help="of the weights and of the order of the data")
    add("--quick", action="store_true", help="a few steps of a tiny model: does it work here?")
    grid = "run the grid of configs/demo.yaml, or of a file with the same keys, instead; resumable"
    add("--sweep", nargs="?", const="demo", metavar="GRID.yaml", help=grid)
    return parser
