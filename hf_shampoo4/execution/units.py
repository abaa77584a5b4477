"""What one call of `step` updates together, its plan, and how its state stands on the ranks before a plan is made."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..options import NAMES
from ..sharding.deepspeed import deepspeed_parameters
from ..sharding.local_parameter import LocalParameter, local_parameter
from .model_groups import Group, ModelGroups
from .waves import Wave

Key = tuple[int, int]
"""Of a unit: position of the group, and in it of the first parameter, trained or not."""


class Unit(NamedTuple):
    """What one call updates together: a group, or the part of it that is in one tensor of DeepSpeed's."""

    key: Key
    group: Group
    members: list[LocalParameter]
    """What is planned: on this rank or, while a plan is made, on any."""
    candidates: list[LocalParameter]
    """Everything that could be, the same on every rank."""

    def identity(self) -> Any:
        """What a plan depends on."""
        live = [(id(local.buffer), local.buffer.device, local.buffer.dtype, local.shape) for local in self.members]
        return [self.group[name] for name in NAMES], live


class Lent(NamedTuple):
    """A state tensor as a plan has left it in `optimizer.state`."""

    tensor: weakref.ref[Tensor]
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> Lent:
        """As it is now."""
        return cls(weakref.ref(tensor), tensor.data_ptr())


@dataclass
class UnitPlan:
    """A unit's waves, and what they were built on."""

    identity: Any
    everything: set[Tensor]
    """All parameters of the group, frozen ones too."""
    state: dict[Tensor, dict[str, Lent]]
    """The very tensors that the waves work on."""
    waves: list[Wave]
    structure: dict[str, Any]
    """The options that the state's form and meaning go by."""
    start: int
    """The group's step before any of its units was updated."""
    step: int
    """The group's step at which this one was updated last."""
    counts: list[weakref.ref[Tensor]] = field(default_factory=list)
    """Of the stacks' counts of updates, a view of each."""
    versions: list[int] = field(default_factory=list)
    """Of these after the last step."""

    def count(self, group: Group) -> int:
        """One more step; of several units of a group, the first counts the group's.

        Returns:
            The number of the step.
        """
        if self.step == group["step"]:
            group["step"] += 1
        self.step = group["step"]
        return self.step

    def holds(self, state: Mapping[Any, Any]) -> bool:
        """Whether `state` still has the very tensors that the waves work on (offloading replaces them), and these have
        the counts that the last step left there (an earlier state may have been copied into them)."""
        for p, entry in self.state.items():
            there = state.get(p, {})
            for key, (ref, address) in entry.items():
                tensor = ref()  # in other memory after `tensor.data = ...`
                if tensor is None or there.get(key) is not tensor or tensor.data_ptr() != address:
                    return False
        for ref, version in zip(self.counts, self.versions, strict=True):
            count = ref()
            if count is None or count._version != version:
                return False
        return True

    def seal(self) -> None:
        """A step is made, or its plan."""
        self.versions = [-1 if (count := ref()) is None else count._version for ref in self.counts]


def units_of(
    groups: ModelGroups,
    called: Sequence[Group],
    plans: Mapping[Key, UnitPlan],
    is_needed: Callable[[LocalParameter], bool],
) -> list[Unit]:
    """What this call is to update: all groups or, as DeepSpeed calls it, one group or a part of one.

    Args:
        groups: all that the optimizer has; they follow what is called.
        called: those that are in the optimizer's `param_groups` now.
        plans: what is planned so far.
        is_needed: whether this rank has a part in a parameter's training.
    """
    units = []
    for index, group in enumerate(groups.groups):
        if not any(group is there for there in called):
            continue
        named = groups.named(index)
        if [*map(id, group["params"])] != [id(p) for _, p in named]:  # DeepSpeed's tensors are in their place
            found = [deepspeed_parameters(buffer, named) for buffer in group["params"]]
        else:
            found = [[local_parameter(name, p) for name, p in named]]
        first = {name: i for i, (name, _) in enumerate(named)}
        for candidates in found:
            key = (index, first[candidates[0].name] if candidates else 0)
            plan = plans.get(key)
            members = [p for p in candidates if is_needed(p) or (plan and p.parameter in plan.state)]
            units.append(Unit(key, group, members, candidates))
    return units


def is_dry_run(units: Sequence[Unit], groups: ModelGroups) -> bool:
    """Whether an engine steps on zeros before training, so that optimizers make their state: nothing is to be done.

    DeepSpeed without ZeRO does, with copies of whole 16-bit parameters, which are alike on all ranks.
    """
    if any(group["step"] for group in groups.groups):
        return False
    models, members = groups.model_ids(), [local for unit in units for local in unit.members]
    copies = [one.buffer for one in members if type(one.buffer) is Tensor and one.buffer is one.parameter]
    gradients = [p.grad for p in copies if id(p) not in models and p.grad is not None]
    return bool(members) and len(gradients) == len(members) and not any(g.any() for g in gradients)


class Standing(NamedTuple):
    """How a parameter's state is on a rank before a plan is made."""

    needed: bool
    """Whether the rank wants it planned."""
    planned: bool
    """Whether the plan before had it."""
    had: bool
    """Whether the rank had some of its state then; of spread state not every rank has."""
    there: bool
    torn: bool
    """Whether a part of it is missing."""


def is_lost(name: str, standings: Sequence[Standing]) -> bool:
    """Whether a parameter's state is gone on all ranks that had it in the plan before.

    Args:
        name: of the parameter, for the message.
        standings: by rank.

    Raises:
        RuntimeError: it is gone on some of them, or in part: nobody can have meant that.
    """
    having = [rank for rank, s in enumerate(standings) if s.there]
    lacking = [rank for rank, s in enumerate(standings) if not s.there and (s.had or not s.planned)]
    torn = [rank for rank, s in enumerate(standings) if s.torn]
    if torn or (having and lacking):
        where = f"lacks tensors on ranks {torn}" if torn else f"is there on ranks {having} and gone on ranks {lacking}"
        raise RuntimeError(f"the state of {name!r} {where}: load the same checkpoint on every rank, or empty it on all")
    return any(s.had and not s.there for s in standings)


def warn_of_lengthless(groups: Iterable[Group]) -> None:
    """Say that a share of the training was asked for, and that nobody has said how long that is."""
    share = max((group["stochastic_last"] for group in groups if not group["stochastic_from"]), default=0.0)
    if share:
        warnings.warn(
            f"stochastic_last={share} has no effect without the length of the training: in the Trainer add "
            "callbacks=[hf_shampoo4.Shampoo4bitCallback()], which knows it, and elsewhere give stochastic_from, a step",
            stacklevel=3,
        )


def warn_of_fresh(names: Sequence[str], why: str) -> None:
    """Say which trained parameters begin with empty state, and why."""
    shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    warnings.warn(f"{len(names)} of the parameters that are trained ({shown}) start afresh: {why}", stacklevel=2)
