"""`pytest -m core` is quick because nothing in it starts a process; tests/conftest.py makes each test keep to that."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from _pytest.outcomes import Failed


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([sys.executable, "-V"], check=True),
        lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
        lambda: os.system("true"),
        lambda: os.fork(),
    ],
    ids=["subprocess", "spawn", "system", "fork"],
)
def test_a_core_test_that_starts_a_process_fails(start: Callable[[], object]) -> None:
    with pytest.raises(Failed, match="is of the core tier and starts a process"):
        start()
