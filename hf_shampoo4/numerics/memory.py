"""A CPU's memory: what one operation frees serves the next one's result."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT = 512 << 20  # bytes
PIECES = (128 << 20, 32 << 20)  # a wave's results have up to 64 MiB; an older glibc takes no more than the second
SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """Have malloc keep up to 512 MiB that were freed, in pieces of up to 128 MiB, for the whole process.

    By itself it gives more than 64 MiB, and each larger piece, back to the system at once.  The next result then has
    fresh pages, zeroed one by one, which takes longer than to compute it.

    Returns:
        Whether it does: only glibc's can, and what the environment says of it stands.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in SET_BY_USER):
        return False
    malloc = ctypes.CDLL(None)
    return any(malloc.mallopt(M_MMAP_THRESHOLD, size) for size in PIECES) and bool(
        malloc.mallopt(M_TRIM_THRESHOLD, KEPT)
    )
