"""Pretraining on the Hugging Face Trainer: `parse` a configuration, `run` it.

`hf-shampoo4 train`, `scripts/pretrain_llama.py`, `scripts/pretrain_gpt.py` and `hf-shampoo4 demo` are this one path.
A configuration is flat: the fields of `ModelArguments`, `DataArguments`, `RunArguments` and
`transformers.TrainingArguments` side by side, from a YAML file, with `--key value` overrides.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback

from hf_shampoo4.checkpointing.completeness import incomplete, last_complete
from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.integrations.trainer import check_args, register
from hf_shampoo4.options import read_yaml
from hf_shampoo4.training.data import DataArguments, TextData, collate, load_text, reason

DEFAULT_CONFIG = "stdlib_tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelArguments:
    """Which model, and how it differs from its configuration file."""

    model: str = field(
        default="llama_tiny",
        metadata={"help": "A preset of configs/models, a config.json, a folder or a hub name; '' with `model_type`."},
    )
    model_type: str | None = field(
        default=None, metadata={"help": "With model='': a transformers model type at its defaults, e.g. gpt2."}
    )
    model_overrides: str = field(
        default="", metadata={"help": "Changes of the configuration: 'hidden_size=128,num_hidden_layers=4'."}
    )
    init_from_pretrained: bool = field(
        default=False, metadata={"help": "Load the weights of `model` (a folder or hub name) instead of drawing them."}
    )
    dtype: str = field(default="float32", metadata={"help": f"Type of the parameters: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    tie_word_embeddings: bool | None = field(default=None, metadata={"help": "One matrix for embedding and head."})

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not allowed: it must be one of {', '.join(DTYPES)}")


@dataclass
class RunArguments:
    """What `TrainingArguments` does not say."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train into a folder that is not empty; its old checkpoints are deleted."}
    )
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "Sequences of an optimizer step over all processes; sets gradient_accumulation_steps."},
    )


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


# ---------------------------------------------------------------------------------------------------- configuration


def config_root() -> Path:
    """The folder of shipped configurations: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def read_config(path: Union[str, Path], kind: str = "train") -> dict[str, Any]:
    """A YAML file's settings; a bare name is looked up among the shipped `configs/<kind>`.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    shipped = config_root() / kind
    try:
        candidates = (Path(path).expanduser(), shipped / f"{path}.yaml", shipped / path)
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
    except (ValueError, RuntimeError) as error:  # no path can be called that, or there is no such user's home
        raise ConfigError(f"config {str(path)!r} does not exist: {error}") from error
    if found is None:
        names = ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
        raise ConfigError(f"config {str(path)!r} does not exist; allowed: a YAML file, or one of {names}")
    try:
        content = read_yaml(found)
    except ValueError as error:
        raise ConfigError(f"config {str(path)!r} {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config {str(path)!r} must map settings to values, not {type(content).__name__}")
    return content


