"""The plans of all units: which waves they step through, made together with the other ranks.

A plan is made at the first step, and again when parameters, options or state tensors are not those that it was made
on.  State that there is goes into the new plan; state of new parameters is initialised.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..exceptions import OptionError
from ..options import Options, structure
from ..sharding.agreement import all_or_none, gather_or_raise
from ..sharding.exchange import Ranks, host
from ..sharding.local_parameter import LocalParameter, check_trainable, full_shape
from ..sharding.rendezvous import announced
from ..sharding.replicas import ReplicaChecks
from .build import build
from .equal_replicas import EqualReplicas, require_equal_state
from .model_groups import ModelGroups
from .state_layout import Entry, foreign_state, own_state
from .units import Key, Lent, Standing, Unit, UnitPlan, is_lost, units_of, warn_of_fresh
from .waves import Wave

PUT_AWAY = -1
"""In the place of a group's position: a plan of groups that were edited, whose state goes into the next one."""

State = dict[Any, Any]
"""An optimizer's: parameter -> state key -> tensor, and what wrappers keep in it."""


class BlockReader(NamedTuple):
    """State that is still on disk: it is read when it is known which blocks are this rank's."""

    read: Callable[[dict[str, Tensor]], None]
    """Fills the tensors that it is given, named as `WaveState.named_blocks` does; raises if one is missing."""
    groups: int
    """How many of the first groups it has state of."""
    names: Set[str]
    """Of the parameters that it has state of."""


