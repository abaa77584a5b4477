"""The forms in which the state is saved, and from one to another.

whole     a state dict of torch's: per parameter and kind of tensor all blocks in canonical order, no rank in it
a part    the same, with some blocks of each parameter; "<shape>/blocks" says which rows of the whole they are
packed    the whole state as bytes in the first group, for FSDP1, which lets nothing else through unharmed
flat      torch's flattened one: "state.<parameter>.<key>" -> tensor, "param_groups.<parameter>.<option>" -> value
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exceptions import CheckpointError, OptionError
from ..execution.state_layout import Entry, StateKey, foreign_state, is_partial, names_blocks, own_state
from ..options import NAMES, Options, check_rates, saved_options
from ..sharding.local_parameter import clean_name
from .names import AFRESH

FORMAT = 5  # of the state; in every param group, so that a checkpoint says what wrote it
PACKED = "packed_state"  # in the first group
"""What is kept of one parameter."""


def pack(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state as bytes in the first group, under the parameters' positions through the groups."""
    groups = state_dict["param_groups"]
    position = {key: i for i, key in enumerate(key for group in groups for key in group["params"])}
    file = io.BytesIO()
    torch.save({position.get(key, key): entry for key, entry in state_dict["state"].items()}, file)
    return {"state": {}, "param_groups": [{**groups[0], PACKED: file.getvalue()}, *groups[1:]]}


