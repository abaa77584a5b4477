"""Every option of the optimizer: its name, default, meaning and allowed values, in one place.

The same names are used in Python (`Shampoo4bit(..., block_size=512)`), on the command line
(`--optim_args "block_size=512"`) and in YAML.  Precedence: explicit option > YAML file (`config=`) > preset >
default.  This module imports neither torch nor transformers, so a bad option is refused before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .exceptions import OptionError
from .numerics.codebooks import ONLY_4_BITS

CONFIG_ENV = "HF_SHAMPOO4_CONFIG"
LARGEST_YAML = 1 << 20


@dataclass(frozen=True)
class Options:
    """What one parameter group does; stored key by key in `optimizer.param_groups`."""

    algorithm: Literal["shampoo", "soap", "kl_shampoo", "kl_soap", "elementwise"] = "kl_shampoo"
    """`shampoo`: Kronecker preconditioner per matrix, with inverse roots, as in the papers; `soap`, `kl_shampoo`,
    `kl_soap`: moments in the eigenbasis of the factors; `elementwise`: the base optimizer alone."""
    embeddings: Literal["auto", "elementwise"] = "auto"
    """What embeddings and the output head get: the base optimizer alone, or (auto, beside matrices that have soap,
    kl_shampoo or kl_soap) KL-Shampoo with a diagonal factor for the vocabulary."""
    vocabulary: bool = False
    """The group's matrices are embeddings or the output head, one row for each entry of a vocabulary; `param_groups`
    says so."""
    rates: tuple[tuple[str, float], ...] = ()
    """Factors on the learning rate by kind of parameter, such as `embedding:6,head:2` or {"embedding": 6, "head": 2};
    1 for a kind that is not named.  As a group's own `lr` would, they scale decoupled weight decay along; schedulers
    and logs keep to the rate that the factors multiply."""
    kind: Literal["any", "embedding", "head", "matrix", "vector"] = "any"
    """What a group's parameters are, for `rates`; `param_groups` says so.  A weight that is both embedding and head
    counts as an embedding: it begins as small and grows as far as one, and has one rate."""
    factor: Literal["eigen", "direct", "cholesky", "cholesky_ef"] = "eigen"
    """What is kept of a Kronecker factor: its eigenvectors and eigenvalues, the matrix itself, or its Cholesky factor,
    without or with error feedback."""
    bits: Literal[4, 8, 32] = 4
    """Bits of a stored factor entry (32: float32, no quantisation)."""
    base: Literal["adamw", "sgdm"] = "adamw"
    """The optimizer that the (preconditioned) gradient goes through; sgdm is `torch.optim.SGD`, momentum = betas[0]."""
    nesterov: bool = False
    """Nesterov's momentum, for sgdm."""
    moments: Literal["fp32", "bf16", "8bit", "4bit", "4bit_factored", "4bit_eden", "4bit_zipsr"] = "4bit"
    """Storage of the first and second moment; see `moments.make_moments`."""
    first_codebook: Literal["auto", "dynamic", "nf4", "linear2"] = "auto"
    """Levels of a 4-bit first moment (auto: nf4 for 4bit_eden, 4bit_zipsr and the eigenbasis family, dynamic for the
    others, and 8 bits where KL-Shampoo is given embeddings or the output head, which then have no second moment)."""
    second_codebook: Literal["auto", "linear0", "dynamic0", "dynamic_unsigned"] = "auto"
    """Levels of a 4-bit second moment (auto: linear0 for 4bit, dynamic0 for _eden, dynamic_unsigned for _zipsr)."""
    stochastic_from: int = 0
    """Step from which a 4-bit first moment is rounded stochastically (0: never)."""
    stochastic_last: float = 0.0
    """The same as a share of training, from its end: the Trainer's callback, which knows the steps, sets the above."""
    block_size: int = 1024
    """Largest order of a factor of a matrix that has two: a larger side is cut into equal blocks."""
    sides: Literal["auto", "both", "short"] = "auto"
    """Which sides of a matrix have a basis with soap, kl_shampoo and kl_soap: both, the short one alone (of a square
    the columns), or (auto) the short one of a matrix that is `oblong` and both of any other.  The factor of a side
    without a basis is diagonal.  Of a vocabulary the columns have one."""
    oblong: float = 2.5
    """From how many times as long as wide `sides=auto` takes a matrix's short side alone."""
    basis_order: int = 2048
    """Largest order of the basis of a matrix that has one: a larger short side is cut into equal parts."""
    quant_block: int = 0
    """Entries of a factor's column that share one scale (0: 16 in a basis of SOAP and KL-Shampoo, whose scales have 8
    bits, and 64 in shampoo's factors, with float32 scales)."""
    codebook: Literal["auto", "linear2", "dynamic", "nf4", "lloyd16"] = "auto"
    """Levels that a factor's entries are rounded to (auto: lloyd16 for the 4-bit bases of SOAP and KL-Shampoo, linear2
    for all else; nf4 and lloyd16 have 4 bits only, and lloyd16 is made for blocks of 16)."""
    stats_every: int = 10
    """T1: steps between two updates of Shampoo's factors, or between two turns of SOAP's and KL-Shampoo's bases."""
    roots_every: int = 10
    """T2: steps between two computations of the inverse roots."""
    stagger: bool = True
    """Spread the refreshes of the blocks over the steps of a period, so that no step takes much longer than another
    (for shampoo false unless it is given: as in the papers).

    When a block's turn comes depends on its place among the blocks of the parameter group, and on how many updates its
    parameter has had: steps on which that has no gradient do not count."""
    refresh_warmup: int = 100
    """SOAP's and KL-Shampoo's bases turn at every step at first; their interval grows by one each time this many steps
    have passed, up to `stats_every` (0: it is that from the start)."""
    factor_beta: float = 0.9
    """Decay of the factors' moving average, per step; for shampoo per update, and .95 unless it is given."""
    vocabulary_beta: float = 0.99
    """Decay of the eigenvalues of a vocabulary: most of its entries have no gradient for many steps."""
    damping: float = 1e-6
    """Added to a factor before its root, times its largest eigenvalue; for SOAP and KL-Shampoo to the eigenvalues that
    their first moment is divided by when it is stored (1e-7 if it is less)."""
    rectify_stats: int = 1
    """t1: Bjorck steps on the decoded eigenvectors before a factor update."""
    rectify_roots: int = 1
    """t2: Bjorck steps on the decoded eigenvectors before an inverse root (the paper's 4 are 1 to 4% more accurate and
    take a third of a refresh)."""
    error_beta: float = 0.7
    """Decay of the error state of a `cholesky_ef` factor, per update (the paper's .95 moves a 4-bit error state by less
    than half a level, and stalls it)."""
    root: Literal["eigh", "newton", "newton_db"] = "eigh"
    """How inverse roots are computed: in the eigenbasis (which an `eigen` factor has at hand), by coupled Newton
    ("Schur-Newton"), or by Newton-Denman-Beavers pairs."""
    graft: Literal["norm", "block", "none"] = "norm"
    """Give the preconditioned gradient the gradient's norm: over the parameter, over each block, or not."""
    matrix_view: Literal["auto", "flatten", "batch"] = "auto"
    """How a tensor of 3 or more dimensions is a matrix: (d0, d1*d2*...), or d0 matrices each (d1, d2)."""
    row_splits: tuple[int, ...] = ()
    """Sizes along dim 0 of matrices fused into one parameter (q, k, v); blocks never straddle them.

    Applies to the parameters whose rows they add up to, of which there must be one."""
    maximize: bool = False
    """Go up along the gradient: what is updated takes its negative for it."""
    stochastic_rounding: bool = False
    """Round bfloat16 parameters stochastically when they are written back."""
    diagnose_every: int = 0
    """Steps between two looks at the state's health, see diagnostics.py (0: none); one costs a copy of the state."""
    shard_state: bool = False
    """Under DDP, let every rank keep the state of its own blocks only (FSDP always does)."""
    wire: Literal["exact", "bf16"] = "exact"
    """What gradients and updates are sent as between ranks: their own dtype and float32, or bfloat16."""
    communicate: bool = True
    """Work together with the other ranks of torch.distributed; false: every process trains parameters of its own."""
    seed: int = 0
    """Seed of stochastic rounding; the noise depends on seed, step and position alone."""

    def __post_init__(self) -> None:
        for name in ("block_size", "basis_order", "stats_every", "roots_every"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "an integer >= 1")
        for name in (
            "quant_block", "rectify_stats", "rectify_roots", "stochastic_from", "refresh_warmup", "diagnose_every",
            "seed",
        ):  # fmt: skip
            _require(name, getattr(self, name), getattr(self, name) >= 0, "an integer >= 0")
        for name in ("factor_beta", "vocabulary_beta"):
            _require(name, getattr(self, name), 0.0 <= getattr(self, name) < 1.0, "a number in [0, 1)")
        _require("oblong", self.oblong, 1.0 < self.oblong < math.inf, "a number above 1")
        _require("damping", self.damping, 0.0 < self.damping < 1.0, "a number in (0, 1)")
        _require("row_splits", self.row_splits, all(n >= 1 for n in self.row_splits), "positive sizes")
        if self.algorithm != "elementwise":  # which carries its neighbours' options along
            changed = [name for name in USED_BY if getattr(self, name) != getattr(Options, name)]
            _refuse_unused(changed, self.algorithm, self.factor)
        _check_factors_by_kind(self.rates)
        _check_factor(self)
        _check_moments(self)

    @property
    def factor_codebook(self) -> str:
        """`codebook`, chosen.  The columns of an eigenbasis are nearly Gaussian: in blocks of 16 with scales that fit,
        lloyd16 errs by .072; in blocks of 64 nf4 does by .092 and linear2 by .11."""
        if self.codebook != "auto":
            return self.codebook
        return "lloyd16" if self.algorithm in EIGENBASIS and self.bits == 4 else "linear2"

    @property
    def factor_block(self) -> int:
        """`quant_block`, chosen."""
        return self.quant_block or (16 if self.algorithm in EIGENBASIS else 64)

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by: the factor of `rates` for this kind."""
        return dict(self.rates).get(self.kind, 1.0)

    def turn_interval(self, updates: int) -> int:
        """Steps between two turns of a basis after so many: bases change fast at first, and slowly later."""
        if not self.refresh_warmup:
            return self.stats_every
        return min(self.stats_every, max(1, updates // self.refresh_warmup))

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Options:
        """What the options stored in a parameter group ask for (other keys of the group are ignored)."""
        return cls(**{name: group[name] for name in NAMES}).carried_out()

    def carried_out(self) -> Options:
        """With the algorithm that `embeddings` and `vocabulary` mean."""
        if not self.vocabulary:
            return self
        preconditioned = self.embeddings == "auto" and self.algorithm in EIGENBASIS
        return dataclasses.replace(self, algorithm="kl_shampoo" if preconditioned else "elementwise")


KINDS = ("embedding", "head", "matrix", "vector")

EIGENBASIS = ("soap", "kl_shampoo", "kl_soap")

# 2405.18144 and 2412.10663: factors are updated rarely, and all of them at once
SHAMPOO_DEFAULTS = {"factor_beta": 0.95, "stagger": False}

# Which algorithms use an option that not all of them use, and which of Shampoo's factors.
USED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("factor", "roots_every", "rectify_roots", "root", "graft", "error_beta"), ("shampoo",)),
    **dict.fromkeys(("base", "nesterov"), ("shampoo", "elementwise")),
    **dict.fromkeys(("refresh_warmup", "vocabulary_beta", "sides", "oblong", "basis_order"), EIGENBASIS),
}
USED_BY_FACTOR = {"rectify_stats": ("eigen",), "rectify_roots": ("eigen",), "error_beta": ("cholesky_ef",)}


def _what_uses(name: str, algorithm: str, factor: str) -> str:
    """Why an option has no effect with this algorithm, or with this factor of Shampoo, and what to add; "" if it has
    one."""
    users, factors = USED_BY.get(name, (algorithm,)), USED_BY_FACTOR.get(name, (factor,))
    if algorithm not in users:
        return f"with algorithm={algorithm}: remove it, or add algorithm={' or '.join(users)}"
    if algorithm == "shampoo" and factor not in factors:
        return f"with factor={factor}: remove it, or add factor={' or '.join(factors)}"
    return ""


def _refuse_unused(names: Iterable[str], algorithm: str, factor: str) -> None:
    for name in names:
        if why := _what_uses(name, algorithm, factor):
            raise OptionError(f"option {name} has no effect {why}")


def _check_factors_by_kind(rates: tuple[tuple[str, float], ...]) -> None:
    rule = f"numbers > 0 by kind, such as embedding:6;head:2, of {', '.join(KINDS)}"
    strange = [kind for kind, rate in rates if kind not in KINDS or not 0 < rate < math.inf]
    _require("rates", dict(rates), not strange and len(dict(rates)) == len(rates), rule)


def _check_factor(o: Options) -> None:
    """Refuse a factor's constants and codebooks that cannot be."""
    _require("error_beta", o.error_beta, 0.0 <= o.error_beta < 1.0, "a number in [0, 1)")
    _require("codebook", o.codebook, o.codebook not in ONLY_4_BITS or o.bits != 8, "linear2 or dynamic with bits=8")


