"""Pretraining on the Hugging Face Trainer: `parse` a configuration, `run` it.

`hf-shampoo4 train`, `scripts/pretrain_llama.py`, `scripts/pretrain_gpt.py` and `hf-shampoo4 demo` are this one path.
A configuration is flat: the fields of `ModelArguments`, `DataArguments`, `RunArguments` and
`transformers.TrainingArguments` side by side, from a YAML file, with `--key value` overrides.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union
from unittest import mock

from accelerate.utils import broadcast_object_list
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpointing.completeness import STATE, steps_made
from ..exceptions import ConfigError
from ..integrations.saving import save_whole_model
from ..integrations.trainer import asked_optim
from .arguments import DataArguments, ModelArguments, RunArguments
from .config import parse_as
from .data import TextData, collate, known_tokenizer, load_text, masked
from .model import build_model, load_model_config
from .output_dir import prepare_output
from .sources import of_utf8


@dataclass
class RunConfig:
    """A checked configuration."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    training: TrainingArguments


@dataclass
class Result:
    """What a run leaves behind besides its folder."""

    metrics: dict[str, Any]
    """Final numbers, as in `all_results.json`."""
    trainer: Trainer
    """With `state.log_history`, the optimizer and the model."""


ARGUMENT_TYPES = (ModelArguments, DataArguments, RunArguments, TrainingArguments)


def parse(config: Union[str, Path, Mapping[str, Any], None] = None, overrides: Sequence[str] = ()) -> RunConfig:
    """A pretraining's settings: see `config.parse_as`; a name is one of configs/train."""
    return RunConfig(*parse_as(ARGUMENT_TYPES, "train", config, overrides))


def run(
    config: RunConfig,
    callbacks: Sequence[TrainerCallback] = (),
    progress: TrainerCallback | None = None,
    optimizer: Callable[[PreTrainedModel, TrainingArguments], tuple[type, dict[str, Any]]] | None = None,
) -> Result:
    """Train, evaluate, and write the model, its checkpoints and `all_results.json` into `output_dir`.

    Two runs that differ only in their optimizer start from the same weights and see the same batches.

    Args:
        config: from `parse`.
        callbacks: for the Trainer.
        progress: shown instead of the Trainer's progress bar.
        optimizer: class and keywords of an optimizer that takes the place of `optim`.

    Returns:
        Final metrics and the log by step.

    Raises:
        ConfigError: a folder that would be overwritten, a checkpoint, dataset, tokenizer or model that is not there.
    """
    training = config.training
    checkpoint = prepare_output(config.run, training)
    load_model_config(config.model)  # refuse a bad one before the text is prepared
    with training.main_process_first(desc="text"), of_utf8(config.data.dataset):
        data = known_tokenizer(config.data, config.model, checkpoint)
        text = load_text(data, data_seed(training))
    set_seed(training.seed)
    fraction = config.data.mask_fraction
    model = build_model(config.model, len(text.tokenizer), text.tokenizer.eos_token_id, fraction > 0)
    collator = functools.partial(masked, mask=text.tokenizer.mask_token_id, fraction=fraction) if fraction else collate
    trainer = _trainer(model, text, training, list(callbacks), optimizer and optimizer(model, training), collator)
    with of_utf8(config.data.dataset):  # a stream is read meanwhile
        return train_and_evaluate(trainer, checkpoint, progress)


