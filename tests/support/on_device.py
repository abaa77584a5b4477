"""The kernels' tests on a GPU: `HF_SHAMPOO4_TEST_DEVICE=cuda pytest -p tests.support.on_device tests/numerics/...`.

The tests are written for a CPU and Triton's interpreter.  With this plugin what they make is on the device, where the
kernels are compiled; the reference is plain PyTorch there.  `hf-shampoo4 bench --gpu-check` runs them so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

DEVICE = os.environ.get("HF_SHAMPOO4_TEST_DEVICE", "cpu")
OF_A_CPU = ("left_to_torch", "cannot_build", "compile_for_a_gpu")
"""In the names of tests that are about a device without kernels."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is about a CPU."""
    for item in items:
        if any(name in item.name for name in OF_A_CPU):
            item.add_marker(pytest.mark.skip(reason="about a device without kernels"))


@pytest.fixture(autouse=True)
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test makes is on the device; nothing takes a kernel before the test says so."""
    for module in [m for name, m in sys.modules.items() if name.startswith("hf_shampoo4.")]:
        if hasattr(module, "has_kernels"):
            monkeypatch.setattr(module, "has_kernels", lambda device, block: False)
    given = request.module
    if hasattr(given, "CPU"):
        monkeypatch.setattr(given, "CPU", torch.device(DEVICE))
    if hasattr(given, "allocate"):
        allocate = given.allocate

        def there(storage: Any, rows: int, device: Any) -> Any:
            return allocate(storage, rows, DEVICE)

        monkeypatch.setattr(given, "allocate", there)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)
