"""Shampoo (1802.09568): L^-1/4 G R^-1/4 with the gradient's norm goes through AdamW or SGD in the gradient's place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..numerics.blocks import Index, State, gather_blocks, scatter_blocks
from ..options import Options
from .factors import Factor, make_factor
from .moments import BASES, Base, make_base
from .operations import Work, coding_workspace, product
from .protocols import Context, Stack
from .two_sided import TwoSided, side_state


@dataclass(frozen=True)
class Shampoo(TwoSided):
    """Two factors, kept as `factors` says, and the moments of what they precondition."""

    moments: Base
    left: Factor
    right: Factor

    grafted: ClassVar[bool] = True
    every: ClassVar[Mapping[str, str]] = {"stats": "stats_every", "roots": "roots_every"}

    @classmethod
    def make(cls, shape: tuple[int, ...], options: Options, quantise: bool, whole: tuple[int, int]) -> Shampoo:
        factors = make_factor(shape[0], options), make_factor(shape[1], options)
        return cls(shape, make_base(shape, options, quantise), *factors)

    def label(self, options: Options, moments: str) -> str:
        over = "" if options.base == "adamw" else f" over {BASES[options.base]}"
        return f"Shampoo {options.factor} {options.bits}-bit{over}, {moments} moments"

    def work(self) -> dict[str, Work]:
        m, n = self.shape
        (left_update, left_root), (right_update, right_root) = self.left.work(), self.right.work()
        # L^-1/4 G R^-1/4;  G G^T and G^T G
        step = statistics = product(m, m, n) + product(m, n, n)
        return {"step": step, "stats": statistics + left_update + right_update, "roots": left_root + right_root}

    def workspace(self, blocks: int) -> dict[str, int]:
        m, n = self.shape
        entries, square = blocks * m * n, blocks * max(m, n) ** 2
        # P, grafted, and the base beside it;  a root is decoded while P is made
        step = max(3 * entries, entries + self.moments.workspace(entries), entries + square + coding_workspace(square))
        update, refresh = self.left.workspace(square)
        return {"step": step, "stats": max(step, update), "roots": max(step, refresh)}

    def refreshes(self) -> dict[str, list[str]]:
        of_sides = [name for name in self.storages() if name.startswith(("left.", "right."))]
        roots = [name for name in of_sides if name.endswith(".root")]
        return {"stats": [name for name in of_sides if name not in roots], "roots": roots}

    def precondition(self, stack: Stack, g: Tensor, context: Context) -> Tensor:
        """P, (B, m, n), from the gradient: what is then grafted, over all blocks of a parameter."""
        # every T1 steps: L <- beta L + (1 - beta) G G^T;  R <- beta R + (1 - beta) G^T G
        for blocks, _ in context.due(stack, "stats"):
            with self._some(stack, blocks, context) as (some, left, right):
                some["failures"]["dense"] += self.left.update(left, g[blocks] @ g[blocks].mT).int()
                some["failures"]["dense"] += self.right.update(right, g[blocks].mT @ g[blocks])
        # every T2 steps: L^-1/4, R^-1/4
        for blocks, _ in context.due(stack, "roots"):
            with self._some(stack, blocks, context) as (some, left, right):
                some["failures"]["dense"] += self.left.refresh(left).int() + self.right.refresh(right)
        # P = L^-1/4 G R^-1/4
        return self.left.root(side_state(stack.state, "left")) @ g @ self.right.root(side_state(stack.state, "right"))

    @contextmanager
    def _some(self, stack: Stack, blocks: Index, context: Context) -> Iterator[tuple[State, State, State]]:
        """The state of some blocks and of their sides, to be changed in place; timed."""
        with context.stopwatch.on(stack.seed_offsets.device):
            some = gather_blocks(stack.state, blocks)
            yield some, side_state(some, "left"), side_state(some, "right")
            scatter_blocks(stack.state, blocks, some)

    def update(self, stack: Stack, g: Tensor, context: Context) -> Tensor:
        """The base (AdamW or SGD) on P |G| / |P| in the gradient's place.

        Args:
            stack: of B blocks; its state is changed in place.
            g: (B, m, n) float32, what `precondition` and the graft have made of the gradient.
            context: of the step.

        Returns:
            (B, m, n) float32.
        """
        # the base on P |G| / |P|: AdamW m <- b1 m + (1 - b1) P, v <- b2 v + (1 - b2) P^2, u = m / (sqrt(v) + eps)
        return self.moments.direction(stack.state, g, context.moment_step(stack))
