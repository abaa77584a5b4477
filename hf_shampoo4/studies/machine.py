"""What a study measures on, and how many bytes an optimizer holds."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def machine() -> dict[str, Any]:
    """Processor, accelerator, threads, versions, and how busy the machine is now."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def tensors_of(state: Any) -> Iterator[Tensor]:
    """All plain tensors inside an optimizer's state, whatever it nests them in, each once."""
    todo, seen = [state], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor) and hasattr(item, "__tensor_flatten__"):  # torchao's states are subclasses
            todo += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
        elif isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of an optimizer's state; views of one storage count by what they show."""
    return sum(t.numel() * t.element_size() for entry in optimizer.state.values() for t in tensors_of(entry))


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
