"""The stages of `hf-shampoo4 bench --gpu-check` that test the kernels, in processes of pytest's: see gpu_check.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_shampoo4.studies.gpu_check import Notes, Scale

ROOT = Path(__file__).parents[2]
PLUGIN = "tests.support.on_device"


def tests(notes: Notes, scale: Scale, seconds: float) -> None:
    """The kernels' tests on the device; on a CPU in Triton's interpreter."""
    if _can_test(notes, "the kernels' tests"):
        notes.put("result", _pytest([], scale, seconds))


def sanitizer(notes: Notes, scale: Scale, seconds: float) -> None:
    """The same under NVIDIA's compute-sanitizer, which sees accesses out of bounds."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        notes.leave_out("compute-sanitizer", "it is not installed (part of the CUDA toolkit)")
    elif _can_test(notes, "compute-sanitizer"):
        notes.put("result", _pytest([tool, "--tool", "memcheck", "--error-exitcode", "99"], scale, seconds))


def _can_test(notes: Notes, what: str) -> bool:
    for package in ("triton", "pytest"):
        if find_spec(package) is None:
            notes.leave_out(what, f"{package} is not installed")
            return False
    if not _files():
        notes.leave_out(what, f"they are not in {ROOT}: a clone has them, an installed package has not")
        return False
    return True


def _pytest(before: list[str], scale: Scale, seconds: float) -> dict[str, Any]:
    chosen = [*before, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", PLUGIN, "-m", "not slow"]
    if scale.tests:
        chosen += ["-k", scale.tests]
    environment = {**os.environ, "HF_SHAMPOO4_TEST_DEVICE": scale.device}
    began = time.monotonic()
    done = subprocess.run(
        [*chosen, *map(str, _files())],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=max(seconds - 3, 1), check=False,
    )  # fmt: skip
    tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
    return {"exit_code": done.returncode, "tail": tail[-3000:], "seconds": round(time.monotonic() - began, 1)}


def _files() -> list[Path]:
    return sorted((ROOT / "tests" / "numerics").glob("test_*kernel*.py"))
