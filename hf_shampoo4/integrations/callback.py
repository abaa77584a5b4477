"""What the Trainer says about the optimizer: a table before training, numbers in its logs, bytes in its results."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback

from ..checkpointing.completeness import CALLBACK, noted
from ..options import pairs_as_text
from ..state_report import metrics
from ..utils.wrappers import without_wrappers
from .saving import follow_saves, shampoo_in
from .trainer import OPTIMS, asked_optim, check_args, optim_name

REFRESH = "optim/refresh_seconds"
WITHOUT_GRADIENTS = 3
"""Steps at the beginning after which a training in which no parameter has had a gradient is stopped."""


class Shampoo4bitCallback(TrainerCallback, ExportableState):
    """Reports about `Shampoo4bit`; with any other optimizer it does nothing.

    `hf_shampoo4.register()` puts it before the trackers of `report_to`, so that they log what it adds.
    """

    def __init__(self) -> None:
        self.world_size = self.local_world_size = 1
        self.optimizer = ""
        """What trains: `hf-shampoo4 report` names it."""
        self.seconds: list[list[float]] = []
        """[step, seconds since training began, evaluations included] of every log with a loss."""
        self._began = 0.0
        self._refreshed = 0.0
        """Seconds spent on refreshes in this training that the optimizer, which counts from its last load, lacks."""
        self.steps_without_gradients = 0
        follow_saves()

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json`: who comes back must know how many ranks had to finish (completeness.py)."""
        sizes = {"world_size": self.world_size, "local_world_size": self.local_world_size}
        return {"args": {}, "attributes": {**sizes, "optimizer": self.optimizer, "seconds": self.seconds}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a bad option when the Trainer is made, not after the data were prepared."""
        check_args(args)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        """Turn shares of training into steps, and print what is preconditioned how."""
        ours = shampoo_in(optimizer)
        if ours is None:
            _refuse_another(args, optimizer)
        told = "" if ours is None else ours.report()  # reads options that were set by hand
        self.world_size = args.world_size
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))  # on_step_end knows better
        self.optimizer = _name(args, model, optimizer)
        before = noted(state.stateful_callbacks) if state.global_step else {}  # of the checkpoint
        self.seconds = [[step, spent] for step, spent in before.get("seconds", ()) if step <= state.global_step]
        self._began = time.perf_counter() - (self.seconds[-1][1] if self.seconds else 0.0)
        state.stateful_callbacks[CALLBACK] = self.state()  # a checkpoint from before may lack it
        if ours is None:
            return
        refreshed = next((entry[REFRESH] for entry in reversed(state.log_history) if REFRESH in entry), 0.0)
        self._refreshed = refreshed - ours.refresh_seconds()
        self.steps_without_gradients, ours.has_seen_gradients = 0, False
        for group in ours.param_groups:
            if group["stochastic_last"]:
                earlier = group["step"] - state.global_step  # of another training: moments count all of the group's
                nearest = round(state.max_steps * (1 - group["stochastic_last"]))
                group["stochastic_from"] = max(1, 1 + earlier + nearest)
        if state.is_world_process_zero:
            print(told, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Count a step that a loss scaler (fp16) left out: then the optimizer was not called and cannot.

        Raises:
            RuntimeError: nothing is trained: no parameter has had a gradient in the first steps.
        """
        ours = shampoo_in(optimizer)
        if ours is None:
            return
        self.local_world_size = ours.ranks_here or self.local_world_size  # mpirun and srun set no LOCAL_WORLD_SIZE
        if getattr(optimizer, "step_was_skipped", False):
            for group in ours.param_groups:
                group["skipped_steps"] += 1
        elif not ours.has_seen_gradients:
            self.steps_without_gradients += 1
            if self.steps_without_gradients in (WITHOUT_GRADIENTS, state.max_steps):
                raise RuntimeError(
                    f"nothing is trained: in {self.steps_without_gradients} steps no parameter of the optimizer has "
                    "had a gradient.  It was made for another model than the one that is trained (a copy, or one from "
                    "before model_init or PEFT made another), or what it trains takes no part in the loss"
                )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Add bytes, skipped steps, failed refreshes and refresh time to what the Trainer logs."""
        if logs is not None and _are_of_training(logs):
            self.seconds.append([state.global_step, round(time.perf_counter() - self._began, 3)])
            state.stateful_callbacks[CALLBACK] = self.state()
        ours = shampoo_in(optimizer)
        if ours is None or logs is None:
            return
        extra: dict[str, int | float] = {}
        if "train_runtime" in logs:  # these logs are the results of the run
            extra = {"train_optimizer_state_mb": metrics(ours)["optim/state_bytes"] / 1e6}
        elif _are_of_training(logs):
            extra = metrics(ours)
            extra[REFRESH] = round(extra[REFRESH] + self._refreshed, 4)
        logs.update(extra)
        if state.log_history:
            state.log_history[-1].update(extra)  # for trainer_state.json: a copy of the logs, made before the callbacks


def _are_of_training(logs: Mapping[str, Any]) -> bool:
    """Whether a loss is among them, under any name that a Trainer gives it, and not an evaluation's."""
    evaluated = any(key.endswith("_runtime") or key.startswith(("eval_", "test_")) for key in logs)
    return not evaluated and any("loss" in key for key in logs)


def _name(args: Any, model: Any, optimizer: Any) -> str:
    """What trains, as `--optim` and `--optim_args` say it; an optimizer that these do not make, by its class."""
    asked = asked_optim(args)
    ours = shampoo_in(optimizer)
    if ours is not None:
        return optim_name(ours, asked if asked in OPTIMS else "shampoo4bit")
    from transformers import Trainer

    made, found = None, type(without_wrappers(optimizer))
    with suppress(Exception):  # a package or an argument that is missing, where the Trainer was given another optimizer
        made = Trainer.get_optimizer_cls_and_kwargs(args, model)[0]
    by_args = optimizer is None or made is found
    return f"{asked} {pairs_as_text(args.optim_args or '')}".rstrip() if by_args else found.__name__


def _refuse_another(args: Any, optimizer: Any) -> None:
    """An engine may have put an optimizer of its own in the place of the one that was asked for."""
    optimizer = without_wrappers(optimizer)
    if args.optim in OPTIMS and optimizer is not None:
        raise ValueError(
            f"--optim {args.optim.value} was asked for, but {type(optimizer).__name__} would train: leave that out of "
            "the DeepSpeed configuration and of the Trainer's `optimizers`, or leave --optim out"
        )
