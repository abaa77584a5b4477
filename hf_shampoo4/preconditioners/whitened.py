"""First moments of matrices in eigenbases, stored over the roots of their rows' and columns' eigenvalues.

`WhitenedMoment` is the reference, and computes on every device; on a GPU `FusedMoment` does the same in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numerics.blocks import Buffers, Index, covers
from ..numerics.precision import rotate
from ..numerics.quantize import DENSE_BLOCK, has_kernels, kernels, padded
from ..numerics.rounding import Settling
from ..numerics.storage import Blockwise, Dense, Storage
from .moments import FIRST_STREAM, MomentStep, bias, write_first

LARGEST = 1e30  # of a whitened moment, which grows while no gradient comes and eigenvalues are forgotten faster

Scales = tuple[Tensor, Tensor]
"""Of the rows (B, m, 1) and the columns (B, 1, n), float32."""


class BasisUpdate(NamedTuple):
    """Bases that were updated."""

    blocks: Index
    """Of the stack: b blocks."""
    left: Tensor | None
    """Q_L, (b, m, m): the bases in coordinates of those before; None: the side has none."""
    right: Tensor | None
    """Q_R, (b, n, n)."""


def carried(x: Tensor, updates: Iterable[BasisUpdate]) -> Tensor:
    """Q_L^T x Q_R of the blocks (B, m, n) whose bases were updated, in place unless all of them did."""
    for blocks, left, right in updates:
        some = rotate(left, x[blocks], right)
        if covers(blocks, len(x)):
            return some
        x[blocks] = some
    return x


class WhitenedMoment:
    """A stack's first moment m' while a step works on it."""

    def __init__(self, storage: Storage, buffers: Buffers, scales: Scales) -> None:
        """
        Args:
            scales: what is stored has been divided by.
        """
        self._storage, self._buffers = storage, buffers
        rows, columns = scales
        stored = storage.read(buffers)
        self.exact = (stored * rows if isinstance(storage, Dense) else stored.mul_(rows)).mul_(columns)
        """(B, m, n) float32."""

    def add(self, g: Tensor, weight: float) -> None:
        """m' <- lerp(m', G', weight); G' (B, m, n) must stay as it is until m' is stored."""
        self._g = g
        self.exact.lerp_(g, weight)

    def carry(self, updates: list[BasisUpdate]) -> None:
        """m' <- Q_L^T m' Q_R in the blocks whose bases were updated."""
        self.exact = carried(self.exact, updates)

    def store(self, scales: Scales, at: MomentStep) -> Tensor:
        """m' over other scales, and not too large; it is not to be used any more.

        Returns:
            What was stored, as it was before: (B, m, n) float32, not to be written to.
        """
        rows, columns = scales
        m = self.exact.div_(rows).div_(columns).clamp_(-LARGEST, LARGEST)
        # eigenvalues follow the gradients, so that faint ones come to move m' as others do: only what has none settles
        write_first(self._storage, {"first": self._buffers}, m, at, self._g, 0.0)
        return m

    def step(self, scales: Scales, at: MomentStep) -> Tensor:
        """`store`, and the direction of KL-Shampoo: what is stored, bias-corrected, (B, m, n) float32."""
        m = self.store(scales, at)
        by = bias(at.betas[0], at.steps, m.dim())
        return m.div_(by) if at.watch is None else m / by


class FusedMoment:
    """As `WhitenedMoment`, without a tensor of its own: `step` is one pass of a Triton kernel."""

    def __init__(self, storage: Storage, buffers: Buffers, scales: Scales) -> None:
        self._storage, self._buffers, self._scales = storage, buffers, scales
        self._carried: Any = None

    def add(self, g: Tensor, weight: float) -> None:
        """As `WhitenedMoment.add`."""
        self._g, self._weight = g, weight

    def carry(self, updates: list[BasisUpdate]) -> None:
        """As `WhitenedMoment.carry`: the blocks whose bases were updated, and no others, are decoded."""
        found, start = list[Tensor](), 0
        at = torch.full((len(self._g),), -1, dtype=torch.int32, device=self._g.device) if updates else self._g
        for blocks, left, right in updates:
            scales = (self._scales[0][blocks], self._scales[1][blocks])
            some = {name: buffer[blocks] for name, buffer in self._buffers.items()}
            m = kernels("whitened").lerped(self._g[blocks], self._stored(some), scales, self._weight)
            at[blocks] = torch.arange(start, start + len(m), dtype=torch.int32, device=at.device)
            start += len(m)
            found.append(rotate(left, m, right))
        if found:
            self._carried = kernels("whitened").Carried(found[0] if len(found) == 1 else torch.cat(found), at)

    def step(self, scales: Scales, at: MomentStep) -> Tensor:
        """As `WhitenedMoment.step`."""
        u: Tensor = kernels("whitened").moment(
            self._g, self._stored(self._buffers), self._scales, scales, bias(at.betas[0], at.steps, 1), self._weight,
            LARGEST, self._carried,
            None if at.noise is None else Settling(self._g, 0.0, at.noise.multiply_shift(FIRST_STREAM)),
        )  # fmt: skip
        return u

    def _stored(self, buffers: Buffers) -> Any:
        storage = self._storage
        if isinstance(storage, Blockwise):
            levels = padded(storage.codebook, storage.bits, buffers["codes"].device)
            return kernels("whitened").Stored(*buffers.values(), *levels, storage.bits, storage.block)
        return kernels("whitened").Stored(buffers["dense"], bits=8 * buffers["dense"].element_size())


def can_fuse(storage: Storage, at: MomentStep, device: torch.device) -> bool:
    """Whether `FusedMoment` does what is asked of a step: rounding to nearest, and nobody who looks at m'."""
    if at.watch is not None:
        return False
    if isinstance(storage, Blockwise):
        nearest = not (at.stochastic_first and storage.bits == 4) and storage.fit == "largest" and not storage.columns
        return nearest and has_kernels(device, storage.block)
    floats = (torch.float32, torch.bfloat16)
    return isinstance(storage, Dense) and storage.dtype in floats and has_kernels(device, DENSE_BLOCK)
