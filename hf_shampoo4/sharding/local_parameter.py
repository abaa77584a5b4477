"""What a rank holds of a parameter, and where: the parameter itself, or a range of it in an engine's flat buffer.

    one process, DDP                            the parameter
    FSDP2, HSDP, tensor parallelism             the local tensor of a DTensor
    FSDP1 (use_orig_params)                     the parameter, which FSDP1 has made a 1-D range of the real one
    DeepSpeed ZeRO-1, ZeRO-2, ZeRO-3            a range of the float32 tensor that takes the parameters' place

DeepSpeed says where a parameter is in attributes of the model's own parameters (deepspeed.py), FSDP1 in its modules
only: `note_flat_ranges` notes it on the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_NOTE = "_hf_shampoo4_range"
_NAME = "_hf_shampoo4_name"
_PURPOSE = "_hf_shampoo4_purpose"


class Range(NamedTuple):
    """Entries [start, start + numel) of a parameter, row-major, are at [offset, offset + numel) of a buffer."""

    start: int
    numel: int
    offset: int = 0


class LocalParameter(NamedTuple):
    """A parameter that is trained, as this rank sees it."""

    name: str
    """The same in every run and on every rank."""
    parameter: Tensor
    """The model's; its state is kept under it."""
    shape: tuple[int, ...]
    """Of all of it."""
    buffer: Tensor
    """What a step changes; its `.grad` is the gradient."""
    range: Range | None = None
    """Of the parameter in the buffer, if that is flat."""

    @property
    def numel(self) -> int:
        """Of all of it."""
        return math.prod(self.shape)

    def weights(self) -> Tensor:
        """What this rank holds, flat and row-major: a view if the memory `is_flat`, else a copy."""
        return self._range_of(_flat(self.buffer))

    def flat_view(self) -> Tensor | None:
        """`weights`, if they are a view: entries lie in memory one after the other, row-major; not channels last, nor a
        column."""
        local = local_tensor(self.buffer)
        return self._range_of(local.view(-1)) if _is_flat(local) else None

    @property
    def is_flat(self) -> bool:
        """Whether `flat_view` is one."""
        return _is_flat(local_tensor(self.buffer))

    def gradient(self) -> Tensor | None:
        """Its gradient as this rank has it: flat, in the order of `weights` and of any dtype; None if there is none.

        Raises:
            TypeError: a plain tensor of all of what the ranks have cut.
        """
        grad: Any = self.buffer.grad
        if grad is None:
            return None
        mine: Any = self.buffer
        if type(grad) is not Tensor and hasattr(grad, "placements"):
            if grad.placements != mine.placements:
                grad = grad.redistribute(placements=mine.placements)
        elif hasattr(mine, "placements") and grad.numel() != local_tensor(mine).numel():
            raise TypeError(
                f"the gradient of {self.name!r} is a plain tensor of all of it, {tuple(grad.shape)}, but the parameter "
                "is a DTensor, cut over ranks: set a DTensor, such as p.grad * scale, or "
                "distribute_tensor(gradient, p.device_mesh, p.placements)"
            )
        return self._range_of(_flat(grad))

    def digest(self) -> list[tuple[float, ...]]:
        """A few numbers of the weights, and of the gradient if there is one, to tell apart what is no replica."""
        there = [self.weights(), self.gradient()]
        return [_digest(flat) for flat in there if flat is not None]

    def write_back(self, flat: Tensor) -> None:
        """Copy changed weights back, flat as `weights` gave them, if that had to copy them."""
        if not self.is_flat:
            here = local_tensor(self.buffer)
            here = here if self.range is None else self._range_of(here)
            here.copy_(flat.view(here.shape))

    def _range_of(self, flat: Tensor) -> Tensor:
        """Of a flat buffer (entries,) what is this parameter's, a view."""
        return flat if self.range is None else flat[self.range.offset : self.range.offset + self.range.numel]


def local_tensor(t: Tensor) -> Tensor:
    """What this rank has of a parameter or gradient, detached: a DTensor's local part, or the tensor itself; a view."""
    local: Any = t.detach()
    return local.to_local() if type(local) is not Tensor and hasattr(local, "to_local") else local


def _flat(t: Tensor) -> Tensor:
    """What this rank holds, flat and row-major with stride 1.

    `reshape` alone takes a column, every other entry or an expanded number as they lie.
    """
    local = local_tensor(t)
    return local.view(-1) if _is_flat(local) else local.resolve_neg().reshape(-1).contiguous()


def _is_flat(local: Tensor) -> bool:
    """Whether its entries lie one after the other, row-major, with the signs that they have in memory."""
    return local.is_contiguous() and not local.is_neg()


def overlapping(members: Sequence[LocalParameter]) -> Iterator[tuple[str, str]]:
    """Pairs of parameters with numbers of the same memory in both: a decoder's weight that is the encoder's, turned.

    Views that only lie between each other, as columns of one tensor do, are not meant.
    """
    by_storage: dict[int, list[tuple[int, int, str, Tensor]]] = {}
    for one in members:
        local = local_tensor(one.buffer)
        if one.range is None and local.numel():
            first = int(local.storage_offset())
            last = first + sum((n - 1) * int(step) for n, step in zip(local.shape, local.stride(), strict=True))
            there = by_storage.setdefault(local.untyped_storage()._cdata, [])
            there.append((first, last, one.name, local))
    for there in by_storage.values():
        there.sort(key=lambda found: found[:2])
        for i, (_, last, name, local) in enumerate(there):
            for j, (first, _, other, beside) in enumerate(there[i + 1 :], i + 1):
                if first > last:
                    break
                are_dense = all(x.numel() == 1 + end - start for start, end, _, x in (there[i], there[j]))
                if are_dense or torch.isin(_addresses(local), _addresses(beside)).any():
                    yield name, other


