"""The optimizer's part of a checkpoint folder, whatever wrote it: `hf-shampoo4 checkpoint inspect|convert|last DIR`.

    optimizer.pt     Trainer, one process or DDP: parameters by position
    optimizer.bin    Trainer or accelerate under FSDP2 with FULL_STATE_DICT: parameters by name; accelerate otherwise
    optimizer_0/     the same with SHARDED_STATE_DICT: torch.distributed.checkpoint
    global_step*/    DeepSpeed: ZeRO, a file for each rank; stage 0, one file with the model
    groups.json      hf_shampoo4.save_optimizer

`convert` writes `optimizer.pt` from any of them: the Trainer loads it in one process or under DDP, and
`optimizer.load_state_dict` everywhere.  `last` prints the newest checkpoint
of a Trainer's output folder that is complete (completeness.py): for `--resume_from_checkpoint` after a crash.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..exceptions import CheckpointError, OptionError
from ..execution.state_layout import StateKey, own_state
from ..options import NAMES, Options
from . import checksums
from .completeness import last_complete
from .formats import check_metadata, join, unflattened, unpack, well_formed
from .optimizer_folder import GROUPS, read_whole

WHOLE = "optimizer.pt"
FILES = (WHOLE, "optimizer.bin", "optimizer_0")
STAGE_0 = "mp_rank_00_model_states.pt"


def newest(output_dir: Path) -> Path:
    """The last complete checkpoint of a Trainer's output folder; those passed over are named on stderr.

    Raises:
        FileNotFoundError: there is none.
    """
    found, passed_over = last_complete(output_dir)
    for name, reason in passed_over.items():
        print(f"passed over {name}: {reason}", file=sys.stderr)
    if found is None:
        raise FileNotFoundError(f"{output_dir} holds no complete checkpoint")
    return found


def read(folder: Path) -> dict[str, Any]:
    """The optimizer's state dict of a checkpoint folder, all of it, in the CPU's memory.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, or was not written by Shampoo4bit.
    """
    import torch

    found = next((folder / name for name in FILES if (folder / name).exists()), None)
    at = _step_of_deepspeed(folder)
    of_deepspeed = _of_ranks(at)
    if (folder / GROUPS).exists():
        found, state_dict = folder, read_whole(folder)
    elif of_deepspeed:
        found, state_dict = folder, _joined(of_deepspeed)
    elif found is None and (at / STAGE_0).is_file():
        found = at / STAGE_0
        state_dict = _of_stage_0(found)
    elif found is None:
        raise FileNotFoundError(_none_in(folder))
    elif found.is_dir():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        check_metadata(found)
        with tempfile.TemporaryDirectory() as temporary:
            dcp_to_torch_save(found, Path(temporary) / "full.pt")
            state_dict = unflattened(torch.load(Path(temporary) / "full.pt", weights_only=True)["optimizer"])
    else:
        state_dict = _loaded(found)
    try:
        return well_formed(unpack(checksums.verified(state_dict)))
    except CheckpointError as error:
        raise CheckpointError(f"{found}: {error}") from error


def _none_in(folder: Path) -> str:
    """Why there is no optimizer in what a user named, and where there may be one."""
    if not folder.exists():
        return f"{folder} does not exist"
    if folder.is_file():
        return f"{folder} is a file: give the folder that it lies in, {folder.parent}"
    files = ", ".join([*FILES, "global_step*", GROUPS])
    within = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    hint = f"; it holds {', '.join(within)}: name one of them" if within else ""
    return f"{folder} holds none of {files}: not a checkpoint with an optimizer{hint}"


def is_of_other_modes(folder: Path) -> bool:
    """Whether a folder holds what is read before a file of `FILES`: save_optimizer's folder, or DeepSpeed's ranks."""
    return (folder / GROUPS).exists() or bool(_of_ranks(_step_of_deepspeed(folder)))


def _loaded(file: Path) -> Any:
    """What torch.save has written.

    Raises:
        CheckpointError: it is cut off, damaged, or holds what only unpickling could load.
    """
    import torch

    checksums.check_archive(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes can do to torch.load
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return CheckpointError(f"{file} cannot be read: {reason[0]}")


def _step_of_deepspeed(folder: Path) -> Path:
    """The folder of the step that DeepSpeed's `latest` names, or the folder itself."""
    latest = folder / "latest"
    return folder / Path(latest.read_text(encoding="utf-8").strip()).name if latest.is_file() else folder


