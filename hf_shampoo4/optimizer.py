"""`Shampoo4bit`: the torch optimizer, for one process and DDP."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .algorithms import Context, directions
from .blocks import matrix_view
from .clock import Stopwatch
from .diagnostics import Probe
from .matrix import exact_float32
from .moments import make_moments
from .options import NAMES, STRUCTURAL, OptionError, Options, resolve
from .plan import Stack, Wave, blocks_of, build, deliver, state_layout

FORMAT = 1  # of the state; in every param group, so that a checkpoint says what wrote it


class CheckpointError(ValueError):
    """A state dict that does not belong to this optimizer and model; nothing was loaded from it."""


class Shampoo4bit(torch.optim.Optimizer):
    """Shampoo with low-bit factors, roots and moments, over AdamW (2405.18144, 2309.01507).

    Matrices (and convolutions and experts through their matrix view) are preconditioned; vectors get the base alone.
    Embeddings and the output head are matrices too: put them in a group with `algorithm="elementwise"`, as
    `hf_shampoo4.param_groups(model)` does.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any torch optimizer.  A group may set any option.
        lr: learning rate; AdamW's.
        betas: decay of the first and second moment; with base="sgdm" the first is the momentum.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW; with base="sgdm" coupled, as in torch.optim.SGD: added to the
            (preconditioned) gradient before the momentum.
        preset: a named set of options (`hf_shampoo4.options.PRESETS`).
        config: path of a YAML file with options.
        options: see `hf_shampoo4.options.Options`; explicit ones win over `config`, that over `preset`.

    Raises:
        OptionError: an option that does not exist, or a value that is not allowed.
        TypeError: a complex parameter.
        ValueError: no parameter has a matrix to precondition.
    """

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
        **options: Any,
    ) -> None:
        chosen = Options(**resolve(options, preset=preset, config=config))
        base = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._reset()
        super().__init__(params, {**base, **vars(chosen), "step": 0, "skipped_steps": 0, "format": FORMAT})
        self._require_matrices()
        _check_row_splits(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        A step on which any gradient is not finite changes nothing but `skipped_steps`.

        Raises:
            TypeError: a sparse gradient, or a sharded parameter (FSDP2, tensor parallel).
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        usable = self._gradients_are_finite()
        for index, group in enumerate(self.param_groups):
            if not usable:
                group["skipped_steps"] += 1
                continue
            group["step"] += 1
            options, decay = Options.of(group), group["weight_decay"]
            coupled, decoupled = (decay, 0.0) if options.base == "sgdm" else (0.0, decay)
            probe = Probe() if options.diagnose_every and group["step"] % options.diagnose_every == 0 else None
            context = Context(options, group["step"], group["betas"], group["eps"], self._stopwatch, coupled, probe)
            for wave in self._waves(index):
                _step_wave(wave, context, float(group["lr"]), decoupled)
            if probe:
                self._probes[index] = probe
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are cast and checked as the constructor's are.

        Raises:
            OptionError: as the constructor.
            TypeError: a complex parameter.
        """
        group = dict(param_group)
        given = {name: group.pop(name) for name in (*NAMES, "preset", "config") if name in group}
        _check_keys(group)
        chosen = resolve(given, beneath={name: self.defaults[name] for name in NAMES})
        super().add_param_group({**group, **chosen})
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, every tensor in the dtype it was saved in.

        What changes the state's layout (bits, factor, block size, ...) must be the same here as there; other options
        and the learning rate come from the checkpoint, as torch has it.

        Raises:
            CheckpointError: written by another optimizer, for another model or with other structural options, or
                incomplete.  Nothing is changed then.
        """
        self._check_checkpoint(state_dict)
        # torch casts all per-parameter state to the parameter's dtype, codes too: show it wrapped values only.
        hidden = {
            key: {name: _Opaque(value) for name, value in entry.items()} for key, entry in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": hidden})
        for p, entry in self.state.items():
            for name, wrapped in entry.items():
                entry[name] = wrapped.value.to(p.device, copy=True)  # never alias the caller's dict
        self._reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._reset()

    def refresh_seconds(self) -> float:
        """Time spent on factors and roots since construction or the last load."""
        return self._stopwatch.seconds()

    def diagnostics(self) -> list[dict[str, float]]:
        """What the last look at each group's state found, see diagnostics.py; groups that were not looked at are left
        out."""
        return [probe.metrics() for _, probe in sorted(self._probes.items())]

    def names(self, index: int) -> list[str]:
        """A name for every parameter of group `index`, the same in every run: its own, or its position."""
        group = self.param_groups[index]
        names = group.get("param_names") or []
        if len(names) == len(group["params"]):
            return [clean_name(name) for name in names]
        return [f"{index}.{i}" for i in range(len(group["params"]))]

    def _reset(self) -> None:
        self._built: dict[int, _Built] = {}
        self._probes: dict[int, Probe] = {}
        self._stopwatch = Stopwatch()

    def _waves(self, index: int) -> list[Wave]:
        """The plan of a group: built at its first step, again when parameters, their state or options changed.

        Raises:
            RuntimeError: state that was there at the step before is gone.
        """
        group = self.param_groups[index]
        live = [(name, p) for name, p in zip(self.names(index), group["params"], strict=True) if p.requires_grad]
        identity = (Options.of(group), [(id(p), p.device, p.dtype, p.shape) for _, p in live])
        before = self._built.get(index)
        if before is None or before.identity != identity or not self._holds(before):
            self._require_matrices()
            for name, p in live:
                if before is not None and before.lost(p) and not self.state.get(p):
                    raise RuntimeError(f"the optimizer state of {name!r} is gone: load the last checkpoint again")
            waves = build(live, identity[0], self.state)
            views = {p: dict(self.state[p]) for _, p in live}
            self._built[index] = _Built(identity, list(group["params"]), views, waves)
        return self._built[index].waves

    def _holds(self, built: _Built) -> bool:
        """Whether `state` still holds the very tensors that the plan works on (offloading replaces them)."""
        return all(
            self.state[p].get(key) is tensor for p, entry in built.state.items() for key, tensor in entry.items()
        )

    def _gradients_are_finite(self) -> bool:
        by_device: dict[torch.device, list[Tensor]] = {}
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None or not p.requires_grad or not p.numel():
                    continue
                if p.grad.layout != torch.strided or hasattr(p, "device_mesh"):
                    _refuse_unusable(p, self.names(index)[i])
                by_device.setdefault(p.device, []).append(p.grad.detach())
        return all(_finite(gradients) for gradients in by_device.values())

    def _require_matrices(self) -> None:
        if self.defaults["algorithm"] == "elementwise":
            return
        groups = [group for group in self.param_groups if group["algorithm"] != "elementwise"]
        if any(matrix_view(tuple(p.shape), group["matrix_view"]) for group in groups for p in group["params"]):
            return
        parameters = [p for group in self.param_groups for p in group["params"]]
        shapes = ", ".join(sorted({str(tuple(p.shape)) for p in parameters})[:5])
        raise ValueError(
            f"nothing to precondition: none of the {len(parameters)} parameters has a matrix that is neither an "
            f"embedding nor the output head (shapes: {shapes}). "
            "Sharding that flattens parameters (FSDP1, DeepSpeed) hides them: train with DDP or one process. "
            "For the base optimizer alone set algorithm='elementwise' (--optim adamw4bit)."
        )

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> None:
        saved_groups, state = state_dict.get("param_groups"), state_dict.get("state")
        if not isinstance(saved_groups, list) or not isinstance(state, dict):
            raise CheckpointError("not an optimizer state dict: it needs 'state' and 'param_groups'")
        if any(group.get("format") != FORMAT for group in saved_groups):
            keys = sorted({name for entry in state.values() if isinstance(entry, dict) for name in entry})[:4]
            raise CheckpointError(
                f"the checkpoint was not written by Shampoo4bit (state format {FORMAT}); its state holds {keys}. "
                "Resume with the optimizer that wrote it, or load the model alone and start the optimizer afresh."
            )
        sizes, ours = [len(g["params"]) for g in saved_groups], [len(g["params"]) for g in self.param_groups]
        if sizes != ours:
            raise CheckpointError(f"checkpoint of another model: groups of {sizes} parameters, here {ours}")
        known = {key for saved in saved_groups for key in saved["params"]}
        strange = [key for key, entry in state.items() if key not in known or not isinstance(entry, dict)]
        if strange:
            raise CheckpointError(f"damaged checkpoint: state entries that are no parameter's state: {strange[:3]}")
        for index, saved in enumerate(saved_groups):
            self._check_saved_group(index, saved, state)

    def _check_saved_group(self, index: int, saved: dict[str, Any], state: dict[Any, Any]) -> None:
        group = self.param_groups[index]
        for name in STRUCTURAL:
            there, here = saved.get(name), group[name]
            if there != here:
                raise CheckpointError(
                    f"the checkpoint was written with {name}={there}, this run has {name}={here}: "
                    f"resume with {name}={there}, or start the optimizer afresh"
                )
        saved_names = [clean_name(name) for name in saved.get("param_names") or []]
        for i, (key, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
            name = self.names(index)[i]
            if group.get("param_names") and saved_names and saved_names[i] != name:
                raise CheckpointError(f"checkpoint of another model: parameter {saved_names[i]!r} there, {name!r} here")
            entry = state.get(key, {})
            if entry or (p.requires_grad and saved.get("step", 0)):
                _check_entry(name, entry, state_layout(blocks_of(tuple(p.shape), Options.of(group))))


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers (DDP, torch.compile, FSDP) put before it."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _step_wave(wave: Wave, context: Context, lr: float, weight_decay: float) -> None:
    active = wave.active()
    stacks: list[Stack] = [stack if rows is None else stack.rows(rows) for stack, rows in active]
    if not stacks:
        return
    with exact_float32(stacks[0].membership.device.type):
        updates = directions(stacks, [stack.gradients() for stack in stacks], context)
    for (whole, rows), stack, update in zip(active, stacks, updates, strict=True):
        if rows is not None:
            whole.put_back(rows, stack)
        deliver(stack, update, lr, weight_decay, context.step, context.options)


class _Opaque:
    """Hides a value from torch's casts."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(frozen=True)
