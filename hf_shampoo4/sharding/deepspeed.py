"""DeepSpeed ZeRO: which range of which parameter lies where in the flat float32 tensors that it gives an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .local_parameter import LocalParameter, Range, full_shape


def deepspeed_parameters(buffer: Tensor, named: Sequence[tuple[str, Tensor]]) -> list[LocalParameter]:
    """The parameters of a group that are in one of its flat float32 tensors.

    Args:
        buffer: what DeepSpeed has put into the group: this rank's part of a group (ZeRO-1, ZeRO-2) or of a part of it
            (ZeRO-3), its gradient in `.grad`.
        named: the model's parameters that were in the group, frozen ones too, with their names.

    Raises:
        ValueError: partitions over a part of the ranks, optimizer state on NVMe, or a buffer of another engine.
    """
    of_zero3 = next((p for _, p in named if hasattr(p, "_z3_optimizer")), None)
    found = _zero12(buffer, named) if of_zero3 is None else _zero3(buffer, named, of_zero3)
    return [LocalParameter(name, p, full_shape(p), buffer, here) for name, p, here in found]


def _zero12(buffer: Tensor, named: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor, Range]]:
    """The parameters are views of one flat tensor that is cut into equal parts, one a rank.

    Their places in it are right in every configuration; DeepSpeed's own `_hp_mapping` is not under
    round_robin_gradients.
    """
    size, found = buffer.numel(), []
    low = dist.get_rank() * size
    for name, p in named:
        group: Any = getattr(p, "_dp_group", None)
        if group is None:  # without elements
            continue
        _check_group(group)
        if p.untyped_storage().nbytes() != dist.get_world_size() * size * p.element_size():
            raise ValueError(f"parameter {name!r} is not in the flat tensor of DeepSpeed's that is to be updated")
        at = int(p.storage_offset())
        start, stop = max(at, low), min(at + p.numel(), low + size)
        here = Range(start - at, stop - start, start - low) if start < stop else Range(0, 0)
        found.append((name, p, here))
    return found


def _zero3(buffer: Tensor, named: Sequence[tuple[str, Tensor]], first: Any) -> list[tuple[str, Tensor, Range]]:
    """Every parameter is cut into equal parts on its own, one a rank; a sub-group's parts lie in one tensor."""
    engine, names, found = first._z3_optimizer, {id(p): name for name, p in named}, []
    if engine.swap_optimizer:
        raise ValueError(
            "the optimizer state of DeepSpeed is offloaded to NVMe, which hf_shampoo4 cannot follow: "
            'set "offload_optimizer": {"device": "cpu"} in the DeepSpeed configuration, or leave it out'
        )
    index = next((i for i, flat in enumerate(engine.fp32_partitioned_groups_flat) if flat is buffer), None)
    if index is None:
        raise ValueError("the optimizer was given a tensor that is none of DeepSpeed's sub-groups")
    for p in engine.fp16_groups[index]:
        _check_group(p.ds_process_group)
        _, offset, size = engine.grad_position[engine.get_param_id(p)]
        start = min(dist.get_rank() * size, p.ds_numel)
        found.append((names[id(p)], p, Range(start, min(size, p.ds_numel - start), offset)))
    return found


def _check_group(group: Any) -> None:
    if dist.get_world_size(group) != dist.get_world_size():
        raise ValueError(
            f"DeepSpeed partitions a parameter over {dist.get_world_size(group)} of {dist.get_world_size()} ranks "
            "(expert or tensor parallelism, MiCS), which is not supported: use ZeRO over all ranks, or FSDP2"
        )
