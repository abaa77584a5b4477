"""Numbers of a command line as types for argparse: what is not allowed is answered in a sentence, before any work."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from ..exceptions import OptionError

SEEDS = 2**32 - 1
"""The largest seed that every library takes."""


def require_with(needed: str, there: bool, **given: object) -> None:
    """Refuse options of a command that do nothing without another one.

    Args:
        needed: the option that they are for, as it is typed.
        there: whether it was given.
        given: of each of them what was; None or False: nothing.

    Raises:
        OptionError: one was given, and the other was not.
    """
    for name, value in given.items():
        if not there and value is not None and value is not False:
            told = f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}"
            raise OptionError(f"{told} is for {needed}: give that too, or leave it out")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of whole numbers from `least` to `most`."""
    allowed = f"{least} or more" if most is None else f"{least} to {most:,}"

    def cast(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {allowed}")
        return value

    return cast


def number(above: float, most: float = math.inf) -> Callable[[str], float]:
    """A type of finite numbers above `above`, up to `most`."""
    allowed = f"above {above:g}" + (f", {most:g} at most" if most < math.inf else "")

    def cast(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (above < value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {allowed}")
        return value

    return cast