class _Built:
    """A group's plan, and what it was built on."""

    identity: tuple[Options, list[Any]]
    members: list[Tensor]
    """All parameters of the group, frozen ones too."""
    state: dict[Tensor, dict[str, Tensor]]
    waves: list[Wave]

    def lost(self, p: Tensor) -> bool:
        """Whether a parameter without state must have had one: it was trained, or put in a trained one's place."""
        return p in self.state or not any(p is member for member in self.members)


def _check_keys(group: dict[str, Any]) -> None:
    """A group may carry foreign keys (schedulers put some there), but not an option that is spelt wrong."""
    for key in group:
        close = difflib.get_close_matches(key, NAMES, n=1, cutoff=0.8)
        if close:
            raise OptionError(f"unknown option {key!r} in a parameter group: did you mean {close[0]!r}?")


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not _is_number(group[name]) or not 0 <= float(group[name]) < math.inf:
            raise OptionError(f"{name}={group[name]!r} is not allowed: it must be a number >= 0")
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(map(_is_number, betas))
    if not pair or not all(0 <= beta < 1 for beta in betas):
        raise OptionError(f"betas={betas!r} is not allowed: it must be two numbers in [0, 1)")
    if group["nesterov"] and betas[0] == 0:
        raise OptionError(f"betas={betas!r} is not allowed: nesterov needs a momentum, the first number in (0, 1)")
    group["betas"] = tuple(betas)
    make_moments((1,), Options.of(group), quantise=True)  # raises if a storage needs a package that is missing
    for p in group["params"]:
        if not p.is_floating_point():
            shape = tuple(p.shape)
            raise TypeError(f"parameter of shape {shape} is {p.dtype}: only real floating point can be trained")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _check_row_splits(groups: list[dict[str, Any]]) -> None:
    for splits in {group["row_splits"] for group in groups} - {()}:
        shapes = [(tuple(p.shape), g["matrix_view"]) for g in groups if g["row_splits"] == splits for p in g["params"]]
        rows = {view.rows for view in (matrix_view(*shape) for shape in shapes) if view}
        if sum(splits) not in rows:
            raise OptionError(
                f"row_splits={splits} add up to {sum(splits)}, but the matrices have {sorted(rows)} rows: "
                "give the sizes along dim 0 of a fused parameter"
            )


