"""How a block's gradient becomes a direction: Shampoo (two factors, graft, moments), the eigenbasis family (moments in
the factors' eigenbasis) or the base alone.

An algorithm is a frozen description of one block shape; equal descriptions are computed as one stack.  Its state is
{tensor name: buffers}; `compute_updates` runs the stacks of a wave together, as the graft goes over whole parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.storage import Dense, State, Storage
from ..options import Options
from .bases import make_sides
from .eigenbasis import Eigenbasis
from .factors import make_factor
from .moments import Base, make_base, make_moments
from .operations import Work
from .protocols import Algorithm, Context, Stack
from .shampoo import Shampoo


@dataclass(frozen=True)
class Elementwise:
    """No preconditioner: norms, biases, and what is left to the base."""

    shape: tuple[int, ...]
    moments: Base

    grafted: ClassVar[bool] = False

    def storages(self) -> dict[str, Storage]:
        return {"steps": Dense(()), **self.moments.storages()}

    def initialise(self, state: State) -> None:
        """Zeros are right."""

    def work(self) -> dict[str, Work]:
        return {"step": Work()}

    def workspace(self, blocks: int) -> dict[str, int]:
        return {"step": self.moments.workspace(blocks * math.prod(self.shape))}

    def refreshes(self) -> dict[str, list[str]]:
        return {}

    def update(self, stack: Stack, g: Tensor, context: Context) -> Tensor:
        """u, (B, *shape) float32: the base's direction.

        Args:
            g: (B, *shape) float32, the gradient.
        """
        return self.moments.direction(stack.state, g, context.moment_step(stack))


def make_algorithm(
    shape: tuple[int, ...], options: Options, quantise_moments: bool, rotated: tuple[bool, bool] = (True, True)
) -> Algorithm:
    """The algorithm for blocks of `shape` that the options name.

    Args:
        quantise_moments: see `make_base`.
        rotated: which sides have a basis, see `rotated_sides`.
    """
    if options.algorithm == "elementwise":
        return Elementwise(shape, make_base(shape, options, quantise_moments))
    if options.algorithm == "shampoo":
        factors = make_factor(shape[0], options), make_factor(shape[1], options)
        return Shampoo(shape, make_base(shape, options, quantise_moments), *factors)
    moments = make_moments(shape, options, quantise_moments)
    return Eigenbasis(shape, moments, *make_sides(shape, options, rotated), whitened=options.algorithm != "soap")


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
    found = [stack.algorithm.update(stack, g, context) for stack, g in zip(stacks, gradients, strict=True)]
    if context.probe:
        context.probe.after(stacks)
    return found


def graft(stacks: Sequence[Stack], gradients: Sequence[Tensor], context: Context, total: Total) -> list[Tensor]:
    """Of Shampoo's stacks P <- P |G|_F / |P|_F, the norms over each parameter (`norm`) or block (`block`), or P alone.

    A zero P stays zero.  A P that is not finite (a gradient whose square overflows) becomes zero.

    Args:
        stacks: of one wave.
        gradients: of each stack, (B, *shape) float32.
        context: of the step.
        total: see `Total`.

    Returns:
        For each stack (B, *shape) float32; the gradients of stacks that are not Shampoo's as they are.
    """
    values, over = list(gradients), context.options.graft
    chosen = [(i, stack.algorithm) for i, stack in enumerate(stacks) if isinstance(stack.algorithm, Shampoo)]
    if not chosen:
        return values
    for i, shampoo in chosen:
        values[i] = shampoo.precondition(stacks[i], gradients[i], context)
    p2 = [_squared_norms(values[i]) for i, _ in chosen]
    g2 = [_squared_norms(gradients[i]) for i, _ in chosen] if over != "none" else p2
    if over == "norm":
        members = [stacks[i].membership.double() for i, _ in chosen]
        # products with the membership matrices, not a scatter-add, whose order is not fixed on a GPU
        sums = [torch.stack([m @ x for m, x in zip(members, squares, strict=True)]).sum(0) for squares in (g2, p2)]
        g2, p2 = ([m.T @ over_all for m in members] for over_all in total(torch.stack(sums)))
    for (i, _), numerator, denominator in zip(chosen, g2, p2, strict=True):
        ratio = torch.nan_to_num((numerator / denominator).sqrt(), nan=0.0, posinf=0.0).float()[:, None, None]
        values[i] = torch.where(ratio > 0, values[i] * ratio, 0.0)
    return values


def _squared_norms(x: Tensor) -> Tensor:
    """float64 (B,): the square of a float32 norm overflows float32."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).double().square()
