"""Code tables: the levels that a normalised number in [-1, 1] (or [0, 1]) is rounded to.

`CODEBOOKS[name](bits)` gives the levels in ascending order as Python floats; code j stands for level j.
A codebook is one entry of the dict; `options` says which may be asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

# The 16 quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, 2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# The Lloyd-Max levels, zero among them and the ends fixed, of a normal distribution in blocks of 16 that are scaled to
# [-1, 1] (for larger blocks, and the mean magnitude of the error: 2306.06965).
_LLOYD16 = (
    -1.0, -0.7873, -0.6169, -0.4718, -0.3422, -0.2229, -0.1101, 0.0,
    0.0966, 0.1951, 0.2976, 0.4060, 0.5240, 0.6568, 0.8109, 1.0,
)  # fmt: skip

ONLY_4_BITS: dict[str, tuple[float, ...]] = {"nf4": _NF4, "lloyd16": _LLOYD16}


def linear2(bits: int) -> list[float]:
    """Signed squares `sign(x) x^2`, x evenly spaced in [-1, 1], the level below zero replaced by 0 (2405.18144)."""
    top = 2**bits - 1
    x = [-1 + 2 * j / top for j in range(top + 1)]
    levels = [abs(v) * v for v in x]
    levels[2 ** (bits - 1) - 1] = 0.0
    return levels


def linear0(bits: int) -> list[float]:
    """Unsigned, even, without a zero: `(j + 1) / 2^bits` (2309.01507, "linear without zero point")."""
    return [(j + 1) / 2**bits for j in range(2**bits)]


def dynamic(bits: int) -> list[float]:
    """Signed dynamic exponent: decades of 10, each with twice the fractions of the one below (1511.04561)."""
    positive = _dynamic_fractions(bits, first_decade=1)
    return sorted([-v for v in positive] + [0.0] + positive + [1.0])


def dynamic_unsigned(bits: int) -> list[float]:
    """As `dynamic`, the sign's bit spent on twice the fractions."""
    return sorted([0.0, *_dynamic_fractions(bits, first_decade=2), 1.0])


def dynamic0(bits: int) -> list[float]:
    """`dynamic_unsigned` without its zero: 2^bits - 1 levels, for second moments."""
    return dynamic_unsigned(bits)[1:]


def nf4(bits: int) -> list[float]:
    """NormalFloat, 4 bits only (2305.14314).

    Raises:
        ValueError: bits is not 4.
    """
    return _of_4_bits("nf4", bits)


def lloyd16(bits: int) -> list[float]:
    """The levels that err least on Gaussian numbers in blocks of 16, 4 bits only: .075, of nf4 .081.

    Raises:
        ValueError: bits is not 4.
    """
    return _of_4_bits("lloyd16", bits)


def _of_4_bits(name: str, bits: int) -> list[float]:
    if bits != 4:
        raise ValueError(f"codebook {name} has 4 bits, not {bits}")
    return list(ONLY_4_BITS[name])


def _dynamic_fractions(bits: int, first_decade: int) -> list[float]:
    """Means of an even split of [0.1, 1], `first_decade` of them in the lowest decade, doubling with each next."""
    decades = bits - 1
    levels = []
    for i in range(decades):
        n = first_decade * 2**i
        levels += [10.0 ** (i - decades + 1) * (0.1 + 0.9 * (j + 0.5) / n) for j in range(n)]
    return levels


CODEBOOKS: dict[str, Callable[[int], list[float]]] = {
    "linear2": linear2,
    "linear0": linear0,
    "dynamic": dynamic,
    "dynamic_unsigned": dynamic_unsigned,
    "dynamic0": dynamic0,
    "nf4": nf4,
    "lloyd16": lloyd16,
}


@cache
def levels(name: str, bits: int) -> tuple[float, ...]:
    """Ascending levels of codebook `name`.

    Raises:
        ValueError: unknown name, or bits that the codebook does not have.
    """
    if name not in CODEBOOKS:
        raise ValueError(f"unknown codebook {name!r}; known: {', '.join(sorted(CODEBOOKS))}")
    if bits not in (4, 8):
        raise ValueError(f"codebooks have 4 or 8 bits, not {bits}")
    return tuple(CODEBOOKS[name](bits))
