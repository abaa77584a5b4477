"""The parameter groups of an optimizer as the model has them, whatever an engine has put in their place.

DeepSpeed replaces a group's parameters by flat tensors of its own, and calls `step` with some of the groups only: the
list that a group had is kept, with the model's parameters in it.  Not by weak references: torch does not move a module
whose parameters are DTensors that have some.  And not beyond the first plan where others than DeepSpeed have replaced
them, FSDP2 for good.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..exceptions import OptionError
from ..options import NAMES, Options, cast, check_rates, require_kind
from ..preconditioners.moments import make_base
from ..sharding.geometry import matrix_view
from ..sharding.local_parameter import (
    check_trainable,
    clean_name,
    full_shape,
    in_deepspeed,
    noted_name,
    noted_purpose,
)

Group = dict[str, Any]


class ModelGroups:
    """All parameter groups of an optimizer, with the model's parameters of each."""

    def __init__(self, groups: Sequence[Group] = ()) -> None:
        self.groups: list[Group] = []
        self._models: list[list[Tensor]] = []
        self._purposes: list[list[str]] = []
        self._names: set[str] = set()  # own ones, that one parameter alone has
        self._like_positions = False
        """Whether any of them may be one, as "1.0" in a ParameterList is."""
        self._digest = ""
        self.were_edited = False
        """Whether groups have other places than plans were made for; who plans takes it back."""
        for group in groups:
            self.add(group)

    def __len__(self) -> int:
        return len(self.groups)

    def add(self, group: Group) -> None:
        """A group that the optimizer has been given."""
        self.groups.append(group)
        self._models.append(group["params"])  # accelerate empties this very list before FSDP2 cuts the model
        # only `param_groups` says of which kind a group is
        self._purposes.append([noted_purpose(p) if group["kind"] != "any" else "" for p in group["params"]])
        self._note_names()

    def drop_last(self) -> None:
        """Take back the group that was added last."""
        for of_groups in (self.groups, self._models, self._purposes):
            of_groups.pop()
        self._note_names()

    def follow(self, groups: Sequence[Group], in_part: bool = False) -> None:
        """The optimizer's groups now: frameworks put other dicts in their place, and users edit the list.

        Args:
            groups: of the optimizer.
            in_part: whether those that are missing may come back: DeepSpeed takes some out for a step.

        Raises:
            OptionError: a group that was put into the list without the options of one.
        """
        if len(groups) == len(self.groups) and all(a is b for a, b in zip(groups, self.groups, strict=True)):
            return
        place = {id(group): i for i, group in enumerate(self.groups)}
        places = [place.get(id(group), -1) for group in groups]
        is_edited = sorted(places) != places or (len(groups) != len(self.groups) and (-1 in places or not in_part))
        for i, group in enumerate(groups):
            if places[i] < 0:
                _require_options(i, group)
        if is_edited and not any(map(self.is_replaced, range(len(self.groups)))):
            self.groups, self._models, self._purposes, self._digest, self.were_edited = [], [], [], "", True
            for group in groups:
                self.add(group)
        elif len(groups) == len(self.groups):
            self.groups = list(groups)
            self._note_names()

    def is_replaced(self, index: int) -> bool:
        """Whether DeepSpeed has put its own tensors in the place of the parameters of group `index`."""
        return any(map(in_deepspeed, self._models[index]))

    def parameters(self, index: int) -> list[Tensor]:
        """The parameters of group `index`: the model's, also where DeepSpeed has put its own tensors in their place."""
        if not self.is_replaced(index):
            return self.groups[index]["params"]
        return self._models[index]

    def let_go(self) -> None:
        """Of parameters that others have taken the place of for good: a plan is made."""
        self._models = [self.parameters(index) for index in range(len(self.groups))]

    def every_parameter(self) -> list[Tensor]:
        """Of all groups."""
        return [p for index in range(len(self.groups)) for p in self.parameters(index)]

    def model_ids(self) -> set[int]:
        """The ids of the tensors that were in the groups when these were added."""
        return {id(p) for models in self._models for p in models}

    def named(self, index: int) -> list[tuple[str, Tensor]]:
        """The parameters of group `index`, each with a name that is the same in every run: its own, or its position.

        A name that two parameters have, of two models perhaps, says nothing.
        """
        parameters = self.parameters(index)
        own = own_names(self.groups[index])
        own = own if len(own) == len(parameters) else [""] * len(parameters)
        names = [name if name in self._names else f"{index}.{i}" for i, name in enumerate(own)]
        if self._like_positions:
            names = [name if name == mine else self._clear(name) for name, mine in zip(names, own, strict=True)]
        return list(zip(names, parameters, strict=True))

    def _clear(self, position: str) -> str:
        """A position that is no parameter's name: none begins with a dot."""
        while position in self._names:
            position = f".{position}"
        return position

    def _note_names(self) -> None:
        uses = Counter(name for group in self.groups for name in own_names(group))
        self._names = {name for name, count in uses.items() if name and count == 1}
        self._like_positions = any(name[0].isdigit() for name in self._names)

    def names(self, index: int) -> list[str]:
        """Of the parameters of group `index`, see `named`."""
        return [name for name, _ in self.named(index)]

    def purposes(self, index: int) -> list[str]:
        """What each parameter of group `index` is for, as `param_groups` noted it; empty for what it has not seen."""
        noted, count = self._purposes[index], len(self.parameters(index))
        return noted if len(noted) == count else [""] * count

    @contextmanager
    def restored(self, state: dict[Any, Any]) -> Iterator[None]:
        """The groups with the model's parameters in them, where an engine has put its own tensors in their place."""
        theirs = [group["params"] for group in self.groups]
        for index, group in enumerate(self.groups):
            group["params"] = self.parameters(index)
        known = {p for group in self.groups for p in group["params"]}
        for p in [p for p in state if isinstance(p, Tensor) and p not in known and not state[p]]:
            del state[p]  # DeepSpeed has looked its own tensors up
        try:
            yield
        finally:
            for group, params in zip(self.groups, theirs, strict=True):
                group["params"] = params

    def settings(self, planned: Collection[Any], afresh: bool) -> str:
        """What must be the same on all ranks: options, parameters, and which units have a plan.

        Args:
            planned: the keys of the units that have one.
            afresh: whether shapes and names may have changed.
        """
        if afresh or not self._digest:
            shapes = [
                [(name, full_shape(p), p.dtype) for name, p in self.named(index)] for index in range(len(self.groups))
            ]
            self._digest = hashlib.sha256(repr(shapes).encode()).hexdigest()
        # cards of other sizes may give other memory, of which the least is taken
        options = [[group[n] for n in (*NAMES, "step") if n != "working_memory"] for group in self.groups]
        trained = [p.requires_grad for p in self.every_parameter()]
        return repr((self._digest, options, trained, sorted(planned)))

    def explained(self, planned: Collection[Any]) -> list[Group]:
        """The settings, and the rates, for people: group by group."""
        return [
            {
                **{name: group[name] for name in (*NAMES, "step")},
                "the state": "kept" if any(index == i for index, _ in planned) else "new, or just loaded",
                **{
                    f"parameter {name!r}": f"{'trained' if p.requires_grad else 'frozen'}, {full_shape(p)} {p.dtype}"
                    for name, p in self.named(i)
                },
                **{name: float(group[name]) for name in ("lr", "eps", "weight_decay")},
                **{f"betas[{k}]": float(beta) for k, beta in enumerate(group["betas"])},
            }
            for i, group in enumerate(self.groups)
        ]

    def rates(self) -> list[list[float]]:
        """Of each group lr, eps, weight decay and both betas, which schedules may compute with other last bits on
        another rank.  Each is read once: of a tensor on a GPU that waits for it.

        Raises:
            OptionError: one that no step can be made with; of any group, for an engine may step through one at a time.
        """
        return [_rates(group) for group in self.groups]


