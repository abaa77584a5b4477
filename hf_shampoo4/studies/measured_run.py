"""One measured training: the path of `hf-shampoo4 train`, with curves, times and bytes kept."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, ProgressCallback

from hf_shampoo4.studies.machine import state_bytes
from hf_shampoo4.training.pretrain import Result, parse, run

Settings = dict[str, Any]


class StepTimer(TrainerCallback, ExportableState):
    """Seconds of every training step and, of it, of the optimizer; evaluation is outside.

    It is part of a checkpoint: a training that goes on from one has the times of all its steps, each once.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.optimizer_steps: list[float] = []
        self._began = self._optimizer_began = 0.0
        self._made, self._before = time.perf_counter(), 0.0
        self._resumed_at: int | None = None

    @property
    def seconds(self) -> float:
        """Since it was made, and before that until the checkpoint that the training went on from."""
        return self._before + time.perf_counter() - self._made

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json`."""
        told = {"steps": list(self.steps), "optimizer_steps": list(self.optimizer_steps), "seconds": self.seconds}
        return {"args": {}, "attributes": told}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from a checkpoint's times."""
        if state.global_step:
            told: Any = state.stateful_callbacks
            found = told[type(self).__name__]["attributes"]
            self.steps, self.optimizer_steps = list(found["steps"]), list(found["optimizer_steps"])
            self._before, self._resumed_at = found["seconds"], len(self.steps)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """A step begins."""
        self._began = _now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Gradients are ready and clipped."""
        self._optimizer_began = _now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        self.optimizer_steps.append(_now() - self._optimizer_began)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The step is over; the first one after a checkpoint, which allocates anew, counts as the next one does."""
        self.steps.append(_now() - self._began)
        if self._resumed_at is not None and len(self.steps) == self._resumed_at + 2:
            for seconds in (self.steps, self.optimizer_steps):
                seconds[-2] = seconds[-1]


class Keeper(TrainerCallback):
    """Has the Trainer write a checkpoint every so many seconds, and keeps the last whole one alone."""

    def __init__(self, every: float) -> None:
        self.every, self._last = every, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Is it time?  The last step leaves nothing to go on with."""
        if state.global_step < state.max_steps and time.monotonic() - self._last >= self.every:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The new one is there: the others may go."""
        self._last = time.monotonic()
        for old in Path(str(args.output_dir)).glob("*checkpoint-*"):  # also what was set aside as incomplete
            if old.name != f"checkpoint-{state.global_step}":
                shutil.rmtree(old)


def _now() -> float:
    """Seconds; on a CPU processor time over the threads, so that nothing else the machine does counts."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def _mean_ms(seconds: Sequence[float]) -> float:
    """Mean without the first step, which allocates."""
    counted = seconds[1:] or seconds
    return round(1e3 * sum(counted) / len(counted), 2)


class LabelledProgress(ProgressCallback):
    """The Trainer's progress bar with the run's name and its latest losses instead of lines of logs."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar for an evaluation of a second."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show losses on the bar."""
        names = {"loss": "train", "eval_loss": "validation"}
        self.shown |= {names[key]: f"{value:.3f}" for key, value in (logs or {}).items() if key in names}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


@dataclass
class Outcome:
    """What is kept of a run: enough to draw it and to compare it."""

    optim: str
    label: str
    settings: Settings
    parameters: int
    """Those that are trained."""
    bytes_per_parameter: float
    step_ms: float
    optimizer_step_ms: float
    seconds: float
    """The whole run, with evaluation and preparation."""
    validation: list[tuple[int, float]]
    """(step, loss) of every evaluation."""
    training: list[tuple[int, float]]
    """(step, loss since the one before)."""
    step_seconds: list[float] = field(repr=False)
    """Training time of each step."""

    @property
    def final_loss(self) -> float:
        """Validation loss after the last step."""
        return self.validation[-1][1]

    def loss_at(self, step: float) -> float:
        """Validation loss at a step, on a line between two evaluations."""
        for (a, loss_a), (b, loss_b) in itertools.pairwise(self.validation):
            if a <= step <= b:
                return loss_a + (loss_b - loss_a) * (step - a) / (b - a)
        return self.final_loss

    def steps_to(self, loss: float) -> float | None:
        """The first step with at most this validation loss, on a line between two evaluations; None: never."""
        return steps_to(self.validation, loss)


def steps_to(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Where a curve of (step, loss) first comes down to `loss`, on a line between two points; None: never."""
    if curve[0][1] <= loss:
        return curve[0][0]
    for (a, loss_a), (b, loss_b) in itertools.pairwise(curve):
        if loss_b <= loss:
            return a + (b - a) * (loss_a - loss) / (loss_a - loss_b)
    return None


def run_one(
    optim: str, settings: Mapping[str, Any], folder: Path, optimizer: Any = None, every: float | None = None
) -> Outcome:
    """Train with one optimizer.

    Args:
        optim: a name for `--optim`.
        settings: settings of `hf-shampoo4 train`, and a `label`.
        folder: where the model and its metrics go.
        optimizer: as in `train.run`.
        every: seconds after which what is reached is kept in the folder; another call with the same arguments goes on
            from there, to the same bits.  None: nothing is kept, and the folder must be empty.

    Returns:
        Curves, times and bytes.

    Raises:
        ConfigError: a setting that does not exist or cannot be.
    """
    settings = {**settings, "optim": optim}
    label = settings.pop("label", optim)
    timer, given = StepTimer(), {**settings, "output_dir": str(folder)}
    callbacks: list[TrainerCallback] = [timer]
    if every is not None:
        callbacks.append(Keeper(every))
        given |= {"resume_from_checkpoint": "auto", "overwrite_output_dir": True}
    result = run(parse(given), callbacks, LabelledProgress(label), optimizer)
    return outcome_of(result, timer, label, settings)


def outcome_of(result: Result, timer: StepTimer, label: str, settings: Settings) -> Outcome:
    """What is kept of a training that `timer` was a callback of."""
    parameters = sum(p.numel() for p in result.trainer.model.parameters() if p.requires_grad)
    return Outcome(
        optim=settings["optim"],
        label=label,
        settings=settings,
        parameters=parameters,
        bytes_per_parameter=round(state_bytes(result.trainer.optimizer) / parameters, 4),
        step_ms=_mean_ms(timer.steps),
        optimizer_step_ms=_mean_ms(timer.optimizer_steps),
        seconds=round(timer.seconds, 1),
        validation=_curve(result.trainer.state.log_history, "eval_loss"),
        training=_curve(result.trainer.state.log_history, "loss"),
        step_seconds=[round(seconds, 4) for seconds in timer.steps],
    )


def _curve(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) by step; the evaluation after training repeats the last one."""
    return sorted({entry["step"]: round(entry[key], 5) for entry in history if key in entry}.items())
