"""How a block's gradient becomes a direction: Shampoo (two factors, graft, moments) or the base alone (moments).

An algorithm is a frozen description of one block shape; equal descriptions are computed as one stack.  Its state is
{tensor name: buffers}; `directions` runs all stacks of a wave, because the graft's norms go over whole parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .clock import Stopwatch
from .factors import Factor, make_factor
from .moments import Moments, make_moments
from .options import Options
from .rounding import Noise
from .storage import Buffers, Dense, Storage

State = dict[str, Buffers]


@dataclass(frozen=True)
class Context:
    """What a step knows beside gradients and state."""

    options: Options
    step: int
    betas: tuple[float, float]
    eps: float
    stopwatch: Stopwatch
    """Times the refreshes."""
    coupled_decay: float = 0.0
    """L2: this times the parameter is added to what goes through the base, as torch.optim.SGD does."""


class Algorithm(Protocol):
    """What every algorithm offers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one block."""

    @property
    def moments(self) -> Moments:
        """The base's moments."""

    def storages(self) -> dict[str, Storage]:
        """Name -> storage of every tensor of a block's state."""

    def initialise(self, state: State) -> None:
        """Write the state before the first step (buffers come zeroed)."""

    def precondition(self, state: State, g: Tensor, context: Context) -> Tensor:
        """The preconditioned gradient, (B, *shape) float32; `g` is not changed."""


@dataclass(frozen=True)
class Elementwise:
    """No preconditioner: embeddings, output head, norms, biases."""

    shape: tuple[int, ...]
    moments: Moments

    def storages(self) -> dict[str, Storage]:
        return {"steps": Dense(()), **self.moments.storages()}

    def initialise(self, state: State) -> None:
        """Zeros are right."""

    def precondition(self, state: State, g: Tensor, context: Context) -> Tensor:
        return g


@dataclass(frozen=True)
class Shampoo:
    """P = L^-1/4 G R^-1/4 (1802.09568), L and R kept as `factors` says."""

    shape: tuple[int, ...]
    moments: Moments
    left: Factor
    right: Factor

    def storages(self) -> dict[str, Storage]:
        return {
            "steps": Dense(()),
            "failures": Dense((), torch.int32),
            **{f"left.{name}": storage for name, storage in self.left.storages().items()},
            **{f"right.{name}": storage for name, storage in self.right.storages().items()},
            **self.moments.storages(),
        }

    def initialise(self, state: State) -> None:
        self.left.initialise(_side(state, "left"))
        self.right.initialise(_side(state, "right"))

    def precondition(self, state: State, g: Tensor, context: Context) -> Tensor:
        left, right = _side(state, "left"), _side(state, "right")
        failures = state["failures"]["dense"]
        if context.step % context.options.stats_every == 0:
            with context.stopwatch.on(g.device):
                # L <- beta L + (1 - beta) G G^T;  R <- beta R + (1 - beta) G^T G
                failures += self.left.update(left, g @ g.mT)
                failures += self.right.update(right, g.mT @ g)
        if context.step % context.options.roots_every == 0:
            with context.stopwatch.on(g.device):
                # L^-1/4, R^-1/4
                failures += self.left.refresh(left)
                failures += self.right.refresh(right)
        # P = L^-1/4 G R^-1/4
        return self.left.root(left) @ g @ self.right.root(right)


class Stack(Protocol):
    """What `directions` needs of a stack of equal blocks."""

    algorithm: Algorithm
    state: State
    membership: Tensor
    """float32 (parameters of the wave, B): 1 where the block belongs to the parameter."""
    salts: Tensor
    """int32 (B,): the same number for a block in every run and on every rank."""

    def parameters(self) -> Tensor:
        """float32 (B, *shape), a copy."""


def directions(stacks: Sequence[Stack], gradients: Sequence[Tensor], context: Context) -> list[Tensor]:
    """The step of every block of a wave, without learning rate and weight decay: float32 (B, *shape) a stack."""
    preconditioned = [s.algorithm.precondition(s.state, g, context) for s, g in zip(stacks, gradients, strict=True)]
    grafted = graft(stacks, gradients, preconditioned, context.options.graft)
    updates = []
    for stack, p in zip(stacks, grafted, strict=True):
        updates.append(through_base(stack, p, context))
    return updates


def through_base(stack: Stack, p: Tensor, context: Context) -> Tensor:
    """The base's direction for what takes the gradient's place, (B, *shape) float32; counts the blocks' steps."""
    o = context.options
    steps = stack.state["steps"]["dense"].add_(1)
    if context.coupled_decay:
        p = stack.parameters().mul_(context.coupled_decay).add_(p)
    noise = Noise(stack.salts, context.step, o.seed)
    late = 0 < o.stochastic_from <= context.step
    return stack.algorithm.moments.direction(stack.state, p, context.betas, context.eps, steps, noise, late)


def graft(
    stacks: Sequence[Stack], gradients: Sequence[Tensor], preconditioned: Sequence[Tensor], over: str
) -> list[Tensor]:
    """P <- P |G|_F / |P|_F, the norms over each parameter (`norm`) or each block (`block`); a zero P stays zero.

    A P that is not finite (a gradient whose square overflows) becomes zero.
    """
    grafted = list(preconditioned)
    chosen = [i for i, (g, p) in enumerate(zip(gradients, preconditioned, strict=True)) if p is not g]
    if not chosen:
        return grafted
    p2 = [_squared_norms(preconditioned[i]) for i in chosen]
    g2 = [_squared_norms(gradients[i]) for i in chosen] if over != "none" else p2
    if over == "norm":
        members = [stacks[i].membership.double() for i in chosen]
        g2, p2 = _over_parameters(members, g2), _over_parameters(members, p2)
    for i, numerator, denominator in zip(chosen, g2, p2, strict=True):
        ratio = torch.nan_to_num((numerator / denominator).sqrt(), nan=0.0, posinf=0.0).float()[:, None, None]
        grafted[i] = torch.where(ratio > 0, preconditioned[i] * ratio, 0.0)
    return grafted


def make_algorithm(shape: tuple[int, ...], options: Options, quantise_moments: bool) -> Algorithm:
    """The algorithm for blocks of `shape` that the options name."""
    moments = make_moments(shape, options, quantise_moments)
    if options.algorithm == "elementwise":
        return Elementwise(shape, moments)
    return Shampoo(shape, moments, make_factor(shape[0], options), make_factor(shape[1], options))


def _side(state: State, side: str) -> State:
    return {name.removeprefix(side + "."): buffers for name, buffers in state.items() if name.startswith(side + ".")}


def _squared_norms(x: Tensor) -> Tensor:
    """float64 (B,): the square of a float32 norm overflows float32."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).double().square()


def _over_parameters(members: Sequence[Tensor], squares: Sequence[Tensor]) -> list[Tensor]:
    """Sum blocks' squares over their parameter, and hand every block its parameter's sum.

    By products with the membership matrices: a scatter-add's order is not fixed on a GPU.
    """
    total = torch.stack([member @ x for member, x in zip(members, squares, strict=True)]).sum(0)
    return [member.T @ total for member in members]
