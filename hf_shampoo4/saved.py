"""The forms in which the state is saved, and from one to another.

whole     a state dict of torch's: per parameter and kind of tensor all blocks in canonical order, no rank in it
a part    the same, with some blocks of each parameter; "<shape>/blocks" says which rows of the whole they are
packed    the whole state as bytes in the first group, for FSDP1, which lets nothing else through unharmed
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .options import NAMES, Options

FORMAT = 1  # of the state; in every param group, so that a checkpoint says what wrote it
PACKED = "packed_state"  # in the first group

Entry = dict[str, Tensor]
"""What is kept of one parameter."""


class CheckpointError(ValueError):
    """A state dict that does not belong to this optimizer and model; nothing was loaded from it."""


def pack(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state as bytes in the first group, under the parameters' positions through the groups."""
    groups = state_dict["param_groups"]
    position = {key: i for i, key in enumerate(key for group in groups for key in group["params"])}
    file = io.BytesIO()
    torch.save({position[key]: entry for key, entry in state_dict["state"].items()}, file)
    return {"state": {}, "param_groups": [{**groups[0], PACKED: file.getvalue()}, *groups[1:]]}


def unpack(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `pack`; what is not packed is returned as it is."""
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list) or not groups or PACKED not in groups[0]:
        return state_dict
    keys = [key for group in groups for key in group["params"]]
    state = torch.load(io.BytesIO(groups[0][PACKED]), map_location="cpu", weights_only=True)
    bare = [{name: value for name, value in group.items() if name != PACKED} for group in groups]
    return {"state": {keys[i]: entry for i, entry in state.items()}, "param_groups": bare}


def blocks_key(state_key: str) -> str:
    """Where a part says of which blocks it has a kind of tensor."""
    return state_key.split("/")[0] + "/blocks"


def is_part(entry: Entry) -> bool:
    """Whether an entry has a part of a parameter's blocks only."""
    return any(key.endswith("/blocks") for key in entry)


def join(name: str, parts: Sequence[Entry]) -> Entry:
    """All of a parameter's state from its parts.

    Raises:
        CheckpointError: a block is missing or there twice.
    """
    found: Entry = {}
    for key in dict.fromkeys(key for part in parts for key in part if not key.endswith("/blocks")):
        having = [part for part in parts if key in part]
        order = torch.cat([part[blocks_key(key)] for part in having])
        if sorted(order.tolist()) != list(range(len(order))):
            raise CheckpointError(f"state of {name!r}: {key} has blocks {sorted(order.tolist())[:6]}, some are missing")
        found[key] = torch.cat([part[key] for part in having])[order.argsort()]
    return found


def with_tuples(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The groups' tuples as tuples: torch's full state dicts make lists of them and leave empty ones out."""
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list) or any(group.get("format") != FORMAT for group in groups):
        return state_dict
    names = [name for name in NAMES if isinstance(getattr(Options, name), tuple)]
    tuples = [{name: tuple(group.get(name, ())) for name in names} for group in groups]
    betas = [{"betas": tuple(group["betas"])} for group in groups]
    return {**state_dict, "param_groups": [{**g, **t, **b} for g, t, b in zip(groups, tuples, betas, strict=True)]}


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers (DDP, torch.compile, FSDP) put before it."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def check_entry(name: str, entry: dict[str, Any], layout: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Compare what is saved of a parameter with `layout`, shape and dtype of each tensor of the whole.

    Raises:
        CheckpointError: they differ.
    """
    if is_part(entry):
        counts = {key: len(entry.get(blocks_key(key), ())) for key in layout}
        layout = {key: ((counts[key], *shape[1:]), dtype) for key, (shape, dtype) in layout.items() if counts[key]}
    known = {key for key in entry if not key.endswith("/blocks")}
    missing, foreign = sorted(layout.keys() - known), sorted(known - layout.keys())
    if missing or foreign:
        raise CheckpointError(f"state of {name!r} does not fit: missing {missing[:3]}, not known {foreign[:3]}")
    for key, (shape, dtype) in layout.items():
        there = entry[key]
        if not isinstance(there, Tensor) or tuple(there.shape) != shape or there.dtype != dtype:
            found = f"{tuple(there.shape)} {there.dtype}" if isinstance(there, Tensor) else type(there).__name__
            raise CheckpointError(f"state of {name!r}: {key} is {found}, expected {shape} {dtype}: another model?")
