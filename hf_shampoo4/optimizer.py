"""`Shampoo4bit`: the torch optimizer, for any number of ranks."""

from __future__ import annotations

import copy
import difflib
import hashlib
import inspect
import math
import uuid
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, get_type_hints

import torch
from torch import Tensor

from .checkpointing.checksums import verified
from .checkpointing.formats import FORMAT, check_entry, clean_name, pack, unpack, well_formed
from .exceptions import CheckpointError, OptionError, SparseGradient
from .execution.blocking import blocks_of
from .execution.build import build
from .execution.state_layout import Entry, foreign, own, state_layout
from .execution.wave_step import WaveStep, run
from .execution.waves import Wave
from .groups import noted_purpose
from .options import KINDS, NAMES, OF_ADAMW, OF_THE_RUN, STRUCTURAL, TYPES, Options, check_rates, resolve
from .preconditioners.diagnostics import Probe
from .preconditioners.moments import make_moments
from .preconditioners.protocols import Context
from .sharding.agreement import Failures, View, agree, all_or_none, gather_or_raise
from .sharding.exchange import ProcessGroup, Ranks
from .sharding.geometry import matrix_view
from .sharding.local_parameter import (
    LocalParameter,
    check_trainable,
    deepspeed_parameters,
    full_shape,
    in_deepspeed,
    in_fsdp1,
    local_parameter,
    noted_name,
)
from .sharding.rendezvous import all_come, announced
from .sharding.replicas import compare, has_gradient, refuse_join, wrappers
from .state_report import table
from .utils.stopwatch import Stopwatch


def _with_options(init: Callable[..., None]) -> Callable[..., None]:
    """Show the options in the signature, where command lines and editors look for them.

    None stands for what is not given: a default that is given would win over a preset's value.
    """
    shown: Any = init
    hints = get_type_hints(init)
    given = [p for p in inspect.signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD]
    own = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in given]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind | None)
        for name, kind in TYPES.items()
    ]
    shown.__signature__ = inspect.Signature([*own, *options])
    return init