class Plans:
    """A plan for each unit, and the ranks that it was made with."""

    def __init__(self, groups: ModelGroups) -> None:
        self.groups = groups
        self.ranks = Ranks()
        self.of_unit: dict[Key, UnitPlan] = {}
        self.reader: BlockReader | None = None
        self.replica_checks = ReplicaChecks()
        self.equal_replicas = EqualReplicas()
        self.meeting = ""
        """A word that these ranks alone know, for meetings outside of a step."""
        self._calls = 0
        self.ranks_here = 0
        """How many of the ranks this computer has; 0: the first step will tell."""

    def __bool__(self) -> bool:
        return bool(self.of_unit)

    def announced(self, call: str) -> AbstractContextManager[None]:
        """What every rank must call outside of a step: who has waited in it for a minute is told whom for."""
        self._calls += 1
        said = (
            f"in {call} for ranks {{ranks}}, which have not called it: where state is spread over ranks, what saves it "
            "is called on every rank, also if one alone writes"
        )
        return announced(self.ranks, f"{self.meeting}/call/{self._calls}", said)

    def waves(self, group: int | None = None) -> list[Wave]:
        """Of all groups, or of one."""
        return [wave for (g, _), plan in self.of_unit.items() if group in (None, g) for wave in plan.waves]

    def units(self, called: Sequence[dict[str, Any]], state: State) -> list[Unit]:
        """What this call is to update; `called` are the optimizer's groups now."""
        self.groups.follow(called, in_part=True)
        if self.groups.were_edited:
            if self.reader is not None and not self.of_unit:
                raise RuntimeError(
                    "param_groups was edited after load_optimizer() and before the step that reads the state, which "
                    "goes by the groups' places: load it again, and edit the list before that or after the step"
                )
            self.groups.were_edited = False
            if self.of_unit:
                self.reader = None
            self.of_unit = {(PUT_AWAY, i): plan for i, plan in enumerate(self.of_unit.values())}
        return units_of(self.groups, called, self.of_unit, partial(self._needs, state))

    def is_stale(self, unit: Unit, state: State) -> bool:
        """Whether a unit has no plan, or one on other parameters, state tensors or options."""
        plan = self.of_unit.get(unit.key)
        return plan is None or plan.identity != unit.identity() or not plan.holds(state)

    def reclaim(self, state: State) -> None:
        """What others have put in the place of state that every rank computes goes into the stacks, to be compared."""
        for plan in self.of_unit.values():
            if any(wave.all_apply for wave in plan.waves) and not plan.holds(state):
                for wave in plan.waves:
                    wave.state.copy_whole(entries_of(wave, state), [False] * len(wave.state.map.groups))

    def follow_steps(self) -> bool:
        """A group's count of steps that was set by hand since the last step is that of all its units, and their
        parameters' may be others too.

        Returns:
            Whether there is one.
        """
        if self.groups.were_edited:  # the plans have the groups' places before
            return False
        counted: dict[int, int] = {}  # by the unit that was updated last
        for (index, _), plan in self.of_unit.items():
            counted[index] = max(plan.step, counted.get(index, 0))
        put_back = False
        for index, step in counted.items():
            if index != PUT_AWAY and (now := self.groups.groups[index]["step"]) != step:
                put_back = True
                for plan in [plan for key, plan in self.of_unit.items() if key[0] == index]:
                    plan.step, plan.identity = now, None  # so that it is made anew
        return put_back

    def replicas(self, units: Sequence[Unit]) -> list[LocalParameter]:
        """Plain tensors that every rank has."""
        waves = [wave for unit in units if unit.key in self.of_unit for wave in self.of_unit[unit.key].waves]
        return [
            member.local for wave in waves for member in wave.members
            if member.placement.whole and not hasattr(member.parameter, "device_mesh")
        ]  # fmt: skip

    def make(self, units: Sequence[Unit], state: State) -> None:
        """Plan some units anew; every rank must call it.  `state` then holds views of the waves' stacks.

        Raises:
            RuntimeError: state that only some ranks have or that is there in part, or another rank failed.
            TypeError, ValueError: parameters or a checkpoint that these ranks cannot train; state of other options or
                shapes than there are now.
        """
        ranks, before = self.ranks, [self.of_unit.get(unit.key) for unit in units]
        if not self.meeting:
            words, hosts = zip(*ranks.gather((uuid.uuid4().hex, host())), strict=True)
            self.meeting, self.ranks_here = words[0], hosts.count(hosts[ranks.rank])
        units, dropped = self._surveyed(units, state)
        with all_or_none(ranks):
            was = {p: plan.structure for plan in self.of_unit.values() for p in plan.state}
            now = [structure(unit.group) for unit in units]
            for unit, of_unit, plan in zip(units, now, before, strict=True):
                _require_structure(unit, of_unit, was, plan, state)
                for local in unit.members:
                    check_trainable(local.parameter)
        left_behind = self._left_behind(units)
        if ranks.world > 1:  # owners may change
            for wave in [wave for plan in (*before, *left_behind.values()) if plan for wave in plan.waves]:
                wave.state.load(entries_of(wave, state))
                _put(wave, wave.state.full(), state)
        for p in dropped:
            state[p] = foreign_state(state[p])
        planned = self._built(units, state)
        new = [wave for waves, old in zip(planned, before, strict=True) if old is None for wave in waves]
        require_equal_state(ranks, [(wave, entries_of(wave, state)) for wave in new])
        for wave in [wave for waves in planned for wave in waves]:
            wave.state.load(entries_of(wave, state))
            _put(wave, wave.state.lent(), state)
        self._read(units, planned, before)
        self._count_updates([wave for waves in planned for wave in waves])
        for unit, of_unit, waves, old in zip(units, now, planned, before, strict=True):
            entries = {local.parameter: own_state(state[local.parameter]) for local in unit.members}
            views = {p: {key: Lent.of(t) for key, t in entry.items()} for p, entry in entries.items()}
            others = (plan.start for (index, _), plan in self.of_unit.items() if index == unit.key[0])
            start = old.step if old else next(others, unit.group["step"])
            everything = set(self.groups.parameters(unit.key[0]))
            lent = [stack.lent.get(("steps", "dense"), [])[:1] for wave in waves for stack in wave.stacks]
            counts = [view for views_of_one in lent for view in views_of_one]  # none in inference mode
            plan = UnitPlan(unit.identity(), everything, views, waves, of_unit, start, start, counts)
            self.of_unit[unit.key] = plan
            plan.seal()
        for wave in [wave for plan in (*before, *left_behind.values()) if plan for wave in plan.waves]:
            wave.let_go()
        for key in left_behind:
            del self.of_unit[key]
        self.groups.let_go()
        self.equal_replicas.begin()
        if ranks.world > 1:
            with all_or_none(ranks):
                self.replica_checks.begin(self.replicas(units), self.groups.every_parameter())

    def _left_behind(self, units: Sequence[Unit]) -> dict[Key, UnitPlan]:
        """Plans of other groups that these units' parameters were in, which were edited or taken out since."""
        keys, members = {unit.key for unit in units}, {local.parameter for unit in units for local in unit.members}
        return {
            key: plan
            for key, plan in self.of_unit.items()
            if key[0] == PUT_AWAY or (key not in keys and not members.isdisjoint(plan.state))
        }

    def _built(self, units: Sequence[Unit], state: State) -> list[list[Wave]]:
        """Waves for each unit, into which the state that there is fits."""
        with all_or_none(self.ranks):
            planned = build(
                [(Options.of(unit.group), unit.members, self._planned_shapes(unit)) for unit in units], self.ranks
            )
            for wave in [wave for waves in planned for wave in waves]:
                wave.state.check(entries_of(wave, state))
        return planned

    def _read(
        self, units: Sequence[Unit], planned: Sequence[Sequence[Wave]], before: Sequence[UnitPlan | None]
    ) -> None:
        """Read what is still on disk, while there is no plan: a step that fails here has not been made."""
        if self.reader is None:
            return
        unread = [
            wave
            for unit, waves, old in zip(units, planned, before, strict=True)
            if old is None and unit.key[0] < self.reader.groups
            for wave in waves
        ]
        with all_or_none(self.ranks):
            self.reader.read({name: row for wave in unread for name, row in wave.state.named_blocks().items()})

    def _count_updates(self, waves: Sequence[Wave]) -> None:
        """Tell every rank how many updates each parameter has had, as the state says that is spread over them."""
        members = [member for wave in waves for member in wave.members]
        counts = [torch.zeros(0, dtype=torch.float32, device="cpu"), *(wave.update_counts().cpu() for wave in waves)]
        for member, count in zip(members, self.ranks.reduce(torch.cat(counts), largest=True).tolist(), strict=True):
            member.updates = int(count)

    def _needs(self, state: State, local: LocalParameter) -> bool:
        """Whether this rank has a part of a parameter's training: as torch's optimizers, it takes every gradient."""
        if local.parameter.requires_grad or local.buffer.grad is not None:
            return True
        awaited = self.reader is not None and local.name in self.reader.names
        return awaited or bool(own_state(state.get(local.parameter, {})))

    def _surveyed(self, units: Sequence[Unit], state: State) -> tuple[list[Unit], list[Tensor]]:
        """The units with the members that all ranks agree on, and the parameters whose state is not kept.

        Raises:
            RuntimeError: see `is_lost`.
        """
        before = {p: entry.keys() for plan in self.of_unit.values() for p, entry in plan.state.items()}
        here = set(self.groups.every_parameter())
        ranks = gather_or_raise(
            self.ranks, lambda: [[self._standing(local, before, state) for local in unit.candidates] for unit in units]
        )
        surveyed, dropped, fresh = [], [p for p in before if p not in here], list[str]()
        for i, unit in enumerate(units):
            plan, members = self.of_unit.get(unit.key), []
            known = plan.everything if plan and not here.issuperset(plan.state) else here
            for j, local in enumerate(unit.candidates):
                standings = [of_rank[i][j] for of_rank in ranks]
                lost = is_lost(local.name, standings)
                if lost:
                    dropped.append(local.parameter)
                if any(standing.needed for standing in standings):
                    members.append(local)
                    if lost or (local.parameter not in known and not any(standing.there for standing in standings)):
                        fresh.append(local.name)
            surveyed.append(unit._replace(members=members))
        if fresh:
            warn_of_fresh(
                fresh,
                "their state was emptied, or they took the place of others.  If that was not meant (a model that is "
                "wrapped or moved after its first step leaves it behind), load the last checkpoint",
            )
        return surveyed, dropped

    def _standing(self, local: LocalParameter, before: Mapping[Tensor, Set[str]], state: State) -> Standing:
        """How one parameter's state is on this rank; `before` has the keys of what the plan before had."""
        p = local.parameter
        had, has = set(before.get(p, ())), set(own_state(state.get(p, {})))
        complete = had <= has
        torn = bool(had & has) and not complete
        return Standing(self._needs(state, local), p in before, bool(had), bool(has) and complete, torn)

    def _planned_shapes(self, unit: Unit) -> dict[str, tuple[int, ...]]:
        """Of all in the unit's group that is planned, the unit's own and, with DeepSpeed, that of its other parts."""
        members = {id(local.parameter) for local in unit.members}
        named = self.groups.named(unit.key[0])
        return {name: full_shape(p) for name, p in named if p.requires_grad or id(p) in members}


