"""What the Trainer says about the optimizer: a table before training, numbers in its logs, bytes in its results."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback

from ..optimizer import Shampoo4bit
from ..report import metrics, table
from .trainer import check_args


class Shampoo4bitCallback(TrainerCallback):
    """Reports about `Shampoo4bit`; with any other optimizer it does nothing.

    `hf_shampoo4.register()` puts it before the trackers of `report_to`, so that they log what it adds.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a bad option when the Trainer is made, not after the data were prepared."""
        check_args(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Turn shares of training into steps, and print what is preconditioned how."""
        ours = _ours(optimizer)
        if ours is None:
            return
        for group in ours.param_groups:
            if group["stochastic_last"]:
                group["stochastic_from"] = 1 + round(state.max_steps * (1 - group["stochastic_last"]))
        if state.is_world_process_zero:
            print(table(ours), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Before a checkpoint, bring together the state that `shard_state` has spread: the Trainer asks rank 0 only."""
        ours = _ours(optimizer)
        if ours is not None and control.should_save:
            ours.consolidate()

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """The same, with `save_strategy="epoch"`."""
        self.on_step_end(args, state, control, optimizer)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Add bytes, skipped steps, failed refreshes and refresh time to what the Trainer logs."""
        ours = _ours(optimizer)
        if ours is None or logs is None:
            return
        extra: dict[str, int | float] = {}
        if "loss" in logs:
            extra = metrics(ours)
        elif "train_runtime" in logs:  # these logs are the results of the run; "_mem_" makes them print it in MB
            extra = {"train_mem_optimizer_state": int(metrics(ours)["optim/state_bytes"])}
        logs.update(extra)
        if state.log_history:
            state.log_history[-1].update(extra)  # for trainer_state.json: a copy of the logs, made before the callbacks


def _ours(optimizer: Any) -> Shampoo4bit | None:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return inner if isinstance(inner, Shampoo4bit) else None
