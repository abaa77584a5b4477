"""Images: convolutions through the optimizer, the two models through the Trainer, the sweep and its files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.studies import vision
from hf_shampoo4.studies.runner import Runs
from hf_shampoo4.studies.vision import read_plan
from hf_shampoo4.studies.vision_run import SPLIT, digits, make_trainer
from tests.support.reference import Shampoo32

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------------- convolutions


class Momentum:
    """torch.optim.SGD's formula, in the place of reference.AdamW."""

    def __init__(self, momentum: float, weight_decay: float) -> None:
        self.m, self.momentum, self.weight_decay = 0.0, momentum, weight_decay

    def step(self, x: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
        self.m = self.momentum * self.m + g + self.weight_decay * x
        return x - lr * self.m


def convolutions(channels_last: bool) -> nn.Sequential:
    """A 3 x 3, a 1 x 1, a depthwise and a grouped convolution."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False),
        nn.Conv2d(12, 16, 1, bias=False),
        nn.Conv2d(16, 16, 3, groups=16, bias=False),
        nn.Conv2d(16, 8, 3, groups=4, bias=False),
    )
    return model.to(memory_format=torch.channels_last) if channels_last else model


def matrix(x: torch.Tensor) -> np.ndarray:
    """The matrix view, written out: a row an output channel, a column an input channel and place in the kernel."""
    return np.array([[float(v) for v in row.contiguous().view(-1)] for row in x.detach()])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("base", ["adamw", "sgdm"])
def test_convolutions_follow_the_literal_reference_of_their_matrix(base: str, channels_last: bool) -> None:
    model = convolutions(channels_last)
    weights = list(model.parameters())
    settings: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 0.1, "block_size": 20, "damping": 1e-4}
    optimizer = Shampoo4bit(
        weights,
        algorithm="shampoo",
        lr=0.01,
        base=base,
        factor="direct",
        bits=32,
        moments="fp32",
        stats_every=1,
        roots_every=2,
        **settings,
    )
    start = [matrix(w) for w in weights]
    references = [Shampoo32(x, t1=1, t2=2, **settings) for x in start]
    for reference in references if base == "sgdm" else ():
        reference.base = Momentum(0.9, 0.1)
    expected = list(start)
    for _ in range(8):
        optimizer.zero_grad()
        images = torch.randn(16, 3, 9, 9)
        model(images.to(memory_format=torch.channels_last) if channels_last else images).square().mean().backward()
        gradients = [matrix(w.grad) for w in weights]
        optimizer.step()
        expected = [reference.step(x, g, 0.01) for reference, x, g in zip(references, expected, gradients, strict=True)]
    for w, x, x0 in zip(weights, expected, start, strict=True):
        assert np.abs(matrix(w) - x).max() < 2e-3 * np.abs(x - x0).max()
        assert w.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    depthwise = {key: tuple(tensor.shape) for key, tensor in optimizer.state[weights[2]].items() if "root" in key}
    assert depthwise == {"16x9/left.root.dense": (1, 16, 16), "16x9/right.root.dense": (1, 9, 9)}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("base", ["adamw", "sgdm"])
@pytest.mark.parametrize("factor", ["eigen", "cholesky_ef"])
def test_in_4_bits_a_convolution_and_its_matrix_are_the_same(factor: str, base: str, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shapes = [(64, 16, 3, 3), (80, 70, 1, 1), (72, 1, 8, 9), (64, 8, 3, 3)]
    weights = [nn.Parameter(torch.randn(shape).to(memory_format=layout)) for shape in shapes]
    flat = [nn.Parameter(w.detach().contiguous().flatten(1)) for w in weights]
    options = {"factor": factor, "base": base, "block_size": 72, "stats_every": 1, "roots_every": 1}
    optimizer, twin = (
        Shampoo4bit(parameters, algorithm="shampoo", lr=0.01, **options) for parameters in (weights, flat)
    )
    for _ in range(3):
        for w, matrix in zip(weights, flat, strict=True):
            w.grad = torch.randn_like(w)
            matrix.grad = w.grad.contiguous().flatten(1)
        optimizer.step()
        twin.step()
    for w, matrix in zip(weights, flat, strict=True):
        assert torch.equal(w.contiguous().flatten(1), matrix)
        state, expected = optimizer.state[w], twin.state[matrix]
        assert any(tensor.dtype == torch.uint8 for tensor in state.values())
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


# --------------------------------------------------------------------------------------------------- the images


def test_digits_are_split_and_scaled() -> None:
    parts = digits()
    assert {name: len(part) for name, part in parts.items()} == SPLIT
    assert parts["train"].pixels.shape == (1000, 1, 8, 8)
    assert abs(float(parts["train"].pixels.mean())) < 1e-5
    assert float(parts["train"].pixels.std()) == pytest.approx(1.0, abs=1e-5)
    assert set(parts["test"].labels.tolist()) == set(range(10))
    again = digits(24)
    assert again["test"].pixels.shape == (500, 1, 24, 24)
    assert torch.equal(again["test"].labels, parts["test"].labels)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"scikit-learn, which is not installed: pip install scikit-learn, or"):
        digits()


# -------------------------------------------------------------------------------------------------- the Trainer


@pytest.mark.parametrize("base", ["adamw", "sgdm"])
@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_models_train_through_the_trainer(model: str, base: str, tmp_path: Path) -> None:
    build = read_plan()["models"][model]["build"]
    settings = {
        "optim": "shampoo4bit",
        "optim_args": f"algorithm=shampoo,base={base},block_size=128,stats_every=2,roots_every=2",
        "learning_rate": 4e-3 if base == "adamw" else 5e-2, "lr_scheduler_type": "constant",
        "max_steps": 12, "logging_steps": 1, "per_device_train_batch_size": 100,
    }  # fmt: skip
    trainer = make_trainer(build, settings, tmp_path)
    trainer.train_dataset = Subset(trainer.train_dataset, range(100))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, Shampoo4bit)
    assert optimizer.param_groups[0]["base"] == base
    found = [module for module in trainer.model.modules() if isinstance(module, nn.Conv2d)]
    assert len(found) == {"resnet": 9, "vit": 1}[model]
    for convolution in found:
        weight, layout = convolution.weight, torch.channels_last if model == "resnet" else torch.contiguous_format
        assert weight.is_contiguous(memory_format=layout)
        roots = [tensor for key, tensor in optimizer.state[weight].items() if "left.root" in key]
        assert roots
        assert all(tensor.any() for tensor in roots)
    for module in trainer.model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            assert not any("root" in key for key in optimizer.state[module.weight])


# ------------------------------------------------------------------------------------------- plan, sweep, report


def test_optimizers_of_a_base_differ_in_the_optimizer_alone() -> None:
    plan = read_plan()
    for optimizers in plan["bases"].values():
        shared = [{k: v for k, v in o.items() if k not in ("optim", "optim_args")} for o in optimizers.values()]
        assert all(settings == shared[0] for settings in shared)


def made_up(build: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """A loss that is lowest at a learning rate of .1; above 1 it diverges."""
    rate, seed = settings["learning_rate"], settings["seed"]
    loss = math.nan if rate > 1 else 1.0 + abs(math.log(rate / 0.1)) + 0.01 * seed
    return {
        "train_loss": loss, "validation_loss": loss, "test_loss": loss, "test_accuracy": 0.9,
        "test_loss_by_epoch": [loss + 1, loss], "parameters": 10, "bytes_per_parameter": 4.0, "seconds": 1.0,
    }  # fmt: skip


def test_sweep_chooses_the_rate_and_runs_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(vision, "train", lambda *args: calls.append(args[1]) or made_up(*args))
    contestant = vision.Contestant("vit", {}, "AdamW", "AdamW", {}, [0.01, 2.0, 0.1, 0.3], [3, 4])
    kept = Runs(tmp_path)
    runs = vision.compete(contestant, kept)
    assert [(c["learning_rate"], c["seed"]) for c in calls] == list(itertools.product([0.01, 2.0, 0.1, 0.3], [3, 4]))
    assert [(run["settings"]["learning_rate"], run["settings"]["seed"]) for run in runs] == [(0.1, 3), (0.1, 4)]
    assert vision.compete(contestant, kept) == runs
    assert len(vision.summary([contestant], kept)["contestants"][0]["runs"]) == 8
    assert len(calls) == 8, "finished runs are taken from the disk"
    vision.compete(dataclasses.replace(contestant, build={"image_size": 16}), kept)
    assert len(calls) == 16, "those of another model are not"


def test_report_of_all_contestants_keeps_the_remarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "train", made_up)
    arguments = ["--models", "vit", "--output_dir", str(tmp_path / "out")]
    vision.main(arguments)
    path = tmp_path / "out" / "vision.md"
    rows = [line for line in path.read_text().splitlines() if line.startswith("| vit")]
    assert len(rows) == 8
    assert all("| 3 |" in row and "± 0.0100" in row for row in rows)  # seeds are .01 apart
    path.write_text(path.read_text() + "\nShampoo wins.\n")
    vision.main(arguments)
    assert path.read_text().endswith("\nShampoo wins.\n")
    with Image.open(tmp_path / "out" / "vision.png") as picture:
        assert picture.width > 1000
    assert sorted(file.name for file in path.parent.iterdir()) == ["runs", "vision.json", "vision.md", "vision.png"]


def script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_vision.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "train_vision.py"), run_name="__main__")


def test_the_script_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    script(monkeypatch, "--quick", "--models", "resnet", "--output_dir", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "eval_test_loss" not in shown, "what the Trainer says belongs on stderr"
    assert shown.count("| resnet | AdamW |") == shown.count("| resnet | SGD with momentum |") == 4
    contestants = json.loads((tmp_path / "out" / "vision.json").read_text())["contestants"]
    runs = {(entry["base"], entry["optimizer"]): entry["runs"][0] for entry in contestants}
    sizes = {name: run["bytes_per_parameter"] for name, run in runs.items()}
    assert len(runs) == len(contestants) == 8
    assert sizes["AdamW", "AdamW"] == pytest.approx(8.0, rel=1e-2)
    assert sizes["SGD with momentum", "SGD"] == pytest.approx(4.0, rel=1e-2)
    for base in ("AdamW", "SGD with momentum"):
        assert sizes[base, "Shampoo, 4-bit cholesky_ef"] < sizes[base, "Shampoo, 4-bit eigen"]
        assert sizes[base, "Shampoo, 4-bit eigen"] < 0.4 * sizes[base, "Shampoo, 32-bit"]
    assert all(math.isfinite(run["test_loss"]) and len(run["test_loss_by_epoch"]) == 1 for run in runs.values())


def test_a_model_that_the_plan_lacks_is_an_error_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"^error: the plan has no model 'alexnet'; it has: resnet, vit$"):
        script(monkeypatch, "--models", "resnet,alexnet", "--output_dir", tmp_path)
    assert not list(tmp_path.iterdir())
