"""Checksums of saved state: a bit that a disk or a network has turned must not be trained on.

CRC-32, which finds every error of one bit and misses one in four thousand million others; `zlib` has it everywhere, at
about a gigabyte a second.

    groups.json     of every tensor that `save_optimizer` has written; a rank counts over what it writes and reads alone
    "checksums"     in the file of `checkpoint convert`, beside "state": of every parameter's state and of the groups
    torch.save      writes them into its archives, and torch.load does not look at them: `check_archive` does
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exceptions import CheckpointError

KEY = "checksums"


def of_tensor(t: Tensor, before: int = 0) -> int:
    """CRC-32 of the bytes of a tensor of any dtype, row-major, after what `before` is of."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data, before) if flat.numel() else before


def of_content(content: Any) -> int:
    """Of what JSON can hold; tuples count as lists, tensors as their numbers."""
    return zlib.crc32(json.dumps(content, sort_keys=True, default=_plain).encode())


def added(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with its checksums beside the state."""
    return {**state_dict, KEY: _of_state_dict(state_dict)}


def verified(state_dict: Any) -> Any:
    """The inverse of `added`; what has no checksums is returned as it is.

    Raises:
        CheckpointError: it is not what was written.
    """
    if not isinstance(state_dict, dict) or KEY not in state_dict:
        return state_dict
    bare = {key: value for key, value in state_dict.items() if key != KEY}
    try:
        there, here = state_dict[KEY], _of_state_dict(bare)
        damaged = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    except Exception as error:  # whatever turned bits can do to its structure
        raise CheckpointError(f"damaged checkpoint: {type(error).__name__}: {error}") from error
    if damaged:
        what = "the groups' options" if damaged[0] == "" else f"the state of parameter {damaged[0]}"
        raise CheckpointError(
            f"damaged checkpoint: {what} is not what was written, by its checksum ({len(damaged)} differ): make the "
            "file again with hf-shampoo4 checkpoint convert, or go on from another checkpoint"
        )
    return bare


def check_archive(file: Path) -> None:
    """Look whether a file of torch.save is what was written; one of another form is not looked at.

    Raises:
        CheckpointError: it is not.
    """
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # whatever bytes can do to zipfile
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    if damaged:
        raise CheckpointError(
            f"{file} is not what was written, by the checksum of {damaged!r} in it: copy it again from where it is "
            "whole, or go on from another checkpoint"
        )


def _of_state_dict(state_dict: Mapping[str, Any]) -> dict[Any, int]:
    """Of each parameter's state, under its key; and under "" of all else."""
    rest = {key: value for key, value in state_dict.items() if key != "state"}
    return {"": of_content(rest), **{key: _of_entry(entry) for key, entry in state_dict["state"].items()}}


def _of_entry(entry: Any) -> int:
    """Of a parameter's state, or of what a hook has noted."""
    if not isinstance(entry, Mapping):
        return of_content(entry)
    found = 0
    for key in sorted(entry, key=str):
        value = entry[key]
        if isinstance(value, Tensor):
            found = zlib.crc32(f"{key} {value.dtype} {tuple(value.shape)}".encode(), found)
            found = of_tensor(value, found)
        else:
            found = zlib.crc32(f"{key} {of_content(value)}".encode(), found)
    return found


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else repr(value)
