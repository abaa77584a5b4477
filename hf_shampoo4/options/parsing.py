"""Options from Python, `--optim_args`, YAML files and presets, cast and checked together."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ..exceptions import OptionError
from ..utils.yaml import read_yaml
from .algorithms import ALGORITHMS, FALLBACK
from .fields import (
    KINDS,
    NAMES,
    OF_ADAMW,
    PRESETS,
    TYPES,
    Options,
    refuse_unused,
    require,
    shown,
    what_uses,
)

CONFIG_ENV = "HF_SHAMPOO4_CONFIG"


def resolve(
    given: Mapping[str, Any],
    *,
    preset: str | None = None,
    config: str | None = None,
    beneath: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Cast and check options, laid over a YAML file's, laid over a preset's.

    Args:
        given: option name -> value; text is cast to the option's type.  May hold `preset` and `config` too.
        preset: a name of `PRESETS`.
        config: path of a YAML file with options at its top level.
        beneath: options that hold where none of these says otherwise; the result is checked together with them.

    Returns:
        The options that were set by any of the three, cast; nothing for those left at their default.

    Raises:
        OptionError: unknown name, wrong type, value out of range, unknown preset, missing or malformed file.
    """
    given = _without_adamws(given)
    config = given.pop("config", config)
    explicit_preset = given.pop("preset", preset)
    named = config is not None and not (isinstance(config, str) and config == "")
    from_file = _without_adamws(_read_config(config)) if named else {}
    if "config" in from_file:
        raise OptionError(f"{config}: an options file cannot name another one (key 'config')")
    file_preset = from_file.pop("preset", None)
    preset = explicit_preset if explicit_preset is not None else file_preset
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise OptionError(f"unknown preset {shown(preset)}; valid presets: {', '.join(sorted(PRESETS))}")
    below: dict[str, Any] = dict(PRESETS[preset]) if preset is not None else {}
    explicit = {name: cast(name, value) for source in (from_file, given) for name, value in source.items()}
    merged = _merged(beneath or {}, below, explicit)
    Options(**{**(beneath or {}), **merged})  # range checks, before any training time is spent
    return merged


def saved_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that was saved, cast and checked; what it lacks, of an older version, it lacks still.

    Raises:
        OptionError: a value of the wrong type or out of range.
    """
    options = {name: cast(name, group[name]) for name in NAMES if name in group}
    algorithm = options.get("algorithm", Options.algorithm)
    if algorithm in ALGORITHMS and algorithm != FALLBACK:  # what an older version took and had no use for
        options |= {name: usual for name, usual in _without_use(options).items() if name in options}
    Options(**options)
    return options


def _merged(beneath: Mapping[str, Any], preset: Mapping[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """What is set above `beneath`, once it is known what else is chosen.

    Of a preset only what these use is taken, and what `beneath` has set for others goes back to its default.

    Raises:
        OptionError: something explicit that they do not use, whatever its value; the message says what to add.  Or two
            ways to say from which step on something is.
    """
    chosen = {**beneath, **preset, **explicit}
    algorithm = chosen.get("algorithm", Options.algorithm)
    if not set(NAMES) <= set(explicit):  # which is a whole group of another optimizer, not somebody's choice
        refuse_unused(explicit, chosen)
        start, share = explicit.get("stochastic_from"), explicit.get("stochastic_last")
        rule = f"0 beside stochastic_last={share}, which the Trainer's callback makes a step of: give one of them"
        require("stochastic_from", start, not (start and share), rule)
    taken = {name: value for name, value in preset.items() if not what_uses(name, chosen)}
    if algorithm == FALLBACK:  # carries its neighbours' options along
        return {**taken, **explicit}
    reset = {n: usual for n, usual in _without_use(chosen).items() if beneath.get(n, usual) != usual}
    return {**reset, **_defaults_of(algorithm, beneath), **taken, **explicit}


def _without_use(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options that these have no use for, at their defaults."""
    return {name: getattr(Options, name) for name in NAMES if what_uses(name, chosen)}


