"""What Shampoo and the eigenbasis family share: a state of two Kronecker sides, moments and two counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..numerics.blocks import State
from ..numerics.storage import Dense, Storage
from .protocols import Algorithm


class SideState(Protocol):
    """One side of a block: a `factors.Factor` or a `bases.Side`."""

    def storages(self) -> dict[str, Storage]:
        """Name -> storage of each tensor it keeps."""

    def initialise(self, state: State) -> None:
        """Write the state before the first step (buffers come zeroed)."""


@dataclass(frozen=True)
class TwoSided(Algorithm):
    """A block of m x n, its shape, with a Kronecker factor on each side."""

    left: SideState
    """Of order m."""
    right: SideState
    """Of order n."""

    def storages(self) -> dict[str, Storage]:
        """`steps`: updates so far; `failures`: how often a new value was not finite and the last good one was kept."""
        return {
            "steps": Dense(()),
            "failures": Dense((), torch.int32),
            **{f"left.{name}": storage for name, storage in self.left.storages().items()},
            **{f"right.{name}": storage for name, storage in self.right.storages().items()},
            **self.moments.storages(),
        }

    def initialise(self, state: State) -> None:
        self.left.initialise(side_state(state, "left"))
        self.right.initialise(side_state(state, "right"))


def side_state(state: State, side: str) -> State:
    """The state of one Kronecker side, "left" or "right", under its own names."""
    return {name.removeprefix(side + "."): buffers for name, buffers in state.items() if name.startswith(side + ".")}
