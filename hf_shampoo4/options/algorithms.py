"""Every algorithm by name: its class, what people call it, and the options that it uses.  Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..exceptions import OptionError


@dataclass(frozen=True)
class Entry:
    """One algorithm."""

    label: str
    """For people."""
    implementation: Any
    """Its class, a `preconditioners.protocols.Algorithm`, or "module:class"."""
    uses: tuple[str, ...] = ()
    """Options that not all algorithms use.  What no entry names is used by all."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of its options, where they are not those of `Options`."""
    auto: Mapping[str, Any] = field(default_factory=dict)
    """What `auto` (of `quant_block`: 0) stands for, where it is not what `AUTO` says; of `codebook` with 4 bits."""
    vocabulary: str = "elementwise"
    """The algorithm of embeddings and the output head beside matrices that have this one."""


AUTO: dict[str, Any] = {"quant_block": 64, "codebook": "linear2", "first_codebook": "dynamic"}

_FACTORS = (
    "bits", "quant_block", "codebook", "block_size", "stats_every", "stagger", "factor_beta", "damping",
    "rectify_stats",
)  # fmt: skip
_BASE = ("base", "nesterov")
_EIGENBASES: dict[str, Any] = {
    "implementation": "hf_shampoo4.preconditioners.eigenbasis:Eigenbasis",
    "uses": (
        *_FACTORS, "sides", "oblong", "basis_order", "refresh_warmup", "orthogonalise", "rotation_precision",
        "vocabulary_beta",
    ),
    "auto": {"quant_block": 16, "codebook": "lloyd16", "first_codebook": "nf4"},
    "vocabulary": "kl_shampoo",
}  # fmt: skip

ALGORITHMS: dict[str, Entry] = {
    "shampoo": Entry(
        "Shampoo",
        "hf_shampoo4.preconditioners.shampoo:Shampoo",
        (*_FACTORS, *_BASE, "factor", "roots_every", "rectify_roots", "error_beta", "root", "graft"),
        # 2405.18144 and 2412.10663: factors are updated rarely, and all of them at once
        defaults={"factor_beta": 0.95, "stagger": False},
    ),
    "soap": Entry("SOAP", **_EIGENBASES),
    "kl_shampoo": Entry("KL-Shampoo", **_EIGENBASES),
    "kl_soap": Entry("KL-SOAP", **_EIGENBASES),
    "elementwise": Entry("the base alone", "hf_shampoo4.preconditioners.elementwise:Elementwise", _BASE),
}

FALLBACK = "elementwise"
"""What updates the parameters of any group that its own algorithm is not for; it keeps that one's options."""


def register(name: str, entry: Entry) -> None:
    """Add an algorithm, before any optimizer is asked for it.

    Raises:
        OptionError: there is one of this name.
    """
    if name in ALGORITHMS:
        raise OptionError(f"algorithm={name!r} is there already; {', '.join(ALGORITHMS)} are taken")
    ALGORITHMS[name] = entry


def users_of(option: str) -> tuple[str, ...]:
    """The algorithms that use an option."""
    return tuple(name for name, entry in ALGORITHMS.items() if option in entry.uses) or tuple(ALGORITHMS)


def auto_of(algorithm: str, option: str) -> Any:
    """What `auto` stands for with an algorithm."""
    return ALGORITHMS[algorithm].auto.get(option, AUTO[option])
