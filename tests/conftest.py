"""One environment for every test: offline, one thread a worker, private caches, a fixed seed."""

from __future__ import annotations

import multiprocessing.process
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Set before anything imports torch or the HF stack; child processes inherit it.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    TRL_EXPERIMENTAL_SILENCE="1",
    MPLBACKEND="Agg",
    TRITON_INTERPRET="1",  # read when triton is imported, by us or by somebody else
)
if os.environ.get("HF_SHAMPOO4_TEST_DEVICE", "cpu") != "cpu":  # kernels on a GPU: tests/support/on_device.py
    del os.environ["TRITON_INTERPRET"]
# Left over from a user's shell, these would change what the tests see.
for name in ("HF_SHAMPOO4_CONFIG", "HF_SHAMPOO4_REGISTER"):
    os.environ.pop(name, None)

_CACHE = pytest.StashKey[str]()

# `pytest -m core`: the optimizer in this one process, in under two minutes on one core; what is `slow` is not in it.
CORE = (
    "numerics",
    "optimizer",
    "preconditioners",
    "sharding",
    "utils",
    "execution/test_blocking.py",
    "execution/test_memory_layout.py",
    "package/test_tiers.py",
)
LONGER = (
    "numerics/test_kernels.py",
    "numerics/test_descent_kernel.py",
    "numerics/test_whitened_kernels.py",
    "optimizer/test_fuzz.py",
    "preconditioners/test_fused_steps.py",
    "optimizer/test_rates.py",
)  # an interpreter; the Trainer
_TESTS = Path(__file__).parent


def _is_core(path: Path) -> bool:
    inside = any(path.is_relative_to(_TESTS / part) for part in CORE)
    return inside and not any(path == _TESTS / part for part in LONGER)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m core`, the other files are not even imported: they load transformers, datasets and TRL."""
    if config.option.markexpr == "core" and collection_path.suffix == ".py" and not _is_core(collection_path):
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in `CORE`."""
    for item in items:
        if _is_core(item.path) and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.core)


@pytest.fixture(autouse=True)
def _core_starts_no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("core") is None:
        return

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail(f"{request.node.nodeid} is of the core tier and starts a process: mark it slow, or move it")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    for name in ("fork", "system", "posix_spawn"):
        monkeypatch.setattr(os, name, refuse)


def pytest_configure(config: pytest.Config) -> None:
    """Give the run its own caches, shared by the xdist workers (which inherit the controller's environment)."""
    if not hasattr(config, "workerinput"):
        config.stash[_CACHE] = folder = tempfile.mkdtemp(prefix="hf_shampoo4-tests-")
        os.environ["HF_SHAMPOO4_CACHE"] = os.path.join(folder, "hf_shampoo4")
        os.environ["HF_HOME"] = os.path.join(folder, "hf")
        os.environ["TRACKIO_DIR"] = os.path.join(folder, "trackio")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the caches."""
    if _CACHE in config.stash:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Fixed seeds; libraries that the test did not import are left alone, so light tests stay fast."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(1)
        torch.manual_seed(0)
