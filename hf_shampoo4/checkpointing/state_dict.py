"""An optimizer's state dict: `saved` makes it, `accepted` checks one that may be anything and makes it this model's."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..exceptions import CheckpointError, OptionError
from ..execution.blocking import blocks_of
from ..execution.model_groups import Group, ModelGroups, own_names, truly_named
from ..execution.state_layout import Entry, foreign_state, own_state, state_layout
from ..options import NAMES, OF_THE_RUN, STRUCTURAL, Options, require_kind, structure
from ..sharding.local_parameter import clean_name, full_shape, in_deepspeed, in_fsdp1
from .formats import check_entry, well_formed
from .names import OTHERS, renamed, told_apart


def saved(groups: Sequence[Group], state: Mapping[Any, Any], spread: Mapping[Tensor, Entry]) -> dict[str, Any]:
    """A state dict as torch's: parameters by their position through the groups.

    Args:
        groups: with the model's parameters in them.
        state: parameter -> what this rank keeps of its state; and notes of hooks.
        spread: parameter -> its state as it is to be saved, where that is another (`SpreadState.full`).
    """
    members = [p for group in groups for p in group["params"]]
    number = {id(p): i for i, p in enumerate(members)}
    numbered = [{**truly_named(group), "params": [number[id(p)] for p in group["params"]]} for group in groups]
    found: dict[Any, Any] = {}
    for p, entry in state.items():
        if not isinstance(p, Tensor):
            found[p] = entry  # a hook's note
        elif id(p) in number:
            found[number[id(p)]] = {**foreign_state(entry), **spread[p]} if p in spread else entry
    return {"state": found, "param_groups": numbered}


class Accepted(NamedTuple):
    """A state dict with this model's parameters in it."""

    state: defaultdict[Any, Any]
    """Parameter -> its saved state, in the dtypes that it was saved in."""
    groups: list[Group]
    stateless: list[str]
    """The names of those that are trained here and have no state there."""
    unlike: dict[str, tuple[Any, Any]]
    """Options that the run has otherwise, and which the state's form does not tell: what is there, and here."""


def accepted(state_dict: Any, groups: ModelGroups, ours: Sequence[Group]) -> Accepted:
    """Check that a state dict fits the model and its options, and key it by the model's parameters.

    torch's own loading would cast all state, codes too, to the parameters' dtype.

    Args:
        state_dict: may be anything; not changed.
        groups: of the optimizer.
        ours: the optimizer's `param_groups`, with the model's parameters in them.

    Raises:
        CheckpointError: it does not fit; the message says where.
    """
    state_dict = _numbered(well_formed(state_dict), groups, ours)
    stateless = _check(state_dict, groups, ours)
    unlike = _unlike(state_dict["param_groups"], ours)
    parameter: dict[Any, Tensor] = {}
    theirs = copy.deepcopy(state_dict["param_groups"])
    for group, mine in zip(theirs, ours, strict=True):
        parameter.update(zip(group["params"], mine["params"], strict=True))
        if "param_names" in mine and ("param_names" not in group or len(own_names(mine)) == len(mine["params"])):
            group["param_names"] = mine["param_names"]
        group.update(params=mine["params"], **{name: mine[name] for name in OF_THE_RUN})
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, entry in state_dict["state"].items():
        state[parameter.get(key, key)] = _copied(entry, parameter[key]) if key in parameter else entry
    return Accepted(state, theirs, stateless, unlike)


def _unlike(theirs: Sequence[Group], ours: Sequence[Group]) -> dict[str, tuple[Any, Any]]:
    told = {*STRUCTURAL, *OF_THE_RUN, "stochastic_from"}  # the last is made of the length of the training
    compared = (*NAMES, "weight_decay", "betas", "eps")  # schedules set lr, and those of momentum the first beta
    return {
        name: (there[name], here[name])
        for there, here in zip(theirs, ours, strict=True)
        for name in compared
        if name not in told
        and name in there
        and not _same(there[name], here[name])
        and not (name == "betas" and "max_momentum" in there)
    }


def _same(there: Any, here: Any) -> bool:
    """Betas may be a tuple or a list, as JSON has made of it."""
    both = [tuple(x) if isinstance(x, (list, tuple)) else x for x in (there, here)]
    return bool(both[0] == both[1])


def without_state(groups: Sequence[Group], ours: ModelGroups) -> dict[str, Any]:
    """A state dict of groups alone, for state that is read later.

    Args:
        groups: as in a state dict, without "params".
        ours: of the optimizer, whose parameters are numbered.
    """
    sizes = [len(ours.parameters(index)) for index in range(len(ours))]
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    numbered = [{**g, "params": list(range(f, f + n))} for g, f, n in zip(groups, first, sizes, strict=False)]
    return {"state": {}, "param_groups": [*numbered, *groups[len(sizes) :]]}


