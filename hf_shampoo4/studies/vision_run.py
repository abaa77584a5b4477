"""Small image models on scikit-learn's digits, and one training of one of them.

The images are 1,797 handwritten digits of 8 x 8 pixels, which come inside the package.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.integrations.trainer import register
from hf_shampoo4.studies.machine import state_bytes
from hf_shampoo4.studies.runner import Settings

SPLIT = {"train": 1000, "validation": 297, "test": 500}
DIGIT_SIDE = 8


# ---------------------------------------------------------------------------------------------------- data and model


@dataclass(frozen=True)
class Images(Dataset):
    """Images and their classes."""

    pixels: Tensor
    """float32 (images, 1, side, side), of mean 0 and variance 1 over the training images."""
    labels: Tensor
    """int64 (images,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def digits(side: int = DIGIT_SIDE) -> dict[str, Images]:
    """Scikit-learn's digits, drawn apart by a fixed seed into the parts of `SPLIT`.

    Args:
        side: pixels of a side; other than 8, the images are interpolated.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the images come with scikit-learn, which is not installed: "
                          "pip install scikit-learn, or 'hf-shampoo4[vision]'") from error  # fmt: skip
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(found.images, dtype=torch.float32)[order, None]
    labels = torch.tensor(found.target, dtype=torch.int64)[order]
    if side != DIGIT_SIDE:
        pixels = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
    train = pixels[: SPLIT["train"]]
    pixels = (pixels - train.mean()) / train.std()
    sizes = list(SPLIT.values())
    parts = zip(SPLIT, pixels.split(sizes), labels.split(sizes), strict=True)
    return {name: Images(images, classes) for name, images, classes in parts}


def build_model(build: Mapping[str, Any]) -> PreTrainedModel:
    """A model of the plan with random weights, in the memory format that it asks for."""
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(num_labels=10, **build["config"]))
    return model.to(memory_format=torch.channels_last if build["channels_last"] else torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------- one run


def make_trainer(build: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> Trainer:
    """A Trainer that is ready to run; equal seeds give equal weights and order of the images.

    Args:
        build: a model of the plan, with the size of its images.
        settings: `TrainingArguments`.
        folder: the Trainer's.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    register()
    images = digits(build["image_size"])
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        **settings,
    )
    set_seed(arguments.seed)
    return Trainer(
        build_model(build),
        arguments,
        train_dataset=images["train"],
        eval_dataset={name: images[name] for name in ("validation", "test")},
        compute_metrics=_accuracy,
    )


def _accuracy(predictions: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def train(build: Mapping[str, Any], settings: Mapping[str, Any]) -> Settings:
    """Train once; what the Trainer prints goes to stderr.

    Args:
        build: a model of the plan, with the size of its images.
        settings: `TrainingArguments`, with a `seed`.

    Returns:
        Losses and accuracies after the last epoch, the test loss after each, and the optimizer's bytes a parameter.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trainer = make_trainer(build, settings, Path(folder))
        seconds = trainer.train().metrics["train_runtime"]
    parameters = sum(p.numel() for p in trainer.model.parameters())
    curves = {
        name: [round(entry[key], 5) for entry in trainer.state.log_history if key in entry]
        for name, key in (
            ("train_loss", "loss"),
            ("validation_loss", "eval_validation_loss"),
            ("test_loss", "eval_test_loss"),
            ("test_accuracy", "eval_test_accuracy"),
        )
    }
    return {
        **{name: curve[-1] for name, curve in curves.items()},
        "test_loss_by_epoch": curves["test_loss"],
        "parameters": parameters,
        "bytes_per_parameter": round(state_bytes(trainer.optimizer) / parameters, 3),
        "seconds": round(seconds, 1),
    }