def _rates(group: Group) -> list[float]:
    try:
        found = [*map(float, (group["lr"], group["eps"], group["weight_decay"], *group["betas"]))]
    except (TypeError, ValueError, OverflowError):
        found = []
    if len(found) != 5 or not all(map(math.isfinite, found)) or not all(0 <= beta < 1 for beta in found[3:]):
        try:
            check_rates(group)
        except OptionError as error:
            raise OptionError(
                f"{error}; look at the schedule that has set it (0 steps of warmup or in all, perhaps)"
            ) from error
    return found


def _require_options(index: int, group: Group) -> None:
    for name in (*NAMES, "lr", "betas", "eps", "weight_decay", "step", "skipped_steps"):
        if name not in group:
            raise OptionError(
                f"parameter group {index} was put into param_groups without {name!r}: use add_param_group()"
            )


def own_names(group: Mapping[str, Any]) -> list[str]:
    """The names that a group has for its parameters; none if it has no names."""
    return [clean_name(name) for name in group.get("param_names") or []]


def with_names(group: Mapping[str, Any], named: bool) -> Group:
    """A copy of a group as torch takes it: with a name for each parameter, "" if none is known, or without names.

    Args:
        group: as a user or another program gives it.
        named: whether the groups before it have names.
    """
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else params if isinstance(params, set) else list(params)
    names = group.get("param_names")
    found = {**group, "params": params}
    if any(isinstance(p, tuple) for p in params):
        return found  # torch reads them
    if (named and names is None) or (names is not None and len(names) != len(params)):
        found["param_names"] = [noted_name(p) for p in params]
    return found


