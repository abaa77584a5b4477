"""`hf-shampoo4 train` and `finetune`: a CONFIG, and `--key value` settings over it.

Names and the folder are checked before anything heavy is imported, so that a mistake is answered at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..exceptions import ConfigError, MissingPackage
from ..utils.hub import offline_without_network
from .arguments import ChatArguments, DataArguments, ModelArguments, RunArguments
from .config import check_names, is_config, read_config, settings_help
from .library_fields import SFT, TRAINER, library_fields
from .output_dir import refuse_content

DEFAULT_CONFIG = "stdlib_tiny"


def train(arguments: Sequence[str]) -> None:
    """`train [CONFIG] [--key value ...]`; without a CONFIG the CPU-sized default."""
    ours, library = (ModelArguments, DataArguments, RunArguments), "transformers.TrainingArguments"
    if {"-h", "--help"} & set(arguments):
        print(f"usage: hf-shampoo4 train [CONFIG.yaml] [--key value ...]   (CONFIG: default {DEFAULT_CONFIG})\n")
        print(settings_help(ours, library))
        return
    config, overrides = _split(arguments)
    _check(config or DEFAULT_CONFIG, overrides, "train", ours, library_fields(TRAINER), library)
    from .pretrain import parse, run

    result = run(parse(config or DEFAULT_CONFIG, overrides))
    result.trainer.log_metrics("all", result.metrics)


def finetune(arguments: Sequence[str]) -> None:
    """`finetune CONFIG [--key value ...]`."""
    ours, library = (ChatArguments, RunArguments), "trl.SFTConfig and trl.ModelConfig"
    if not arguments or {"-h", "--help"} & set(arguments):
        print("usage: hf-shampoo4 finetune CONFIG.yaml [--key value ...]   (CONFIG: or a name in configs/finetune)\n")
        print(settings_help(ours, library))
        return
    config, overrides = _split(arguments)
    _check(config, overrides, "finetune", ours, library_fields(SFT), library)
    if missing := [name for name in ("transformers", "trl", "peft") if find_spec(name) is None]:
        extra = "train,trl" if "transformers" in missing else "trl"
        raise MissingPackage(f"fine-tuning needs {' and '.join(missing)}: pip install 'hf-shampoo4[{extra}]'")
    from .finetune import parse, run

    result = run(parse(config, overrides))
    result.trainer.log_metrics("all", result.metrics)


def checked_settings(config: str, overrides: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The settings of a training, CONFIG's and those of the command line, and which command's they are.

    Args:
        config: of `train` or of `finetune`, told by the name or by `model_name_or_path`.
        overrides: `--key value` items.

    Returns:
        "train" or "finetune", and the settings.

    Raises:
        ConfigError: as `train` and `finetune` would.
    """
    given = overrides_as_settings(overrides)
    kind = _kind_of(config, given)
    ours = (ModelArguments, DataArguments, RunArguments) if kind == "train" else (ChatArguments, RunArguments)
    fields, name = (TRAINER, "transformers.TrainingArguments") if kind == "train" else (SFT, "trl.SFTConfig")
    _check(config, [*overrides, "--overwrite_output_dir", "true"], kind, ours, library_fields(fields), name)
    return kind, {**read_config(config, kind), **given}


def _kind_of(config: str, given: Mapping[str, Any]) -> str:
    try:
        content = read_config(config, "train")
    except ConfigError:
        with suppress(ConfigError):
            read_config(config, "finetune")
            return "finetune"
        raise
    return "finetune" if "model_name_or_path" in {**content, **given} else "train"


def _split(arguments: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """CONFIG, which comes first, and the settings."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def _check(
    config: str | None,
    overrides: Sequence[str],
    kind: str,
    ours: Sequence[type],
    library: set[str] | None,
    library_name: str,
) -> None:
    """What can be said of a command line without the libraries.

    Raises:
        ConfigError: a CONFIG that is not there, or an unknown setting in it or on the command line.
    """
    for before, item in zip(["=", *overrides], overrides, strict=False):  # a list's values may follow each other
        stands_alone = not item.startswith("-") and ("=" in before or not before.startswith("--"))
        if stands_alone and (item is overrides[0] or is_config(item, kind)):
            raise ConfigError(f"{item!r} is no --key value: CONFIG comes first, and there is one")
    settings = {} if config is None else read_config(config, kind)
    given = {**settings, **overrides_as_settings(overrides)}
    if library is not None:
        check_names(given, ours, library, library_name)
    if given.get("output_dir") and not {"overwrite_output_dir", "resume_from_checkpoint"} & set(given):
        refuse_content(Path(str(given["output_dir"])))
    offline_without_network()


def overrides_as_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` items as a file would have them; several values are a list, none is true."""
    found: dict[str, list[str]] = {}
    key = ""
    for item in overrides:
        if item.startswith("--"):
            name, equals, value = item[2:].partition("=")
            key = name.replace("-", "_")
            found[key] = [value] if equals else []
        elif key:
            found[key].append(item)
    return {key: values[0] if len(values) == 1 else values or True for key, values in found.items()}