def _addresses(local: Tensor) -> Tensor:
    """Where in its storage the entries of a strided tensor are: int64, row-major."""
    addresses = torch.tensor([local.storage_offset()], device="cpu")
    for n, step in zip(local.shape, local.stride(), strict=True):
        addresses = (addresses.unsqueeze(-1) + torch.arange(n, device="cpu") * step).flatten()
    return addresses


def may_be_replicas(digests: Sequence[list[tuple[float, ...]]]) -> bool:
    """Whether the digests may be those of replicas, which processors may have made to differ a little."""
    for mine, other in ((a, b) for of_one in digests[1:] for a, b in zip(digests[0], of_one, strict=False)):
        norm = max(mine[-1], other[-1])
        if any(abs(x - y) > 0.1 * norm for x, y in zip(mine, other, strict=True)):  # false where one is not finite
            return False
    return True


def _digest(flat: Tensor) -> tuple[float, ...]:
    """Nine float64: eight sums of every eighth entry, and the norm, of a flat tensor."""
    sums = [flat[i::8].sum(dtype=torch.float64) for i in range(8)]
    norm = torch.linalg.vector_norm(flat.float()).double()
    return tuple(torch.stack([*sums, norm]).tolist())


def full_shape(p: Tensor) -> tuple[int, ...]:
    """A parameter's shape before an engine took it apart."""
    if hasattr(p, "ds_shape"):  # ZeRO-3, zero.Init
        return tuple(p.ds_shape)
    return getattr(p, _NOTE)[0] if hasattr(p, _NOTE) else tuple(p.shape)


def local_parameter(name: str, p: Tensor) -> LocalParameter:
    """A parameter that is in the optimizer's groups itself, under a name that is the same in every run."""
    return LocalParameter(name, p, full_shape(p), p, getattr(p, _NOTE)[1] if hasattr(p, _NOTE) else None)


def in_fsdp1(p: Tensor) -> bool:
    """Whether FSDP1 has flattened a parameter."""
    return hasattr(p, _NOTE)


def in_deepspeed(p: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO keeps the float32 weights of a parameter of the model in a tensor of its own."""
    return hasattr(p, "_z3_optimizer") or hasattr(p, "_dp_group")


def note_name(p: Tensor, name: str) -> None:
    """Remember a parameter's name, for groups that other programs make of it."""
    setattr(p, _NAME, name)


def noted_name(p: Tensor) -> str:
    """What was noted; "" if nothing."""
    return getattr(p, _NAME, "")


def note_purpose(p: Tensor, purpose: str) -> None:
    """Remember what a parameter is for, for people."""
    setattr(p, _PURPOSE, purpose)


def noted_purpose(p: Tensor) -> str:
    """Why `param_groups` treats a parameter as it does; empty for one that it never saw."""
    return getattr(p, _PURPOSE, "")


@lru_cache(maxsize=1 << 16)
def clean_name(name: str) -> str:
    """A parameter's name without what wrappers (DDP, torch.compile, FSDP) put before it."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def check_trainable(p: Tensor) -> None:
    """Refuse what cannot be trained.

    Raises:
        TypeError: a parameter that is not real floating point.
        ValueError: an expanded parameter, one of a lazy module, or one of FSDP1 whose shape cannot be known.
    """
    if is_lazy(p):
        raise ValueError("a parameter of a lazy module has no shape yet: call the model before making the optimizer")
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(
            f"parameter of shape {tuple(p.shape)} is {p.dtype}: only real floating point can be trained, "
            "in 16 bits or more"
        )
    if p.layout == torch.strided and not p.is_contiguous() and _is_expanded(p):
        raise ValueError(
            f"parameter of shape {tuple(p.shape)} has one number in several places (expand): clone() it first"
        )
    if getattr(p, "_is_flat_param", False):
        raise ValueError(
            "FSDP1 has joined parameters into one flat tensor, in which matrices cannot be told apart: wrap the model "
            "with use_orig_params=True (fsdp_use_orig_params: true in an accelerate configuration), or use FSDP2"
        )
    if getattr(p, "_fsdp_flattened", False) and not hasattr(p, _NOTE):
        raise ValueError(
            f"FSDP1 has flattened a parameter of now {p.numel()} entries and only the model knows its shape: pass "
            "hf_shampoo4.param_groups(model) instead of model.parameters(), after the model was wrapped, or use FSDP2"
        )


def _is_expanded(p: Tensor) -> bool:
    return any(n > 1 and not step for n, step in zip(p.shape, p.stride(), strict=True))


def note_flat_ranges(model: nn.Module) -> None:
    """Note on every parameter that FSDP1 has flattened which range of it this rank has.

    Raises:
        ValueError: HYBRID_SHARD with one shard a replica, which torch 2.13 takes for NO_SHARD of that one rank
            (`_init_core_state`): no gradient is then sent to the other replicas (`_reduce_grad_no_shard`).
    """
    if not any(getattr(p, "_fsdp_flattened", False) for p in model.parameters()):
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    for module in FullyShardedDataParallel.fsdp_modules(model):
        replicas: Any = getattr(module, "_inter_node_pg", None)
        if module.world_size == 1 and replicas is not None and replicas.size() > 1:
            raise ValueError(
                f"FSDP1's HYBRID_SHARD over {replicas.size()} replicas of one shard each averages no gradients, so the "
                "replicas would drift apart: give each replica two or more shards, or use NO_SHARD, DDP or FSDP2"
            )
        flat: Any = module._handle.flat_param if module._handle is not None else None
        if flat is None or flat._params is None:  # None: use_orig_params=False
            continue
        for p, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            here = Range(info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else Range(0, 0)
            setattr(p, _NOTE, (tuple(shape), here))
