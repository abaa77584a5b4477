"""The processes that train one model together (`Ranks`), and how tensors travel between them in all-to-alls."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Form(NamedTuple):
    """Of a tensor that is to come: what its bytes mean."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize


def packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """uint8: the bytes of some tensors, one after the other."""
    parts = [t.contiguous().view(-1).view(torch.uint8) for t in tensors]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)


@dataclass
class Pending:
    """An all-to-all under way; whoever waits for it gets what the others sent."""

    received: Tensor
    into: Mapping[int, Sequence[Form]]
    """What each of the others sends, by rank in ascending order."""
    device: torch.device
    work: Any = None
    sent: Tensor | None = None
    """Kept alive until the transfer is over."""

    def wait(self) -> dict[int, list[Tensor]]:
        """The tensors that came, by the rank that sent them, each in its shape and dtype; views of one buffer."""
        if self.work is not None:
            self.work.wait()
        self.work = self.sent = None
        forms = [form for forms in self.into.values() for form in forms]
        parts = iter(self.received.to(self.device).split([form.nbytes for form in forms]))
        return {rank: [_as(next(parts), form) for form in forms] for rank, forms in self.into.items()}


def _as(part: Tensor, form: Form) -> Tensor:
    """A tensor of `form` from its bytes, uint8; copied where they do not lie at a multiple of the dtype's size."""
    aligned = part if part.storage_offset() % form.dtype.itemsize == 0 else part.clone()
    return aligned.view(form.dtype).view(form.shape)


AGAIN = (
    "save its state_dict() (with sharded state, by torch.distributed.checkpoint or save_optimizer) while the group is "
    "there, and load it into the new one"
)


@dataclass
class Ranks:
    """The processes that train one model together, as this one sees them."""

    rank: int = 0
    world: int = 1
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes that this rank has sent to others so far, by purpose."""
    group: Any = None
    """Their process group; None: the default one."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the parameters are.  Small numbers travel from there: a thread that saves a checkpoint meanwhile, as
    `torch.distributed.checkpoint.async_save` does, has the CPU's backend."""
    _reduction: Any = field(default=None, init=False, repr=False, compare=False)
    """The last one.  Were gloo's thread the last to have it, it would need Python's lock to let go of its tensor, and
    a script that ends after its last step would be aborted: at its end Python gives that lock to no thread."""

    @cached_property
    def global_ranks(self) -> tuple[int, ...]:
        """What torch calls each rank in the default group."""
        return tuple(dist.get_process_group_ranks(self.group or dist.group.WORLD)) if self.world > 1 else (0,)

    def from_global(self, mesh: Sequence[int], name: str) -> tuple[int, ...]:
        """A mesh of ranks of the default group as ranks of this one.

        Raises:
            ValueError: it has others too.
        """
        if not set(mesh) <= set(self.global_ranks):
            raise ValueError(
                f"parameter {name!r} lives on a mesh of ranks {list(mesh)[:8]}, but process_group has ranks "
                f"{list(self.global_ranks)[:8]}: leave process_group out, or give the group of all ranks of the meshes"
            )
        return tuple(self.global_ranks.index(rank) for rank in mesh)

    def require(self) -> None:
        """Make sure that the group is there.

        Raises:
            RuntimeError: it was destroyed.
        """
        if self.world > 1 and not dist.is_initialized():
            raise RuntimeError(f"the process group of {self.world} ranks that the optimizer works in is gone: {AGAIN}")

    def require_same(self) -> None:
        """Make sure that this process is the rank in it that it was.

        Raises:
            RuntimeError: the group was made again with other ranks.
        """
        now = (
            (self.rank, self.world) if self.world == 1 else (dist.get_rank(self.group), dist.get_world_size(self.group))
        )
        if now != (self.rank, self.world):
            raise RuntimeError(
                f"this process is rank {now[0]} of {now[1]}, and was rank {self.rank} of {self.world} when the "
                f"optimizer shared its work out: {AGAIN}"
            )

    @property
    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.world) if rank != self.rank]

    def all_to_all(
        self,
        purpose: str,
        out: Mapping[int, Tensor],
        sizes: Mapping[int, int],
        into: Mapping[int, Sequence[Form]],
        device: torch.device,
        lost: int = 0,
    ) -> Pending:
        """Send bytes to ranks; every rank must call it, also one with nothing to send or to receive.

        Args:
            purpose: what the bytes are counted under.
            out: rank -> uint8, what is `packed` for it.
            sizes: rank -> how much that is.
            into: rank -> what comes from it.
            device: where that is wanted.
            lost: the byte that is sent where `out` has nothing, because this rank could not make it.
        """
        wire, others = self._wire(device), self.others
        sizes = {rank: sizes.get(rank, 0) for rank in others}
        parts = [
            out[r] if r in out else torch.full((sizes[r],), lost, dtype=torch.uint8, device=device) for r in others
        ]
        sent = torch.cat(parts).to(wire) if parts else torch.empty(0, dtype=torch.uint8, device=wire)
        counts, expected = [0] * self.world, [0] * self.world
        for rank, part in zip(others, parts, strict=True):
            counts[rank], expected[rank] = part.numel(), sum(form.nbytes for form in into.get(rank, ()))
        received = torch.empty(sum(expected), dtype=torch.uint8, device=wire)
        work = dist.all_to_all_single(received, sent, expected, counts, group=self.group, async_op=True)
        self.sent[purpose] = self.sent.get(purpose, 0) + sent.numel()
        return Pending(received, {rank: into.get(rank, ()) for rank in others}, device, work, sent)

    def reduce(self, x: Tensor, largest: bool = False) -> Tensor:
        """The sum over ranks, the same bits on all of them; every rank must call it.

        Args:
            x: of any shape and dtype, the same on every rank; may be written to.
            largest: the largest number instead of the sum.
        """
        if self.world == 1:
            return x
        on_wire = x.to(self._wire(self.device if x.device.type == "cpu" else x.device))
        by_thread = on_wire.device.type == "cpu"
        operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        self._reduction = dist.all_reduce(on_wire, operation, group=self.group, async_op=by_thread)
        if by_thread:
            self._reduction.wait()
        return on_wire.to(x.device)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; any small object."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _wire(self, device: torch.device) -> torch.device:
        """Where the backend can send from: NCCL sends from a GPU alone, also what was offloaded to the CPU."""
        known = [found.type for found in getattr(self.group or dist.group.WORLD, "_device_types", [])]
        return device if not known or device.type in known else torch.device(known[0])


