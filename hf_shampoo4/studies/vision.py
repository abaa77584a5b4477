"""Image classification: a small ResNet and a small ViT of transformers, by AdamW, SGD and Shampoo over either.

`python scripts/train_vision.py` trains every model of `configs/vision.yaml` with every optimizer there, on the Hugging
Face Trainer, with every learning rate and seed, and compares them at each one's best rate.
The images are scikit-learn's digits: 1,797 handwritten ones of 8 x 8 pixels, which come inside the package.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.integrations.trainer import OPTIMS
from hf_shampoo4.studies.code_version import versions
from hf_shampoo4.studies.machine import machine
from hf_shampoo4.studies.race_report import write_markdown
from hf_shampoo4.studies.runner import Runs, Settings
from hf_shampoo4.studies.vision_run import SPLIT, train
from hf_shampoo4.training.config import config_root, read_config
from hf_shampoo4.utils.files import write_json
from hf_shampoo4.utils.plots import picture, style

COLUMNS = (
    "model", "base", "optimizer", "learning rate", "seeds", "train loss", "test loss", "test accuracy, %",
    "bytes a parameter",
)  # fmt: skip
# ---------------------------------------------------------------------------------------------------- all runs


@dataclass(frozen=True)
class Contestant:
    """A model with an optimizer: a line of the table."""

    model: str
    build: Settings
    """Of the model, and the size of its images."""
    base: str
    optimizer: str
    settings: Settings
    """`TrainingArguments` but learning rate and seed."""
    rates: Sequence[float]
    """Learning rates to try."""
    seeds: Sequence[int]
    """Of weights and order."""


def read_plan(quick: bool = False) -> Settings:
    """`configs/vision.yaml`; if `quick`, with one learning rate, one seed and ten steps."""
    plan = read_config(config_root() / "vision.yaml")
    for given in plan["models"].values() if quick else ():
        given["training"] = plan["quick"]
        given["seeds"] = given["seeds"][:1]
        given["learning_rates"] = {base: rates[:1] for base, rates in given["learning_rates"].items()}
    return plan


def contestants_of(plan: Mapping[str, Any], models: Sequence[str]) -> list[Contestant]:
    """Every optimizer of the plan on each of these models.

    Raises:
        ConfigError: a model that the plan does not have.
    """
    for model in models:
        if model not in plan["models"]:
            raise ConfigError(f"the plan has no model {model!r}; it has: {', '.join(plan['models'])}")
    found = []
    for model in models:
        given = plan["models"][model]
        for base, optimizers in plan["bases"].items():
            rates = given["learning_rates"][base]
            for optimizer, own in optimizers.items():
                settings = {**plan["training"], **given["training"], **own}
                if "optim_args" in own:
                    settings["optim_args"] = own["optim_args"].format(every=given["every"])
                found.append(Contestant(model, given["build"], base, optimizer, settings, rates, given["seeds"]))
    return found


def compete(contestant: Contestant, runs: Runs) -> list[Settings]:
    """Its runs, one a seed, at the learning rate with the lowest final validation loss in the mean over seeds."""
    sweep = [[run_once(contestant, rate, seed, runs) for seed in contestant.seeds] for rate in contestant.rates]
    return min(sweep, key=_mean_validation_loss)


def summary(contestants: Sequence[Contestant], runs: Runs) -> Settings:
    """Every run of the contestants, at all learning rates; those that are finished are not made again."""
    return {
        "machine": machine(),
        "split": SPLIT,
        "contestants": [
            {**asdict(c), "runs": [run_once(c, rate, seed, runs) for rate in c.rates for seed in c.seeds]}
            for c in contestants
        ],
    }


def _mean_validation_loss(runs: Sequence[Mapping[str, Any]]) -> float:
    loss = statistics.mean(run["validation_loss"] for run in runs)
    return loss if math.isfinite(loss) else math.inf


def run_once(contestant: Contestant, rate: float, seed: int, runs: Runs) -> Settings:
    """The run from the disk, if this code has made it; else train, and keep it at once."""
    settings = {**contestant.settings, "learning_rate": rate, "seed": seed}
    code = versions(["scikit-learn", *(["hf_shampoo4"] if settings.get("optim") in OPTIMS else [])])
    told = {"model": contestant.model, "build": contestant.build, **settings}
    return runs.once(told, code, lambda: _told(contestant, train(contestant.build, settings), rate, seed))


def _told(contestant: Contestant, run: Settings, rate: float, seed: int) -> Settings:
    """The run, once it is printed."""
    print(
        f"{contestant.model:6} {contestant.base:17} {contestant.optimizer:26} lr {rate:<6g} seed {seed}: "
        f"train {run['train_loss']:.4f}  validation {run['validation_loss']:.4f}  test {run['test_loss']:.4f}  "
        f"{100 * run['test_accuracy']:.1f}%  {run['bytes_per_parameter']:.2f} B/param  {run['seconds']} s",
        flush=True,
    )
    return run


# ---------------------------------------------------------------------------------------------------- the report


Result = tuple[Contestant, list[Settings]]
"""A contestant and its runs at its best learning rate, one a seed."""


def markdown(results: Sequence[Result]) -> str:
    """The table."""
    lines = [
        "# Images: ResNet and ViT, over AdamW and over SGD with momentum",
        "",
        "`python scripts/train_vision.py` (settings: `configs/vision.yaml`; every run: `vision.json`).",
        "",
        f"Scikit-learn's digits: {SPLIT['train']:,} images to train on, {SPLIT['validation']} to choose the learning "
        f"rate by their mean loss over seeds (in brackets: the rates tried), {SPLIT['test']} to test. After the last "
        "epoch; mean ± standard deviation over seeds of weights and order, the same for all optimizers.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
        *(_line(contestant, runs) for contestant, runs in results),
        "",
        "![Test loss by epoch](vision.png)",
        "",
    ]
    return "\n".join(lines)


def _line(contestant: Contestant, runs: Sequence[Mapping[str, Any]]) -> str:
    cells = (
        contestant.model, contestant.base, contestant.optimizer,
        f"{runs[0]['settings']['learning_rate']:g} ({', '.join(f'{rate:g}' for rate in contestant.rates)})",
        str(len(runs)),
        _spread([run["train_loss"] for run in runs], 4),
        _spread([run["test_loss"] for run in runs], 4),
        _spread([100 * run["test_accuracy"] for run in runs], 1),
        f"{runs[0]['bytes_per_parameter']:.2f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float], places: int) -> str:
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{spread}"


def draw(results: Sequence[Result], path: Path) -> None:
    """Test loss by epoch as a PNG: a row a model, a column a base; lines are means, bars the range over seeds."""
    from matplotlib.ticker import MaxNLocator

    models, bases = (list(dict.fromkeys(getattr(c, name) for c, _ in results)) for name in ("model", "base"))
    size = (5.5 * len(bases), 3.9 * len(models))
    with picture(path, size, (len(models), len(bases)), font=10, dpi=140, sharey="row") as (_, panels):
        for contestant, runs in results:
            axes = panels[models.index(contestant.model)][bases.index(contestant.base)]
            _draw_curves(axes, contestant.optimizer, [run["test_loss_by_epoch"] for run in runs])
            axes.set(title=f"{contestant.model}, {contestant.base}", xlabel="epoch", yscale="log")
            axes.set_ylabel("test loss, nats an image")
        for axes in panels.flat:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(frameon=False, fontsize=8)


def _draw_curves(axes: Any, label: str, curves: Sequence[Sequence[float]]) -> None:
    by_epoch = list(zip(*curves, strict=True))
    epochs = range(1, len(by_epoch) + 1)
    means, look = [statistics.mean(losses) for losses in by_epoch], style(len(axes.containers))
    spread = ([mean - min(row) for mean, row in zip(means, by_epoch, strict=True)],
              [max(row) - mean for mean, row in zip(means, by_epoch, strict=True)])  # fmt: skip
    shift = 0.04 * (len(axes.containers) - 1.5)  # bars beside each other, not over each other
    at = [epoch + shift for epoch in epochs]
    axes.errorbar(at, means, yerr=spread, linewidth=1.8, elinewidth=1, label=f"{label}: {means[-1]:.3f}", **look)


# ---------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str]) -> None:
    """`train_vision.py [--models resnet,vit] [--output_dir DIR] [--quick]`."""
    parser = argparse.ArgumentParser(prog="train_vision.py", description=__doc__)
    parser.add_argument("--models", default="resnet,vit", help="of configs/vision.yaml; default: %(default)s")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/vision"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="ten steps with each optimizer: does it work here?")
    chosen = parser.parse_args(arguments)
    plan, folder = read_plan(chosen.quick), chosen.output_dir
    contestants = contestants_of(plan, chosen.models.split(","))
    runs = Runs(folder / "runs")
    results = [(contestant, compete(contestant, runs)) for contestant in contestants]
    write_json(folder / "vision.json", summary(contestants, runs))
    write_markdown(folder / "vision.md", markdown(results))
    draw(results, folder / "vision.png")
    print((folder / "vision.md").read_text(encoding="utf-8"))