def _check_entry(name: str, entry: dict[str, Any], layout: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    missing, foreign = sorted(layout.keys() - entry.keys()), sorted(entry.keys() - layout.keys())
    if missing or foreign:
        raise CheckpointError(f"state of {name!r} does not fit: missing {missing[:3]}, not known {foreign[:3]}")
    for key, (shape, dtype) in layout.items():
        there = entry[key]
        if not isinstance(there, Tensor) or tuple(there.shape) != shape or there.dtype != dtype:
            found = f"{tuple(there.shape)} {there.dtype}" if isinstance(there, Tensor) else type(there).__name__
            raise CheckpointError(f"state of {name!r}: {key} is {found}, expected {shape} {dtype}: another model?")


def _refuse_unusable(p: Tensor, name: str) -> NoReturn:
    if hasattr(p, "device_mesh"):
        raise TypeError(
            f"parameter {name!r} is sharded (DTensor: FSDP2 or tensor parallel); "
            "this version trains in one process or under DDP"
        )
    raise TypeError(
        f"parameter {name!r} has a sparse gradient, which Shampoo4bit cannot use: "
        "set sparse=False on the embedding, or give the parameter its own torch.optim.SparseAdam"
    )


def _finite(gradients: list[Tensor]) -> bool:
    """Of gradients on one device."""
    if gradients[0].device.type == "cpu":  # where the norm of one tensor takes 25 times as long
        extremes = [x for gradient in gradients for x in torch.aminmax(gradient)]
    else:
        extremes = list(torch._foreach_norm(gradients, math.inf))
    return bool(torch.isfinite(torch.stack([x.float() for x in extremes])).all())
