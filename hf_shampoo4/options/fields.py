"""Every option of the optimizer: its name, default, meaning and allowed values, in one place; and the presets."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from ..exceptions import OptionError
from ..numerics.codebooks import ONLY_4_BITS
from .algorithms import ALGORITHMS, FALLBACK, auto_of, users_of


@dataclass(frozen=True)
class Options:
    """What one parameter group does; stored key by key in `optimizer.param_groups`."""

    # ---- all algorithms: what is trained how

    algorithm: str = "kl_shampoo"
    """`shampoo`: Kronecker preconditioner per matrix, with inverse roots, as in the papers; `soap`, `kl_shampoo`,
    `kl_soap`: moments in the eigenbasis of the factors; `elementwise`: the base optimizer alone."""
    embeddings: Literal["auto", "elementwise"] = "auto"
    """What embeddings and the output head get: the base optimizer alone, or (auto, beside matrices that have soap,
    kl_shampoo or kl_soap) KL-Shampoo with a diagonal factor for the vocabulary."""
    vocabulary: bool = False
    """The group's matrices are embeddings or the output head, one row for each entry of a vocabulary; `param_groups`
    says so."""
    kind: Literal["any", "embedding", "head", "matrix", "vector"] = "any"
    """What a group's parameters are, for `rates`; `param_groups` says so.  A weight that is both embedding and head
    counts as an embedding: it begins as small and grows as far as one, and has one rate."""
    rates: tuple[tuple[str, float], ...] = ()
    """Factors on the learning rate by kind of parameter, such as `embedding:6,head:2` or {"embedding": 6, "head": 2};
    1 for a kind that is not named.  As a group's own `lr` would, they scale decoupled weight decay along; schedulers
    and logs keep to the rate that the factors multiply."""
    matrix_view: Literal["auto", "flatten", "batch"] = "auto"
    """How a tensor of 3 or more dimensions is a matrix: (d0, d1*d2*...), or d0 matrices each (d1, d2).  `param_groups`
    flattens 1-D convolutions, whatever is chosen for all."""
    row_splits: tuple[int, ...] = ()
    """Sizes along dim 0 of matrices fused into one parameter (q, k, v); blocks never straddle them.

    Applies to the parameters whose rows they add up to, of which there must be one."""
    maximize: bool = False
    """Go up along the gradient, as torch's optimizers have it: what is updated takes its negative for it."""
    stochastic_rounding: bool = False
    """Round bfloat16 parameters stochastically when they are written back."""

    # ---- all algorithms: moments

    moments: Literal["fp32", "bf16", "8bit", "4bit", "4bit_factored", "4bit_eden", "4bit_zipsr"] = "4bit"
    """Storage of the first and second moment: as numbers of 32 or 16 bits; in blocks of 8 bits (needs bitsandbytes) or
    4; the second one's as means of rows and columns (`4bit_factored`), or by the recipes of 2610.12444."""
    first_codebook: Literal["auto", "dynamic", "nf4", "linear2"] = "auto"
    """Levels of a 4-bit first moment (auto: nf4 for 4bit_eden, 4bit_zipsr and the eigenbasis family, dynamic for the
    others, and 8 bits where KL-Shampoo is given embeddings or the output head, which then have no second moment)."""
    second_codebook: Literal["auto", "linear0", "dynamic0", "dynamic_unsigned"] = "auto"
    """Levels of a 4-bit second moment (auto: linear0 for 4bit, dynamic0 for _eden, dynamic_unsigned for _zipsr)."""
    stochastic_from: int = 0
    """Step from which a 4-bit first moment is rounded stochastically (0: never)."""
    stochastic_last: float = 0.0
    """The same as a share of training, from its end: the Trainer's callback, which knows the steps, sets the above."""

    # ---- all algorithms: the run

    working_memory: float = 0.0
    """GB that a step on a GPU may take beside the state, about (0: up to an eighth of the GPU's memory; at least .7).
    With less, fewer parameters are updated together: the step is the same, and launches more kernels."""
    max_skipped: int = 50
    """Steps in a row whose gradients are not finite after which `step` raises on every rank (0: never)."""
    diagnose_every: int = 0
    """Steps between two looks at the state's health, see diagnostics.py (0: none); one costs a copy of the state."""
    shard_state: bool = False
    """Under DDP, let every rank keep the state of its own blocks only (FSDP always does)."""
    apply: Literal["auto", "owners", "all"] = "auto"
    """Who updates a block where every rank has all weights and all state (DDP): its owner, who sends what has changed,
    or every rank for itself, and only the blocks that are refreshed in a step are their owners'.  On CPUs the bits
    are the same where the wire is exact (of matrices whose bytes are no multiple of 64 if MKL_CBWR=COMPATIBLE is set);
    on GPUs a product's may depend on how many blocks are in a batch.  auto: what late steps should be shorter with, by
    a table of GPUs and their links; owners on all others.  Where every rank updates all, gradients must be the same on
    all of them, to the last bit: bits of weights and state are compared now and then, and with all a difference is an
    error; with auto owners update all from there on."""
    wire: Literal["exact", "bf16"] = "exact"
    """What gradients and updates are sent as between ranks: their own dtype and float32, or bfloat16."""
    communicate: bool = True
    """Work together with the other ranks of torch.distributed; false: every process trains parameters of its own."""
    seed: int = 0
    """Seed of stochastic rounding; the noise depends on seed, step and position alone."""

    # ---- shampoo and elementwise: the base

    base: Literal["adamw", "sgdm"] = "adamw"
    """The optimizer that the (preconditioned) gradient goes through; sgdm is `torch.optim.SGD`, momentum = betas[0]."""
    nesterov: bool = False
    """Nesterov's momentum, for sgdm."""

    # ---- shampoo, soap, kl_shampoo and kl_soap: factors

    bits: Literal[4, 8, 32] = 4
    """Of a stored entry of a factor or basis (32: float32, no quantisation)."""
    quant_block: int = 0
    """Entries of a factor's column that share one scale (0: 16 in a basis of SOAP and KL-Shampoo, whose scales have 8
    bits, and 64 in shampoo's factors, with float32 scales)."""
    codebook: Literal["auto", "linear2", "dynamic", "nf4", "lloyd16"] = "auto"
    """Levels that a factor's entries are rounded to (auto: lloyd16 for the 4-bit bases of SOAP and KL-Shampoo, linear2
    for all else; nf4 and lloyd16 have 4 bits only, and lloyd16 is made for blocks of 16)."""
    block_size: int = 1024
    """Largest order of a factor of a matrix that has two: a larger side is cut into equal blocks."""
    stats_every: int = 10
    """T1: steps between two updates of Shampoo's factors, or, in the long run (see `refresh_warmup`), between two
    updates of SOAP's and KL-Shampoo's bases."""
    stagger: bool = True
    """Spread the refreshes of the blocks over the steps of a period, so that no step takes much longer than another
    (the papers' Shampoo does not).

    When a block is refreshed depends on its position among the blocks of the parameter group, and on how many updates
    its parameter has had: steps on which that has no gradient do not count."""
    factor_beta: float = 0.9
    """Decay of the factors' moving average, per step; for shampoo per update.  SOAP's and KL-Shampoo's eigenvalues are
    forgotten no faster than the first moment that they divide: by the larger of this and betas[0]."""
    damping: float = 1e-6
    """Added to a factor before its root, times its largest eigenvalue; for SOAP and KL-Shampoo to the eigenvalues that
    their first moment is divided by when it is stored (1e-7 if it is less).  What a moment was stored with is not kept:
    after a change it is misread for a few steps, in directions with next to no gradient."""
    rectify_stats: int = 1
    """t1: Bjorck steps on the decoded eigenvectors before a factor update."""

    # ---- soap, kl_shampoo and kl_soap: eigenbases

    sides: Literal["auto", "both", "short"] = "auto"
    """Which sides of a matrix have a basis with soap, kl_shampoo and kl_soap: both, the short one alone (of a square
    the columns), or (auto) the short one of a matrix that is `oblong` and both of any other.  The factor of a side
    without a basis is diagonal.  Of a vocabulary the columns have one."""
    oblong: float = 2.5
    """From how many times as long as wide `sides=auto` takes a matrix's short side alone."""
    basis_order: int = 2048
    """Largest order of the basis of a matrix that has one: a larger short side is cut into equal parts."""
    refresh_warmup: int = 100
    """SOAP's and KL-Shampoo's bases are updated at every step at first: the interval is the number of a parameter's
    updates over this, rounded down, from 1 up to `stats_every` (100: every second step from update 200 on; 0:
    `stats_every` at once)."""
    orthogonalise: Literal["auto", "qr", "cholesky_qr"] = "auto"
    """How a basis is updated: by the `qr` of its factor, which CUDA computes one after another, or by Cholesky factors
    (`cholesky_qr`), whole stacks at once, the same to rounding; auto: cholesky_qr on CUDA, and elsewhere qr, which
    takes half of its time on a CPU."""
    rotation_precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """What the operands of the products into the bases and back are rounded to, which are summed in float32; factors,
    eigenvalues and the bases' updates are float32 in any case.  auto: tf32 on a GPU that has it, else float32.  A CPU
    with products of its own for `bfloat16` (avx512_bf16, amx) takes half the time in it, and rounds the sums to
    bfloat16 too; else it rounds operands as a GPU would, and multiplies in float32, which takes longer than float32."""
    vocabulary_beta: float = 0.99
    """Decay of the eigenvalues of a vocabulary: most of its entries have no gradient for many steps.  As `factor_beta`
    no less than betas[0]."""

    # ---- shampoo: inverse roots

    factor: Literal["eigen", "direct", "cholesky", "cholesky_ef"] = "eigen"
    """What is kept of a Kronecker factor: its eigenvectors and eigenvalues, the matrix itself, or its Cholesky factor,
    without or with error feedback."""
    error_beta: float = 0.7
    """Decay of the error state of a `cholesky_ef` factor, per update (the paper's .95 moves a 4-bit error state by less
    than half a level, and stalls it)."""
    roots_every: int = 10
    """T2: steps between two computations of the inverse roots."""
    root: Literal["eigh", "newton", "newton_db"] = "eigh"
    """How inverse roots are computed: in the eigenbasis (which an `eigen` factor has at hand), by coupled Newton
    ("Schur-Newton"), or by Newton-Denman-Beavers pairs."""
    rectify_roots: int = 1
    """t2: Bjorck steps on the decoded eigenvectors before an inverse root (the paper's 4 are 1 to 4% more accurate and
    take a third of a refresh)."""
    graft: Literal["norm", "block", "none"] = "norm"
    """Give the preconditioned gradient the gradient's norm: over the parameter, over each block, or not."""

    def __post_init__(self) -> None:
        for name in ("block_size", "basis_order", "stats_every", "roots_every"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "an integer >= 1")
        for name in (
            "quant_block", "rectify_stats", "rectify_roots", "stochastic_from", "refresh_warmup", "diagnose_every",
            "max_skipped",
            "seed",
        ):  # fmt: skip
            require(name, getattr(self, name), getattr(self, name) >= 0, "an integer >= 0")
        for name in ("factor_beta", "vocabulary_beta"):
            require(name, getattr(self, name), 0.0 <= getattr(self, name) < 1.0, "a number in [0, 1)")
        require("working_memory", self.working_memory, 0.0 <= self.working_memory < math.inf, "a number >= 0, in GB")
        require("oblong", self.oblong, 1.0 < self.oblong < math.inf, "a number above 1")
        require("damping", self.damping, 0.0 < self.damping < 1.0, "a number in (0, 1)")
        require("row_splits", self.row_splits, all(n >= 1 for n in self.row_splits), "positive sizes")
        require("algorithm", self.algorithm, self.algorithm in ALGORITHMS, f"one of {', '.join(ALGORITHMS)}")
        if self.algorithm != FALLBACK:  # which carries its neighbours' options along
            changed = [name for name in NAMES if getattr(self, name) != getattr(Options, name)]
            refuse_unused(changed, vars(self))
        spread = "auto or owners with shard_state=true: a block's owner alone has its state"
        require("apply", self.apply, self.apply != "all" or not self.shard_state, spread)
        _check_factors_by_kind(self.rates)
        _check_factor(self)
        _check_moments(self)

    @property
    def factor_codebook(self) -> str:
        """`codebook`, chosen.  The columns of an eigenbasis are nearly Gaussian: in blocks of 16 with scales that fit,
        lloyd16 errs by .072; in blocks of 64 nf4 does by .092 and linear2 by .11."""
        if self.codebook != "auto":
            return self.codebook
        return auto_of(self.algorithm, "codebook") if self.bits == 4 else "linear2"

    @property
    def factor_block(self) -> int:
        """`quant_block`, chosen."""
        return self.quant_block or auto_of(self.algorithm, "quant_block")

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by: the factor of `rates` for this kind."""
        return dict(self.rates).get(self.kind, 1.0)

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Options:
        """What the options stored in a parameter group, cast, ask for (other keys of the group are ignored)."""
        return _carried_out(_values(group))  # a step asks for each group, whose options seldom change

    def carried_out(self) -> Options:
        """With the algorithm that `embeddings` and `vocabulary` mean."""
        if not self.vocabulary:
            return self
        theirs = ALGORITHMS[self.algorithm].vocabulary if self.embeddings == "auto" else FALLBACK
        return dataclasses.replace(self, algorithm=theirs)


KINDS = ("embedding", "head", "matrix", "vector")

# Option -> which values of others it is used with; of others that the algorithm does not use, it does not matter.
USED_WITH: dict[str, dict[str, tuple[Any, ...]]] = {
    "error_beta": {"factor": ("cholesky_ef",)},
    "rectify_stats": {"factor": ("eigen",), "bits": (4, 8)},
    "rectify_roots": {"factor": ("eigen",), "bits": (4, 8)},
    "quant_block": {"bits": (4, 8)},
    "codebook": {"bits": (4, 8)},
    "oblong": {"sides": ("auto",)},
    "vocabulary_beta": {"embeddings": ("auto",)},
}


def what_uses(name: str, chosen: Mapping[str, Any]) -> str:
    """Why an option has no effect with the others that are chosen, and what to add; "" if it has one.

    Args:
        name: of the option.
        chosen: option -> value; what is not there is at its default.
    """
    algorithm, users = chosen.get("algorithm", Options.algorithm), users_of(name)
    if algorithm not in users:
        return f"with algorithm={algorithm}: remove it, or add algorithm={' or '.join(users)}"
    for other, values in USED_WITH.get(name, {}).items():
        value = chosen.get(other, getattr(Options, other))
        if algorithm in users_of(other) and value not in values:
            return f"with {other}={value}: remove it, or add {other}={' or '.join(map(str, values))}"
    return ""


def refuse_unused(names: Iterable[str], chosen: Mapping[str, Any]) -> None:
    """Raises an OptionError for the first of the options that has no effect with those chosen, with what to add."""
    for name in names:
        if why := what_uses(name, chosen):
            raise OptionError(f"option {name} has no effect {why}")


def _check_factors_by_kind(rates: tuple[tuple[str, float], ...]) -> None:
    rule = f"numbers > 0 by kind, such as embedding:6;head:2, of {', '.join(KINDS)}"
    strange = [kind for kind, rate in rates if kind not in KINDS or not 0 < rate < math.inf]
    require("rates", dict(rates), not strange and len(dict(rates)) == len(rates), rule)


def _check_factor(o: Options) -> None:
    """Refuse a factor's constants and codebooks that cannot be."""
    require("error_beta", o.error_beta, 0.0 <= o.error_beta < 1.0, "a number in [0, 1)")
    require("codebook", o.codebook, o.codebook not in ONLY_4_BITS or o.bits != 8, "linear2 or dynamic with bits=8")