def host() -> str:
    """Which computer this is: its name and, as many have the same, what its kernel drew when it started.

    Another container is another computer, as it is for NCCL.
    """
    boot = ""
    with suppress(OSError):  # not Linux, or not to be read
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{socket.gethostname()} {boot}"


class ProcessGroup:
    """The group that an optimizer was given, or None; its copies in this process have the same."""

    def __init__(self, group: Any = None) -> None:
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError(
                f"rank {dist.get_rank()} is not in process_group: give every rank the group that it trains in, or set "
                "communicate=False where it trains a model of its own"
            )
        self.group = group

    def ranks(self, devices: Iterable[torch.device], of_an_engine: bool = False) -> Ranks:
        """Its ranks, by default all processes, or this one alone where there are no others.

        Args:
            devices: of the parameters.
            of_an_engine: whether DeepSpeed partitions them.

        Raises:
            ValueError: a part of the ranks, though an engine works with all of them.
        """
        if not dist.is_available() or not dist.is_initialized():
            return Ranks()
        if of_an_engine and dist.get_world_size(self.group) < dist.get_world_size():
            raise ValueError(
                f"process_group has {dist.get_world_size(self.group)} of {dist.get_world_size()} ranks, but DeepSpeed "
                "partitions over all: leave process_group out"
            )
        device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        return Ranks(dist.get_rank(self.group), dist.get_world_size(self.group), group=self.group, device=device)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroup:
        return self

    def __reduce__(self) -> Any:
        if self.group is not None:
            raise TypeError(
                "an optimizer with a process_group cannot be pickled, as groups cannot: save its state_dict(), and "
                "load that into one that is made with the group of then"
            )
        return ProcessGroup, ()
