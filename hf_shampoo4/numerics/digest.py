"""A number of the bits of tensors, by which replicas are compared: exact, and its device is not waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 8  # bytes
COLUMNS = 1 << 10
"""Words this far apart are added, in one pass.  What is left is weighted, so that two of them must have changed
oppositely, and nothing else, to be overlooked."""


def digest(tensors: Sequence[Tensor]) -> Tensor:
    """Of all bits of some tensors on one device, in their order; other bits give another number but by chance.

    Returns:
        float64 of no dimension, a whole number within 2^47.
    """
    parts = [part for t in tensors for part in _sums(t)]
    sums = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device="cpu")
    return ((sums * _weights(len(sums), sums.device)).sum() >> 16).double()


def _sums(t: Tensor) -> list[Tensor]:
    """int64, each of one dimension: sums of a tensor's words, which wrap around."""
    flat = t.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % WORD:
        flat = flat.clone()
    end = flat.numel() // WORD * WORD
    words, rest = flat[:end].view(torch.int64), flat[end:]
    found = [rest.long()] if rest.numel() else []
    if words.numel() <= 2 * COLUMNS:
        return [words, *found]
    end = words.numel() // COLUMNS * COLUMNS
    return [words[:end].view(-1, COLUMNS).sum(0), words[end:], *found]


def _weights(count: int, device: torch.device) -> Tensor:
    """int64 (count,): odd numbers without a pattern."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * -7046029254386353131
    mixed ^= mixed >> 29
    mixed *= -4658895280553007687
    return (mixed ^ (mixed >> 32)) | 1