def truly_named(group: Group) -> Group:
    """Without its names if they are not one for each parameter: its list was edited by hand."""
    if "param_names" not in group or len(group["param_names"]) == len(group["params"]):
        return group
    return {key: value for key, value in group.items() if key != "param_names"}


def check_keys(group: Mapping[str, Any]) -> None:
    """A group may carry foreign keys (schedulers put some there), but not an option that is spelt wrong.

    Raises:
        OptionError: a key that is nearly an option.
    """
    for key in group:
        close = difflib.get_close_matches(key, NAMES, n=1, cutoff=0.8)
        if close:
            raise OptionError(f"unknown option {key!r} in a parameter group: did you mean {close[0]!r}?")


def read_options(group: Group) -> None:
    """Read what was set in a group by hand as the constructor's options are read: text becomes numbers.

    Raises:
        OptionError, ImportError: the message says what is allowed.
    """
    group.update({name: cast(name, group[name]) for name in NAMES})
    require_kind(group)
    make_base((1,), Options.of(group), quantise=True)  # raises if a storage needs a package that is missing


def check_group(group: Group) -> None:
    """Refuse a group whose numbers, options or parameters cannot be trained with; `betas` becomes a tuple.

    Raises:
        OptionError, ImportError, TypeError, ValueError: the message says what is allowed.
    """
    check_rates(group)
    betas = group["betas"]
    if group["nesterov"] and betas[0] == 0:
        raise OptionError(f"betas={betas!r} is not allowed: nesterov needs a momentum, the first number in (0, 1)")
    group["betas"] = tuple(betas)
    read_options(group)
    if len({id(p) for p in group["params"]}) < len(group["params"]):
        raise ValueError("a parameter is in its group twice: it would be updated twice a step")
    for p in group["params"]:
        if p.requires_grad:  # frozen ones may be of any kind, such as quantised weights
            check_trainable(p)


def check_row_splits(groups: Sequence[Group]) -> None:
    """Refuse `row_splits` that fit no parameter.

    Raises:
        OptionError: no matrix has as many rows as they add up to.
    """
    for splits in {group["row_splits"] for group in groups} - {()}:
        shapes = [(full_shape(p), g["matrix_view"]) for g in groups if g["row_splits"] == splits for p in g["params"]]
        rows = {view.rows for view in (matrix_view(*shape) for shape in shapes) if view}
        if sum(splits) not in rows:
            raise OptionError(
                f"row_splits={splits} add up to {sum(splits)}, but the matrices have {sorted(rows)} rows: "
                "give the sizes along dim 0 of a fused parameter"
            )
