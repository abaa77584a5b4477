"""The optimizer's state in a folder of its own: any engine, any number of ranks, keyed by parameter and block.

For what the engine's own files cannot carry: DeepSpeed ZeRO at another number of ranks, FSDP1 to and from other modes.

    groups.json           the groups' options, the parameters' shapes, and checksums of everything;
                          written last, so that it marks a complete folder
    .metadata, *.distcp   torch.distributed.checkpoint: "<parameter>/<kind of tensor>/<block>" -> a tensor

Every rank writes the blocks that it owns and reads those that it will keep, so that none holds more than its own.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..exceptions import CheckpointError
from ..execution.model_groups import truly_named
from ..execution.state_layout import Entry
from ..execution.wave_state import parse_row_name
from ..sharding.local_parameter import full_shape
from ..utils.files import write_json
from ..utils.wrappers import without_wrappers
from . import checksums
from .formats import check_metadata
from .names import OTHERS, renamed, told_apart

if TYPE_CHECKING:
    from ..optimizer import Shampoo4bit

GROUPS = "groups.json"
ELSEWHERE = "copy the folder again from where it is whole, or go on from another checkpoint"


def save_optimizer(optimizer: Shampoo4bit, folder: str | Path) -> None:
    """Write the optimizer's state; every rank must call it, with the same folder on a disk that all of them share.

    If it fails on one rank it raises on all, and what is in the folder then is not taken for a checkpoint.

    Args:
        optimizer: also as accelerate or DeepSpeed has wrapped it.
        folder: a new one.

    Raises:
        FileExistsError: the folder holds one already.
        RuntimeError: no step was made since the optimizer was made or loaded; or another rank failed.
        CheckpointError: a rank could not write: the disk is full, read-only, or not the same for all ranks.
        TypeError: a parameter group has a value that JSON cannot hold.
    """
    optimizer, folder = without_wrappers(optimizer), Path(folder)
    with optimizer.all_or_none("save_optimizer()"):
        rows = optimizer.named_blocks()
        if (folder / GROUPS).exists():
            raise FileExistsError(f"{folder} holds an optimizer already: choose another folder")
        groups = [_described(optimizer, i) for i in range(len(optimizer.param_groups))]
        json.dumps(groups)
        mine = {name: checksums.of_tensor(row) for name, row in rows.items()}
    _write(rows, folder, optimizer)
    everybodys = {name: number for of_rank in optimizer.gather(mine) for name, number in of_rank.items()}
    with optimizer.all_or_none("save_optimizer()"):  # nobody goes on before it is complete
        if optimizer.rank == 0:
            _complete(folder, groups, everybodys)


def _write(rows: dict[str, Tensor], folder: Path, optimizer: Shampoo4bit) -> None:
    """Every rank its rows.

    Raises:
        CheckpointError: on all ranks, if one could not.
    """
    from torch.distributed import checkpoint

    alone, group = optimizer.world_size == 1, optimizer.process_group
    try:
        with _without_warnings():
            checkpoint.save(dict(rows), checkpoint_id=folder, process_group=group, no_dist=alone)
    except checkpoint.CheckpointException as error:
        ranks = ", ".join(map(str, sorted(error.failures)))
        where = "" if alone else f"rank {ranks} could not write: "
        raise CheckpointError(f"{folder} was not completed: {where}{_reasons(error)}") from error


def _complete(folder: Path, groups: list[dict[str, Any]], sums: dict[str, int]) -> None:
    """Write what marks the folder as complete, after a look at what the ranks have written.

    Raises:
        CheckpointError: it cannot be written, or a file is not there.
    """
    try:
        missing = sorted({name for name in _files(folder).values() if not (folder / name).is_file()})
        if missing:
            raise CheckpointError(
                f"{folder} was not completed: {missing[:3]} of other ranks are not there: use a disk that all share"
            )
        write_json(folder / GROUPS, sealed(groups, sums, _metadata_checksum(folder)))
    except OSError as error:
        raise CheckpointError(f"{folder} was not completed: {type(error).__name__}: {error}") from error


def sealed(groups: list[dict[str, Any]], sums: dict[str, int], metadata: int) -> dict[str, Any]:
    """What groups.json holds."""
    content = {"groups": groups, "checksums": sums, "metadata": metadata}
    return {**content, "checksum": checksums.of_content(content)}


def _metadata_checksum(folder: Path) -> int:
    return zlib.crc32((folder / ".metadata").read_bytes())


def load_optimizer(optimizer: Shampoo4bit, folder: str | Path) -> None:
    """Go on from what `save_optimizer` has written, in any mode and with any number of ranks.

    Options and the learning rate are taken over now.  The state is read at the next step, when it is known which blocks
    this rank keeps; the folder must be there until then.  What was frozen when it was written and is not here begins
    afresh, with a warning; of what is frozen here the state is kept.

    Args:
        optimizer: also as accelerate or DeepSpeed has wrapped it.
        folder: what was given to `save_optimizer`.

    Raises:
        FileNotFoundError: there is none, or it was not completed.
        CheckpointError: another model or other structural options.  Nothing is changed then.  At the next step also:
            a block is missing, or not what was written, or a group added since has changed the names; the step is not
            made then.
    """
    optimizer, folder = without_wrappers(optimizer), Path(folder)
    groups, sums = read_groups(folder)
    optimizer.groups.follow(optimizer.param_groups)
    ours = [_described(optimizer, i)["parameters"] for i in range(len(optimizer.param_groups))]
    there = _there(folder, [group["parameters"] for group in groups], ours)
    bare = [{key: value for key, value in group.items() if key != "parameters"} for group in groups]
    written = {parse_row_name(name)[0] for name in sums}
    saved = {name for name, original in there.items() if original in written}

    def read(rows: dict[str, Tensor]) -> None:
        check_metadata(folder)
        of_whom = {name: parse_row_name(name)[0] for name in rows}
        if unknown := sorted(set(of_whom.values()) - there.keys()):
            raise CheckpointError(
                f"parameters have other names than when {folder} was loaded ({', '.join(map(repr, unknown[:3]))}), for "
                "those of a group added since are called as they were: add it after the next step"
            )
        rows = {there[p] + name.removeprefix(p): rows[name] for name, p in of_whom.items() if p in saved}
        missing = sorted(rows.keys() - sums.keys())
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} blocks' tensors that are this rank's: {missing[:3]}")
        _load(rows, folder, sums)

    optimizer.load_blocks(bare, read, saved)


def _there(
    folder: Path, theirs: Sequence[dict[str, list[int]]], ours: Sequence[dict[str, list[int]]]
) -> dict[str, str]:
    """The names here -> the names that the folder has for the same parameters.

    Args:
        folder: for the message.
        theirs: of each group, the parameters' names and shapes.
        ours: the same of the optimizer.

    Raises:
        CheckpointError: they are not the same.
    """
    there, here = ([name for group in groups for name in group] for groups in (theirs, ours))
    new = renamed(there, here)
    named = [{new.get(name, name): shape for name, shape in group.items()} for group in theirs]
    if [set(group) for group in named] != [set(group) for group in ours]:
        raise CheckpointError(f"{folder} is {OTHERS}: {told_apart(there, here)}")
    for group, mine in zip(named, ours, strict=True):
        for name, shape in mine.items():
            if group[name] != shape:
                raise CheckpointError(
                    f"{folder} is of another model: parameter {name!r} is {group[name]} there and {shape} here"
                )
    return {new.get(name, name): name for name in there}


def read_groups(folder: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The groups, with the shapes of the parameters; and the checksums of the blocks' tensors.

    Raises:
        FileNotFoundError: it is not complete.
        CheckpointError: the file is damaged.
    """
    file = folder / GROUPS
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {GROUPS}: it is no optimizer saved by save_optimizer, or half of one")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if isinstance(content, list):
        raise CheckpointError(f"{file} has no checksums: an earlier version of hf_shampoo4 wrote it, resume with that")
    content = content if isinstance(content, dict) else {}
    seal = content.pop("checksum", None)
    if content.keys() != {"groups", "checksums", "metadata"} or seal != checksums.of_content(content):
        raise CheckpointError(f"{file} is not what was written, by its checksum: {ELSEWHERE}")
    if (folder / ".metadata").is_file() and content["metadata"] != _metadata_checksum(folder):
        raise CheckpointError(f"{folder / '.metadata'} is not what was written, by its checksum: {ELSEWHERE}")
    check_metadata(folder)
    return content["groups"], content["checksums"]