def _check_moments(o: Options) -> None:
    """Refuse a base, recipe and codebooks that do not go together."""
    four_bit = o.moments.startswith("4bit")
    _require("nesterov", o.nesterov, not o.nesterov or o.base == "sgdm", "false unless base=sgdm")
    plain = ("fp32", "bf16", "8bit", "4bit")
    one_moment = "one of " + ", ".join(plain) + " with base=sgdm: the others are ways to keep a second moment"
    _require("moments", o.moments, o.base == "adamw" or o.moments in plain, one_moment)
    only = f"auto with moments={o.moments}: only 4-bit moments have a choice of levels"
    _require("first_codebook", o.first_codebook, four_bit or o.first_codebook == "auto", only)
    second = SECOND_CODEBOOKS.get(o.moments, ()) if o.base == "adamw" else ()
    rule = f"one of {', '.join(('auto', *second))} with base={o.base} and moments={o.moments}"
    if o.second_codebook == "dynamic_unsigned":
        rule += ": a second moment that its zero level makes zero explodes 1/sqrt(v); only 4bit_zipsr may use it"
    _require("second_codebook", o.second_codebook, o.second_codebook in ("auto", *second), rule)
    no_codes = f"0 with moments={o.moments}: only a 4-bit first moment is rounded stochastically"
    _require("stochastic_from", o.stochastic_from, four_bit or not o.stochastic_from, no_codes)
    _require("stochastic_last", o.stochastic_last, 0.0 <= o.stochastic_last <= 1.0, "a number in [0, 1]")
    _require("stochastic_last", o.stochastic_last, four_bit or not o.stochastic_last, no_codes)


