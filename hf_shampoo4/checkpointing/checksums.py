"""Checksums of saved state: a bit that a disk or a network has turned must not be trained on.

CRC-32, which finds every error of one bit and misses one in four thousand million others; `zlib` has it everywhere, at
about a gigabyte a second, and a rank counts over what it writes and reads alone.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from torch import Tensor


def of_tensor(t: Tensor) -> int:
    """Of the bytes of a tensor, row-major."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def of_content(content: Any) -> int:
    """Of what JSON can hold; tuples count as lists, tensors as their numbers."""
    return zlib.crc32(json.dumps(content, sort_keys=True, default=_numbers).encode())


def _numbers(t: Any) -> Any:
    if not isinstance(t, Tensor):
        raise TypeError(f"{type(t).__name__} is no value that a parameter group may have in a checkpoint")
    return t.tolist()
