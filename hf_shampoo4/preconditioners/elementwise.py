"""The base alone, for norms, biases and what else has no preconditioner: AdamW or SGD with any storage of moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..options import Options
from .moments import BASES, Base, make_base
from .protocols import Algorithm, Context, Stack, strip


@dataclass(frozen=True)
class Elementwise(Algorithm):
    """No preconditioner."""

    moments: Base

    preconditions: ClassVar[bool] = False

    @classmethod
    def make(cls, shape: tuple[int, ...], options: Options, quantise: bool, whole: tuple[int, int]) -> Elementwise:
        return cls(shape, make_base(shape, options, quantise))

    @classmethod
    def largest_block(cls, rows: int, columns: int, options: Options) -> tuple[int, int]:
        return max(1, strip(columns)), columns

    def label(self, options: Options, moments: str) -> str:
        return f"{BASES[options.base]} {moments}"

    def update(self, stack: Stack, g: Tensor, context: Context) -> Tensor:
        """u, (B, *shape) float32: the base's direction.

        Args:
            stack: of B blocks; its state is changed in place.
            g: (B, *shape) float32, the gradient.
            context: of the step.
        """
        return self.moments.direction(stack.state, g, context.moment_step(stack))
