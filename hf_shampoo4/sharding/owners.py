"""Who owns a block: balanced over ranks by what the blocks cost, and the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Load(NamedTuple):
    """What a block asks of its owner."""

    flops: int
    """A step, refreshes averaged in."""
    bytes: int
    """Of state."""


def assign(loads: Sequence[Load], world: int, there: Sequence[tuple[int, Load]] = ()) -> list[int]:
    """The owner of every block; the same on every rank, for it depends on the arguments alone.

    `there` are the blocks that have owners already.

    Equal blocks are dealt out in turn, but for the last rounds, with which what the largest blocks leave uneven can be
    made up for: those go, the largest first, to the rank on which the larger of its two shares (of all flops, of all
    bytes) stays smallest, ties to the lowest.
    """
    counts = Counter(loads)
    totals = [max(sum(load[k] for load in (*loads, *(load for _, load in there))), 1) for k in range(2)]
    share = {load: max(x / total for x, total in zip(load, totals, strict=True)) for load in counts}
    largest = max(share.values(), default=0.0) or 1.0
    rounds = {load: count // world - 1 - int(min(largest / (share[load] or 1.0), 16)) for load, count in counts.items()}
    dealt = {load: max(full, 0) * world for load, full in rounds.items()}
    owners, seen, left = [0] * len(loads), Counter[Load](), []
    for i, load in enumerate(loads):
        if seen[load] < dealt[load]:
            owners[i] = seen[load] % world
        else:
            left.append(i)
        seen[load] += 1
    shares = np.zeros((2, world))
    for owner, load in there:
        shares[:, owner] += np.array(load) / totals
    for i in sorted(left, key=lambda i: (-share[loads[i]], i)):
        mine = np.array([[x / total] for x, total in zip(loads[i], totals, strict=True)])
        owners[i] = int((shares + mine).max(0).argmin())
        shares[:, owners[i]] += mine[:, 0]
    return owners
