"""The optimizer's state in a folder of its own: any engine, any number of ranks, keyed by parameter and block.

For what the engine's own files cannot carry: DeepSpeed ZeRO at another number of ranks, FSDP1 to and from other modes.

    groups.json       the groups' options and the parameters' shapes; written last, so that it marks a complete folder
    .metadata, *.distcp   torch.distributed.checkpoint: "<parameter>/<kind of tensor>/<block>" -> a tensor

Every rank writes the blocks that it keeps and reads those that it will keep, so that none holds more than its own.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..exceptions import CheckpointError
from ..execution.state_layout import Entry
from ..sharding.local_parameter import full_shape
from ..utils.files import write_json
from .formats import check_metadata

if TYPE_CHECKING:
    from ..optimizer import Shampoo4bit

GROUPS = "groups.json"


def save_optimizer(optimizer: Shampoo4bit, folder: str | Path) -> None:
    """Write the optimizer's state; every rank must call it, with the same folder on a disk that all of them share.

    Raises:
        FileExistsError: the folder holds one already.
        RuntimeError: no step was made since the optimizer was made or loaded.
    """
    from torch.distributed import checkpoint

    folder = Path(folder)
    with optimizer.together():
        rows = optimizer.rows()
        if (folder / GROUPS).exists():
            raise FileExistsError(f"{folder} holds an optimizer already: choose another folder")
    checkpoint.save(dict(rows), checkpoint_id=folder, no_dist=optimizer.world_size == 1)
    if optimizer.rank == 0:
        write_json(folder / GROUPS, [_described(optimizer, i) for i in range(len(optimizer.param_groups))])
    with optimizer.together():
        pass  # nobody goes on before it is complete


def load_optimizer(optimizer: Shampoo4bit, folder: str | Path) -> None:
    """Go on from what `save_optimizer` has written, in any mode and with any number of ranks.

    Options and the learning rate are taken over now.  The state is read at the next step, when it is known which blocks
    this rank keeps; the folder must be there until then.

    Raises:
        FileNotFoundError: there is none, or it was not completed.
        CheckpointError: another model or other structural options.  Nothing is changed then.  At the next step also:
            a block is missing.
    """
    folder = Path(folder)
    groups = read_groups(folder)
    check_metadata(folder)
    ours = [_described(optimizer, i)["parameters"] for i in range(len(optimizer.param_groups))]
    for there, here in zip([group["parameters"] for group in groups], ours, strict=False):
        for name in [*there, *here]:
            if there.get(name) != here.get(name):
                found = f"parameter {name!r} is {there.get(name)} there and {here.get(name)} here"
                raise CheckpointError(f"{folder} is of another model: {found}")
    bare = [{key: value for key, value in group.items() if key != "parameters"} for group in groups]

    def read(rows: dict[str, Tensor]) -> None:
        from torch.distributed import checkpoint

        check_metadata(folder)
        stored = set(checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata)
        missing = sorted(rows.keys() - stored)
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} blocks' tensors that are this rank's: {missing[:3]}")
        _load(rows, folder)

    optimizer.load_blocks(bare, read)


def read_groups(folder: Path) -> list[dict[str, Any]]:
    """The groups, with the shapes of the parameters.

    Raises:
        FileNotFoundError: no complete side checkpoint.
        CheckpointError: the file is damaged.
    """
    if not (folder / GROUPS).is_file():
        raise FileNotFoundError(f"{folder} has no {GROUPS}: it is no optimizer saved by save_optimizer, or half of one")
    try:
        groups = json.loads((folder / GROUPS).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / GROUPS} is not JSON: {error}") from error
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("parameters"), dict) for group in groups
    ):
        raise CheckpointError(f"{folder / GROUPS} is no list of parameter groups")
    return groups


def read_whole(folder: Path) -> dict[str, Any]:
    """All of it as a state dict keyed by the parameters' names, in the CPU's memory."""
    from torch.distributed import checkpoint

    groups = read_groups(folder)
    check_metadata(folder)
    stored: dict[str, Any] = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    rows = {name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in stored.items()}
    _load(rows, folder)
    of: dict[str, dict[str, dict[int, Tensor]]] = {}
    for path, row in rows.items():
        name, shape, kind, k = path.rsplit("/", 3)
        of.setdefault(name, {}).setdefault(f"{shape}/{kind}", {})[int(k)] = row
    state: dict[str, Entry] = {}
    for name, entry in of.items():
        for key, found in entry.items():
            if sorted(found) != list(range(len(found))):
                raise CheckpointError(f"{folder}: {key} of {name!r} has blocks {sorted(found)[:6]}, some are missing")
        state[name] = {key: torch.stack([found[k] for k in range(len(found))]) for key, found in entry.items()}
    return {
        "state": state,
        "param_groups": [{**group, "params": list(group.pop("parameters"))} for group in groups],
    }


def _load(rows: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors, each rank for itself.

    Raises:
        CheckpointError: a file cannot be read.
    """
    from torch.distributed import checkpoint

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no process group is used, as it is meant
            checkpoint.load(dict(rows), checkpoint_id=folder, no_dist=True)
    except checkpoint.CheckpointException as error:  # no Exception, so that whoever cleans up after those would not
        reasons = "; ".join(sorted({f"{type(e).__name__}: {e}" for e, _ in error.failures.values()}))
        raise CheckpointError(f"{folder} cannot be read: {reasons}") from error


def _described(optimizer: Shampoo4bit, index: int) -> dict[str, Any]:
    """Of a group, what JSON can hold: all but the parameters themselves."""
    group = {key: value for key, value in optimizer.param_groups[index].items() if key != "params"}
    named = zip(optimizer.names(index), optimizer.parameters(index), strict=True)
    shapes = {name: list(full_shape(p)) for name, p in named if p.requires_grad}
    numbers = {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
    return {**numbers, "parameters": shapes}
