"""--resume_from_checkpoint goes on bit for bit, also where state is easily lost."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_shampoo4.exceptions import CheckpointError
from tests.support.tiny import Tokens, arguments, llama

OPTIONS = "algorithm=shampoo,stats_every=2,roots_every=3,stochastic_rounding=true"


def model(dtype: torch.dtype) -> nn.Module:
    """With a frozen layer, and a matrix and a vector that never get a gradient."""
    made = llama()
    made.model.unused = nn.Linear(64, 64)
    made.model.layers[0].mlp.requires_grad_(False)
    return made.to(dtype)


def run(args, dtype: torch.dtype, resume: bool = False) -> Trainer:
    trainer = Trainer(model(dtype), args, train_dataset=Tokens(count=32))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(
    ("dtype", "optim", "options"),
    [
        (torch.bfloat16, "shampoo4bit", OPTIONS),
        (torch.bfloat16, "adamw4bit", "stochastic_rounding=true"),
        (torch.float32, "shampoo4bit", "algorithm=shampoo,stats_every=2,roots_every=3,moments=fp32,block_size=48"),
        (torch.bfloat16, "soap4bit", "stats_every=2,refresh_warmup=3,stochastic_rounding=true"),
        (torch.float32, "kl_shampoo4bit", "stats_every=2,refresh_warmup=3"),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, dtype, optim, options):
    changes = {
        "optim": optim, "optim_args": options, "max_steps": 8, "save_strategy": "steps", "save_steps": 5,
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "weight_decay": 0.1,
        "lr_scheduler_type": "cosine", "warmup_steps": 2,
    }  # fmt: skip
    unbroken = run(arguments(tmp_path / "unbroken", **changes), dtype)
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    resumed = run(arguments(tmp_path / "resumed", **changes), dtype, resume=True)

    assert losses(resumed) == losses(unbroken)
    assert len(losses(resumed)) == 8
    assert same(dict(resumed.model.state_dict()), dict(unbroken.model.state_dict()))
    assert same(resumed.optimizer.state_dict(), unbroken.optimizer.state_dict())
    assert resumed.model.model.unused.weight.dtype == dtype


class Frozen(TrainerCallback):
    """Freezes a layer when the checkpoint is loaded."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.model.layers[1].mlp.requires_grad_(False)


def test_a_layer_that_is_unfrozen_or_frozen_before_resuming_is_named_with_what_to_do(tmp_path):
    def trained(layers: int, resume: bool = False, **options) -> Trainer:
        made = llama()
        for layer in made.model.layers[:layers]:
            layer.mlp.requires_grad_(False)
        args = arguments(tmp_path, max_steps=4 if resume else 2, save_strategy="steps", save_steps=2)
        trainer = Trainer(made, args, train_dataset=Tokens(count=32), **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trained(1)
    one = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(
        CheckpointError, match=f"only here are 3 .'{one}', .*If they were frozen then, freeze them when"
    ):
        trained(0, resume=True)
    other = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(CheckpointError, match=f"only there are 3 .'{other}', .*If they are frozen now, let them req"):
        trained(2, resume=True)
    weight = trained(1, resume=True, callbacks=[Frozen()]).model.model.layers[1].mlp.up_proj.weight
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(weight, saved["model.layers.1.mlp.up_proj.weight"]), "as the message says"


def test_a_checkpoint_of_another_geometry_is_refused(tmp_path):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run(arguments(tmp_path, **changes), torch.float32)
    with pytest.raises(ValueError, match="block_size"):
        run(arguments(tmp_path, **changes, optim_args="algorithm=shampoo,block_size=32"), torch.float32, resume=True)