def _require_structure(
    unit: Unit, now: dict[str, Any], was: Mapping[Tensor, dict[str, Any]], plan: UnitPlan | None, state: State
) -> None:
    """Refuse state that was made with other options than its group has now: numbers that mean something else.

    Args:
        unit: as it is to be planned.
        now: its group's structural options.
        was: under which options the parameters were planned before, perhaps in another group.
        plan: the unit's before; of a parameter that took another's place with its state.
        state: the optimizer's.

    Raises:
        OptionError: a structural option was changed, and the state was kept.
    """
    for local in unit.members:
        then = was.get(local.parameter, plan.structure if plan else now)
        if then != now and own_state(state.get(local.parameter, {})):
            name = next(name for name, value in then.items() if now[name] != value)
            raise OptionError(
                f"{name} was changed from {then[name]!r} to {now[name]!r} in the parameter group of {local.name!r}, "
                "and the state that there is means something else: set it back, or delete the state "
                "(del optimizer.state[parameter]) to begin afresh"
            )


def entries_of(wave: Wave, state: Mapping[Any, Any]) -> list[Entry]:
    """What there is of its members' state."""
    return [own_state(state.get(member.parameter, {})) for member in wave.members]


def _put(wave: Wave, entries: Mapping[int, Entry], state: State) -> None:
    """Member -> its new state, beside what wrappers keep of it."""
    for m, entry in entries.items():
        p = wave.members[m].parameter
        state[p] = {**foreign_state(state[p]), **entry}
