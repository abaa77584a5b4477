"""Supervised fine-tuning on TRL's SFTTrainer: `parse` a configuration, `run` it.

`hf-shampoo4 finetune` and `scripts/finetune.py` are this one path.  A configuration is flat: the fields of
`trl.ModelConfig` (model, LoRA, quantisation), `ChatArguments`, `RunArguments` and `trl.SFTConfig` side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from ..exceptions import ConfigError
from .data import ELSEWHERE, open_dataset, reason
from .pretrain import Result, RunArguments, check_run, parse_as, prepare_output, settings_help, settings_of
from .pretrain import train_and_evaluate as finish

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import ModelConfig, SFTConfig

# What TRL reads: the columns of an example, the first kind that is there, and what belongs to any of them.
KINDS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
BESIDE = ("tools", "chat_template_kwargs")
PICTURES = ("image", "images")


@dataclass
class ChatArguments:
    """Which conversations."""

    dataset: str = field(metadata={"help": f"Examples to learn, e.g. JSONL with a column `messages`: {ELSEWHERE}."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of a hub dataset to train on."})
    validation_dataset: str | None = field(default=None, metadata={"help": "Examples to validate on."})
    validation_split: str | None = field(default=None, metadata={"help": "Split of a hub dataset to validate on."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Without those two: share of the examples held out (0: none)."}
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Use the first N examples only."})

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ConfigError(f"validation_fraction={self.validation_fraction!r} is not allowed: it must be in [0, 1)")


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
    """Settings of a file, of a name in configs/finetune or of a mapping, with command-line overrides over them.

    Args:
        config: YAML file, shipped configuration name, or mapping of settings.
        overrides: `--key value` or `--key=value` items; they win.

    Returns:
        The four groups of arguments.

    Raises:
        ConfigError: missing or unreadable file, unknown setting, wrong type, inconsistent values, no TRL.
        OptionError: an `optim_args` item that the optimizer refuses.
    """
    checked = FinetuneConfig(*parse_as(argument_types(), settings_of(config, "finetune"), overrides))
    if not checked.model.model_name_or_path:
        raise ConfigError("model_name_or_path is required: a folder or a hub name")
    check_run(checked.run, checked.training)
    return checked


def load_examples(data: ChatArguments, seed: int = 0) -> tuple[Dataset, Dataset | None]:
    """Training and validation examples, with the columns of one of `KINDS`.

    Raises:
        ConfigError: a dataset that is not there, or has none of these columns.
    """
    train = _with_known_columns(data.dataset, open_dataset(data.dataset, data.train_split, data.dataset_config))
    if data.validation_dataset or data.validation_split:
        source = data.validation_dataset or data.dataset
        split = data.validation_split or data.train_split
        held_out = _with_known_columns(source, open_dataset(source, split, data.dataset_config))
    elif data.validation_fraction:
        parts = train.train_test_split(data.validation_fraction, seed=seed)
        train, held_out = parts["train"], parts["test"]
    else:
        held_out = None
    return train.take(min(data.max_train_examples or len(train), len(train))), held_out


def _with_known_columns(source: str, examples: Dataset) -> Dataset:
    kind = next((columns for columns in KINDS if set(columns) <= set(examples.column_names)), None)
    if kind is None:
        allowed = ", or ".join(" and ".join(columns) for columns in KINDS)
        raise ConfigError(f"dataset {source!r} has columns {', '.join(examples.column_names)}; it needs {allowed}")
    if pictures := [name for name in PICTURES if name in examples.column_names]:
        raise ConfigError(f"dataset {source!r} has pictures (column {pictures[0]!r}), which would not be learnt from: "
                          "remove the column to train on the text alone")  # fmt: skip
    return examples.select_columns([name for name in (*kind, *BESIDE) if name in examples.column_names])


def run(config: FinetuneConfig, callbacks: Sequence[TrainerCallback] = ()) -> Result:
    """Fine-tune, evaluate, and write the model (or the adapter), checkpoints and `all_results.json`.

    Args:
        config: from `parse`.
        callbacks: for the Trainer.

    Returns:
        Final metrics and the log by step.

    Raises:
        ConfigError: a folder that would be overwritten; a checkpoint, dataset or model that is not there.
    """
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    training, model = config.training, config.model
    checkpoint = prepare_output(config.run, training)
    with training.main_process_first(desc="examples"):
        train, held_out = load_examples(config.data, training.data_seed or training.seed)
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
    except OSError as error:  # what transformers raises for a name that is neither a folder nor on the hub
        said = reason(error)
        raise ConfigError(f"model_name_or_path {model.model_name_or_path!r} cannot be loaded ({said})") from error
    return finish(trainer, checkpoint)


def main(arguments: Sequence[str]) -> None:
    """`finetune CONFIG [--key value ...]`."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print("usage: hf-shampoo4 finetune CONFIG.yaml [--key value ...]   (CONFIG: or a name in configs/finetune)\n")
        print(settings_help(argument_types()))
        return
    named = not arguments[0].startswith("--")
    result = run(parse(arguments[0] if named else None, arguments[1:] if named else arguments))
    result.trainer.log_metrics("all", result.metrics)