def _check_moments(o: Options) -> None:
    """Refuse a base, recipe and codebooks that do not go together."""
    four_bit = o.moments.startswith("4bit")
    require("nesterov", o.nesterov, not o.nesterov or o.base == "sgdm", "false unless base=sgdm")
    plain = ("fp32", "bf16", "8bit", "4bit")
    one_moment = "one of " + ", ".join(plain) + " with base=sgdm: the others are ways to keep a second moment"
    require("moments", o.moments, o.base == "adamw" or o.moments in plain, one_moment)
    only = f"auto with moments={o.moments}: only 4-bit moments have a choice of levels"
    require("first_codebook", o.first_codebook, four_bit or o.first_codebook == "auto", only)
    second = SECOND_CODEBOOKS.get(o.moments, ()) if o.base == "adamw" else ()
    rule = f"one of {', '.join(('auto', *second))} with base={o.base} and moments={o.moments}"
    if o.second_codebook == "dynamic_unsigned":
        rule += ": a second moment that its zero level makes zero explodes 1/sqrt(v); only 4bit_zipsr may use it"
    require("second_codebook", o.second_codebook, o.second_codebook in ("auto", *second), rule)
    no_codes = f"0 with moments={o.moments}: only a 4-bit first moment is rounded stochastically"
    require("stochastic_from", o.stochastic_from, four_bit or not o.stochastic_from, no_codes)
    require("stochastic_last", o.stochastic_last, 0.0 <= o.stochastic_last <= 1.0, "a number in [0, 1]")
    require("stochastic_last", o.stochastic_last, four_bit or not o.stochastic_last, no_codes)


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

