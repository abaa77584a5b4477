"""What a step must know of gradients beforehand: which there are, of which dtype, whether all are finite."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..exceptions import SparseGradient
from ..sharding.local_parameter import LocalParameter, check_trainable
from .units import Key, Unit

WIDTHS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def width(gradient: Tensor | None) -> int:
    """0 for none, else 1 + the position in `WIDTHS` of its dtype, or of float32 for one that is not there."""
    if gradient is None:
        return 0
    return 1 + WIDTHS.index(gradient.dtype if gradient.dtype in WIDTHS else torch.float32)


def dtype_of(width: int) -> torch.dtype:
    """The dtype of a gradient whose `width` is not 0."""
    return WIDTHS[width - 1]


def are_finite(live: Sequence[LocalParameter]) -> bool:
    """Whether the square of every entry of this rank's gradients is finite, in float32.

    Raises:
        SparseGradient: a gradient whose layout is not strided.
        TypeError, ValueError: a parameter that cannot be trained.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for local in live:
        if local.buffer.grad is not None:
            check_trainable(local.parameter)  # which may have been frozen before
            if local.buffer.grad.layout != torch.strided:
                raise SparseGradient(
                    f"parameter {local.name!r} has a sparse gradient, which Shampoo4bit cannot use: "
                    "set sparse=False on the embedding, or give the parameter its own torch.optim.SparseAdam"
                )
        gradient = local.gradient()
        if gradient is not None and gradient.numel():
            by_device.setdefault(gradient.device, []).append(gradient)
    return all(_squares_are_finite(gradients) for gradients in by_device.values())


def broken(live: Sequence[LocalParameter]) -> list[str]:
    """The names of the parameters whose gradient on this rank is not finite, or too large to square."""
    found = [(local.name, local.gradient()) for local in live]
    return [name for name, g in found if g is not None and g.numel() > 0 and not _squares_are_finite([g])]


class SkippedSteps:
    """Steps that are not made, as a gradient is not finite; the same count on every rank."""

    def __init__(self) -> None:
        self._in_a_row: Counter[Key] = Counter()

    def clear(self) -> None:
        """A step was made."""
        self._in_a_row.clear()

    def count(self, units: Sequence[Unit]) -> None:
        """One more of these units; the first one in a row is said.

        Raises:
            RuntimeError: too many in a row; weights that are not finite would make all that follow like this.
        """
        for unit in units:
            unit.group["skipped_steps"] += 1
            self._in_a_row[unit.key] += 1
        in_a_row = max(self._in_a_row.values(), default=0)
        most = max((unit.group["max_skipped"] for unit in units), default=0)
        where = broken([local for unit in units for local in unit.members])
        said = f"gradients are not finite, or too large to square (on this rank of {where[:3] or 'no parameter'})"
        if in_a_row == 1:
            warnings.warn(f"{said}: nothing was updated, and this step is counted in skipped_steps", stacklevel=3)
        if most and in_a_row >= most:
            raise RuntimeError(
                f"{in_a_row} steps in a row made no update, for {said}: go on from the last checkpoint, with a lower "
                "learning rate or smaller max_grad_norm if it comes again, and look at the data of these steps "
                f"(max_skipped={most}; 0 lets it go on for ever)"
            )


def _squares_are_finite(gradients: list[Tensor]) -> bool:
    """Of flat gradients on one device: an infinite second moment would never be finite again."""
    if gradients[0].device.type == "cpu":  # where the norm of one tensor takes 25 times as long
        extremes = [x for gradient in gradients for x in torch.aminmax(gradient)]
    else:
        extremes = list(torch._foreach_norm(gradients, math.inf))
    return bool(torch.isfinite(torch.stack([x.float() for x in extremes]).square()).all())
