"""One environment for every test: offline, one thread a worker, private caches, a fixed seed."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile

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
# Left over from a user's shell, these would change what the tests see.
for name in ("HF_SHAMPOO4_CONFIG", "HF_SHAMPOO4_REGISTER"):
    os.environ.pop(name, None)

_CACHE = pytest.StashKey[str]()


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
