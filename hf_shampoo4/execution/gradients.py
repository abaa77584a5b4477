"""What a step must know of gradients beforehand: which there are, of which dtype, whether all are finite."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor

from ..exceptions import SparseGradient
from ..sharding.local_parameter import LocalParameter, check_trainable
from .units import Key, Unit, UnitPlan

WIDTHS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def width(gradient: Tensor | None) -> int:
    """0 for none, else 1 + the position in `WIDTHS` of its dtype, or of float32 for one that is not there."""
    if gradient is None:
        return 0
    return 1 + WIDTHS.index(gradient.dtype if gradient.dtype in WIDTHS else torch.float32)


def dtype_of(width: int) -> torch.dtype:
    """The dtype of a gradient whose `width` is not 0."""
    return WIDTHS[width - 1]


UNREAD = ("cuda", "meta")  # devices whose verdict the host need not read before it launches a step


class Verdict:
    """Whether gradients on one device are finite, which the host reads a step later and does not wait for."""

    def __init__(self, names: Sequence[str], finite: Tensor) -> None:
        self._names, self._finite, self._copied = names, finite, None
        self.on_device = finite.all()
        """bool, of no dimension."""
        if finite.is_cuda:
            self._finite = torch.empty(finite.shape, dtype=torch.bool, device="cpu", pin_memory=True)
            self._finite.copy_(finite, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(finite.device))

    def broken(self) -> list[str]:
        """The names of the parameters whose gradients are not finite; it waits until these had been looked at."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._finite.is_meta:  # which has no values
            return []
        return [name for name, finite in zip(self._names, self._finite.tolist(), strict=True) if not finite]


def are_finite(live: Sequence[LocalParameter], wait: bool = False) -> Union[bool, Verdict]:
    """Whether the square of every entry of this rank's gradients is finite, in float32.

    Args:
        live: of which some have gradients.
        wait: for the device; if not, gradients that are all on one of `UNREAD` give a verdict that is still to come.

    Raises:
        SparseGradient: a gradient whose layout is not strided.
        TypeError, ValueError: a parameter that cannot be trained.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
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
            by_device.setdefault(gradient.device, {})[local.name] = gradient
    found = [_squares_are_finite([*named.values()]) for named in by_device.values()]
    if len(found) == 1 and found[0].device.type in UNREAD and not wait:
        return Verdict([*next(iter(by_device.values()))], found[0])
    return all(bool(finite.all()) for finite in found)


def broken(live: Sequence[LocalParameter]) -> list[str]:
    """The names of the parameters whose gradient on this rank is not finite, or too large to square."""
    found = [(local.name, local.gradient()) for local in live]
    return [name for name, g in found if g is not None and g.numel() > 0 and not _squares_are_finite([g]).all()]


class SkippedSteps:
    """Steps that are not made, as a gradient is not finite; the same count on every rank."""

    def __init__(self) -> None:
        self._in_a_row: Counter[Key] = Counter()

    def clear(self) -> None:
        """A step was made."""
        self._in_a_row.clear()

    def count(self, units: Sequence[Unit], where: Sequence[str], for_good: bool = True) -> None:
        """One more of these units, as the gradients of some parameters are not finite; the first one in a row is said.

        Args:
            units: all that the step was of.
            where: the parameters' names.
            for_good: whether too many are an error.

        Raises:
            RuntimeError: too many in a row; weights that are not finite would make all that follow like this.
        """
        for unit in units:
            unit.group["skipped_steps"] += 1
            self._in_a_row[unit.key] += 1
        in_a_row = max(self._in_a_row.values(), default=0)
        most = max((unit.group["max_skipped"] for unit in units), default=0)
        said = f"gradients are not finite, or too large to square (on this rank of {where[:3] or 'no parameter'})"
        if in_a_row == 1:
            warnings.warn(f"{said}: nothing was updated, and this step is counted in skipped_steps", stacklevel=3)
        if for_good and most and in_a_row >= most:
            raise RuntimeError(
                f"{in_a_row} steps in a row made no update, for {said}: go on from the last checkpoint, with a lower "
                "learning rate or smaller max_grad_norm if it comes again, and look at the data of these steps "
                f"(max_skipped={most}; 0 lets it go on for ever)"
            )


class Unsettled:
    """A step that the device makes if all gradients are finite; the host counts it, and takes that back if not."""

    def __init__(self, verdict: Verdict, units: Sequence[Unit], plans: Sequence[UnitPlan]) -> None:
        """Before the step is counted."""
        self.verdict, self.units = verdict, units
        self._steps = [(unit.group, unit.group["step"]) for unit in units]
        self._plans = [(plan, plan.step) for plan in plans]
        members = [member for plan in plans for wave in plan.waves for member in wave.members]
        self._updates = [(member, member.updates) for member in members]

    def take_back(self) -> None:
        """The step was not made."""
        for group, step in self._steps:
            group["step"] = step
        for plan, step in self._plans:
            plan.step = step
        for member, updates in self._updates:
            member.updates = updates


def _squares_are_finite(gradients: list[Tensor]) -> Tensor:
    """bool (gradients,), of flat gradients on one device: an infinite second moment would never be finite again."""
    if gradients[0].device.type == "cpu":  # where the norm of one tensor takes 25 times as long
        extremes = [x for gradient in gradients for x in torch.aminmax(gradient)]
    else:
        extremes = list(torch._foreach_norm(gradients, math.inf))
    finite = torch.isfinite(torch.stack([x.float() for x in extremes]).square())
    return finite.view(len(gradients), -1).all(-1)
