"""Which checkpoints of a Trainer's output folder are whole: a training that was killed may have left a part of one.

The Trainer writes a checkpoint's files one after the other into its final folder, each rank its own, and
`trainer_state.json` last on rank 0; there is no mark that says that all is there.  A checkpoint counts as whole if that
file can be read, every rank that took part has written its last one, `rng_state*.pth` (`Shampoo4bitCallback` notes in
`trainer_state.json` how many ranks there were), and every file ends where its own header says that it does.  Nothing is
unpickled, and no tensor is read.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

STATE = "trainer_state.json"
CALLBACK = "Shampoo4bitCallback"  # under this name the Trainer keeps what the callback says of the ranks

# files of torch.save, which are zip archives: their table of contents comes last
ARCHIVES = ("*.pth", "*.pt", "pytorch_model*.bin", "adapter_model.bin", "*/adapter_model.bin", "optimizer*.bin",
            "global_step*/*.pt")  # fmt: skip
TENSORS = ("*.safetensors", "*/adapter_model.safetensors")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata", "global_step*/*.pt")
WEIGHTS = (*TENSORS, "pytorch_model*.bin", "adapter_model.bin", "*/adapter_model.bin",
           "pytorch_model_fsdp_*/.metadata", "global_step*/*.pt")  # fmt: skip
# PEFT writes the adapter "default" beside the other files, each other one into a folder of its name
ADAPTERS = ("adapter_config.json", "*/adapter_config.json")


def incomplete(folder: Path) -> str:
    """Why a checkpoint folder cannot be resumed from; "" if it can."""
    return next(_problems(folder), "")


def last_complete(output_dir: Path) -> tuple[Path | None, dict[str, str]]:
    """The checkpoint with the most steps that is whole, and the reasons why the newer ones are not, by name."""
    reasons: dict[str, str] = {}
    for folder in sorted(output_dir.glob("checkpoint-*"), key=lambda folder: -step_of(folder)):
        if step_of(folder) < 0 or not folder.is_dir():
            continue
        reason = incomplete(folder)
        if not reason:
            return folder, reasons
        reasons[folder.name] = reason
    return None, reasons


def noted(stateful_callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """What our callback has noted in a Trainer's state: the last, if there were several of them; empty if none."""
    found = stateful_callbacks.get(CALLBACK) or {}
    last = found[-1] if isinstance(found, list) else found
    return dict(last.get("attributes", {}))


def step_of(folder: Path) -> int:
    """By its name; -1 of a folder with another sort of name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else -1


def steps_made(folder: Path) -> int:
    """Of the training that has written a checkpoint, by its state."""
    return int(json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"])


def _problems(folder: Path) -> Iterator[str]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        step = int(state["global_step"])
    except FileNotFoundError:
        yield f"{STATE}, which is written last, is missing"
        return
    except (OSError, ValueError, TypeError, KeyError):
        yield f"{STATE} cannot be read"
        return
    if step_of(folder) not in (-1, step):
        yield f"{STATE} is of step {step}"
    yield from _missing(folder)
    yield from _unfinished_ranks(folder, state)
    yield from (f"{path.relative_to(folder)} is cut off" for path in sorted(_files(folder, ARCHIVES)) if _torn(path))
    for path in sorted(_files(folder, TENSORS)):
        if _safetensors_bytes(path) != path.stat().st_size:
            yield f"{path.relative_to(folder)} is cut off"


def _missing(folder: Path) -> Iterator[str]:
    if not any(_files(folder, ("scheduler.pt", "rng_state*.pth", *OPTIMIZERS))) and any(_files(folder, WEIGHTS)):
        yield "it has weights alone (save_only_model=True): begin a new training with them as the model"
    if not (folder / "scheduler.pt").is_file() and not any(folder.glob("global_step*/*.pt")):
        yield "scheduler.pt is missing"  # a scheduler of DeepSpeed's own is in its files
    for kind, patterns in (("optimizer", OPTIMIZERS), ("weights", WEIGHTS)):
        if not any(_files(folder, patterns)):
            yield f"its {kind} is missing" if kind == "optimizer" else "its weights are missing"
    for config in sorted(_files(folder, ADAPTERS)):  # the Trainer passes over an adapter without weights
        if not any(_files(config.parent, ("adapter_model.safetensors", "adapter_model.bin"))):
            yield f"the weights of {config.relative_to(folder)} are missing"
    for directory in (*folder.glob("optimizer_*/"), *folder.glob("pytorch_model_fsdp_*/")):
        if directory.is_dir() and not (directory / ".metadata").is_file():
            yield f"{directory.name}/.metadata, which is written last, is missing"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            yield f"{index.name} cannot be read"
            return
        yield from (f"{shard} is missing" for shard in sorted(shards) if not (folder / Path(shard).name).is_file())


def _unfinished_ranks(folder: Path, state: dict[str, Any]) -> Iterator[str]:
    """All ranks of the training must have written their random state, or all of one node, whose disk this may be."""
    if (folder / "rng_state.pth").is_file():
        return
    there = {
        int(found[1]) for path in folder.glob("rng_state_*.pth") if (found := re.search(r"_(\d+)\.pth$", path.name))
    }
    try:
        told = noted(state["stateful_callbacks"])
        world, node = int(told["world_size"]), int(told["local_world_size"])
    except (KeyError, TypeError, ValueError, AttributeError):  # written without the callback
        world = node = max(there, default=0) + 1
    nodes = [set(range(first, first + node)) for first in range(0, world, max(node, 1))]
    if there < set(range(world)) and there not in nodes:
        missing = min(set(range(world)) - there)
        yield f"rank {missing} of {world} had not finished: rng_state_{missing}.pth is missing"


def _files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def _torn(path: Path) -> bool:
    return not zipfile.is_zipfile(path)


def _safetensors_bytes(path: Path) -> int:
    """Bytes that the file should have by its header: its length in 8 bytes, JSON, tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return -1
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return -1
