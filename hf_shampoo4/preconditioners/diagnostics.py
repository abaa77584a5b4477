"""The health of low-bit state, looked at in one step: which figures to read when a run does not go as it should.

unmoved_first, unmoved_second
    Share of a moment's codes that the step left as they were.  Near 1, the moment has stalled (2603.16731).
radial_bias
    <Q(m) - m, m> / <m, m>: how much storing shrinks (< 0) or stretches the first moment (2610.12444).
basis_turn
    1 - the mean |cosine| between a basis's vectors before and after a step that updated it.  Near 0 all the time:
    update it less often; above .1 late in training: more often.
condition
    log10 of a factor's largest over its smallest eigenvalue, the worst block's.  Above 6, float32 and `damping` decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..numerics.storage import Blockwise
from .moments import radial_bias, unmoved
from .protocols import Stack

CODES = ("first", "second")


@dataclass
class Probe:
    """Watches the stacks of one step; costs a copy of their state."""

    _before: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _figures: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """Name -> (value, weight)."""

    def before(self, stacks: Sequence[Stack]) -> None:
        """Remember codes and bases."""
        for stack in stacks:
            kept = {name: stack.state[name]["codes"].clone() for name in CODES if "codes" in stack.state.get(name, {})}
            kept |= {name: stack.algorithm.storages()[name].read(stack.state[name]).clone() for name in _bases(stack)}
            self._before[id(stack)] = kept

    def moment(self, stack: Stack, exact: Tensor) -> None:
        """Compare the first moment as it should be, (B, *shape), with what is stored."""
        first = stack.algorithm.moments.first
        if isinstance(first, Blockwise):
            bias = radial_bias(exact, first.read(stack.state["first"]))
            self._add("radial_bias", bias.mean(), exact.numel())

    def after(self, stacks: Sequence[Stack]) -> None:
        """Compare with what was remembered."""
        for stack in stacks:
            kept = self._before.pop(id(stack))
            for name in CODES:
                if name in kept:
                    codes = stack.state[name]["codes"]
                    bits = getattr(stack.algorithm.storages()[name], "bits", 8)
                    self._add(f"unmoved_{name}", unmoved(kept[name], codes, bits).mean(), codes.numel())
            for name in _bases(stack):
                new = stack.algorithm.storages()[name].read(stack.state[name])
                moved = (new != kept[name]).flatten(1).any(1)
                if moved.any():
                    change = 1 - _alignment(kept[name][moved], new[moved])
                    self._add("basis_turn", change, int(moved.sum()) * new.shape[-1])
            for name, buffers in stack.state.items():
                if name.endswith("eigenvalues"):
                    self._add("condition", _log_condition(buffers["dense"]), 1)

    def metrics(self) -> dict[str, float]:
        """Figure -> its mean over what was watched; of the condition the worst."""
        found = {}
        for name, entries in self._figures.items():
            total = sum(weight for _, weight in entries)
            mean = sum(value * weight for value, weight in entries) / total
            found[f"optim/{name}"] = round(max(value for value, _ in entries) if name == "condition" else mean, 5)
        return found

    def _add(self, name: str, value: Tensor, weight: int) -> None:
        number = float(value)
        if math.isfinite(number):
            self._figures.setdefault(name, []).append((number, weight))


def _bases(stack: Stack) -> list[str]:
    return [name for name in stack.state if name.endswith(".basis")]


def _alignment(old: Tensor, new: Tensor) -> Tensor:
    """Mean |cosine| between the columns of two bases, (B, k, k)."""
    return torch.nn.functional.cosine_similarity(old, new, dim=-2).abs().mean()


def _log_condition(eigenvalues: Tensor) -> Tensor:
    """log10 of the largest over the smallest positive eigenvalue of (B, k), the worst block's."""
    smallest = torch.where(eigenvalues > 0, eigenvalues, math.inf).amin(-1)
    return (eigenvalues.amax(-1) / smallest).log10().amax()