class TokenizerBeside(TrainerCallback):
    """Puts the tokenizer into checkpoints of sharded weights, where the Trainer leaves it out."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the Trainer has written a checkpoint."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and not (folder / "tokenizer.json").is_file():
            kwargs["processing_class"].save_pretrained(folder)


def train_and_evaluate(trainer: Trainer, checkpoint: str | None, progress: TrainerCallback | None = None) -> Result:
    """Train, evaluate where there is something to evaluate on, write model, state and metrics.

    A checkpoint of the last step is left as it is, and what was not written after it any more is written now: the
    Trainer, which looks at `max_steps` after a step only, would train one more.

    Raises:
        ConfigError: a checkpoint of weights of other shapes, or of another optimizer.
    """
    if trainer.is_world_process_zero():
        print(planned(trainer, checkpoint), flush=True)
    ended = False
    if checkpoint is not None:
        results = [written_after(trainer, Path(checkpoint)) if trainer.is_world_process_zero() else None]
        broadcast_object_list(results)
        ended = results[0] is not None
        if ended and trainer.is_world_process_zero():
            what = "nothing is done" if results[0] else "only what comes after the last step is done"
            print(f"already trained: {checkpoint} is the end of it, and {what}", flush=True)
        if results[0]:
            return Result(results[0], trainer)
    trainer.add_callback(TokenizerBeside())
    if progress is not None:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress)
    try:
        metrics = _end_of(trainer, checkpoint) if ended else trainer.train(resume_from_checkpoint=checkpoint).metrics
    except (RuntimeError, ValueError) as error:
        if checkpoint is None or not (said := _unfit(str(error), checkpoint, trainer)):
            raise
        raise ConfigError(f"{said}: give the settings that it was trained with, or begin a new training") from error
    save_whole_model(trainer)
    trainer.save_state()
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        evaluated = trainer.evaluate()
        evaluated["perplexity"] = _perplexity(evaluated["eval_loss"])
        trainer.save_metrics("eval", evaluated)
        metrics = {**metrics, **evaluated}
    return Result(metrics, trainer)


def _end_of(trainer: Trainer, checkpoint: str | None) -> dict[str, float]:
    """Load the checkpoint of the last step, by a training of no epochs, which would log a loss of 0."""
    initial, epochs = trainer.set_initial_training_values, [0]

    def of_no_epoch(*arguments: Any, **settings: Any) -> tuple[Any, ...]:
        epochs[0], *others = initial(*arguments, **settings)
        return 0, *others

    with mock.patch.object(trainer, "set_initial_training_values", of_no_epoch), mock.patch.object(trainer, "log"):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.state.num_train_epochs = epochs[0]
    return {"total_flos": trainer.state.total_flos}


def _unfit(error: str, checkpoint: str, trainer: Trainer) -> str | None:
    """What does not fit of a checkpoint, by torch's error."""
    if found := re.search(r"size mismatch for (.*)\.", error):
        return f"the weights of {checkpoint!r} do not fit the model ({found[1]})"
    if "loaded state dict" in error:  # by torch's optimizers; ours says it itself
        return f"the optimizer state of {checkpoint!r} is none of optim={asked_optim(trainer.args)} for this model"
    return None


def planned(trainer: Trainer, checkpoint: str | None = None) -> str:
    """What will be trained, how long, and into which folder: a line to read before time is spent."""
    args, model = trainer.args, trainer.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    what = f"{trained:,} parameters by {asked_optim(args)}, {length(trainer)} of {batch:,} sequences"
    return f"training: {what}, into {args.output_dir}" + (f", resumed from {checkpoint}" if checkpoint else "")


def length(trainer: Trainer) -> str:
    """Of a training, in steps; of epochs over a stream nobody knows how many those are."""
    args, planned_steps = trainer.args, steps(trainer)
    if args.max_steps > 0:
        return f"{planned_steps:,} steps"
    epochs = f"{args.num_train_epochs:g} epochs"
    return epochs if planned_steps is None else f"{epochs} ({planned_steps:,} steps)"


def steps(trainer: Trainer) -> int | None:
    """Of a whole training; None of epochs over a stream."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    if not isinstance(trainer.train_dataset, Sized):
        return None
    batches = len(trainer.train_dataset) / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)


def written_after(trainer: Trainer, checkpoint: Path) -> dict[str, Any] | None:
    """The results that a training left when it ended with this checkpoint, empty if it was killed before it wrote them;
    None if it is to go on from it.
    """
    out, planned_steps = Path(trainer.args.output_dir), steps(trainer)
    if planned_steps is None or steps_made(checkpoint) < planned_steps:
        return None
    ended = (checkpoint / STATE).stat().st_mtime
    last = out / ("all_results.json" if trainer.eval_dataset is None else "eval_results.json")  # that is written
    if not last.is_file() or last.stat().st_mtime < ended:
        return {}
    read: dict[str, Any] = json.loads((out / "all_results.json").read_text())
    return read


def data_seed(training: TrainingArguments) -> int:
    """Of what is held out, and of a stream's order."""
    return training.seed if training.data_seed is None else training.data_seed


def _trainer(
    model: PreTrainedModel,
    text: TextData,
    training: TrainingArguments,
    callbacks: list[Any],
    optimizer: Any,
    collator: Any,
) -> Trainer:
    return Trainer(
        model=model,
        args=training,
        train_dataset=text.train,
        eval_dataset=text.validation,
        data_collator=collator,
        processing_class=text.tokenizer,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer,
    )


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
