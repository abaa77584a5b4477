"""What tests of several rooms share."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from typing import Any

import psutil

from hf_shampoo4.options import what_uses

LONGEST_CHILD = 600
"""Seconds that a process of a test may take.  It ends a hang; how fast anything is, no test decides by it."""


def end(pid: int) -> None:
    """End a process that takes too long, and all that it has started (torchrun's workers have sessions of their own).

    With PYTHONFAULTHANDLER=1 in their environment they write first, to stderr, where each thread is.
    """
    with suppress(psutil.NoSuchProcess):
        found = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)][::-1]  # the workers write first
        for sent in (signal.SIGABRT, signal.SIGKILL):
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(sent)
                    time.sleep(0.1)
            psutil.wait_procs(found, timeout=5)


def used(options: dict[str, Any]) -> dict[str, Any]:
    """Without what has no effect with the others, which is refused."""
    return {name: value for name, value in options.items() if not what_uses(name, options)}