def _without_adamws(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without AdamW's own arguments, which must be at their defaults; text comes from a command line."""
    for name, (defaults, why) in OF_ADAMW.items():
        allowed = {str(value) for value in defaults}
        holds = name not in given or str(given[name]).capitalize() in allowed
        require(name, given.get(name), holds, f"{' or '.join(sorted(allowed))}, as {why}: leave it out")
    return {name: value for name, value in given.items() if name not in OF_ADAMW}


def _defaults_of(algorithm: str, beneath: Mapping[str, Any]) -> dict[str, Any]:
    """What depends on the algorithm, unless `beneath` has something else than its own algorithm's default."""
    of_theirs = ALGORITHMS[beneath.get("algorithm", Options.algorithm)].defaults
    mine = ALGORITHMS[algorithm].defaults
    usual = {name: getattr(Options, name) for name in (*of_theirs, *mine)}
    theirs, mine = {**usual, **of_theirs}, {**usual, **mine}
    left_alone = [name for name in usual if beneath.get(name, theirs[name]) == theirs[name]]
    return {name: mine[name] for name in left_alone if mine[name] != beneath.get(name, usual[name])}


def parse_optim_args(text: str | Mapping[str, str] | None, beneath: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of `--optim_args "key=value,key=value"`; `config=` and $HF_SHAMPOO4_CONFIG name a YAML file.

    Lists are separated by `;`, for the comma separates options (`rates=embedding:6,head:2` may have either).
    `beneath`: as in `resolve`.

    Raises:
        OptionError: an item that is not `key=value`, or anything `resolve` refuses.
    """
    items = _split_items(text) if isinstance(text, str) else dict(text or {})
    items.setdefault("config", os.environ.get(CONFIG_ENV, ""))
    given = {key: value for key, value in items.items() if value != "" or key != "config"}
    return resolve_for_all(given, beneath=beneath)


def resolve_for_all(given: Mapping[str, Any], beneath: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`resolve`, for all groups that `param_groups` makes, each of which it tells what it is.

    Raises:
        OptionError: one of `OF_GROUPS`, here or in the options file; anything `resolve` refuses.
    """
    chosen = resolve(given, beneath=beneath)
    for name in OF_GROUPS:
        if name in chosen:
            raise OptionError(
                f"option {name} is for a parameter group, not for all: param_groups(model), which makes the groups "
                "here, sets it for each by what its parameters are; remove it here (or from the options file), or make "
                "the groups and Shampoo4bit yourself"
            )
    return chosen


def pairs_as_text(value: str | Mapping[str, Any]) -> str:
    """What a YAML file has as a mapping, or an optimizer, as the command line has it: `key=value,key=value`."""
    return value if isinstance(value, str) else ",".join(map(_pair, value, value.values()))


def _pair(key: str, value: Any) -> str:
    """`key=value`; a list is separated by semicolons, and so are the kinds of `rates`; what is no text is JSON."""
    if key == "rates" and isinstance(value, (Mapping, tuple)):
        value = [f"{kind}:{factor}" for kind, factor in dict(value).items()]
    if isinstance(value, (list, tuple)):
        return f"{key}={';'.join(map(str, value))}"
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _split_items(text: str) -> dict[str, str]:
    items: dict[str, str] = {}
    key = ""
    for item in filter(None, (part.strip() for part in text.split(","))):
        if key == "rates" and "=" not in item and ":" in item:
            items[key] += f";{item}"
            continue
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise OptionError(f"optim_args item {item!r} is not key=value (lists use ';', e.g. row_splits=64;32;32)")
        items[key] = value
    return items


def _read_config(path: Any) -> dict[str, Any]:
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"option config={shown(path)} is not allowed: it must be the path of a YAML file")
    try:
        content = read_yaml(Path(path).expanduser())
    except (ValueError, RuntimeError) as error:  # RuntimeError: there is no such user's home
        raise OptionError(f"options file {str(path)!r} {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise OptionError(f"options file {str(path)!r} must map option names to values, not {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def cast(name: str, value: Any) -> Any:
    """`value` as option `name`'s type; text comes from a command line, other types from Python or YAML.

    Raises:
        OptionError: there is no such option, or it cannot have this value; ranges are not looked at.
    """
    if name not in TYPES:
        if name in OF_TORCH:
            raise OptionError(
                f"{name} is no option of optim_args or of a file: it is an argument of the optimizer in Python, and in "
                f"the Trainer {OF_TORCH[name]}"
            )
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise OptionError(f"unknown option {name!r}{hint}; valid options: {', '.join((*NAMES, 'preset', 'config'))}")
    kind = TYPES[name]
    if get_origin(kind) is Literal:
        choices = tuple(ALGORITHMS) if name == "algorithm" else get_args(kind)
        for allowed in choices:
            if isinstance(value, (str, int, float)) and value in (allowed, str(allowed)):
                return allowed
        require(name, value, False, "one of " + ", ".join(map(str, choices)))
    caster = {bool: _as_bool, int: _as_int, float: _as_float, TYPES["rates"]: _as_rates}.get(kind, _as_sizes)
    try:
        return caster(value)
    except (TypeError, ValueError, OverflowError):
        expected = EXPECTED.get(name) or {bool: "true or false", int: "an integer", float: "a number"}[kind]
        require(name, value, False, expected)


OF_TORCH = {
    "lr": "--learning_rate",
    "learning_rate": "--learning_rate, in Python lr",
    "betas": "--adam_beta1 and --adam_beta2",
    "eps": "--adam_epsilon",
    "weight_decay": "--weight_decay",
}

OF_GROUPS = ("kind", "vocabulary")

EXPECTED = {
    "row_splits": "sizes such as 64;32;32",
    "rates": f"numbers by kind, such as embedding:6;head:2, of {', '.join(KINDS)}",
}


def _as_bool(value: Any) -> bool:
    table = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in table:
        raise ValueError
    return table[str(value).lower()]


def _as_int(value: Union[str, int, float]) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _as_float(value: Union[str, int, float]) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _as_sizes(value: Any) -> tuple[int, ...]:
    parts = [part for part in value.split(";") if part.strip()] if isinstance(value, str) else value
    return tuple(_as_int(part) for part in parts)


def _as_rates(value: Any) -> tuple[tuple[str, float], ...]:
    """(kind, factor) pairs, in one order however they are given."""
    if isinstance(value, str):
        value = [part.split(":") for part in value.replace(",", ";").split(";") if part.strip()]
    pairs = value.items() if isinstance(value, Mapping) else value
    return tuple(sorted((str(kind).strip(), _as_float(rate)) for kind, rate in pairs))
