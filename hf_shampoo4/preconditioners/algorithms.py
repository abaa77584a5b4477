"""The algorithms by name, and the step of all stacks of a wave together: a graft goes over whole parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

from ..options import ALGORITHMS, Options
from .protocols import Algorithm, Context, Stack
from .together import updated


def algorithm_class(name: str) -> type[Algorithm]:
    """The class of the algorithm of a name."""
    found = ALGORITHMS[name].implementation
    if isinstance(found, str):
        module, _, cls = found.partition(":")
        found = getattr(import_module(module), cls)
    return found


def intervals(options: Options, updates: int | None = None) -> dict[str, int]:
    """`Algorithm.intervals` of the options' algorithm."""
    return algorithm_class(options.algorithm).intervals(options, updates)


Total = Callable[[Tensor], Tensor]
"""Sums over the blocks of each parameter here, float64 (k, parameters) -> over its blocks on all ranks."""


def compute_updates(
    stacks: Sequence[Stack],
    gradients: Sequence[Tensor],
    context: Context,
    weights: Sequence[Tensor] | None = None,
    total: Total = lambda sums: sums,
) -> list[Tensor]:
    """The step of every block of some stacks, without learning rate and decoupled weight decay.

    Args:
        stacks: of one wave.
        gradients: of each stack, float32 (B, *shape).
        context: of the step.
        weights: as the gradients, where weight decay is coupled.
        total: see `Total`.

    Returns:
        For each stack float32 (B, *shape).
    """
    if context.probe:
        context.probe.before(stacks)
    gradients = graft(stacks, gradients, context, total)
    if weights is not None:
        gradients = [(w * context.coupled_decay).add_(g) for w, g in zip(weights, gradients, strict=True)]
    found = updated(stacks, gradients, context)
    if context.probe:
        context.probe.after(stacks)
    return found


def graft(stacks: Sequence[Stack], gradients: Sequence[Tensor], context: Context, total: Total) -> list[Tensor]:
    """Where `grafted` says so P <- P |G|_F / |P|_F, the norms over each parameter or block (`graft`), or P alone.

    A zero P stays zero.  A P that is not finite (a gradient whose square overflows) becomes zero.

    Args:
        stacks: of one wave.
        gradients: of each stack, (B, *shape) float32.
        context: of the step.
        total: see `Total`.

    Returns:
        For each stack (B, *shape) float32; the gradients of stacks that are not grafted as they are.
    """
    values, over = list(gradients), context.options.graft
    chosen = [i for i, stack in enumerate(stacks) if stack.algorithm.grafted]
    if not chosen:
        return values
    for i in chosen:
        values[i] = stacks[i].algorithm.precondition(stacks[i], gradients[i], context)
    p2 = [_squared_norms(values[i]) for i in chosen]
    g2 = [_squared_norms(gradients[i]) for i in chosen] if over != "none" else p2
    if over == "norm":
        members = [stacks[i].membership.double() for i in chosen]
        # products with the membership matrices, not a scatter-add, whose order is not fixed on a GPU
        sums = [torch.stack([m @ x for m, x in zip(members, squares, strict=True)]).sum(0) for squares in (g2, p2)]
        g2, p2 = ([m.T @ over_all for m in members] for over_all in total(torch.stack(sums)))
    for i, numerator, denominator in zip(chosen, g2, p2, strict=True):
        ratio = torch.nan_to_num((numerator / denominator).sqrt(), nan=0.0, posinf=0.0).float()[:, None, None]
        values[i] = torch.where(ratio > 0, values[i] * ratio, 0.0)
    return values


def _squared_norms(x: Tensor) -> Tensor:
    """float64 (B,): the square of a float32 norm overflows float32."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).double().square()
