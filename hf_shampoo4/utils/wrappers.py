"""Optimizers that accelerate and DeepSpeed have wrapped."""

from __future__ import annotations

from typing import Any


def without_wrappers(optimizer: Any) -> Any:
    """The optimizer in what `accelerator.prepare` or an engine gives back; one that is not wrapped is itself."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
