"""Supervised fine-tuning on TRL's SFTTrainer: `parse` a configuration, `run` it.

`hf-shampoo4 finetune` and `scripts/finetune.py` are this one path.  A configuration is flat: the fields of
`trl.ModelConfig` (model, LoRA, quantisation), `ChatArguments`, `RunArguments` and `trl.SFTConfig` side by side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from ..exceptions import ConfigError, reason
from .arguments import ChatArguments, RunArguments
from .config import parse_as
from .documents import validation_source
from .output_dir import prepare_output
from .pretrain import Result, data_seed
from .pretrain import train_and_evaluate as finish
from .sources import find_source, of_utf8, open_dataset

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import TrainerCallback, TrainingArguments
    from trl import ModelConfig, SFTConfig, SFTTrainer

# What TRL reads: the columns of an example, the first kind that is there, and what belongs to any of them.
KINDS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
BESIDE = ("tools", "chat_template_kwargs")
PICTURES = ("image", "images")


@dataclass
class FinetuneConfig:
    """A checked configuration."""

    model: ModelConfig
    data: ChatArguments
    run: RunArguments
    training: SFTConfig


def argument_types() -> tuple[type, ...]:
    """The dataclasses whose fields are the settings.

    Raises:
        ConfigError: TRL or PEFT is not installed.
    """
    missing = [name for name in ("trl", "peft") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"fine-tuning needs {' and '.join(missing)}: pip install 'hf-shampoo4[trl]'")
    from trl import ModelConfig, SFTConfig

    return ModelConfig, ChatArguments, RunArguments, SFTConfig


def parse(config: Union[str, Path, Mapping[str, Any], None] = None, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """A fine-tuning's settings: see `config.parse_as`; a name is one of configs/finetune.

    Raises:
        ConfigError: also without TRL, or without a model.
    """
    checked = FinetuneConfig(*parse_as(argument_types(), "finetune", config, overrides))
    if not checked.model.model_name_or_path:
        raise ConfigError("model_name_or_path is required: a folder or a hub name")
    return checked


def load_examples(data: ChatArguments, seed: int = 0) -> tuple[Dataset, Dataset | None]:
    """Training and validation examples, with the columns of one of `KINDS`.

    Raises:
        ConfigError: a dataset that is not there, or has none of these columns; or too few examples to hold some out.
    """
    source = find_source(data.dataset)
    train = _with_known_columns(source.name, open_dataset(source, data.train_split, data.dataset_config))
    if validation := validation_source(source, train, data):
        held_out = _with_known_columns(validation[0].name, open_dataset(*validation, data.dataset_config))
    elif data.validation_fraction:
        if len(train) < 2:
            raise ConfigError(f"dataset {data.dataset!r} has {len(train)} example(s), none to hold out: "
                              "give more, or validation_fraction=0")  # fmt: skip
        parts = train.train_test_split(data.validation_fraction, seed=seed)
        train, held_out = _without(parts["test"], parts["train"]), parts["test"]
        if len(train) == 0:
            raise ConfigError(f"dataset {data.dataset!r}: all examples equal ones that are held out: give others, or "
                              "validation_fraction=0")  # fmt: skip
    else:
        held_out = None
    train = train.take(min(data.max_train_examples or len(train), len(train)))
    print(f"examples: {len(train):,} to train on, {len(held_out or ()):,} held out to validate on", flush=True)
    return train, held_out


def _without(held_out: Dataset, train: Dataset) -> Dataset:
    """The examples to train on that are not held out as well: an example may be there more than once."""
    held = dict.fromkeys(
        sorted(_written(example) for example in held_out)
    )  # unlike a set, of one hash in every process
    kept = train.filter(_is_not_among, fn_kwargs={"held": held})
    if again := len(train) - len(kept):
        print(f"examples: {again:,} equal ones that are held out, and are left out", flush=True)
    return kept


def _is_not_among(example: Mapping[str, Any], held: Mapping[str, None]) -> bool:
    return _written(example) not in held


def _written(example: Mapping[str, Any]) -> str:
    return json.dumps(example, sort_keys=True, default=str)


def _with_known_columns(source: str, examples: Dataset) -> Dataset:
    kind = next((columns for columns in KINDS if set(columns) <= set(examples.column_names)), None)
    if kind is None:
        allowed = ", or ".join(" and ".join(columns) for columns in KINDS)
        raise ConfigError(f"dataset {source!r} has columns {', '.join(examples.column_names)}; it needs {allowed}")
    if pictures := [name for name in PICTURES if name in examples.column_names]:
        raise ConfigError(f"dataset {source!r} has pictures (column {pictures[0]!r}), which would not be learnt from: "
                          "remove the column to train on the text alone")  # fmt: skip
    examples = examples.select_columns([name for name in (*kind, *BESIDE) if name in examples.column_names])
    with of_utf8(source):
        return _full(source, _as_text(examples, kind), kind)


def _as_text(examples: Dataset, kind: tuple[str, ...]) -> Dataset:
    """Numbers as they are written: a CSV of sums has a column of them."""
    from datasets import Value

    for name in kind:
        if isinstance(examples.features[name], Value) and examples.features[name].dtype != "string":
            examples = examples.cast_column(name, Value("string"))
    return examples


def _full(source: str, examples: Dataset, kind: tuple[str, ...]) -> Dataset:
    """The examples without empty cells."""
    full = examples.filter(lambda *cells: all(cells), input_columns=list(kind))
    if empty := len(examples) - len(full):
        print(f"dataset {source!r}: {empty} of {len(examples)} rows have no {' or '.join(kind)} and are left out")
    return full


def run(
    config: FinetuneConfig,
    callbacks: Sequence[TrainerCallback] = (),
    progress: TrainerCallback | None = None,
    optimizer: Callable[[nn.Module, TrainingArguments], tuple[type, dict[str, Any]]] | None = None,
) -> Result:
    """Fine-tune, evaluate, and write the model (or the adapter), checkpoints and `all_results.json`.

    Args:
        config: from `parse`.
        callbacks: for the Trainer.
        progress: shown instead of the Trainer's progress bar.
        optimizer: class and keywords of an optimizer that takes the place of `optim`, by the model with its adapters.

    Returns:
        Final metrics and the log by step.

    Raises:
        ConfigError: a folder that would be overwritten; a checkpoint, dataset or model that is not there.
    """
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    training, model = config.training, config.model
    checkpoint = prepare_output(config.run, training)
    with training.main_process_first(desc="examples"):
        train, held_out = load_examples(config.data, data_seed(training))
    _learn_from_answers_where_there_are(training, train)
    given: Any = training.model_init_kwargs or {}  # text or a mapping; TRL has made it a mapping by now
    ours = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    training.model_init_kwargs = {**ours, **given}
    try:
        trainer = SFTTrainer(
            model=model.model_name_or_path,
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=list(callbacks),
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise _explained(error, config) from error
    _tell_what_is_left(trainer, train, held_out)
    if optimizer is not None:  # its groups are of the model as TRL has adapted it
        trainer.optimizer_cls_and_kwargs = optimizer(trainer.model, training)
    return finish(trainer, checkpoint, progress)


def _learn_from_answers_where_there_are(training: SFTConfig, examples: Dataset) -> None:
    """Turn `assistant_only_loss` off, and say so, for examples that are no conversations: TRL would refuse them."""
    from trl.data_utils import is_conversational

    if training.assistant_only_loss and not is_conversational(examples[0]):
        learnt = "completions" if "completion" in examples.column_names else "whole texts"
        print(f"the examples are no conversations: learning from the {learnt} (assistant_only_loss=false)", flush=True)
        training.assistant_only_loss = False


def _tell_what_is_left(trainer: SFTTrainer, train: Dataset, held_out: Dataset | None) -> None:
    """Say how many examples TRL has left out since nothing of what is learnt from is within `max_length`.

    Raises:
        ConfigError: all to train on, or all to validate on.
    """
    args = trainer.args
    packed = args.packing if args.eval_packing is None else args.eval_packing
    parts = [("train on", train, trainer.train_dataset, args.packing)]
    parts += [("validate on", held_out, trainer.eval_dataset, packed)] if held_out is not None else []
    for purpose, given, kept, packed in parts:
        if len(kept) == 0:
            raise ConfigError(f"none of {len(given):,} examples to {purpose} has anything to learn within "
                              f"max_length={args.max_length} tokens: raise it, or give shorter prompts")  # fmt: skip
        if not packed and len(kept) < len(given) and trainer.is_world_process_zero():
            print(f"examples: {len(given) - len(kept):,} of {len(given):,} to {purpose} have nothing to learn within "
                  f"max_length={args.max_length} tokens, and are left out", flush=True)  # fmt: skip


def _explained(error: Exception, config: FinetuneConfig) -> Exception:
    """What a user can do about an error of TRL or transformers while they load; the error itself if it is another."""
    name, said = config.model.model_name_or_path, reason(error)
    if isinstance(error, OSError) or "model_type" in said or "Unrecognized model" in said:
        return ConfigError(f"model_name_or_path {name!r} cannot be loaded ({said})")
    if "chat_template is not set" in said or "NoneType" in said:
        return ConfigError(
            f"{name!r} has no chat template, so it cannot learn from `messages`: give one with chat_template_path "
            "(a .jinja file, or a model that has one), or examples with `prompt` and `completion`"
        )
    if "no assistant tokens" in said:
        return ConfigError(
            "a conversation has no turn of the assistant to learn from, or the chat template does not mark it "
            "({% generation %}): leave such conversations out, or set assistant_only_loss=false to learn from all turns"
        )
    if "Target modules" in said:
        return ConfigError(f"lora_target_modules names no layer of {name!r} ({said})")
    if "chat template" in said or "chat_template" in said:
        return ConfigError(
            f"the chat template of {name!r} cannot be trained with ({said}): "
            "set assistant_only_loss=false, or give one with chat_template_path"
        )
    return error