def read_whole(folder: Path) -> dict[str, Any]:
    """All of it as a state dict keyed by the parameters' names, in the CPU's memory.

    Raises:
        FileNotFoundError: it is not complete.
        CheckpointError: it is damaged.
    """
    from torch.distributed import checkpoint

    groups, sums = read_groups(folder)
    stored: dict[str, Any] = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    rows = {n: torch.empty(found.size, dtype=found.properties.dtype, device="cpu") for n, found in stored.items()}
    _load(rows, folder, sums)
    of: dict[str, dict[str, dict[int, Tensor]]] = {}
    for path, row in rows.items():
        name, key, block = parse_row_name(path)
        of.setdefault(name, {}).setdefault(key, {})[block] = row
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


def _load(rows: dict[str, Tensor], folder: Path, sums: dict[str, int]) -> None:
    """Fill tensors, each rank for itself.

    Raises:
        CheckpointError: a file cannot be read, or is not what was written.
    """
    from torch.distributed import checkpoint

    try:
        with _without_warnings():
            checkpoint.load(dict(rows), checkpoint_id=folder, no_dist=True)
    except checkpoint.CheckpointException as error:
        raise CheckpointError(f"{folder} cannot be read: {_reasons(error)}") from error
    damaged = sorted(name for name, row in rows.items() if checksums.of_tensor(row) != sums.get(name))
    if damaged:
        files = ", ".join(sorted({str(folder / _files(folder)[name]) for name in damaged})[:3])
        raise CheckpointError(
            f"{files}: {len(damaged)} tensors are not what was written, by their checksums ({damaged[0]}): {ELSEWHERE}"
        )


def _files(folder: Path) -> dict[str, str]:
    """In which file each tensor is."""
    from torch.distributed import checkpoint

    contents: Any = checkpoint.FileSystemReader(folder).read_metadata().storage_data
    return {index.fqn: stored.relative_path for index, stored in contents.items()}


def _reasons(error: Any) -> str:
    """What has failed; torch's is no Exception, so whoever cleans up after those would not."""
    return "; ".join(sorted({f"{type(e).__name__}: {e}" for e, _ in error.failures.values()}))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """torch warns that no process group is used, as it is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _described(optimizer: Shampoo4bit, index: int) -> dict[str, Any]:
    """Of a group, what JSON can hold: all but the parameters themselves."""
    group = {key: value for key, value in truly_named(optimizer.param_groups[index]).items() if key != "params"}
    named = zip(optimizer.names(index), optimizer.parameters(index), strict=True)
    shapes = {name: list(full_shape(p)) for name, p in named}
    numbers = {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
    return {**numbers, "parameters": shapes}