# Recipes whose paper (2610.12444) has the output head's first moment rounded stochastically in the last part of
# training, and that part (table 10 there: rounded to nearest, the head alone cost .14 of loss).
STOCHASTIC_HEAD: dict[str, float] = {"4bit_eden": 0.1, "4bit_zipsr": 0.1}

# Levels that a second moment may have, the default first.  Zero is among them only where rounding to it is as rare as
# it is harmful (preconditioner space).
SECOND_CODEBOOKS: dict[str, tuple[str, ...]] = {
    "4bit": ("linear0", "dynamic0"),
    "4bit_eden": ("dynamic0", "linear0"),
    "4bit_zipsr": ("dynamic_unsigned",),
}

# Arguments of torch.optim.AdamW that scripts pass to any optimizer: the values at which they ask for nothing, and why
# there is no other here.
OF_ADAMW: dict[str, tuple[tuple[Any, ...], str]] = {
    "fused": ((None, False), "it chooses an implementation of AdamW, and there is one here"),
    "foreach": ((None, False), "equal blocks are computed together in any case"),
    "amsgrad": ((False,), "there is no such variant of these algorithms"),
    "capturable": ((False,), "a step decides on the CPU which factors it refreshes, which no CUDA graph can hold"),
    "differentiable": ((False,), "nothing can be differentiated through a step on quantised state"),
}