def _copied(entry: Entry, p: Tensor) -> Entry:
    """A parameter's saved state, never the caller's own tensors but where this rank wants a part of them alone."""
    if in_fsdp1(p) or in_deepspeed(p):
        return dict(entry)
    return {name: t.to(p.device, copy=True) if isinstance(t, Tensor) else copy.deepcopy(t) for name, t in entry.items()}


def _numbered(state_dict: dict[str, Any], names: ModelGroups, ours: Sequence[Group]) -> dict[str, Any]:
    """A state dict keyed by the parameters' names, as FSDP's files are, keyed by their positions as torch's are."""
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not any(isinstance(key, str) for group in groups for key in group["params"]):
        return state_dict
    if not any(group.get("param_names") for group in ours):  # nameless here: only the order can tell
        order = {key: i for i, key in enumerate(key for group in groups for key in group["params"])}
        numbered = [{**group, "params": [order[key] for key in group["params"]]} for group in groups]
        return {**state_dict, "param_groups": numbered, "state": {order.get(k, k): v for k, v in state.items()}}
    number: dict[str, int] = {}
    for index in range(len(ours)):
        number.update({name: len(number) + i for i, name in enumerate(names.names(index))})
    there = {key: clean_name(str(key)) for group in groups for key in group["params"]}
    new = renamed(there.values(), number)
    there = {key: new.get(name, name) for key, name in there.items()}
    if not number.keys() >= set(there.values()):
        raise CheckpointError(f"checkpoint {OTHERS}: {told_apart(there.values(), number)}")
    numbered = []
    for group in groups:
        of_group = sorted((there[key] for key in group["params"]), key=number.__getitem__)
        numbered.append({**group, "params": [number[name] for name in of_group], "param_names": of_group})
    return {**state_dict, "param_groups": numbered, "state": {number[there[k]]: v for k, v in state.items()}}


def _check(state_dict: dict[str, Any], names: ModelGroups, ours: Sequence[Group]) -> list[str]:
    """The names of those that are trained here and have no state there.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    theirs, state = state_dict["param_groups"], state_dict["state"]
    sizes, here = [len(g["params"]) for g in theirs], [len(g["params"]) for g in ours]
    if sizes != here:
        raise CheckpointError(
            f"checkpoint {OTHERS}: groups of {sizes}, here {here}; {told_apart(_all_names(theirs), _all_names(ours))}"
        )
    if len({key for group in theirs for key in group["params"]}) < sum(sizes):
        raise CheckpointError("damaged checkpoint: a parameter is there twice")
    _check_names(theirs, ours)
    of_groups = [
        _check_group(group, mine, names.names(index), state)
        for index, (group, mine) in enumerate(zip(theirs, ours, strict=True))
    ]
    return [name for of_group in of_groups for name in of_group]


def _all_names(groups: Sequence[Group]) -> list[str]:
    return [name for group in groups for name in own_names(group)]


def _check_names(theirs: Sequence[Group], ours: Sequence[Group]) -> None:
    """Compare the parameters of groups that are as large, as far as both have names."""
    there, here = _all_names(theirs), _all_names(ours)
    new = renamed(there, here)
    for group, mine in zip(theirs, ours, strict=True):
        for a, b in zip(own_names(group), own_names(mine), strict=False):
            if new.get(a, a) != b:
                if set(there) == set(here):
                    raise CheckpointError(f"checkpoint of another model: parameter {a!r} there, {b!r} here")
                raise CheckpointError(f"checkpoint {OTHERS}: {told_apart(there, here)}")


def _check_group(there: Group, ours: Group, names: Sequence[str], state: Mapping[Any, Any]) -> list[str]:
    try:
        require_kind({**ours, "rates": there.get("rates", ())})
    except OptionError as error:
        raise CheckpointError(f"the checkpoint was written with {error}") from error
    layout = structure(ours)
    for name, value in structure({**ours, **there}).items():
        if value != layout[name]:
            raise CheckpointError(
                f"the checkpoint was written with {name}={value}, this run has {name}={layout[name]}: "
                f"resume with {name}={value}, or start the optimizer afresh"
            )
    stateless = []
    for key, p, name in zip(there["params"], ours["params"], names, strict=True):
        entry = state.get(key, {})
        if own_state(entry):
            check_entry(name, entry, state_layout(blocks_of(full_shape(p), Options.of(ours))))
        elif p.requires_grad and there["step"] and math.prod(full_shape(p)):
            stateless.append(name)
    return stateless