def parse(config: Union[str, Path, Mapping[str, Any], None] = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Settings of a file (or a mapping) with command-line overrides over them, cast and checked.

    Args:
        config: YAML file, shipped configuration name, or mapping of settings.
        overrides: `--key value` or `--key=value` items; they win.

    Returns:
        The four groups of arguments.

    Raises:
        ConfigError: missing or unreadable file, unknown setting, wrong type, inconsistent values.
        OptionError: an `optim_args` item that the optimizer refuses.
    """
    checked = RunConfig(*parse_as(ARGUMENT_TYPES, settings_of(config, "train"), overrides))
    check_run(checked.run, checked.training)
    return checked


def settings_of(config: Union[str, Path, Mapping[str, Any], None], kind: str) -> dict[str, Any]:
    """The settings of a mapping, a file or a name among `configs/<kind>`; none of None."""
    return dict(config) if isinstance(config, Mapping) else read_config(config, kind) if config is not None else {}


def parse_as(types: Sequence[type], settings: Mapping[str, Any], overrides: Sequence[str]) -> tuple[Any, ...]:
    """One object of each of `types` (dataclasses, the last a TrainingArguments), cast and checked.

    Raises:
        ConfigError: unknown setting, wrong type.
    """
    register()
    lists = {key: value for key, value in settings.items() if isinstance(value, list)}  # argparse may want one word
    arguments = [*_as_arguments({key: value for key, value in settings.items() if key not in lists}), *overrides]
    given = _check_names([*(f"--{key}" for key in lists), *arguments], types)
    if not torch.accelerator.is_available():
        arguments += [] if "use_cpu" in given else ["--use_cpu", "true"]
    parser = HfArgumentParser(types, allow_abbrev=False, add_help=False)
    parser.set_defaults(**{key.replace("-", "_"): value for key, value in lists.items()})
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print its usage and exit
    try:
        return parser.parse_args_into_dataclasses(args=arguments, look_for_args_file=False)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def check_run(run: RunArguments, training: TrainingArguments) -> None:
    """Set the accumulation that `total_batch_size` asks for; refuse an optimizer that cannot run like this.

    Raises:
        ConfigError: a batch size that does not fit, or a sharding that the optimizer does not do.
        OptionError: an `optim_args` item that the optimizer refuses.
    """
    _set_accumulation(run, training)
    try:
        check_args(training)
    except NotImplementedError as error:
        raise ConfigError(str(error)) from error


PAIRS = ("optim_args", "model_overrides")  # key=value,key=value on the command line, which YAML writes as a mapping


def _pair(key: str, value: Any) -> str:
    """`key=value`; a list is separated by semicolons, what is no text is JSON."""
    if isinstance(value, list):
        return f"{key}={';'.join(map(str, value))}"
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as command-line items, so that a file and the command line are cast by the same rules."""
    items: list[str] = []
    for key, value in settings.items():
        if value is None:
            continue
        if key in PAIRS and isinstance(value, Mapping):
            items += [f"--{key}={','.join(map(_pair, value, value.values()))}"]
        elif isinstance(value, Mapping):
            items += [f"--{key}={json.dumps(value)}"]
        else:
            items += [f"--{key}={value}"]
    return items


def _check_names(arguments: Sequence[str], types: Sequence[type]) -> set[str]:
    """The names given; an unknown one is answered with the closest known ones."""
    known = [f.name for kind in types for f in dataclasses.fields(kind) if f.init]
    given = [item[2:].partition("=")[0].replace("-", "_") for item in arguments if item.startswith("--")]
    for name in given:
        if name not in known and name.removeprefix("no_") not in known:
            close = difflib.get_close_matches(name, known, n=3)
            own = [f.name for kind in types[:-1] for f in dataclasses.fields(kind)]
            hint = f"did you mean {' or '.join(close)}?" if close else f"ours are {', '.join(own)};"
            raise ConfigError(f"unknown setting {name!r}: {hint} (every field of {_documented(types[-1])} "
                              "is allowed too)")  # fmt: skip
    return set(given)


def _documented(arguments: type) -> str:
    """`transformers.TrainingArguments` or `trl.SFTConfig`."""
    return f"{arguments.__module__.partition('.')[0]}.{arguments.__name__}"


def _refuse(message: str) -> None:
    raise ConfigError(message)


def _set_accumulation(run: RunArguments, training: TrainingArguments) -> None:
    total = run.total_batch_size
    if total is None:
        return
    at_once = training.train_batch_size * training.world_size  # the first is of all GPUs of a process
    if total % at_once:
        raise ConfigError(f"total_batch_size={total} is not a multiple of per_device_train_batch_size * devices "
                          f"= {training.per_device_train_batch_size} * "
                          f"{at_once // training.per_device_train_batch_size}")  # fmt: skip
    training.gradient_accumulation_steps = total // at_once


# ---------------------------------------------------------------------------------------------------- model


def load_model_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The model's configuration with its overrides.

    Raises:
        ConfigError: no such preset, file or name; an override that the configuration does not have.
    """
    config, source = _base_config(arguments)
    changes = dict(_override(item, config) for item in filter(None, arguments.model_overrides.split(",")))
    if arguments.tie_word_embeddings is not None:
        changes["tie_word_embeddings"] = arguments.tie_word_embeddings
    if not changes:
        return config
    try:  # over what was written, not over what the class has made of it: a head's size follows from the hidden size
        written = PreTrainedConfig.get_config_dict(source)[0] if source else {}
        return type(config).from_dict({**written, **changes})
    except Exception as error:  # validators of transformers, each with types of its own
        raise ConfigError(f"model_overrides {arguments.model_overrides!r} do not fit the {config.model_type} "
                          f"configuration: {reason(error)}") from error  # fmt: skip


def _base_config(arguments: ModelArguments) -> tuple[PreTrainedConfig, Union[str, Path, None]]:
    """A configuration, and where it is written; None: nowhere, it is a type's default."""
    presets = config_root() / "models"
    preset = presets / f"{arguments.model}.json"
    try:
        if not arguments.model and arguments.model_type:
            return AutoConfig.for_model(arguments.model_type), None
        source = preset if arguments.model and preset.is_file() else arguments.model
        return AutoConfig.from_pretrained(source), source
    except (OSError, ValueError, KeyError) as error:
        names = ", ".join(sorted(file.stem for file in presets.glob("*.json")))
        raise ConfigError(f"model {arguments.model or arguments.model_type!r} cannot be loaded ({reason(error)}); "
                          f"allowed: one of {names}, a config.json, a folder or a hub name") from error  # fmt: skip


def _override(item: str, config: PreTrainedConfig) -> tuple[str, Any]:
    """One `key=value` of `model_overrides`, the value read as JSON where it is JSON and as text elsewhere."""
    key, equals, text = (part.strip() for part in item.partition("="))
    known = config.to_dict()
    if not equals or key not in known:
        close = difflib.get_close_matches(key, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"model_overrides item {item!r} is not key=value with a key of {config.model_type}{hint}")
    try:
        return key, json.loads(text)
    except json.JSONDecodeError:
        return key, text


def build_model(arguments: ModelArguments, vocab_size: int, eos_token_id: int | None = None) -> PreTrainedModel:
    """A model from scratch (or from its weights), with an embedding for each of the tokenizer's tokens.

    Args:
        arguments: which model.
        vocab_size: tokens of the tokenizer; the model's vocabulary is this unless `model_overrides` sets a larger one.
        eos_token_id: the tokenizer's end of text, for generation.

    Raises:
        ConfigError: as `load_model_config`, or a vocabulary too small for the tokenizer.
    """
    config = load_model_config(arguments)
    fixed = arguments.init_from_pretrained or re.search(r"\bvocab_size\s*=", arguments.model_overrides)
    if not fixed:
        config.vocab_size = vocab_size
    if config.vocab_size < vocab_size:
        raise ConfigError(f"model {arguments.model!r} has vocab_size={config.vocab_size}, "
                          f"too small for a tokenizer of {vocab_size} tokens")  # fmt: skip
    config.eos_token_id = eos_token_id
    if not arguments.init_from_pretrained:  # they are of the tokenizer that the configuration was written for
        config.bos_token_id = config.pad_token_id = None
    options = {"dtype": DTYPES[arguments.dtype], "attn_implementation": arguments.attn_implementation}
    if arguments.init_from_pretrained:
        return AutoModelForCausalLM.from_pretrained(arguments.model, config=config, **options)
    return AutoModelForCausalLM.from_config(config, **options)


# ---------------------------------------------------------------------------------------------------- the run


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
    with training.main_process_first(desc="text"):
        text = load_text(config.data, training.data_seed or training.seed)
    set_seed(training.seed)
    model = build_model(config.model, len(text.tokenizer), text.tokenizer.eos_token_id)
    trainer = _trainer(model, text, training, list(callbacks), optimizer and optimizer(model, training))
    return train_and_evaluate(trainer, checkpoint, progress)


def train_and_evaluate(trainer: Trainer, checkpoint: str | None, progress: TrainerCallback | None = None) -> Result:
    """Train, evaluate where there is something to evaluate on, write model, state and metrics."""
    if progress is not None:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        evaluated = trainer.evaluate()
        evaluated["perplexity"] = _perplexity(evaluated["eval_loss"])
        trainer.save_metrics("eval", evaluated)
        metrics = {**metrics, **evaluated}
    return Result(metrics, trainer)


def _trainer(
    model: PreTrainedModel, text: TextData, training: TrainingArguments, callbacks: list[Any], optimizer: Any
) -> Trainer:
    return Trainer(
        model=model,
        args=training,
        train_dataset=text.train,
        eval_dataset=text.validation,
        data_collator=collate,
        processing_class=text.tokenizer,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer,
    )


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


FINISHED = ("all_results.json", "model.safetensors", "adapter_model.safetensors")  # what a training leaves at its end


def prepare_output(run: RunArguments, training: TrainingArguments) -> str | None:
    """The checkpoint to resume from, if any; refuses a folder with other content unless told to overwrite it."""
    folder = Path(training.output_dir)
    checkpoint = _checkpoint(training)
    if checkpoint or training.process_index != 0 or not folder.is_dir() or not any(folder.iterdir()):
        return checkpoint
    began = _is(training.resume_from_checkpoint, "auto") and not any((folder / name).exists() for name in FINISHED)
    if not run.overwrite_output_dir and not began:
        raise ConfigError(f"output_dir {str(folder)!r} is not empty: choose another, or --overwrite_output_dir, "
                          "or continue with --resume_from_checkpoint auto")  # fmt: skip
    for old in folder.glob("checkpoint-*"):  # the Trainer's rotation would take them for newer ones of this run
        if run.overwrite_output_dir:
            shutil.rmtree(old)
        else:
            _set_aside(old)
    return None


def _set_aside(checkpoint: Path) -> None:
    """Rename what cannot be resumed from; it may hold weights that somebody wants."""
    free = (f"incomplete-{checkpoint.name}{f'-{i}' * (i > 1)}" for i in itertools.count(1))
    checkpoint.rename(next(path for path in map(checkpoint.with_name, free) if not path.exists()))


def _checkpoint(training: TrainingArguments) -> str | None:
    """`true`: the newest complete checkpoint, which must exist; `auto`: the newest, if there is one; else a folder."""
    asked = training.resume_from_checkpoint
    if asked is None or _is(asked, "", "false", "none"):
        return None
    if not _is(asked, "true", "auto"):
        if not Path(asked).is_dir():
            raise ConfigError(f"resume_from_checkpoint {asked!r} does not exist; allowed: true, auto, or a folder")
        if reason := incomplete(Path(asked)):
            raise ConfigError(f"resume_from_checkpoint {asked!r} is not a complete checkpoint: {reason}")
        return str(asked)
    newest, passed_over = last_complete(Path(training.output_dir))
    for name, reason in passed_over.items():
        print(f"passed over {name}, which is not complete: {reason}", flush=True)
    if newest is None and _is(asked, "true"):
        raise ConfigError(f"resume_from_checkpoint=true: there is no complete checkpoint in {training.output_dir!r}")
    return None if newest is None else str(newest)


def _is(asked: Any, *words: str) -> bool:
    return str(asked).lower() in words


def main(arguments: Sequence[str]) -> None:
    """`train [CONFIG] [--key value ...]`; without a CONFIG the CPU-sized default."""
    if {"-h", "--help"} & set(arguments):
        print(f"usage: hf-shampoo4 train [CONFIG.yaml] [--key value ...]   (CONFIG: default {DEFAULT_CONFIG})\n")
        print(settings_help(ARGUMENT_TYPES))
        return
    named = bool(arguments) and not arguments[0].startswith("--")
    config, overrides = (arguments[0], arguments[1:]) if named else (DEFAULT_CONFIG, arguments)
    result = run(parse(config, overrides))
    result.trainer.log_metrics("all", result.metrics)


def settings_help(types: Sequence[type]) -> str:
    """The settings of this project with their defaults; the last type's are documented by the library it is from."""
    lines = []
    for kind in types[:-1]:
        lines.append(f"{kind.__doc__}")
        for option in dataclasses.fields(kind):
            default = "required" if option.default is dataclasses.MISSING else repr(option.default)
            lines.append(f"  --{option.name} ({default}): {option.metadata.get('help', '')}")
    return "\n".join([*lines, f"and every field of {_documented(types[-1])}."])