NAMES: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Options))
TYPES: dict[str, Any] = get_type_hints(Options)

# What a checkpoint cannot change: the shapes and the meaning of the state depend on these.
STRUCTURAL: tuple[str, ...] = (
    "algorithm", "factor", "bits", "base", "moments", "first_codebook", "second_codebook",
    "block_size", "sides", "oblong", "basis_order", "quant_block", "codebook", "matrix_view", "row_splits",
    "embeddings", "vocabulary",
)  # fmt: skip

# What belongs to a run, not to what it trains: a checkpoint does not change these.
OF_THE_RUN: tuple[str, ...] = ("shard_state", "wire", "communicate", "kind")

PRESETS: dict[str, dict[str, Any]] = {
    # 2405.18144, LLM runs: T1 = T2 = 200, t1 = 1, t2 = 4, order <= 1200 (LLaMA-350M), first-order states in 16 bits.
    "paper_eigen": {
        "algorithm": "shampoo", "factor": "eigen",
        "bits": 4, "block_size": 1200, "quant_block": 64, "codebook": "linear2",
        "stats_every": 200, "roots_every": 200, "stagger": False, "factor_beta": 0.95, "damping": 1e-6,
        "rectify_stats": 1, "rectify_roots": 4, "graft": "norm", "moments": "bf16",
    },
    # 2412.10663: error feedback .95, beta .95, eps 1e-6, roots by Schur-Newton; what it does not say of its LLM run
    # (intervals, order, moments) as in 2405.18144's.
    "paper_cholesky": {
        "algorithm": "shampoo", "factor": "cholesky_ef",
        "bits": 4, "block_size": 1200, "quant_block": 64, "codebook": "linear2",
        "stats_every": 200, "roots_every": 200, "stagger": False, "factor_beta": 0.95, "error_beta": 0.95,
        "damping": 1e-6, "root": "newton", "graft": "norm", "moments": "bf16",
    },
    # The 32-bit Shampoo that the paper compares with, at the same intervals and orders.
    "shampoo32": {
        "algorithm": "shampoo", "factor": "direct",
        "bits": 32, "block_size": 1200, "stats_every": 200, "roots_every": 200, "stagger": False,
        "factor_beta": 0.95, "damping": 1e-6, "graft": "norm", "moments": "bf16",
    },
}  # fmt: skip


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
        raise OptionError(f"unknown preset {_shown(preset)}; valid presets: {', '.join(sorted(PRESETS))}")
    below: dict[str, Any] = dict(PRESETS[preset]) if preset is not None else {}
    explicit = {name: _cast(name, value) for source in (from_file, given) for name, value in source.items()}
    merged = _merged(beneath or {}, below, explicit)
    Options(**{**(beneath or {}), **merged})  # range checks, before any training time is spent
    return merged


