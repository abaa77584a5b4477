"""Which blocks are refreshed in a step; how often is the algorithm's to say (`Algorithm.intervals`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..options import Options

if TYPE_CHECKING:
    from .protocols import Algorithm

Due = Mapping[str, Mapping[int, list[int]]]
"""Refresh -> steps between two of a block's -> positions of the blocks that are due."""


def due(
    algorithm: Algorithm | type[Algorithm], options: Options, updates: Sequence[int], phases: Sequence[float]
) -> Due:
    """Which blocks are due: of every block once in a period, as its own updates are counted.

    A parameter may have no gradient on many steps, just those perhaps on which the optimizer's count would refresh it.

    Args:
        algorithm: of the blocks.
        options: of their group.
        updates: how many each block has had, this one included.
        phases: in [0, 1), what share of a period earlier than all together each is refreshed, if they are staggered.
    """
    found: dict[str, dict[int, list[int]]] = {}
    periods = {n: algorithm.intervals(options, n) for n in set(updates)}
    for i, (n, phase) in enumerate(zip(updates, phases, strict=True)):
        for refresh, every in periods[n].items():
            if (n + int(phase * every * options.stagger)) % every == 0:
                found.setdefault(refresh, {}).setdefault(every, []).append(i)
    return found
