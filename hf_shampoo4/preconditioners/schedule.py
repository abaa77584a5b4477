"""When a block's factors, roots or bases are computed anew: the one place that knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..options import Options

Due = Mapping[str, Mapping[int, list[int]]]
"""Refresh -> steps between two of a block's -> positions of the blocks that are due."""


def intervals(options: Options, updates: int | None = None) -> dict[str, int]:
    """Refresh -> steps between two of a block's, after so many updates, or (None) in the long run."""
    if options.algorithm == "elementwise":
        return {}
    if options.algorithm == "shampoo":
        return {"stats": options.stats_every, "roots": options.roots_every}
    return {"basis": options.stats_every if updates is None else options.basis_interval(updates)}


def due(options: Options, updates: Sequence[int], phases: Sequence[float]) -> Due:
    """Which blocks are due: of every block once in a period, as its own updates are counted.

    A parameter may have no gradient on many steps, just those perhaps on which the optimizer's count would refresh it.

    Args:
        updates: how many each block has had, this one included.
        phases: in [0, 1), what share of a period earlier than all together each is refreshed, if they are staggered.
    """
    found: dict[str, dict[int, list[int]]] = {}
    periods = {n: intervals(options, n) for n in set(updates)}
    for i, (n, phase) in enumerate(zip(updates, phases, strict=True)):
        for refresh, every in periods[n].items():
            if (n + int(phase * every * options.stagger)) % every == 0:
                found.setdefault(refresh, {}).setdefault(every, []).append(i)
    return found