class Shampoo4bit(torch.optim.Optimizer):
    """Shampoo with low-bit factors, roots and moments, over AdamW (2405.18144, 2309.01507).

    Matrices (and convolutions and experts through their matrix view) are preconditioned; vectors get the base alone.
    Embeddings and the output head are matrices too: put them in a group with `vocabulary=True`, as
    `hf_shampoo4.param_groups(model)` does.  Of a plain list of parameters, shapes alone are known, and what is a table
    (embeddings, positions, tokens) is preconditioned as any matrix; `report()` says so.

    Any parameters will do, a single bias too: without a matrix among them all are updated by the base alone, as
    `report()` says.  In the Trainer, where they are those of a whole model, that is an error.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any torch optimizer.  A group may set any option.
        lr: learning rate; AdamW's.
        betas: decay of the first and second moment; with base="sgdm" the first is the momentum.
        eps: added to the root of the second moment (KL-Shampoo has none where it preconditions).
        weight_decay: decoupled, as in AdamW; with base="sgdm" coupled, as in torch.optim.SGD: added to the
            (preconditioned) gradient before the momentum.
        preset: a named set of options (`hf_shampoo4.options.PRESETS`).
        config: path of a YAML file with options.
        process_group: the ranks that train this model together, if they are not all of the default group: those over
            which DistributedDataParallel averages its gradients, say.  It is no option of a group and is not saved.
        options: see `hf_shampoo4.options.Options`; explicit ones win over `config`, that over `preset`; one that is
            None counts as not given.

    Raises:
        OptionError: an option that does not exist, or a value that is not allowed.
        TypeError: a parameter that requires a gradient and is not real floating point of 16 bits or more.
        ValueError: this rank is not in `process_group`.
    """

    _reader: Callable[[dict[str, Tensor]], None] | None
    """Reads the state of the first `_unread` groups' blocks, when it is known which are this rank's."""
    _awaited: Set[str]
    """The names of the parameters that it will read."""
    has_seen_gradients: bool
    """Whether any parameter has had a gradient on any rank, since construction or the last load."""

    @_with_options
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        preset: str | None = None,
        config: str | None = None,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        self._process_group = ProcessGroup(process_group)
        given = {name: value for name, value in options.items() if value is not None or name not in NAMES}
        chosen = Options(**resolve(given, preset=preset, config=config))
        base = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._groups: list[dict[str, Any]] = []
        self._models: list[list[weakref.ref[Tensor]]] = []
        self._purposes: list[list[str]] = []
        self._reset()
        super().__init__(params, {**base, **vars(chosen), "step": 0, "skipped_steps": 0, "format": FORMAT})
        _check_row_splits(self.param_groups)

    @torch._disable_dynamo  # a compiled training step would be traced anew at every step; imports dynamo when called
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; with several ranks, all of them must call it.

        State that was emptied on purpose, or of a parameter that took another's place, begins afresh with a warning.
        A step on which any gradient is not finite, or its square (beyond 1.8e19), changes nothing but `skipped_steps`;
        the first in a row is warned of, and `max_skipped` in a row end the training.

        Raises:
            SparseGradient: a sparse gradient; a TypeError and a RuntimeError.
            TypeError: a parameter that was frozen and cannot be trained.
            ValueError: parameters that are sharded in a way that is not supported.
            RuntimeError: ranks with different options or models, or gradients that were not averaged; state that only
                some ranks have or that is there in part; or another rank that failed.  Parameters and state may then be
                updated in part: go on from the last checkpoint.  Or `max_skipped` steps in a row were skipped.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        if not self._built:
            self._ranks = self._find_ranks()
        self._ranks.require()
        units, mine = self._view()
        if mine.failures.first is None and self._is_dry_run(units):
            return loss
        agreed = self._agree(units, mine)
        self.has_seen_gradients |= bool(agreed.present)
        if agreed.finite:
            self._in_a_row.clear()
            for unit in units if agreed.present else ():
                self._update(unit, agreed)
            agreed.failures.raise_on_all()
        else:
            self._skip(units)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state in a form that has no rank in it, so that any number of ranks can load it.

        Under DeepSpeed, which keeps a file for each rank, it is this rank's part of that form; under FSDP1, which lets
        tensors of other shapes than the parameters' through in no other way, it is bytes in the first group.
        Only where this process has all of the state are these the tensors that are trained; elsewhere they are copies:
        what is read into them (`dcp.load(optimizer.state_dict())`) counts once `load_state_dict` has been given them.
        Where parameters or state are sharded, every rank must call it.  Under DDP with `shard_state` one rank may call
        it alone, as the Trainer does, after every rank has called `consolidate()`; it waits for the others otherwise.

        Raises:
            RuntimeError: they have not come (`rendezvous.PATIENCE`).
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with self._with_model_parameters():
            saved = self._saved()
            members = [p for group in self.param_groups for p in group["params"]]
            number = {id(p): i for i, p in enumerate(members)}
            groups = [{**group, "params": [number[id(p)] for p in group["params"]]} for group in self.param_groups]
            state: dict[Any, Any] = {}
            for p, entry in self.state.items():
                if not isinstance(p, Tensor):
                    state[p] = entry  # a hook's note
                elif id(p) in number:
                    state[number[id(p)]] = {**foreign(entry), **saved[p]} if p in saved else entry
        found: dict[str, Any] = {"state": state, "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, found)
            found = found if changed is None else changed
        return pack(found) if any(map(in_fsdp1, members)) else found

    def consolidate(self) -> None:
        """Bring the state that `shard_state` has spread over the ranks to all of them, for `state_dict()`.

        Every rank must call it.  It is kept in the CPU's memory until the next step, and not done twice before that.
        """
        if self._consolidated:
            return
        for wave in self._all_waves():
            if _only_consolidated(wave):
                found = wave.full_state()
                with self.all_or_none():
                    for m, entry in found.items():
                        kept = {key: t.to("cpu", copy=True) for key, t in entry.items()}
                        self._consolidated[wave.members[m].parameter] = kept

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are cast and checked as the constructor's are.

        Other programs edit groups that have names: one whose "param_names" are of another number than its "params", and
        one without names beside groups that have some, are given the names that the model had for the parameters, if
        the Trainer made the groups, else their positions.

        Raises:
            OptionError, TypeError: as the constructor.
        """
        group = _with_names(param_group, bool(self.param_groups and "param_names" in self.param_groups[0]))
        given = {name: group.pop(name) for name in (*NAMES, *OF_ADAMW, "preset", "config") if name in group}
        _check_keys(group)
        chosen = resolve(given, beneath={name: self.defaults[name] for name in NAMES})
        super().add_param_group({**group, **chosen})
        group = self.param_groups[-1]
        self._groups.append(group)
        self._models.append([weakref.ref(p) for p in group["params"]])
        self._purposes.append(_purposes(group))
        try:
            _check_group(group)
        except Exception:
            for groups in (self.param_groups, self._groups, self._models, self._purposes):
                groups.pop()
            raise
        self._shared_names = _shared_names(self._groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, every tensor in the dtype it was saved in.

        What changes the state's layout (bits, factor, block size, ...) must be the same here as there; other options
        and the learning rate come from the checkpoint, as torch has it, but `shard_state`, `wire` and `communicate`,
        which are the run's own.  Hooks that adapt a state dict run before anything is checked.

        Raises:
            CheckpointError: written by another optimizer, for another model or with other structural options,
                incomplete, or not what `checkpoint convert` has written, by its checksums.  Nothing is changed then.
        """
        state_dict = unpack(verified(state_dict))
        state_dict = dict(state_dict) if isinstance(state_dict, dict) else state_dict
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._load(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def load_blocks(
        self, groups: list[dict[str, Any]], read: Callable[[dict[str, Tensor]], None], saved: Set[str]
    ) -> None:
        """Take over the groups' options now, and the blocks' state when the next step has told which are this rank's.

        Args:
            groups: as in a state dict, without "params".
            read: fills the tensors that it is given, named as `Wave.named_blocks` does; it raises if one is missing.
            saved: the names of the parameters that it can read.

        Raises:
            CheckpointError: as `load_state_dict`.
        """
        sizes = [len(self.parameters(index)) for index in range(len(self._groups))]
        first = [sum(sizes[:i]) for i in range(len(sizes))]
        numbered = [{**g, "params": list(range(f, f + n))} for g, f, n in zip(groups, first, sizes, strict=False)]
        self._load({"state": {}, "param_groups": [*numbered, *groups[len(sizes) :]]}, saved)
        self._reader, self._unread, self._awaited = read, len(self._groups), saved

    def named_blocks(self) -> dict[str, Tensor]:
        """The state of the blocks that this rank owns, as `Wave.named_blocks` names it; views.

        Raises:
            RuntimeError: no step has been made that says which these are.
        """
        if not self._built:
            raise RuntimeError("which rank owns which block is known after the first step (also after loading)")
        return {name: row for wave in self._all_waves() for name, row in wave.named_blocks(owned=True).items()}

    def _load(self, state_dict: dict[str, Any], elsewhere: Set[str] = frozenset()) -> None:
        """As torch loads, which would cast all state, codes too, to the parameters' dtype."""
        with self._with_model_parameters():
            state_dict = self._numbered(well_formed(state_dict))
            stateless = [name for name in self._check_checkpoint(state_dict) if name not in elsewhere]
            parameter: dict[Any, Tensor] = {}
            groups = copy.deepcopy(state_dict["param_groups"])
            for group, ours in zip(groups, self.param_groups, strict=True):
                parameter.update(zip(group["params"], ours["params"], strict=True))
                names = {name: ours[name] for name in ("param_names",) if name in ours and name not in group}
                group.update(names, params=ours["params"], **{name: ours[name] for name in OF_THE_RUN})
            state: defaultdict[Any, Any] = defaultdict(dict)
            for key, entry in state_dict["state"].items():
                state[parameter.get(key, key)] = _taken_over(entry, parameter[key]) if key in parameter else entry
            self.__setstate__({"state": state, "param_groups": groups})
        if stateless:
            _warn_of_fresh(stateless, "the checkpoint has no state of them, as if they were frozen when it was written")

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and `pickle`, which one rank may call alone: nothing can be fetched from others here.

        Raises:
            RuntimeError: this rank has a part of the state only.
        """
        spread = {member.parameter for wave in self._all_waves() if not wave.replicated for member in wave.members}
        if spread - self._consolidated.keys() or self._reader is not None:
            raise RuntimeError(
                "a copy or pickle of this optimizer would have a part of its state only, which is spread over ranks or "
                "not read yet: use state_dict() and load_state_dict() on every rank, save_optimizer() or, with "
                "shard_state, consolidate() on every rank before the copy"
            )
        fetched = {p: {**self.state[p], **entry} for p, entry in self._consolidated.items() if self.state.get(p)}
        kept = {"state": defaultdict(dict, {**self.state, **fetched}), "_process_group": self._process_group}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # an older checkpoint's lack what is newer
            for name, value in self.defaults.items():
                if name not in OF_ADAMW:  # torch has put `differentiable` there
                    group.setdefault(name, value)
        self._groups = list(self.param_groups)
        self._shared_names = _shared_names(self._groups)
        if "_models" not in vars(self):  # a copy
            self._models = [[weakref.ref(p) for p in group["params"]] for group in self.param_groups]
            self._purposes = [_purposes(group) for group in self.param_groups]
        self._reset()

    @property
    def rank(self) -> int:
        """Of this process among those that train together; 0 before the first step."""
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        """How many processes train together; 1 before the first step."""
        return self._ranks.world

    def report(self) -> str:
        """A table of what is preconditioned how, why, and in how many bytes of state; also before the first step."""
        return table(self)

    @property
    def process_group(self) -> Any:
        """The group that it was given; None: the default one."""
        return self._process_group.group

    def refresh_seconds(self) -> float:
        """Time spent on factors and roots since construction or the last load."""
        return self._stopwatch.seconds()

    def diagnostics(self) -> list[dict[str, float]]:
        """What the last look at each group's state found, see diagnostics.py; groups that were not looked at are left
        out."""
        return [probe.metrics() for _, probe in sorted(self._probes.items())]

    def names(self, index: int) -> list[str]:
        """A name for every parameter of group `index`, the same in every run: its own, or its position.

        A name that two parameters have, of two models perhaps, says nothing.
        """
        return self._names(index, len(self.parameters(index)))

    def _names(self, index: int, count: int) -> list[str]:
        own = _own_names(self._groups[index])
        own = own if len(own) == count else [""] * count
        return [name if name and name not in self._shared_names else f"{index}.{i}" for i, name in enumerate(own)]

    def parameters(self, index: int) -> list[Tensor]:
        """The parameters of group `index`: the model's, also where DeepSpeed has put its own tensors in their place."""
        models = [ref() for ref in self._models[index]]
        if any(p is not None and in_deepspeed(p) for p in models):
            return [p for p in models if p is not None]
        return self._groups[index]["params"]

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, by rank; any small object.  Every rank must call it."""
        return self._ranks.gather(value)

    def purposes(self, index: int) -> list[str]:
        """What each parameter of group `index` is for, as `param_groups` noted it; empty for what it has not seen."""
        noted, count = self._purposes[index], len(self.parameters(index))
        return noted if len(noted) == count else [""] * count

    def all_or_none(self) -> AbstractContextManager[None]:
        """All ranks leave the block, or all raise; a rank must not fail in it before others wait for it."""
        return all_or_none(self._ranks)

    def _skip(self, units: Sequence[_Unit]) -> None:
        """Count a step that is not made, the same on every rank; the first one in a row is said.

        Raises:
            RuntimeError: too many in a row; weights that are not finite would make all that follow like this.
        """
        for unit in units:
            unit.group["skipped_steps"] += 1
            self._in_a_row[unit.key] += 1
        in_a_row = max(self._in_a_row.values(), default=0)
        most = max((unit.group["max_skipped"] for unit in units), default=0)
        where = [local.name for unit in units for local in unit.members if _is_broken(local.gradient())]
        said = f"gradients are not finite, or too large to square (on this rank of {where[:3] or 'no parameter'})"
        if in_a_row == 1:
            warnings.warn(f"{said}: nothing was updated, and this step is counted in skipped_steps", stacklevel=3)
        if most and in_a_row >= most:
            raise RuntimeError(
                f"{in_a_row} steps in a row made no update, for {said}: go on from the last checkpoint, with a lower "
                "learning rate or smaller max_grad_norm if it comes again, and look at the data of these steps "
                f"(max_skipped={most}; 0 lets it go on for ever)"
            )

    def _reset(self) -> None:
        self._in_a_row: Counter[tuple[int, int]] = Counter()
        self._ranks = Ranks()
        self._built: dict[tuple[int, int], _Built] = {}
        self._described = ""
        self._wrappers: list[weakref.ref[Any]] = []
        self._unchecked: set[int] = set()
        self._probes: dict[tuple[int, int], Probe] = {}
        self._consolidated: dict[Tensor, Entry] = {}
        self._reader, self._unread, self._awaited = None, 0, frozenset()
        self._meeting, self._steps = "", 0
        self.has_seen_gradients = False
        self._stopwatch = Stopwatch()

    def _units(self) -> list[_Unit]:
        """What this call is to update: all groups or, as DeepSpeed calls it, one group or a part of one."""
        if len(self.param_groups) == len(self._groups):  # frameworks may replace the dicts; DeepSpeed takes some out
            self._groups = list(self.param_groups)
        units = []
        for index, group in enumerate(self._groups):
            if not any(group is there for there in self.param_groups):
                continue
            parameters = self.parameters(index)
            named = list(zip(self._names(index, len(parameters)), parameters, strict=True))
            if parameters is not self._groups[index]["params"]:
                found = [deepspeed_parameters(buffer, named) for buffer in group["params"]]
            else:
                found = [[local_parameter(name, p) for name, p in named]]
            first = {name: i for i, (name, _) in enumerate(named)}
            for candidates in found:
                key = (index, first[candidates[0].name] if candidates else 0)
                built = self._built.get(key)
                members = [h for h in candidates if self._needs(h) or (built and h.parameter in built.state)]
                units.append(_Unit(key, group, members, candidates))
        return units

    def _needs(self, local: LocalParameter) -> bool:
        """Whether this rank has a part of a parameter's training: as torch's optimizers, it takes every gradient."""
        p = local.parameter
        stateful = bool(own(self.state.get(p, {}))) or local.name in self._awaited
        return p.requires_grad or local.buffer.grad is not None or stateful

    def _is_dry_run(self, units: Sequence[_Unit]) -> bool:
        """Whether an engine steps on zeros before training, so that optimizers make their state: nothing is to be done.

        DeepSpeed without ZeRO does, with copies of whole 16-bit parameters, which are alike on all ranks.
        """
        if any(group["step"] for group in self._groups):
            return False
        models = {id(ref()) for refs in self._models for ref in refs}
        local = [local for unit in units for local in unit.members]
        copies = [one.buffer for one in local if type(one.buffer) is Tensor and one.buffer is one.parameter]
        gradients = [p.grad for p in copies if id(p) not in models and p.grad is not None]
        return bool(local) and len(gradients) == len(local) and not any(g.any() for g in gradients)

    def _update(self, unit: _Unit, agreed: View) -> None:
        """One step of the parameters that have a gradient on some rank."""
        group, built = unit.group, self._built[unit.key]
        if built.step == group["step"]:  # of several parts of a group, the first counts the step
            group["step"] += 1
        built.step = group["step"]
        options, decay = Options.of(group), group["weight_decay"]
        coupled, decoupled = (decay, 0.0) if options.base == "sgdm" else (0.0, decay)
        probe = Probe() if options.diagnose_every and group["step"] % options.diagnose_every == 0 else None
        context = Context(options, group["step"], group["betas"], group["eps"], self._stopwatch, coupled, probe)
        steps, lr = [], float(group["lr"]) * options.rate
        for wave in built.waves:
            names = {m: member.name for m, member in enumerate(wave.members)}
            present = {m: WIDTHS[agreed.present[name] - 1] for m, name in names.items() if name in agreed.present}
            for m in present:
                wave.members[m].updates += 1
            for part in (wave.of_members(part, present) for part in wave.parts):
                if part.blocks:
                    steps.append(WaveStep(wave, part, present, context, lr, decoupled, agreed.failures))
        run(steps)
        if probe:
            self._probes[unit.key] = probe

    def _find_ranks(self) -> Ranks:
        """The ranks that train together; from here on all of them do the same, or all raise."""
        if not all(group["communicate"] for group in self._groups):
            return Ranks()
        return self._process_group.ranks(of_an_engine=any(in_deepspeed(p) for p in self._all_parameters()))

    def _view(self) -> tuple[list[_Unit], View]:
        """What is to be updated, and what this rank sees of it."""
        view, units, several = View(Failures(self._ranks)), list[_Unit](), self._ranks.world > 1
        with view.failures.kept():
            self._ranks.require_same()
            refuse_join(self._wrappers)
            units = self._units()
            live = [local for unit in units for local in unit.candidates]  # as many on every rank, whatever is frozen
            view.stale = any(self._stale(unit) for unit in units)
            view.finite = self._gradients_are_finite(live)
            view.present = {local.name: width for local in live if (width := _width(local.buffer.grad))}
            if several:
                view.names = [local.name for local in live]
                view.settings, view.rates = self._settings(afresh=view.stale), _rates(self._groups)
                view.fresh = has_gradient(self._replicas(units))
        return units, view

    def _agree(self, units: Sequence[_Unit], mine: View) -> View:
        """Have a plan, and see the same on every rank: which gradients there are, and whether they are finite."""
        self._consolidated.clear()
        self._steps += 1
        if any(unit.key in self._built for unit in units):  # the second round: all that was to be read has been
            self._reader, self._awaited = None, frozenset()
        device = next((local.buffer.device for unit in units for local in unit.candidates), torch.device("cpu"))
        with nullcontext() if self._built else announced(self._ranks):
            agreed = agree(self._ranks, mine, self._explained, device)
        if agreed.stale and agreed.present:
            self._plan(units)
        if agreed.finite and agreed.present and self._ranks.world > 1:
            self._check_replicas(units, agreed)
        return agreed

    def _check_replicas(self, units: Sequence[_Unit], agreed: View) -> None:
        """Compare what is taken for replicas: after planning, when first there are gradients, and ever more rarely."""
        again = [unit for unit in units if (unit.group["step"] + 1).bit_count() == 1]
        if again:
            self._unchecked |= {id(local.parameter) for local in self._replicas(again, all_of_them=True)}
        if again or agreed.stale or agreed.fresh:
            there = [local for local in self._replicas(units) if local.name in agreed.present]
            tell = compare(self._ranks, there)
            self._unchecked -= {id(local.parameter) for local, tells in zip(there, tell, strict=True) if tells}

    def _replicas(self, units: Sequence[_Unit], all_of_them: bool = False) -> list[LocalParameter]:
        """Plain tensors that every rank has; those that have not been compared yet."""
        waves = [wave for unit in units if unit.key in self._built for wave in self._built[unit.key].waves]
        plain = [
            member.local for wave in waves for member in wave.members
            if member.placement.whole and not hasattr(member.parameter, "device_mesh")
        ]  # fmt: skip
        return plain if all_of_them else [local for local in plain if id(local.parameter) in self._unchecked]

    def _settings(self, afresh: bool) -> str:
        """What must be the same on all ranks."""
        if afresh or not self._described:
            named = [zip(self.names(i), self.parameters(i), strict=True) for i in range(len(self._groups))]
            self._described = repr([[(n, full_shape(p), p.dtype) for n, p in of_group] for of_group in named])
            self._described = hashlib.sha256(self._described.encode()).hexdigest()
        options = [[group[name] for name in (*NAMES, "step")] for group in self._groups]
        trained = [p.requires_grad for p in self._all_parameters()]
        return repr((self._described, options, trained, sorted(self._built)))

    def _explained(self) -> list[dict[str, Any]]:
        """The same for people."""
        return [
            {
                **{name: group[name] for name in (*NAMES, "step")},
                "the state": "kept" if any(index == i for index, _ in self._built) else "new, or just loaded",
                **{
                    f"parameter {n!r}": f"{'trained' if p.requires_grad else 'frozen'}, {full_shape(p)} {p.dtype}"
                    for n, p in zip(self.names(i), self.parameters(i), strict=True)
                },
                **{name: float(group[name]) for name in ("lr", "eps", "weight_decay")},
                **{f"betas[{k}]": float(beta) for k, beta in enumerate(group["betas"])},
            }
            for i, group in enumerate(self._groups)
        ]

    def _all_parameters(self) -> list[Tensor]:
        return [p for index in range(len(self._groups)) for p in self.parameters(index)]

    def _waves(self, index: int) -> list[Wave]:
        return [wave for (group, _), built in self._built.items() if group == index for wave in built.waves]

    def _all_waves(self) -> list[Wave]:
        return [wave for built in self._built.values() for wave in built.waves]

    def _stale(self, unit: _Unit) -> bool:
        """Whether a unit has no plan, or one on other parameters, state tensors or options."""
        built = self._built.get(unit.key)
        return built is None or built.identity != unit.identity() or not self._holds(built)

    def _plan(self, units: Sequence[_Unit]) -> None:
        """Plan what is to be updated: at the first step, and when parameters, their state or options changed.

        Raises:
            RuntimeError: state that only some ranks have or that is there in part, or another rank failed.
            TypeError, ValueError: parameters or a checkpoint that these ranks cannot train.
        """
        before = [self._built.get(unit.key) for unit in units]
        if not self._meeting:
            self._meeting = self._ranks.gather(uuid.uuid4().hex)[0]
        units, dropped = self._surveyed(units)
        with self.all_or_none():
            for local in [local for unit in units for local in unit.members]:
                check_trainable(local.parameter)
        if self._ranks.world > 1:  # owners may change
            for wave in [wave for built in before if built for wave in built.waves]:
                wave.load_state(self._entries(wave))
                self._put(wave, wave.full_state())
        for p in dropped:
            self.state[p] = foreign(self.state[p])
        with self.all_or_none():
            shapes = [self._planned_shapes(unit) for unit in units]
            planned = build(
                [(Options.of(u.group), u.members, of_group) for u, of_group in zip(units, shapes, strict=True)],
                self._ranks,
            )
            for wave in [wave for waves in planned for wave in waves]:
                wave.check_state(self._entries(wave))
        for wave in [wave for waves in planned for wave in waves]:
            wave.load_state(self._entries(wave))
            self._put(wave, wave.local_state())
        if self._reader is not None:  # while there is no plan: a step that fails here has not been made
            fresh = [of_unit for unit, of_unit, old in zip(units, planned, before, strict=True)
                     if old is None and unit.key[0] < self._unread]  # fmt: skip
            with self.all_or_none():
                self._reader(
                    {name: row for waves in fresh for wave in waves for name, row in wave.named_blocks().items()}
                )
        self._count_updates([wave for waves in planned for wave in waves])
        for unit, waves, old in zip(units, planned, before, strict=True):
            views = {local.parameter: own(self.state[local.parameter]) for local in unit.members}
            others = (built.start for (index, _), built in self._built.items() if index == unit.key[0])
            start = old.step if old else next(others, unit.group["step"])
            everything = set(self.parameters(unit.key[0]))
            self._built[unit.key] = _Built(unit.identity(), everything, views, waves, start, start)
        if self._ranks.world > 1:
            self._unchecked |= {id(local.parameter) for local in self._replicas(units, all_of_them=True)}
            with self.all_or_none():
                self._wrappers = wrappers(self._all_parameters())
                refuse_join(self._wrappers)

    def _count_updates(self, waves: Sequence[Wave]) -> None:
        """Tell every rank how many updates each parameter has had, as the state says that is spread over them."""
        members = [member for wave in waves for member in wave.members]
        counts = [torch.zeros(0, dtype=torch.float32, device="cpu"), *(wave.update_counts().cpu() for wave in waves)]
        for member, count in zip(members, self._ranks.reduce(torch.cat(counts), largest=True).tolist(), strict=True):
            member.updates = int(count)

    def _entries(self, wave: Wave) -> list[Entry]:
        """What there is of its members' state."""
        return [own(self.state[member.parameter]) for member in wave.members]

    def _put(self, wave: Wave, entries: Mapping[int, Entry]) -> None:
        for m, entry in entries.items():
            p = wave.members[m].parameter
            self.state[p] = {**foreign(self.state[p]), **entry}

    def _surveyed(self, units: Sequence[_Unit]) -> tuple[list[_Unit], list[Tensor]]:
        """The units with the members that all ranks agree on, and the parameters whose state is not kept.

        Raises:
            RuntimeError: state that only some ranks have, or that is there in part: nobody can have meant that.
        """
        before = {p: entry for built in self._built.values() for p, entry in built.state.items()}
        here = {p for index in range(len(self._groups)) for p in self.parameters(index)}
        ranks = gather_or_raise(
            self._ranks, lambda: [[self._standing(local, before) for local in unit.candidates] for unit in units]
        )
        surveyed, dropped, fresh = [], [p for p in before if p not in here], list[str]()
        for i, unit in enumerate(units):
            built, members = self._built.get(unit.key), []
            known = built.everything if built and not here.issuperset(built.state) else here
            for j, local in enumerate(unit.candidates):
                standings = [of_rank[i][j] for of_rank in ranks]
                lost = _is_lost(local.name, standings)
                if lost:
                    dropped.append(local.parameter)
                if any(standing.needed for standing in standings):
                    members.append(local)
                    if lost or local.parameter not in known:
                        fresh.append(local.name)
            surveyed.append(unit._replace(members=members))
        if fresh:
            _warn_of_fresh(
                fresh,
                "their state was emptied, or they took the place of others.  If that was not meant (a model that is "
                "wrapped or moved after its first step leaves it behind), load the last checkpoint",
            )
        return surveyed, dropped

    def _standing(self, local: LocalParameter, before: Mapping[Tensor, Mapping[str, Any]]) -> _Standing:
        p = local.parameter
        had, has = set(before.get(p, ())), set(own(self.state.get(p, {})))
        complete = had <= has
        torn = bool(had & has) and not complete
        return _Standing(self._needs(local), p in before, bool(had), bool(has) and complete, torn)

    def _planned_shapes(self, unit: _Unit) -> dict[str, tuple[int, ...]]:
        """Of all in the unit's group that is planned, the unit's own and, with DeepSpeed, that of its other parts."""
        index, members = unit.key[0], {id(local.parameter) for local in unit.members}
        named = zip(self.names(index), self.parameters(index), strict=True)
        return {name: full_shape(p) for name, p in named if p.requires_grad or id(p) in members}

    def _holds(self, built: _Built) -> bool:
        """Whether `state` still holds the very tensors that the plan works on (offloading replaces them)."""
        for p, entry in built.state.items():
            there = self.state[p]
            if any(there.get(key) is not tensor for key, tensor in entry.items()):
                return False
        return True

    @contextmanager
    def _with_model_parameters(self) -> Iterator[None]:
        """The groups with the model's parameters in them, where an engine has put its own tensors in their place."""
        theirs = [group["params"] for group in self._groups]
        for index, group in enumerate(self._groups):
            group["params"] = self.parameters(index)
        known = {p for group in self._groups for p in group["params"]}
        for p in [p for p in self.state if isinstance(p, Tensor) and p not in known and not self.state[p]]:
            del self.state[p]  # DeepSpeed has looked its own tensors up
        try:
            yield
        finally:
            for group, params in zip(self._groups, theirs, strict=True):
                group["params"] = params

    def _saved(self) -> dict[Tensor, Entry]:
        """Parameter -> its whole state, of those whose state is spread over the ranks; under DeepSpeed this rank's."""
        if self._reader is not None and not self._built:
            raise RuntimeError("the state is read at the first step after loading: make one before saving it again")
        if not self._consolidated and any(map(_only_consolidated, self._all_waves())):
            self._meet()
            self.consolidate()
        saved = dict(self._consolidated)
        for wave in self._all_waves():
            first = wave.members[0]
            if wave.replicated or first.parameter in saved:
                continue
            if in_deepspeed(first.parameter):
                saved.update({wave.members[m].parameter: entry for m, entry in wave.partial_state().items()})
            else:
                saved.update({wave.members[m].parameter: entry for m, entry in wave.full_state().items()})
        return saved

    def _meet(self) -> None:
        """Wait for every rank to call `state_dict()`.

        Raises:
            RuntimeError: they do not.
        """
        advice = (
            "with shard_state the state is spread over the ranks: call state_dict() on every rank, or, before one rank "
            "calls it alone, consolidate() on every rank (as the Trainer does after hf_shampoo4.register(), with "
            "trainer_kwargs() or with Shampoo4bitCallback)"
        )
        if not all_come(f"{self._meeting}/{self._steps}", self._ranks, advice):
            raise RuntimeError(f"other ranks have not called state_dict(); {advice}")

    def _gradients_are_finite(self, live: Sequence[LocalParameter]) -> bool:
        by_device: dict[torch.device, list[Tensor]] = {}
        for local in live:
            if local.buffer.grad is not None:
                check_trainable(local.parameter)  # which may have been frozen before
                if local.buffer.grad.layout != torch.strided:
                    _refuse_sparse(local.name)
            gradient = local.gradient()
            if gradient is not None and gradient.numel():
                by_device.setdefault(gradient.device, []).append(gradient)
        return all(_finite(gradients) for gradients in by_device.values())

    def _numbered(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict keyed by the parameters' names, as FSDP's files are, keyed by their positions as torch's are."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        if not any(isinstance(key, str) for group in groups for key in group["params"]):
            return state_dict
        if not any(group.get("param_names") for group in self.param_groups):  # nameless here: only the order can tell
            order = {key: i for i, key in enumerate(key for group in groups for key in group["params"])}
            numbered = [{**group, "params": [order[key] for key in group["params"]]} for group in groups]
            return {**state_dict, "param_groups": numbered, "state": {order.get(k, k): v for k, v in state.items()}}
        number: dict[str, int] = {}
        for index in range(len(self.param_groups)):
            number.update({name: len(number) + i for i, name in enumerate(self.names(index))})
        strange = [key for group in groups for key in group["params"] if clean_name(str(key)) not in number]
        if strange:
            raise CheckpointError(f"checkpoint of another model: it has parameters {strange[:3]}, which are not here")
        renamed = []
        for group in groups:
            names = sorted((clean_name(key) for key in group["params"]), key=number.__getitem__)
            renamed.append({**group, "params": [number[name] for name in names], "param_names": names})
        return {**state_dict, "param_groups": renamed, "state": {number[clean_name(k)]: v for k, v in state.items()}}

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> list[str]:
        """The names of those that are trained here and have no state there.

        Raises:
            CheckpointError: the checkpoint does not fit.
        """
        saved_groups, state = state_dict["param_groups"], state_dict["state"]
        sizes, ours = [len(g["params"]) for g in saved_groups], [len(g["params"]) for g in self.param_groups]
        if sizes != ours:
            raise CheckpointError(f"checkpoint of another model: groups of {sizes} parameters, here {ours}")
        if len({key for group in saved_groups for key in group["params"]}) < sum(sizes):
            raise CheckpointError("damaged checkpoint: a parameter is there twice")
        of_groups = [self._check_saved_group(index, saved, state) for index, saved in enumerate(saved_groups)]
        return [name for names in of_groups for name in names]

    def _check_saved_group(self, index: int, saved: dict[str, Any], state: dict[Any, Any]) -> list[str]:
        group = self.param_groups[index]
        try:
            _require_kind({**group, "rates": saved.get("rates", ())})
        except OptionError as error:
            raise CheckpointError(f"the checkpoint was written with {error}") from error
        ours = _layout(group)
        for name, there in _layout({**group, **saved}).items():
            here = ours[name]
            if there != here:
                raise CheckpointError(
                    f"the checkpoint was written with {name}={there}, this run has {name}={here}: "
                    f"resume with {name}={there}, or start the optimizer afresh"
                )
        for there, here in zip(_own_names(saved), _own_names(group), strict=False):  # either may have none
            if there != here:
                raise CheckpointError(f"checkpoint of another model: parameter {there!r} there, {here!r} here")
        stateless = []
        for key, p, name in zip(saved["params"], group["params"], self.names(index), strict=True):
            entry = state.get(key, {})
            if own(entry):
                check_entry(name, entry, state_layout(blocks_of(full_shape(p), Options.of(group))))
            elif p.requires_grad and saved["step"] and math.prod(full_shape(p)):
                stateless.append(name)
        return stateless


def _only_consolidated(wave: Wave) -> bool:
    """Whether state is on its owners alone while every rank has the parameters, so that one rank may be asked alone."""
    first = wave.members[0]
    of_an_engine = in_fsdp1(first.parameter) or in_deepspeed(first.parameter)
    return not wave.replicated and first.placement.whole and not of_an_engine


def _with_names(group: Mapping[str, Any], named: bool) -> dict[str, Any]:
    """A copy of a group as torch takes it: with a name for each parameter, "" if none is known, or without names."""
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else params if isinstance(params, set) else list(params)
    names = group.get("param_names")
    found = {**group, "params": params}
    if any(isinstance(p, tuple) for p in params):
        return found  # torch reads them
    if (named and names is None) or (names is not None and len(names) != len(params)):
        found["param_names"] = [noted_name(p) for p in params]
    return found


def _own_names(group: Mapping[str, Any]) -> list[str]:
    return [clean_name(name) for name in group.get("param_names") or []]


def _purposes(group: Mapping[str, Any]) -> list[str]:
    """What the parameters are for; only `param_groups` says of which kind a group is."""
    return [noted_purpose(p) if group["kind"] != "any" else "" for p in group["params"]]


def _shared_names(groups: Sequence[Mapping[str, Any]]) -> set[str]:
    counts = Counter(name for group in groups for name in _own_names(group))
    return {name for name, count in counts.items() if count > 1}


def _layout(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options on which the layout and the meaning of the state depend, `auto` and 0 as what they stand for."""
    o = Options(**{name: group[name] for name in NAMES})
    return {**{name: group[name] for name in STRUCTURAL}, "quant_block": o.factor_block, "codebook": o.factor_codebook}


def _taken_over(entry: Entry, p: Tensor) -> Entry:
    """A parameter's saved state, never the caller's own tensors but where this rank wants a part of them alone."""
    if in_fsdp1(p) or in_deepspeed(p):
        return dict(entry)
    return {name: t.to(p.device, copy=True) if isinstance(t, Tensor) else copy.deepcopy(t) for name, t in entry.items()}


def _rates(groups: Sequence[Mapping[str, Any]]) -> list[float]:
    """Numbers that tell whether ranks have the same rates; schedules may compute them with other last bits."""
    of_group = [[*map(float, (g["lr"], g["eps"], g["weight_decay"])), *map(float, g["betas"])] for g in groups]
    return [sum((i + 1) * rate for i, rate in enumerate(of_kind)) for of_kind in zip(*of_group, strict=True)]


class _Unit(NamedTuple):
    """What one call updates together: a group, or the part of it that is in one tensor of DeepSpeed's."""

    key: tuple[int, int]
    """Position of the group, and in it of the first parameter, trained or not."""
    group: dict[str, Any]
    members: list[LocalParameter]
    """What is planned: on this rank or, in `_plan`, on any."""
    candidates: list[LocalParameter]
    """Everything that could be, the same on every rank."""

    def identity(self) -> Any:
        """What a plan depends on."""
        live = [(id(local.buffer), local.buffer.device, local.buffer.dtype, local.shape) for local in self.members]
        return [self.group[name] for name in NAMES], live


@dataclass
class _Built:
    """A unit's plan, and what it was built on."""

    identity: Any
    everything: set[Tensor]
    """All parameters of the group, frozen ones too."""
    state: dict[Tensor, dict[str, Tensor]]
    waves: list[Wave]
    start: int
    """The group's step before any of its units was updated."""
    step: int
    """The group's step at which this one was updated last."""


class _Standing(NamedTuple):
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


def _is_lost(name: str, standings: Sequence[_Standing]) -> bool:
    """Whether a parameter's state is gone on all ranks that had it in the plan before.

    Raises:
        RuntimeError: it is gone on some of them, or in part.
    """
    having = [rank for rank, s in enumerate(standings) if s.there]
    lacking = [rank for rank, s in enumerate(standings) if not s.there and (s.had or not s.planned)]
    torn = [rank for rank, s in enumerate(standings) if s.torn]
    if torn or (having and lacking):
        where = f"lacks tensors on ranks {torn}" if torn else f"is there on ranks {having} and gone on ranks {lacking}"
        raise RuntimeError(f"the state of {name!r} {where}: load the same checkpoint on every rank, or empty it on all")
    return any(s.had and not s.there for s in standings)


def _check_keys(group: dict[str, Any]) -> None:
    """A group may carry foreign keys (schedulers put some there), but not an option that is spelt wrong."""
    for key in group:
        close = difflib.get_close_matches(key, NAMES, n=1, cutoff=0.8)
        if close:
            raise OptionError(f"unknown option {key!r} in a parameter group: did you mean {close[0]!r}?")


def _check_group(group: dict[str, Any]) -> None:
    check_rates(group)
    betas = group["betas"]
    if group["nesterov"] and betas[0] == 0:
        raise OptionError(f"betas={betas!r} is not allowed: nesterov needs a momentum, the first number in (0, 1)")
    group["betas"] = tuple(betas)
    _require_kind(group)
    make_moments((1,), Options.of(group), quantise=True)  # raises if a storage needs a package that is missing
    if len({id(p) for p in group["params"]}) < len(group["params"]):
        raise ValueError("a parameter is in its group twice: it would be updated twice a step")
    for p in group["params"]:
        if p.requires_grad:  # frozen ones may be of any kind, such as quantised weights
            check_trainable(p)


def _require_kind(group: Mapping[str, Any]) -> None:
    """Refuse factors by kind on parameters of an unknown kind."""
    if group["kind"] == "any" and any(rate != 1 for _, rate in group["rates"]):
        raise OptionError(
            f"rates={dict(group['rates'])} needs parameter groups of one kind each: pass "
            "hf_shampoo4.param_groups(model) instead of model.parameters(), or give each group its `kind`, one of "
            f"{', '.join(KINDS)}"
        )


def _check_row_splits(groups: list[dict[str, Any]]) -> None:
    for splits in {group["row_splits"] for group in groups} - {()}:
        shapes = [(full_shape(p), g["matrix_view"]) for g in groups if g["row_splits"] == splits for p in g["params"]]
        rows = {view.rows for view in (matrix_view(*shape) for shape in shapes) if view}
        if sum(splits) not in rows:
            raise OptionError(
                f"row_splits={splits} add up to {sum(splits)}, but the matrices have {sorted(rows)} rows: "
                "give the sizes along dim 0 of a fused parameter"
            )


def _refuse_sparse(name: str) -> NoReturn:
    raise SparseGradient(
        f"parameter {name!r} has a sparse gradient, which Shampoo4bit cannot use: "
        "set sparse=False on the embedding, or give the parameter its own torch.optim.SparseAdam"
    )


def _warn_of_fresh(names: Sequence[str], why: str) -> None:
    shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    warnings.warn(f"{len(names)} of the parameters that are trained ({shown}) start afresh: {why}", stacklevel=2)


WIDTHS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _width(gradient: Tensor | None) -> int:
    """0 for none, else 1 + the position in `WIDTHS` of its dtype, or of float32 for one that is not there."""
    if gradient is None:
        return 0
    return 1 + WIDTHS.index(gradient.dtype if gradient.dtype in WIDTHS else torch.float32)


def _is_broken(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.numel() > 0 and not _finite([gradient])


def _finite(gradients: list[Tensor]) -> bool:
    """Whether the squares of gradients on one device are: an infinite second moment would never move again."""
    if gradients[0].device.type == "cpu":  # where the norm of one tensor takes 25 times as long
        extremes = [x for gradient in gradients for x in torch.aminmax(gradient)]
    else:
        extremes = list(torch._foreach_norm(gradients, math.inf))
    return bool(torch.isfinite(torch.stack([x.float() for x in extremes]).square()).all())