def _of_stage_0(file: Path) -> Any:
    """What DeepSpeed without ZeRO has saved of the optimizer: all of it, beside the model.

    Raises:
        CheckpointError: the file is damaged, or has no optimizer.
    """
    checksums.check_archive(file)
    try:
        found = _without_classes(file).get("optimizer")
    except Exception as error:  # whatever bytes can do to torch.load
        raise _unreadable(file, error) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no optimizer, and the files of ZeRO's ranks are not beside it")
    return found.get("optimizer_state_dict", found)  # its class for 16-bit parameters puts ours inside of its own


def _of_ranks(at: Path) -> list[Path]:
    """The files of all ranks under ZeRO, in their order."""
    files = {
        int(m[1]): path for path in at.glob("*_optim_states.pt") if (m := re.search(r"_pp_rank_(\d+)_", path.name))
    }
    return [files[rank] for rank in sorted(files)]


def _joined(files: list[Path]) -> dict[str, Any]:
    """One state dict of DeepSpeed's file for each rank.

    Raises:
        CheckpointError: a rank's file or a block is missing.
        OptionError: another optimizer's.
    """
    parts = []
    for file in files:
        checksums.check_archive(file)
        try:
            part = _without_classes(file)["optimizer_state_dict"]
            count = part["partition_count"]
        except Exception as error:  # whatever bytes can do to torch.load
            raise _unreadable(file, error) from error
        world = count if isinstance(count, int) else max(count)
        if world != len(files):
            raise CheckpointError(f"{file.parent} was written by {world} ranks, but has {len(files)} of their files")
        parts.append(part.get("base_optimizer_state") or part.get("optimizer_state_dict"))
    if not all("format" in group for part in parts for group in part["param_groups"]):
        raise OptionError(f"the optimizer in {files[0].parent} is not Shampoo4bit")
    members = [key for group in parts[0]["param_groups"] for key in group["params"]]
    notes = {key: note for key, note in parts[0]["state"].items() if key not in set(members)}
    of_members = {key: [part["state"].get(key, {}) for part in parts] for key in members}
    state = {**notes, **{key: join(str(key), found) for key, found in of_members.items() if any(found)}}
    return {"state": state, "param_groups": parts[0]["param_groups"]}


def _without_classes(file: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, with what is there of its own classes left out: nothing in it is run."""
    import torch

    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    stubs: list[Any] = [(_Nothing, name) for name in names if name.startswith("deepspeed.")]
    with torch.serialization.safe_globals(stubs):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


class _Nothing:
    """In place of an object of DeepSpeed's."""

    def __init__(self, *arguments: Any) -> None:
        pass


def by_position(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same keyed as `torch.optim.Optimizer.state_dict` keys it: parameters numbered through the groups."""
    number: dict[Any, int] = {}
    groups = []
    for group in state_dict["param_groups"]:
        names = group.get("param_names") or []
        members = sorted(group["params"], key=names.index) if set(names) == set(group["params"]) else group["params"]
        number.update({key: len(number) + i for i, key in enumerate(members)})
        groups.append({**group, "params": [number[key] for key in members]})
    state = {number.get(key, key): entry for key, entry in state_dict["state"].items()}
    return {"state": state, "param_groups": groups}


def described(state_dict: dict[str, Any]) -> Iterator[str]:
    """Lines about the groups: step, what differs from the defaults, and the bytes of each kind of tensor."""
    for i, group in enumerate(state_dict["param_groups"]):
        chosen = {n: group[n] for n in NAMES if n in group and _plain(group[n]) != getattr(Options, n)}
        chosen.pop("algorithm", None)
        entries = [state_dict["state"].get(key, {}) for key in group["params"]]
        yield f"group {i}: {len(entries)} parameters, step {group['step']}, {group['skipped_steps']} skipped"
        yield f"  lr {group['lr']}, weight decay {group['weight_decay']}, betas {tuple(group['betas'])}"
        others = ", ".join(f"{name}={value}" for name, value in chosen.items()) or "the other options at their defaults"
        yield f"  algorithm={group.get('algorithm', Options.algorithm)}, {others}"
        sizes: dict[str, int] = {}
        for entry in entries:
            for key, tensor in own_state(entry).items():
                kind = StateKey.parse(key).kind
                sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
        yield "  bytes: " + ", ".join(f"{kind} {size:,}" for kind, size in sorted(sizes.items()))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
