"""A region, entry by entry, by its definition."""

from __future__ import annotations

import numpy as np

from hf_shampoo4.sharding.regions import Region


def entries(region: Region) -> np.ndarray:
    """The positions in the parameter of what a rank holds, in the order of its flat tensor; -1 where nothing is."""
    found = np.full(region.numel, -1, dtype=np.int64)
    for start, number, length, step, offset, stride in region.runs:
        for i in range(number):
            found[offset + i * stride : offset + i * stride + length] = start + i * step + np.arange(length)
    return found
