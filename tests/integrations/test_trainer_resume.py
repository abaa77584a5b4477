"""--resume_from_checkpoint goes on bit for bit, also where state is easily lost."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from transformers import Trainer

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


def test_a_checkpoint_of_another_geometry_is_refused(tmp_path):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run(arguments(tmp_path, **changes), torch.float32)
    with pytest.raises(ValueError, match="block_size"):
        run(arguments(tmp_path, **changes, optim_args="algorithm=shampoo,block_size=32"), torch.float32, resume=True)