def saved_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that was saved, cast and checked; what it lacks, of an older version, it lacks still.

    Raises:
        OptionError: a value of the wrong type or out of range.
    """
    options = {name: _cast(name, group[name]) for name in NAMES if name in group}
    Options(**options)
    return options


def _merged(beneath: Mapping[str, Any], preset: Mapping[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """What is set above `beneath`, once the algorithm and the factor are known.

    Of a preset only what these use is taken, and what `beneath` has set for others goes back to its default.

    Raises:
        OptionError: something explicit that they do not use, whatever its value; the message says what to add.
    """
    chosen = {"algorithm": Options.algorithm, "factor": Options.factor, **beneath, **preset, **explicit}
    algorithm, factor = chosen["algorithm"], chosen["factor"]
    if not set(NAMES) <= set(explicit):  # which is a whole group of another optimizer, not somebody's choice
        _refuse_unused(explicit, algorithm, factor)
    taken = {name: value for name, value in preset.items() if not _what_uses(name, algorithm, factor)}
    if algorithm == "elementwise":  # carries its neighbours' options along
        return {**taken, **explicit}
    usual = {name: getattr(Options, name) for name in USED_BY if _what_uses(name, algorithm, factor)}
    reset = {name: value for name, value in usual.items() if beneath.get(name, value) != value}
    return {**reset, **_defaults_of(algorithm, beneath), **taken, **explicit}


def _without_adamws(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without AdamW's own arguments, which must be at their defaults; text comes from a command line."""
    for name, (defaults, why) in OF_ADAMW.items():
        allowed = {str(value) for value in defaults}
        holds = name not in given or str(given[name]).capitalize() in allowed
        _require(name, given.get(name), holds, f"{' or '.join(sorted(allowed))}, as {why}: leave it out")
    return {name: value for name, value in given.items() if name not in OF_ADAMW}


