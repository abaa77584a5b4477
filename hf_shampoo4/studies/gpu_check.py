"""`hf-shampoo4 bench --gpu-check DIR`: all that this repository wants to know of a GPU, in eight minutes, offline.

Each stage is a process of its own with a budget, so that a kernel that hangs or breaks the device ends its stage alone.
A stage writes what it finds as it goes (`Notes`), and the report is written anew after each: a kill loses nothing, and
a second call goes on where the first one stopped.  What is missing (a package, Triton, a tool) is said and left out.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.utils.files import write_json

STAGES = {
    "tests": 60, "sanitizer": 40, "ceilings": 25, "decompositions": 40, "kernels": 25, "steps": 105, "race": 180,
}  # fmt: skip
"""Name -> seconds, at most; the race has what the others leave of their time as well."""
MODULES = {"tests": "gpu_check_tests", "sanitizer": "gpu_check_tests", "race": "gpu_check_race"}
"""Where a stage is; the others are in gpu_check_stages."""
LEAST = 3  # seconds for a stage, or it is not begun
MISSING = "missing"
"""Key of a stage's notes: name -> why it was left out."""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    device: str
    orders: tuple[int, ...]
    """Of the matrices that are decomposed."""
    stack_numbers: int
    """Entries of the largest stack of them."""
    products: int
    """Order of the products."""
    kernel_numbers: int
    """Entries that a kernel is timed on."""
    models: tuple[tuple[str, int | None], ...]
    """Presets and their layers (None: all) whose steps are timed."""
    contestants: tuple[str, ...]
    tests: str
    """Which of the kernels' tests, as `pytest -k` takes it; "": all."""
    race: dict[str, Any]
    """Settings of `hf-shampoo4 train` over the demo's."""
    race_seconds: float
    """Of training, for each contestant."""


GPU = Scale(
    "cuda", (512, 1024, 2048, 4096), 1 << 24, 8192, 1 << 26,
    (("llama_130m", None), ("llama_350m", None), ("llama_1b", None)),
    ("shampoo4bit", "muon", "adamw_fused", "adamw4bit", "soap4bit", "bnb_adamw8bit", "po_soap", "torchao_adamw4bit"),
    "",
    {
        "model_overrides": "hidden_size=512,intermediate_size=1376,num_hidden_layers=8,num_attention_heads=8,"
        "num_key_value_heads=8,max_position_embeddings=512",
        "vocab_size": 4096, "seq_len": 512, "per_device_train_batch_size": 128, "max_validation_sequences": 256,
    },
    45.0,
)  # fmt: skip
CPU = Scale(
    "cpu", (64, 128), 1 << 15, 256, 1 << 16, (("llama_tiny", 1),), ("shampoo4bit", "muon", "adamw_fused"), "fit",
    {
        "model_overrides": "hidden_size=64,intermediate_size=172,num_hidden_layers=1", "max_train_documents": 60,
        "max_validation_sequences": 8, "vocab_size": 512, "seq_len": 64, "per_device_train_batch_size": 4,
    },
    1.0,
)  # fmt: skip
SCALES = {"gpu": GPU, "cpu": CPU}


class Notes:
    """What a stage has found, on disk as soon as it is found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def put(self, key: str, value: Any) -> None:
        """Keep a finding."""
        self.found[key] = value
        write_json(self.path, self.found)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """A finding of a call before, or one made now; an error is a finding too, `{"failed": why}`."""
        if key not in self.found:
            try:
                self.put(key, make())
            except Exception as error:  # of a library on this machine: the other findings are still wanted
                self.put(key, {"failed": f"{type(error).__name__}: {error}"[:500]})
        return self.found[key]

    def leave_out(self, what: str, why: str) -> None:
        """Say what is missing."""
        print(f"  left out: {what}: {why}", flush=True)
        self.put(MISSING, {**self.found.get(MISSING, {}), what: why})


def check(folder: Path, cpu: bool, minutes: float, stages: Iterable[str] = STAGES) -> dict[str, Any]:
    """Run the stages that are not done, and write gpu_check.json, .md and .png.

    Args:
        folder: for everything.
        cpu: a small form on the CPU, to see that it works.
        minutes: that all of it may take; each stage gets its share.
        stages: names of `STAGES`.

    Returns:
        What is in the JSON file.

    Raises:
        ConfigError: there is no GPU.
    """
    import torch

    from hf_shampoo4.studies.gpu_check_report import write_report

    if not cpu and not torch.cuda.is_available():
        raise ConfigError(
            "--gpu-check needs a CUDA device, and torch sees none; a small form that shows on the CPU that it works: "
            f"hf-shampoo4 bench --gpu-check {folder} --cpu"
        )
    began, left = time.monotonic(), 60 * minutes
    share = left / sum(STAGES.values()) * 0.98  # the rest is for reports
    told = write_report(folder, SCALES["cpu" if cpu else "gpu"])
    for name in stages:
        notes = Notes(folder / "stages" / f"{name}.json")
        if "done" in notes.found:
            continue
        left = 60 * minutes - (time.monotonic() - began)
        limit = min(left - 5, max(STAGES[name] * share, left - 10 if name == "race" else 0))
        if limit < LEAST:
            notes.put("ended", f"not begun: {left:.0f} s were left")
        else:
            print(f"{name}: at most {limit:.0f} s", flush=True)
            _carry_out(name, folder, "cpu" if cpu else "gpu", limit)
        told = write_report(folder, SCALES["cpu" if cpu else "gpu"])
    return told


def _carry_out(name: str, folder: Path, scale: str, limit: float) -> None:
    """A stage in a process, and in a session, of its own, which are ended when its time is over."""
    began = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-m", "hf_shampoo4.studies.gpu_check", name, str(folder), scale, f"{limit:.1f}"]
    log = folder / "stages" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    notes = Notes(log.with_suffix(".json"))
    notes.put("seconds", round(time.monotonic() - began, 1))
    if code == 0:
        notes.put("done", True)
        notes.found.pop("ended", None)
    else:
        notes.put("ended", f"its {limit:.0f} s were over" if code is None else f"exit code {code}, see {log}")
    print(f"  {notes.found.get('ended', 'done')}, {notes.found['seconds']:.0f} s", flush=True)


def main() -> None:
    """`python -m hf_shampoo4.studies.gpu_check STAGE DIR SCALE SECONDS`."""
    name, folder, scale, seconds = sys.argv[1:]
    module = importlib.import_module(f"hf_shampoo4.studies.{MODULES.get(name, 'gpu_check_stages')}")
    getattr(module, name)(Notes(Path(folder) / "stages" / f"{name}.json"), SCALES[scale], float(seconds))


if __name__ == "__main__":
    main()
