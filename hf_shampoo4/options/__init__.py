"""The options of the optimizer.

The same names are used in Python (`Shampoo4bit(..., block_size=512)`), on the command line
(`--optim_args "block_size=512"`) and in YAML.  Precedence: explicit option > YAML file (`config=`) > preset >
default.  Nothing here imports torch or transformers, so a bad option is refused before anything is loaded.
"""

from ..exceptions import InputError, OptionError
from .fields import (
    EIGENBASIS,
    KINDS,
    NAMES,
    OF_ADAMW,
    OF_THE_RUN,
    PRESETS,
    SECOND_CODEBOOKS,
    STOCHASTIC_HEAD,
    STRUCTURAL,
    TYPES,
    USED_BY,
    USED_BY_FACTOR,
    Options,
    check_rates,
    require,
    require_kind,
)
from .parsing import CONFIG_ENV, parse_optim_args, resolve, saved_options

__all__ = [
    "CONFIG_ENV",
    "EIGENBASIS",
    "InputError",
    "KINDS",
    "NAMES",
    "OF_ADAMW",
    "OF_THE_RUN",
    "OptionError",
    "Options",
    "PRESETS",
    "SECOND_CODEBOOKS",
    "STOCHASTIC_HEAD",
    "STRUCTURAL",
    "TYPES",
    "USED_BY",
    "USED_BY_FACTOR",
    "check_rates",
    "parse_optim_args",
    "require",
    "require_kind",
    "resolve",
    "saved_options",
]