def unpack(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `pack`; what is not packed is returned as it is."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
    if not isinstance(groups, list) or not groups or not isinstance(groups[0], dict) or PACKED not in groups[0]:
        return state_dict
    keys = [key for group in groups for key in group["params"]]
    try:
        state = torch.load(io.BytesIO(groups[0][PACKED]), map_location="cpu", weights_only=True)
        state = {keys[i] if isinstance(i, int) else i: entry for i, entry in state.items()}
    except Exception as error:  # whatever bytes can do to torch.load
        raise CheckpointError(f"damaged checkpoint: its packed state cannot be read: {error}") from error
    bare = [{name: value for name, value in group.items() if name != PACKED} for group in groups]
    return {"state": state, "param_groups": bare}


def unflattened(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The inverse of torch's `flatten_optimizer_state_dict`, keyed by names; what is not flattened stays as it is.

    Parameters with equal options are one group, in the order of its names, if it has them.
    """
    if not isinstance(state_dict, dict) or not any(str(key).startswith("param_groups.") for key in state_dict):
        return state_dict
    state: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, value in state_dict.items():
        if found := _FLAT_STATE.fullmatch(key):
            state.setdefault(found["name"], {})[found["key"]] = value
        elif key.startswith("param_groups."):
            name, option = key.removeprefix("param_groups.").rsplit(".", 1)
            options.setdefault(name, {})[option] = value
    groups: list[dict[str, Any]] = []
    for name, chosen in options.items():
        group = next((group for group in groups if {**group, "params": 0} == {**chosen, "params": 0}), None)
        if group is None:
            groups.append(group := {**chosen, "params": []})
        group["params"].append(name)
    for group in groups:
        order = [clean_name(name) for name in group.get("param_names", [])]
        if sorted(order) == sorted(map(clean_name, group["params"])):
            group["params"].sort(key=lambda name: order.index(clean_name(name)))
    return {"state": state, "param_groups": groups}


_FLAT_STATE = re.compile(r"state\.(?P<name>.+)\.(?P<key>\d+(x\d+)*/.+)")


def join(name: str, parts: Sequence[Entry]) -> Entry:
    """All of a parameter's state from its parts.

    Raises:
        CheckpointError: a block is missing or there twice.
    """
    if not is_partial(parts[0]):  # every rank has everything: one alone, or all of what was frozen in mid-training
        return parts[0]
    found: Entry = foreign_state(parts[0])
    for key in dict.fromkeys(key for part in parts for key in own_state(part) if not names_blocks(key)):
        having = [part for part in parts if key in part]
        order = torch.cat([part[StateKey.parse(key).blocks] for part in having])
        if sorted(order.tolist()) != list(range(len(order))):
            raise CheckpointError(f"state of {name!r}: {key} has blocks {sorted(order.tolist())[:6]}, some are missing")
        found[key] = torch.cat([part[key] for part in having])[order.argsort()]
    return found


def well_formed(state_dict: Any) -> dict[str, Any]:
    """A state dict that may be anything, with the structure that one of ours has, its options cast.

    torch's full state dicts make lists of the groups' tuples and leave empty ones out.  Beside numbered parameters a
    state may hold notes of hooks under names.

    Raises:
        CheckpointError: it has another structure; the message says where.
    """
    groups, state = (state_dict.get(key) if isinstance(state_dict, dict) else None for key in ("param_groups", "state"))
    if not isinstance(groups, list) or not isinstance(state, dict):
        raise CheckpointError("not an optimizer state dict: it needs 'state' and 'param_groups'")
    if not all(isinstance(group, dict) and isinstance(group.get("params"), (list, tuple)) for group in groups):
        raise CheckpointError("damaged checkpoint: a parameter group without its list 'params'")
    others = {group.get("format") for group in groups if type(group.get("format")) is int} - {FORMAT}
    if others:
        raise CheckpointError(
            f"the checkpoint is of another version of hf_shampoo4 (state format {min(others)}, here {FORMAT}), in "
            "which the state means something else: resume with that version, or start the optimizer afresh"
        )
    lacking = [group["params"] for group in groups if type(group.get("format")) is not int]
    if 0 < len(lacking) < len(groups):
        raise CheckpointError(f"the checkpoint has nothing of the parameter group of {[*lacking[0]][:3]}: {AFRESH}")
    if lacking:
        keys = sorted({str(name) for entry in state.values() if isinstance(entry, dict) for name in entry})[:4]
        raise CheckpointError(
            f"the checkpoint was not written by Shampoo4bit (state format {FORMAT}); its state holds {keys}. "
            f"Resume with the optimizer that wrote it, or {AFRESH}."
        )
    keys = [key for group in groups for key in group["params"]]
    if {type(key) for key in keys} not in ({int}, {str}, set()):
        raise CheckpointError("damaged checkpoint: parameters must all be numbered or all be named")
    members = set(keys)

    def belongs(key: Any, entry: Any) -> bool:
        is_note = type(key) is str and not any(type(name) is str for name in members)
        return _has_tensors(entry) if key in members else is_note

    strange = [key for key, entry in state.items() if not belongs(key, entry)]
    if strange:
        raise CheckpointError(f"damaged checkpoint: state entries that are no parameter's state: {strange[:3]}")
    return {**state_dict, "param_groups": [_well_formed_group(i, group) for i, group in enumerate(groups)]}


def _has_tensors(entry: Any) -> bool:
    def is_one(t: Any) -> bool:
        return isinstance(t, Tensor) and t.layout == torch.strided and t.device.type != "meta"

    return isinstance(entry, dict) and all(is_one(t) for t in own_state(entry).values())


def _well_formed_group(index: int, group: dict[str, Any]) -> dict[str, Any]:
    try:
        options = saved_options(group)
        check_rates(group)
    except OptionError as error:
        raise CheckpointError(f"damaged checkpoint: in parameter group {index}, {error}") from error
    missing = [name for name in ("lr", "betas", "eps", "weight_decay", "step", "skipped_steps") if name not in group]
    if missing:
        raise CheckpointError(f"damaged checkpoint: parameter group {index} lacks {', '.join(missing)}")
    for name in ("step", "skipped_steps"):
        if type(group.get(name, 0)) is not int or group.get(name, 0) < 0:
            raise CheckpointError(f"damaged checkpoint: in parameter group {index}, {name} is no number of steps")
    names = group.get("param_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"damaged checkpoint: in parameter group {index}, param_names is no list of names")
    if names and len(names) != len(group["params"]):
        if any(type(key) is int for key in group["params"]):
            raise CheckpointError(f"damaged checkpoint: parameter group {index} has {len(names)} names for its "
                                  f"{len(group['params'])} parameters")  # fmt: skip
        # by names: torch has left out what is not in the optimizer, but not its name
        group = {key: value for key, value in group.items() if key != "param_names"}
    empty = {name: () for name in NAMES if getattr(Options, name) == ()}
    betas = {"betas": tuple(group["betas"])} if "betas" in group else {}
    return {**group, **empty, **options, **betas}


def check_metadata(folder: Path) -> None:
    """Look at the table of contents of a folder of torch.distributed.checkpoint, before torch unpickles it.

    Raises:
        CheckpointError: it names something that torch does not write into it, and that would be run.
        FileNotFoundError: there is none: the checkpoint was not completed.
    """
    if not (folder / ".metadata").is_file():
        raise FileNotFoundError(f"{folder} has no .metadata, which is written last: the checkpoint was not completed")
    with (folder / ".metadata").open("rb") as file:
        try:
            _Contents(file).load()
        except CheckpointError:
            raise
        except Exception as error:  # whatever bytes can do to an unpickler
            raise CheckpointError(f"{folder / '.metadata'} cannot be read: {type(error).__name__}: {error}") from error


class _Contents(pickle.Unpickler):
    """Builds nothing but torch's own descriptions of a checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        described = module == "torch.distributed.checkpoint.metadata"
        stored = (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
        if "." not in name and (described or stored):
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return getattr(torch, name)
        if (module, name) in HARMLESS:
            return super().find_class(module, name)
        raise CheckpointError(
            f"the checkpoint's .metadata asks for {module}.{name}, which is no part of one: not loaded"
        )


HARMLESS = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}  # fmt: skip


def _blocks(keys: Sequence[str]) -> str:
    """The shapes of the blocks that keys of states are of."""
    return ", ".join(sorted({StateKey.parse(key).shape for key in keys}))


def check_entry(name: str, entry: dict[str, Any], layout: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Compare what is saved of a parameter with `layout`, shape and dtype of each tensor of the whole.

    Raises:
        CheckpointError: they differ.
    """
    if is_partial(entry):
        counts = {key: len(entry.get(StateKey.parse(key).blocks, ())) for key in layout}
        layout = {key: ((counts[key], *shape[1:]), dtype) for key, (shape, dtype) in layout.items() if counts[key]}
    known = {key for key in own_state(entry) if not names_blocks(key)}
    missing, strange = sorted(layout.keys() - known), sorted(known - layout.keys())
    if missing or strange:
        there, here = _blocks(strange), _blocks(missing)
        said = (
            f"saved of blocks of {there}, here {here}: has a vocabulary or a width changed?  " if there and here else ""
        )
        raise CheckpointError(f"state of {name!r} does not fit: {said}missing {missing[:3]}, not known {strange[:3]}")
    for key, (shape, dtype) in layout.items():
        there = entry[key]
        if not isinstance(there, Tensor) or tuple(there.shape) != shape or there.dtype != dtype:
            found = f"{tuple(there.shape)} {there.dtype}" if isinstance(there, Tensor) else type(there).__name__
            raise CheckpointError(f"state of {name!r}: {key} is {found}, expected {shape} {dtype}: another model?")
