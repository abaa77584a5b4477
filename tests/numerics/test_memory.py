"""On a CPU a step works in memory that the one before has freed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hf_shampoo4.numerics.memory import SET_BY_USER, keep_freed_memory

STEPS = """
import resource, torch
from hf_shampoo4 import Shampoo4bit

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
p = torch.nn.Parameter(torch.randn(16384, 256))
p.grad = torch.randn_like(p)
optimizer = Shampoo4bit([{"params": [p], "vocabulary": True}], lr=1e-3, refresh_warmup=0, stats_every=100)
found = []
for _ in range(6):
    before = faults()
    optimizer.step()
    found.append(faults() - before)
print(min(found) * resource.getpagesize() / (p.numel() * p.element_size()))
"""


def fresh_copies(environment: dict[str, str]) -> float:
    """How many results of the parameter's size would have as many fresh pages as the cheapest of some steps."""
    words = [sys.executable, "-c", STEPS]
    return float(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not keep_freed_memory(), reason="another malloc, or one that was told what to do")
def test_a_step_on_a_cpu_takes_no_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fresh_copies(dict(os.environ)) < 0.2
    told = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072"}  # as malloc does by itself before anything large is freed
    assert fresh_copies(told) > 2


def test_what_the_environment_says_of_malloc_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET_BY_USER:
        with monkeypatch.context() as m:
            m.setenv(name, "x")
            assert keep_freed_memory.__wrapped__() is False
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert keep_freed_memory.__wrapped__() is False
