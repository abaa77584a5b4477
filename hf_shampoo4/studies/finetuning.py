"""Fine-tuning side by side: a model, pretrained once, is taught a task in one way by every optimizer at its best rate.

The grids are in `configs/finetuning.yaml`, one for every task and way (all parameters, LoRA of a rank), and
`race.carry_out` runs them.  A run is `training.finetune.run`, the path of `hf-shampoo4 finetune`; after it the loss on
what the model was pretrained on tells what it has forgotten.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_shampoo4.studies import finetuning_data
from hf_shampoo4.studies.code_version import versions
from hf_shampoo4.studies.finetuning_data import write_task
from hf_shampoo4.studies.grid import RATE, Contestant, Grid, Point, Settings, read_plan
from hf_shampoo4.studies.measured_run import LabelledProgress, StepTimer, outcome_of, run_one
from hf_shampoo4.studies.peers import code_of as optimizer_code
from hf_shampoo4.studies.peers import optimizer_of, train_settings
from hf_shampoo4.studies.race import Study, told
from hf_shampoo4.studies.runner import Runs
from hf_shampoo4.training import finetune, pretrain
from hf_shampoo4.training.config import config_root, read_config
from hf_shampoo4.training.data import collate, load_text

OURS = ("pretraining", "task", "examples")
"""Settings of a run that `hf-shampoo4 finetune` does not have."""
STRIDE = 2  # of a sweep, in factors of sqrt(2)


def read_grids(size: str = "", quick: bool = False) -> list[Grid]:
    """The grids of `configs/finetuning.yaml`, named TASK_WAY; all tasks of the first way come first.

    Args:
        size: of the model, one of `sizes` there; default: the first.
        quick: a few steps of a smaller model, one seed.
    """
    plan, demo = read_config(config_root() / "finetuning.yaml"), read_plan()
    sized = plan["sizes"][size or next(iter(plan["sizes"]))]
    small = plan["quick"] if quick else {"pretraining": {}, "common": {}}
    common = {
        **plan["common"],
        **small["common"],
        "pretraining": {**demo["common"], **plan["pretraining"], **sized, **small["pretraining"]},
    }
    grids = []
    for way in small.get("ways", plan["ways"]):
        for task, given in plan["tasks"].items():
            own = {"task": task, "examples": small.get("examples", given["examples"])}
            settings = {**common, **own, **given["settings"], **plan["ways"][way]["settings"]}
            grids.append(
                Grid(
                    name=f"{task}_{way}",
                    title=f"{given['title']}, {plan['ways'][way]['title']}",
                    baseline=next(iter(plan["contestants"])),
                    target=None,
                    seeds=tuple(plan["seeds"][: 1 if quick else None]),
                    common=settings,
                    contestants=tuple(
                        _contestant(name, entry, way, settings) for name, entry in plan["contestants"].items()
                    ),
                )
            )
    return grids


def _contestant(name: str, given: Mapping[str, Any], way: str, settings: Settings) -> Contestant:
    own = {key: value for key, value in given.items() if key not in ("label", RATE)}
    points = (Point(float(given[RATE][way])),)
    return Contestant(name, given["label"], points, (RATE,), {**settings, **own}, stride=STRIDE)


@dataclass(frozen=True)
class Base:
    """A pretrained model."""

    folder: Path
    """With its weights and tokenizer."""
    run: Settings
    """Its `parameters`, `validation` (step and loss) and `seconds`."""


def base_model(settings: Settings, folder: Path) -> Base:
    """Pretrain a model, or take the one that is there.

    Args:
        settings: of `hf-shampoo4 train`, and `rates`.
        folder: of the study; the model and its run are kept in `pretraining` there, under one name.
    """
    runs, code = Runs(folder / "pretraining"), optimizer_code(settings)
    model = runs.path(settings, code).with_suffix("")

    def make() -> Settings:
        runs.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=runs.folder) as scratch:
            shown = {**train_settings(settings), "label": "pretraining"}
            outcome = run_one(shown.pop("optim"), shown, Path(scratch) / "model", optimizer_of(settings))
            os.replace(Path(scratch) / "model", model)
        return {"parameters": outcome.parameters, "validation": outcome.validation, "seconds": outcome.seconds}

    return Base(model, runs.once(settings, code, make))


def study(folder: Path) -> Study:
    """How the runs of the grids are made, in the folder of the study."""
    return Study(lambda label, settings, _: train(label, settings, folder), code_of)


def code_of(settings: Settings) -> dict[str, str]:
    """The versions of what makes a run; the model that it starts from is told by its settings."""
    return {**optimizer_code(settings), **versions(["peft", "trl"], finetuning_data)}


def train(label: str, settings: Settings, folder: Path) -> Settings:
    """Fine-tune once; what came out, as `race.told`, and `base_loss`: the validation loss of the pretraining, now."""
    base = base_model(settings["pretraining"], folder)
    examples = write_task(settings["task"], folder / "examples", *settings["examples"])
    given = {key: value for key, value in train_settings(settings).items() if key not in OURS}
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"model_name_or_path": str(base.folder), "dataset": str(examples.train),
                 "validation_dataset": str(examples.held_out), "output_dir": scratch}  # fmt: skip
        config = finetune.parse({**given, **paths})
        progress = LabelledProgress(f"{label}, seed {settings['seed']}")
        result = finetune.run(config, [timer], progress, optimizer_of(settings))
        outcome = outcome_of(result, timer, label, given)
        loss = loss_on_pretraining(result.trainer.model, settings["pretraining"])
    return {**told(outcome), "base_loss": loss}


def loss_on_pretraining(model: nn.Module, pretraining: Settings) -> float:
    """Mean loss a token, in nats, on the validation sequences of a pretraining."""
    batch = pretraining["per_device_eval_batch_size"]
    rows = _held_out(json.dumps(pretraining))
    model.eval()
    losses = []
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            losses += [float(model(**collate(some)).loss)] * len(some)
    return round(sum(losses) / len(losses), 5)


@functools.cache
def _held_out(pretraining: str) -> list[dict[str, Any]]:
    """The validation sequences; settings as JSON."""
    settings = train_settings(json.loads(pretraining))
    return list(load_text(pretrain.parse({**settings, "output_dir": "unused"}).data).validation)