def _defaults_of(algorithm: str, beneath: Mapping[str, Any]) -> dict[str, Any]:
    """What depends on the algorithm, unless `beneath` has something else than its own algorithm's default."""
    usual = {name: getattr(Options, name) for name in SHAMPOO_DEFAULTS}
    theirs = SHAMPOO_DEFAULTS if beneath.get("algorithm") == "shampoo" else usual
    left_alone = [name for name in usual if beneath.get(name, theirs[name]) == theirs[name]]
    mine = SHAMPOO_DEFAULTS if algorithm == "shampoo" else usual
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
    return resolve({key: value for key, value in items.items() if value != "" or key != "config"}, beneath=beneath)


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


def read_yaml(path: Path) -> Any:
    """What a small YAML file of plain values says.

    Raises:
        ValueError: why it is not one, in words that follow its name.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values; without references, of which a small file can make a value that nobody can print."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"references (*{self.peek_event().anchor}) are not allowed")
            return super().compose_node(parent, index)

    try:
        if path.is_dir() or (path.exists() and not path.is_file()):  # a device may have no end
            raise ValueError(f"cannot be read: {'Is a directory' if path.is_dir() else 'not a file'}")
        if path.stat().st_size > LARGEST_YAML:
            raise ValueError(f"is larger than {LARGEST_YAML:,} bytes")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError("is not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())}") from error


def _read_config(path: Any) -> dict[str, Any]:
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"option config={_shown(path)} is not allowed: it must be the path of a YAML file")
    try:
        content = read_yaml(Path(path).expanduser())
    except (ValueError, RuntimeError) as error:  # RuntimeError: there is no such user's home
        raise OptionError(f"options file {str(path)!r} {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise OptionError(f"options file {str(path)!r} must map option names to values, not {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _cast(name: str, value: Any) -> Any:
    """`value` as option `name`'s type; text comes from a command line, other types from Python or YAML."""
    if name not in TYPES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise OptionError(f"unknown option {name!r}{hint}; valid options: {', '.join((*NAMES, 'preset', 'config'))}")
    kind = TYPES[name]
    if get_origin(kind) is Literal:
        for allowed in get_args(kind):
            if isinstance(value, (str, int, float)) and value in (allowed, str(allowed)):
                return allowed
        _require(name, value, False, "one of " + ", ".join(str(a) for a in get_args(kind)))
    caster = {bool: _as_bool, int: _as_int, float: _as_float, TYPES["rates"]: _as_rates}.get(kind, _as_sizes)
    try:
        return caster(value)
    except (TypeError, ValueError, OverflowError):
        expected = EXPECTED.get(name) or {bool: "true or false", int: "an integer", float: "a number"}[kind]
        _require(name, value, False, expected)


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


def check_rates(group: Mapping[str, Any]) -> None:
    """The numbers of a parameter group that are every optimizer's, as far as they are there.

    Raises:
        OptionError: lr, eps, weight_decay or betas that no training can have.
    """
    for name in ("lr", "eps", "weight_decay"):
        if name in group and not (_is_number(group[name]) and 0 <= float(group[name]) < math.inf):
            raise OptionError(f"{name}={_shown(group[name])} is not allowed: it must be a number >= 0")
    betas = group.get("betas", (0.0, 0.0))
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(map(_is_number, betas))
    if not pair or not all(0 <= float(beta) < 1 for beta in betas):
        raise OptionError(f"betas={_shown(betas)} is not allowed: it must be two numbers in [0, 1)")


def _is_number(value: Any) -> bool:
    """Or a tensor of one."""
    try:
        return not isinstance(value, (str, bytes)) and isinstance(float(value), float)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _require(name: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise OptionError(f"option {name}={_shown(value)} is not allowed: it must be {allowed}")


def _shown(value: Any) -> str:
    """As Python writes it, of a length that a message can hold."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}..."
