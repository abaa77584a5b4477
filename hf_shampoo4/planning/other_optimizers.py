"""State of other optimizers of the same model, by their own rules."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from ..groups import is_of_matrices, param_groups
from .figures import OverRanks


@dataclass(frozen=True)
class _Treated:
    """A parameter, as other optimizers tell them apart."""

    shape: tuple[int, ...]
    embedding: bool
    hidden_matrix: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def _adamw(p: _Treated) -> int:
    """torch.optim.AdamW on float32 parameters."""
    return 8 * p.elements


def _adamw_8bit(p: _Treated) -> int:
    """bitsandbytes in the Trainer: blocks of 256; embeddings and tensors of fewer than 4,096 elements in 32 bits."""
    return 8 * p.elements if p.embedding or p.elements < 4096 else 2 * (p.elements + 4 * -(-p.elements // 256))


def _soap(p: _Treated) -> int:
    """nikhilvyas/SOAP at its defaults (2409.11321): a factor and a basis for every side of at most 10,000."""
    sides = [side for side in p.shape if side <= 10_000] if len(p.shape) > 1 else []
    return 8 * p.elements + sum(2 * 4 * side**2 for side in sides)


def _muon(p: _Treated) -> int:
    """KellerJordan/Muon: a momentum for hidden matrices, AdamW for the rest."""
    return (4 if p.hidden_matrix else 8) * p.elements


OTHERS = {"AdamW, 32-bit": _adamw, "AdamW, 8-bit": _adamw_8bit, "SOAP": _soap, "Muon": _muon}
"""Optimizer -> bytes of its state for a float32 parameter."""


def bytes_of_others(model: nn.Module, world: int, replicated: bool) -> dict[str, OverRanks]:
    """Bytes of state by optimizer: a whole copy for every rank where ours is replicated, else cut evenly over them."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {id(p) for group in param_groups(model) if is_of_matrices(group) for _, p in group["params"]}
    treated = [
        _Treated(tuple(p.shape), id(p) in embeddings, id(p) in matrices) for p in model.parameters() if p.requires_grad
    ]
    sizes = {label: sum(map(size, treated)) for label, size in OTHERS.items()}
    if replicated:
        return {label: OverRanks(size * world, size) for label, size in sizes.items()}
    return {label: OverRanks(size, -(-size // world)) for label, size in sizes.items()}