_values = operator.itemgetter(*NAMES)


@functools.lru_cache(maxsize=256)
def _carried_out(values: tuple[Any, ...]) -> Options:
    """Checked options from their values, in the order of `NAMES`."""
    return Options(*values).carried_out()


TYPES: dict[str, Any] = {**get_type_hints(Options), "algorithm": Literal[tuple(ALGORITHMS)]}

# What a checkpoint cannot change: the shapes and the meaning of the state depend on these.
STRUCTURAL: tuple[str, ...] = (
    "algorithm", "factor", "bits", "base", "moments", "first_codebook", "second_codebook",
    "block_size", "sides", "oblong", "basis_order", "quant_block", "codebook", "matrix_view", "row_splits",
    "embeddings", "vocabulary",
)  # fmt: skip

# What belongs to a run, not to what it trains: a checkpoint does not change these.
OF_THE_RUN: tuple[str, ...] = (
    "shard_state", "apply", "wire", "communicate", "kind", "max_skipped", "working_memory", "diagnose_every",
)  # fmt: skip

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


def structure(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options on which the layout and the meaning of the state depend, `auto` and 0 as what they stand for."""
    o = Options.of(group)
    return {**{name: group[name] for name in STRUCTURAL}, "quant_block": o.factor_block, "codebook": o.factor_codebook}


def require_kind(group: Mapping[str, Any]) -> None:
    """Refuse factors by kind (`rates`) on parameters of an unknown kind.

    Raises:
        OptionError: the group's kind is "any" and a factor is not 1.
    """
    if group["kind"] == "any" and any(rate != 1 for _, rate in group["rates"]):
        raise OptionError(
            f"rates={dict(group['rates'])} needs parameter groups of one kind each: pass "
            "hf_shampoo4.param_groups(model) instead of model.parameters(), or give each group its `kind`, one of "
            f"{', '.join(KINDS)}"
        )


def check_rates(group: Mapping[str, Any]) -> None:
    """The numbers of a parameter group that are every optimizer's, as far as they are there.

    Raises:
        OptionError: lr, eps, weight_decay or betas that no training can have.
    """
    for name in ("lr", "eps", "weight_decay"):
        if name in group and not (_is_number(group[name]) and 0 <= float(group[name]) < math.inf):
            raise OptionError(f"{name}={shown(group[name])} is not allowed: it must be a number >= 0")
    betas = group.get("betas", (0.0, 0.0))
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(map(_is_number, betas))
    if not pair or not all(0 <= float(beta) < 1 for beta in betas):
        raise OptionError(f"betas={shown(betas)} is not allowed: it must be two numbers in [0, 1)")


def _is_number(value: Any) -> bool:
    """Or a tensor of one."""
    try:
        return not isinstance(value, (str, bytes)) and isinstance(float(value), float)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def require(name: str, value: Any, holds: bool, allowed: str) -> None:
    """Raises an OptionError that names the value and what is allowed, unless the condition holds."""
    if not holds:
        raise OptionError(f"option {name}={shown(value)} is not allowed: it must be {allowed}")


def shown(value: Any) -> str:
    """As Python writes it, of a length that a message can hold."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}..."
