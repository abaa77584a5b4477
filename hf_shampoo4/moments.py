"""First and second moments under any storage, and the AdamW direction that they give, on stacks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import Options
from .storage import Blockwise, Buffers, Dense, RankOne, Storage

State = dict[str, Buffers]

MOMENT_BLOCK = 128  # 2309.01507: smaller than 8-bit's 256, because outliers cost a 4-bit block more


@dataclass(frozen=True)
class Adam:
    """Adam's moments; the direction is computed from them *before* they are stored (2610.12444, section 3)."""

    first: Storage
    second: Storage

    def storages(self) -> dict[str, Storage]:
        return {"first": self.first, "second": self.second}

    def direction(self, state: State, g: Tensor, betas: tuple[float, float], eps: float, steps: Tensor) -> Tensor:
        """Adam's step without the learning rate.

        Args:
            g: (B, *shape) float32, the gradient or its preconditioned form.
            steps: float32 (B,), how many times each block has been updated, this one included.
        """
        # m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        m = self.first.read(state["first"]).lerp_(g, 1 - betas[0])
        v = self.second.read(state["second"]).mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        # u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
        denominator = (v / _bias(betas[1], steps, v.dim())).sqrt_().add_(eps)
        u = (m / _bias(betas[0], steps, m.dim())).div_(denominator)
        self.first.write(state["first"], m)
        self.second.write(state["second"], v)
        return u


def make_moments(shape: tuple[int, ...], options: Options, quantise: bool) -> Adam:
    """Moments of blocks of `shape`; float32 unless `quantise` (their parameter has at least 4,096 elements)."""
    if options.moments == "bf16":
        return Adam(Dense(shape, torch.bfloat16), Dense(shape, torch.bfloat16))
    if options.moments == "fp32" or not quantise:
        return Adam(Dense(shape), Dense(shape))
    first = Blockwise(shape, "dynamic", 4, MOMENT_BLOCK)
    # rank-1 scales need a matrix: a vector falls back to blocks (2309.01507, section 4.2)
    second = RankOne(shape, "linear0", 4) if len(shape) == 2 else Blockwise(shape, "linear0", 4, MOMENT_BLOCK)
    return Adam(first, second)


def _bias(beta: float, steps: Tensor, dim: int) -> Tensor:
    """1 - beta^t, shaped to broadcast over (B, *shape); expm1 keeps its digits when beta is near 1."""
    bias = -torch.expm1(steps * math.log(beta)) if beta > 0 else torch.ones_like(steps)
    return bias.view(-1, *[1] * (dim - 1))
