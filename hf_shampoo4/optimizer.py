"""`Shampoo4bit`: the torch optimizer, for any number of ranks."""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .checkpointing.checksums import verified
from .checkpointing.formats import FORMAT, pack, unpack
from .checkpointing.spread_state import SpreadState
from .checkpointing.state_dict import accepted, saved, without_state
from .execution.consensus import agree, check_replicas, look
from .execution.gradients import SkippedSteps, Unsettled, broken
from .execution.model_groups import ModelGroups, check_group, check_keys, check_row_splits, read_options, with_names
from .execution.plans import BlockReader, Plans, entries_of
from .execution.units import Key, Unit, is_dry_run, warn_of_fresh, warn_of_lengthless
from .execution.wave_step import WaveStep, run, wave_steps
from .execution.waves import Wave
from .options import NAMES, OF_ADAMW, TYPES, Options, cast, resolve
from .preconditioners.diagnostics import Probe
from .preconditioners.protocols import Context
from .sharding.agreement import View, all_or_none
from .sharding.exchange import ProcessGroup, Ranks
from .sharding.local_parameter import in_deepspeed, in_fsdp1, note_purpose, noted_purpose
from .state_report import table
from .utils.stopwatch import Stopwatch

LEAST_EPS = 2.0**-75  # an eps of 0 would divide 0 by 0; directions of squares too small for float32 are below 100


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
    """KL-Shampoo (default), SOAP or Shampoo with low-bit state (2509.03378, 2409.11321, 2405.18144, 2309.01507).

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

    has_seen_gradients: bool
    """Whether any parameter has had a gradient on any rank, since construction, the last load or the beginning of a
    Trainer's training."""
    _unsettled: Unsettled | None
    """The last step, if the host does not know yet whether it was made."""

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
        self.groups = ModelGroups()
        self._reset()
        super().__init__(params, {**base, **vars(chosen), "step": 0, "skipped_steps": 0, "format": FORMAT})
        check_row_splits(self.param_groups)

    @torch._disable_dynamo  # a compiled training step would be traced anew at every step; imports dynamo when called
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; with several ranks, all of them must call it.

        State that was emptied on purpose, or of a parameter that took another's place, begins afresh with a warning.
        A step on which any gradient is not finite, or its square (beyond 1.8e19), changes nothing but `skipped_steps`;
        the first in a row is warned of, and `max_skipped` in a row end the training.  One process on a GPU learns of it
        in the next call, or when the state is saved: until then `step` of the groups counts it.

        Raises:
            SparseGradient: a sparse gradient; a TypeError and a RuntimeError.
            TypeError: a parameter that was frozen and cannot be trained.
            ValueError: parameters that are sharded in a way that is not supported.
            RuntimeError: ranks with different options or models, or gradients that were not averaged; state that only
                some ranks have or that is there in part; or another rank that failed.  Parameters and state may then be
                updated in part: go on from the last checkpoint.  Or `max_skipped` steps in a row were skipped.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        plans = self._plans
        self._settle()
        if not plans:
            plans.ranks = self._find_ranks()
        units, mine = look(plans, self.param_groups, self.state)
        if mine.failures.first is None and is_dry_run(units, self.groups):
            return loss
        self._spread.new_step()
        agreed = agree(plans, units, mine)
        self.has_seen_gradients |= bool(agreed.present)
        if agreed.stale and agreed.present:
            plans.make(units, self.state)
            warn_of_lengthless(unit.group for unit in units)
        if not agreed.finite:
            self._skipped.count(units, broken([local for unit in units for local in unit.members]))
            return loss
        if agreed.verdict is None:
            self._skipped.clear()
        else:
            self._unsettled = Unsettled(agreed.verdict, units, [plans.of_unit[unit.key] for unit in units])
        check_replicas(plans, units, agreed)
        with plans.equal_replicas.step():
            for unit in units if agreed.present else ():
                run(self._wave_steps(unit, agreed))  # collect gradients, update blocks, send updates, apply them
            agreed.failures.raise_on_all()
            for unit in units if agreed.present else ():
                plans.of_unit[unit.key].seal()
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
        self._settle(for_good=False)
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with self.groups.restored(self.state):
            spread = self._spread.full(self.state)
            found = saved(self.param_groups, self.state, spread)
            is_packed = any(in_fsdp1(p) for group in self.param_groups for p in group["params"])
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, found)
            found = found if changed is None else changed
        return pack(found) if is_packed else found

    def consolidate(self) -> None:
        """Bring the state that `shard_state` has spread over the ranks to all of them, for `state_dict()`.

        Every rank must call it.  It is kept in the CPU's memory until the next step, and not done twice before that.
        """
        self._spread.consolidate(self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are cast and checked as the constructor's are.

        Other programs edit groups that have names: one whose "param_names" are of another number than its "params", and
        one without names beside groups that have some, are given the names that the model had for the parameters, if
        the Trainer made the groups, else their positions.

        Raises:
            OptionError, TypeError: as the constructor.
        """
        group = with_names(param_group, bool(self.param_groups and "param_names" in self.param_groups[0]))
        given = {name: group.pop(name) for name in (*NAMES, *OF_ADAMW, "preset", "config") if name in group}
        check_keys(group)
        chosen = resolve(given, beneath={name: self.defaults[name] for name in NAMES})
        super().add_param_group({**group, **chosen})
        self.groups.add(self.param_groups[-1])
        try:
            check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            self.groups.drop_last()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, every tensor in the dtype it was saved in.

        What changes the state's layout (bits, factor, block size, ...) must be the same here as there; other options
        and the learning rate come from the checkpoint, as torch has it, but those that are the run's own
        (`options.OF_THE_RUN`).  Hooks that adapt a state dict run before anything is checked.

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
            read: fills the tensors that it is given, named as `WaveState.named_blocks` does; raises if one is missing.
            saved: the names of the parameters that it can read.

        Raises:
            CheckpointError: as `load_state_dict`.
        """
        self._load(without_state(groups, self.groups), awaited=saved)
        self._plans.reader = BlockReader(read, len(self.groups), saved)

    def named_blocks(self) -> dict[str, Tensor]:
        """The state of the blocks that this rank owns, as `WaveState.named_blocks` names it; views.

        Raises:
            RuntimeError: no step has been made that says which these are.
        """
        self._settle(for_good=False)
        self.groups.follow(self.param_groups, in_part=True)
        if not self._plans or self.groups.were_edited:
            raise RuntimeError(
                "which rank owns which block is known after the first step (also after loading, and after groups were "
                "put into param_groups or turned round there)"
            )
        found: dict[str, Tensor] = {}
        for wave in self.waves():
            found.update(wave.state.named_blocks(entries_of(wave, self.state), owned=True))
        return found

    def _load(self, state_dict: Any, awaited: Set[str] = frozenset()) -> None:
        """Take over a state dict; the state of the `awaited` is read later."""
        self.groups.follow(self.param_groups)
        self._read_options()
        with self.groups.restored(self.state):
            found = accepted(state_dict, self.groups, self.param_groups)
            self.__setstate__({"state": found.state, "param_groups": found.groups})
        if found.unlike:
            told = ", ".join(f"{name}={there!r}, not {here!r}" for name, (there, here) in found.unlike.items())
            warnings.warn(
                f"options come from the checkpoint, as the learning rate does: {told}.  To change one, set it in "
                "optimizer.param_groups after loading (under the Trainer: in a callback's on_train_begin)",
                stacklevel=3,
            )
        stateless = [name for name in found.stateless if name not in awaited]
        if stateless:
            warn_of_fresh(stateless, "the checkpoint has no state of them, as if they were frozen when it was written")

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and `pickle`, which one rank may call alone.

        Raises:
            RuntimeError: this rank has a part of the state only.
        """
        self._settle(for_good=False)
        state = defaultdict(dict, {**self.state, **self._spread.of_copy(self.state)})
        purposes = [[noted_purpose(p) for p in group["params"]] for group in self.param_groups]  # a copy loses notes
        kept = {"state": state, "_process_group": self._process_group, "_purposes": purposes}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in NAMES:  # an older pickle lacks what is newer
            self.defaults.setdefault(name, getattr(Options, name))
        for group in self.param_groups:  # an older checkpoint's lack what is newer
            for name, value in self.defaults.items():
                if name not in OF_ADAMW:  # torch has put `differentiable` there
                    group.setdefault(name, value)
        if "groups" in vars(self):
            self.groups.follow(self.param_groups)
        else:  # a copy
            for group, purposes in zip(self.param_groups, vars(self).pop("_purposes", ()), strict=False):
                for p, purpose in zip(group["params"], purposes, strict=True):
                    note_purpose(p, purpose)
            self.groups = ModelGroups(self.param_groups)
        self._reset()

    @property
    def rank(self) -> int:
        """Of this process among those that train together; 0 before the first step."""
        return self._plans.ranks.rank

    @property
    def world_size(self) -> int:
        """How many processes train together; 1 before the first step."""
        return self._plans.ranks.world

    @property
    def ranks_here(self) -> int:
        """How many of them are on this computer; 0 before the first step."""
        return self._plans.ranks_here

    @property
    def process_group(self) -> Any:
        """The group that it was given; None: the default one."""
        return self._process_group.group

    @property
    def sent(self) -> dict[str, int]:
        """Bytes that this rank has sent to others so far, by purpose."""
        return dict(self._plans.ranks.sent)

    def report(self) -> str:
        """A table of what is preconditioned how, why, and in how many bytes of state; also before the first step."""
        self.groups.follow(self.param_groups, in_part=True)  # as a step: one rank alone may ask
        self._read_options()
        return table(self)

    def refresh_seconds(self) -> float:
        """Time spent on factors, roots and bases since construction or the last load."""
        return self._stopwatch.seconds()

    def diagnostics(self) -> list[dict[str, float]]:
        """What the last look at each group's state found, see diagnostics.py; groups that were not looked at are left
        out."""
        return [probe.metrics() for _, probe in sorted(self._probes.items())]

    def waves(self, group: int | None = None) -> list[Wave]:
        """What was planned, of all groups or of one; empty before the first step."""
        return self._plans.waves(group)

    def names(self, index: int) -> list[str]:
        """A name for every parameter of group `index`, the same in every run: its own, or its position."""
        return self.groups.names(self._place(index))

    def parameters(self, index: int) -> list[Tensor]:
        """The parameters of group `index`: the model's, also where DeepSpeed has put its own tensors in their place."""
        return self.groups.parameters(self._place(index))

    def purposes(self, index: int) -> list[str]:
        """What each parameter of group `index` is for, as `param_groups` noted it; empty for what it has not seen."""
        return self.groups.purposes(self._place(index))

    def _place(self, index: int) -> int:
        """Where group `index` is among those that were planned, of which the list may have a part."""
        group = self.param_groups[index]
        return next((i for i, planned in enumerate(self.groups.groups) if planned is group), index)

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, by rank; any small object.  Every rank must call it."""
        return self._plans.ranks.gather(value)

    @contextmanager
    def all_or_none(self, call: str) -> Iterator[None]:
        """All ranks leave the block, or all raise; a rank must not fail in it before others wait for it.

        Args:
            call: what every rank has called, named to one that waits for others in it.
        """
        with self._plans.announced(call), all_or_none(self._plans.ranks):
            yield

    def _read_options(self) -> None:
        """Of all groups, what was set in them by hand since the last step.

        Raises:
            OptionError: it is not allowed.
        """
        for group in self.param_groups:
            read_options(group)

    def _reset(self) -> None:
        self._plans = Plans(self.groups)
        self.groups.were_edited = False
        self._spread = SpreadState(self._plans)
        self._skipped = SkippedSteps()
        self._unsettled = None
        self._probes: dict[Key, Probe] = {}
        self._stopwatch = Stopwatch()
        self.has_seen_gradients = False

    def _settle(self, for_good: bool = True) -> None:
        """Count the last step as what it was, if the host did not know whether its gradients were finite.

        Args:
            for_good: whether too many that were skipped end the training; not while its state is saved.

        Raises:
            RuntimeError: they do.
        """
        put_back = self._plans.follow_steps()
        unsettled, self._unsettled = self._unsettled, None
        if unsettled is None:
            return
        where = unsettled.verdict.broken()
        if where:
            if not put_back:
                unsettled.take_back()
            self._skipped.count(unsettled.units, where, for_good)
        else:
            self._skipped.clear()

    def _find_ranks(self) -> Ranks:
        """The ranks that train together; from here on all of them do the same, or all raise."""
        if not all(cast("communicate", group["communicate"]) for group in self.groups.groups):
            return Ranks()
        parameters = self.groups.every_parameter()
        return self._process_group.ranks([p.device for p in parameters], any(map(in_deepspeed, parameters)))

    def _wave_steps(self, unit: Unit, agreed: View) -> list[WaveStep]:
        """A step of each part of a unit's waves that has a gradient on some rank.

        It counts the group's step and the parameters' updates.
        """
        group, plan = unit.group, self._plans.of_unit[unit.key]
        options, step = Options.of(group), plan.count(group)
        lr, eps, decay, *betas = agreed.rates[unit.key[0]]
        coupled, decoupled = (decay, 0.0) if options.base == "sgdm" else (0.0, decay)
        probe = Probe() if options.diagnose_every and step % options.diagnose_every == 0 else None
        if probe:
            self._probes[unit.key] = probe
        counts = None if agreed.verdict is None else agreed.verdict.on_device
        eps = max(eps, LEAST_EPS)
        context = Context(options, step, (betas[0], betas[1]), eps, self._stopwatch, coupled, probe, counts)
        return wave_steps(plan.waves, agreed, context, lr * options.rate, decoupled)
