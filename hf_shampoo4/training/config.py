"""Configurations: flat files of settings and `--key value` overrides, cast and checked by dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from ..exceptions import ConfigError
from ..options import pairs_as_text
from ..utils.numbers import SEEDS
from ..utils.yaml import read_yaml

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .arguments import RunArguments

DEFAULT_OPTIM = "shampoo4bit"


def config_root() -> Path:
    """The folder of shipped configurations: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def read_config(path: Union[str, Path], kind: str = "train") -> dict[str, Any]:
    """A YAML file's settings; a bare name is looked up among the shipped `configs/<kind>`.

    `like: OTHER` in it lays the file over another one, which lies beside it or is shipped.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a file that is like itself.
    """
    files = [_find(path, Path(), kind)]
    content = _mapping(path, files[0])
    while other := content.pop("like", None):
        found = _find(other, files[-1].parent, kind)
        if found in files:
            raise ConfigError(f"config {str(path)!r}: `like: {other}` leads back to {found.name!r}")
        files.append(found)
        content = {**_mapping(other, found), **content}
    return content


def is_config(word: str, kind: str) -> bool:
    """Whether a word of the command line looks like a configuration's name."""
    return word.endswith((".yaml", ".yml")) or (config_root() / kind / f"{word}.yaml").is_file()


def _find(path: Union[str, Path], folder: Path, kind: str) -> Path:
    shipped = config_root() / kind
    try:
        candidates = (folder / Path(path).expanduser(), shipped / f"{path}.yaml", shipped / path)
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
    except (TypeError, ValueError, RuntimeError) as error:  # no path can be called that, or no user has that home
        raise ConfigError(f"config {str(path)!r} does not exist: {error}") from error
    if found is None:
        names = ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
        wrong = "is a folder" if candidates[0].is_dir() else "does not exist"
        raise ConfigError(f"config {str(path)!r} {wrong}; allowed: a YAML file, or one of {names}")
    return found.resolve()


def _mapping(name: Union[str, Path], file: Path) -> dict[str, Any]:
    try:
        content = read_yaml(file)
    except ValueError as error:
        raise ConfigError(f"config {str(name)!r} {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config {str(name)!r} must map settings to values, not {type(content).__name__}")
    return content


def parse_as(
    types: Sequence[type], kind: str, config: Union[str, Path, Mapping[str, Any], None], overrides: Sequence[str]
) -> tuple[Any, ...]:
    """Settings of a file, of a name in configs/<kind> or of a mapping, with command-line overrides over them.

    Args:
        types: dataclasses, the last two `RunArguments` and a kind of `TrainingArguments`.
        kind: folder of configs/.
        config: YAML file, shipped configuration name, or mapping of settings; None: none.
        overrides: `--key value` or `--key=value` items; they win.

    Returns:
        One object of each of `types`, cast and checked.

    Raises:
        ConfigError: missing or unreadable file, unknown setting, wrong type, inconsistent values.
        OptionError: an `optim_args` item that the optimizer refuses.
    """
    settings = dict(config) if isinstance(config, Mapping) else read_config(config, kind) if config is not None else {}
    made = _cast(types, settings, overrides)
    _check_run(*made[-2:])
    return made


def _cast(types: Sequence[type], settings: Mapping[str, Any], overrides: Sequence[str]) -> tuple[Any, ...]:
    """One object of each of `types` from settings as text, or of their own type."""
    import torch
    from transformers import HfArgumentParser

    from ..integrations.trainer import register

    register()
    lists = {key: value for key, value in settings.items() if isinstance(value, list)}  # argparse may want one word
    arguments = [*_as_arguments({key: value for key, value in settings.items() if key not in lists}), *overrides]
    given = _names_in([*(f"--{key}" for key in lists), *arguments])
    check_names(given, types[:-1], field_names(types[-1]), documented(types[-1]))
    if not torch.accelerator.is_available():
        arguments += [] if "use_cpu" in given else ["--use_cpu", "true"]
    parser = HfArgumentParser(types, allow_abbrev=False, add_help=False)
    parser.set_defaults(optim=DEFAULT_OPTIM)  # a command of this package; transformers' own default is AdamW
    parser.set_defaults(**{key.replace("-", "_"): value for key, value in lists.items()})
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print its usage and exit
    try:
        return parser.parse_args_into_dataclasses(args=arguments, look_for_args_file=False)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def _check_run(run: RunArguments, training: TrainingArguments) -> None:
    """Set the accumulation that `total_batch_size` asks for; refuse an optimizer that cannot run like this.

    Raises:
        ConfigError: a batch size that does not fit, or a sharding that the optimizer does not do.
        OptionError: an `optim_args` item that the optimizer refuses.
    """
    from ..integrations.trainer import check_args

    _check_numbers(training)
    _set_accumulation(run, training)
    try:
        check_args(training)
    except NotImplementedError as error:
        raise ConfigError(str(error)) from error


COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def _check_numbers(training: TrainingArguments) -> None:
    """Refuse what the Trainer finds out late or takes for something else: `max_steps=0` is no limit to it.

    Raises:
        ConfigError: a number that is not allowed.
    """
    steps, epochs = training.max_steps, training.num_train_epochs
    for name, holds, allowed in (
        *((name, getattr(training, name) >= 1, ">= 1") for name in COUNTS),
        *((name, 0 <= (getattr(training, name) or 0) <= SEEDS, f"0 to {SEEDS:,}") for name in ("seed", "data_seed")),
        ("max_steps", steps >= 1 or steps == -1, ">= 1, or -1: num_train_epochs decide"),
        ("num_train_epochs", steps >= 1 or 0 < epochs < math.inf, "a number above 0"),
    ):
        if not holds:
            raise ConfigError(f"{name}={getattr(training, name)} is not allowed: it must be {allowed}")


PAIRS = ("optim_args", "model_overrides")  # key=value,key=value on the command line, which YAML writes as a mapping


def _as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as command-line items, so that a file and the command line are cast by the same rules."""
    items: list[str] = []
    for key, value in settings.items():
        if value is None:
            continue
        if key in PAIRS and isinstance(value, Mapping):
            items += [f"--{key}={pairs_as_text(value)}"]
        elif isinstance(value, Mapping):
            items += [f"--{key}={json.dumps(value)}"]
        else:
            items += [f"--{key}={value}"]
    return items


def _names_in(arguments: Sequence[str]) -> set[str]:
    """The settings that `--key value` and `--key=value` items name."""
    return {item[2:].partition("=")[0].replace("-", "_") for item in arguments if item.startswith("--")}


def field_names(kind: type) -> set[str]:
    """The settings that a dataclass takes."""
    return {f.name for f in dataclasses.fields(kind) if f.init}


def check_names(given: Iterable[str], ours: Sequence[type], library: set[str], library_name: str) -> None:
    """Answer an unknown setting with the closest known ones.

    Raises:
        ConfigError: a name that neither our dataclasses nor the library's has.
    """
    own = [f.name for kind in ours for f in dataclasses.fields(kind)]
    known = library | set(own)
    for name in given:
        if name not in known and name.removeprefix("no_") not in known:
            close = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"ours are {', '.join(own)};"
            raise ConfigError(f"unknown setting {name!r}: {hint} (every field of {library_name} is allowed too)")


def documented(arguments: type) -> str:
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
    if training.auto_find_batch_size:
        raise ConfigError(f"total_batch_size={total} would not be kept by auto_find_batch_size, which makes the batch "
                          "of a device smaller and leaves the accumulation: turn it off, and give a "
                          "per_device_train_batch_size that fits")  # fmt: skip
    training.gradient_accumulation_steps = total // at_once


def settings_help(ours: Sequence[type], library_name: str) -> str:
    """The settings of this project with their defaults; the others are documented by the library that they are from."""
    lines = []
    for kind in ours:
        lines.append(f"{kind.__doc__}")
        for option in dataclasses.fields(kind):
            default = "required" if option.default is dataclasses.MISSING else repr(option.default)
            lines.append(f"  --{option.name} ({default}): {option.metadata.get('help', '')}")
    return "\n".join([*lines, f"and every field of {library_name}."])
