"""The options of the optimizer.

The same names are used in Python (`Shampoo4bit(..., block_size=512)`), on the command line
(`--optim_args "block_size=512"`) and in YAML.  Precedence: explicit option > YAML file (`config=`) > preset >
default.  Nothing here imports torch or transformers, so a bad option is refused before anything is loaded.
"""

from ..exceptions import InputError, OptionError
from .algorithms import ALGORITHMS, FALLBACK, Entry, auto_of, register, users_of
from .fields import (
    KINDS,
    NAMES,
    OF_ADAMW,
    OF_THE_RUN,
    PRESETS,
    SECOND_CODEBOOKS,
    STOCHASTIC_HEAD,
    STRUCTURAL,
    TYPES,
    Options,
    check_rates,
    require,
    require_kind,
    structure,
    what_uses,
)
from .parsing import (
    CONFIG_ENV,
    OF_GROUPS,
    cast,
    pairs_as_text,
    parse_optim_args,
    resolve,
    resolve_for_all,
    saved_options,
)

__all__ = [
    "ALGORITHMS",
    "CONFIG_ENV",
    "Entry",
    "FALLBACK",
    "InputError",
    "KINDS",
    "NAMES",
    "OF_ADAMW",
    "OF_GROUPS",
    "OF_THE_RUN",
    "OptionError",
    "Options",
    "PRESETS",
    "SECOND_CODEBOOKS",
    "STOCHASTIC_HEAD",
    "STRUCTURAL",
    "TYPES",
    "auto_of",
    "cast",
    "check_rates",
    "pairs_as_text",
    "parse_optim_args",
    "register",
    "require",
    "require_kind",
    "resolve",
    "resolve_for_all",
    "saved_options",
    "structure",
    "users_of",
    "what_uses",
]
