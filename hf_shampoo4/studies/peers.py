"""Optimizers of other libraries that the Trainer has no name for, as contestants of a race."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.groups import is_of_matrices, param_groups

Chosen = tuple[type, dict[str, Any]]
"""What a Trainer takes as `optimizer_cls_and_kwargs`."""


def muon(model: nn.Module, args: Any) -> Chosen:
    """Muon on the hidden matrices, AdamW on the rest, both at the same learning rate (Moonlight's scaling)."""
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"], "use_muon": is_of_matrices(group)}
        for group in param_groups(model, args.weight_decay)
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    kwargs = {"lr": args.learning_rate, "adamw_lr": args.learning_rate, "adamw_betas": betas, "use_adjusted_lr": True}
    chosen = _of_pytorch_optimizer("Muon")
    if not torch.accelerator.is_available():
        _in_float32(importlib.import_module("pytorch_optimizer.optimizer.muon.base"))
    return chosen, {**kwargs, "params": groups}


def soap(model: nn.Module, args: Any) -> Chosen:
    """SOAP in float32, refreshed every 10 steps, its own betas; no basis for a vocabulary-sized side."""
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in param_groups(model, args.weight_decay)
    ]
    return _of_pytorch_optimizer("SOAP"), {"lr": args.learning_rate, "max_precondition_dim": 2048, "params": groups}


def _in_float32(module: Any) -> None:
    """Have Muon iterate in float32: a CPU without bfloat16 products takes a hundred times as long for those."""
    name = "zero_power_via_newton_schulz_5"
    iterate = getattr(module, name)
    setattr(module, name, functools.partial(getattr(iterate, "func", iterate), dtype=torch.float32))


def _of_pytorch_optimizer(name: str) -> type:
    try:
        return getattr(importlib.import_module("pytorch_optimizer"), name)
    except ImportError as error:
        raise ConfigError(f"{name} is pytorch_optimizer's: pip install 'hf-shampoo4[race]'") from error


PEERS: dict[str, Callable[[nn.Module, Any], Chosen]] = {"muon": muon, "soap": soap}
