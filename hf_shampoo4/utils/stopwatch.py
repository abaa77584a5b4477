"""A stopwatch that does not make the host wait for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums the time spent inside `with stopwatch.on(device):`; on a GPU by events, read once they have passed."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Time what is launched on `device` meanwhile."""
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            stream = torch.cuda.current_stream(device)  # of that device, which need not be the current one
            start.record(stream)
            yield
            end.record(stream)
            self._pending.append((start, end))
            self._collect(wait=False)
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """Total so far; waits for the device to finish what was timed."""
        self._collect(wait=True)
        return self._seconds

    def _collect(self, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][1].query()):
            start, end = self._pending.popleft()
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
