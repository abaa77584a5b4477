"""What all ranks must see alike before they work on a step together, and what becomes of an error on one of them.

A rank that fails in something that all do together goes on taking part in it, so that no other waits for it; at the end
all ranks raise (`Failures`).  What each sees when a step begins is compared in one all-reduce whose length is the same
whatever a rank sees (`agree`).
"""

from __future__ import annotations

import hashlib
import math
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from .exchange import Ranks

TOLERANCE = 1e-6  # between learning rates, which processors may compute with other last bits
PATIENCE = 60.0  # seconds until those are told who wait for a rank at the first step


@dataclass
class Failures:
    """What went wrong on this rank in something that all ranks do together."""

    ranks: Ranks
    first: Exception | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep an error until all ranks raise; one process raises it at once."""
        try:
            yield
        except Exception as error:
            if self.ranks.world == 1:
                raise
            traceback.clear_frames(error.__traceback__)  # whose tensors may be what there is no memory for
            self.first = self.first or error

    def raise_together(self) -> None:
        """Raise if a rank has failed, as all of them must call it: each failed one its own error, the others what it was.

        Raises:
            Exception: this rank's.
            RuntimeError: another rank failed.
        """
        failed = torch.tensor([float(self.first is not None)])
        if self.ranks.world == 1 or not self.ranks.reduce(failed, largest=True).item():
            return
        messages = self.ranks.gather(f"{type(self.first).__name__}: {self.first}" if self.first is not None else "")
        if self.first is not None:
            raise self.first
        rank = next(rank for rank, message in enumerate(messages) if message)
        raise RuntimeError(f"rank {rank} failed, so no rank goes on; there: {messages[rank]}")


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """All ranks leave the block, or all raise; a rank must not fail in it before others wait for it."""
    failures = Failures(ranks)
    with failures.kept():
        yield
    failures.raise_together()


def of_each(ranks: Ranks, make: Callable[[], Any]) -> list[Any]:
    """What `make` gives on each rank, any small object; or all ranks raise."""
    failures, mine = Failures(ranks), None
    with failures.kept():
        mine = make()
    failures.raise_together()
    return ranks.gather(mine)


@dataclass
class View:
    """What a rank sees when a step begins."""

    failures: Failures
    finite: bool = True
    stale: bool = False
    """Whether it has to plan: all ranks do, if one does."""
    fresh: bool = False
    """Whether it has a gradient by which replicas can be told from what is not, see replicas.py."""
    settings: str = ""
    """Options and parameters, which must be the same on all ranks."""
    rates: list[float] = field(default_factory=list)
    """Numbers which must be nearly the same; as many on every rank."""
    present: list[bool] = field(default_factory=list)
    """Which parameters have a gradient; as many as there are, if the settings are the same."""


def agree(ranks: Ranks, mine: View, explained: Callable[[], list[dict[str, Any]]], device: torch.device) -> View:
    """What all ranks together see.

    Args:
        explained: the settings of every parameter group, to tell the difference by.

    Raises:
        Exception: this rank has failed.
        RuntimeError: another one has, or settings differ; the message says which.
    """
    if ranks.world == 1:
        return mine
    flags = [mine.failures.first is not None, not mine.finite, mine.stale, mine.fresh]
    numbers = [_number(mine.settings), _number(repr(mine.present)), *mine.rates]
    seen = torch.tensor([*flags, *numbers, *(-x for x in numbers)], dtype=torch.float64, device=device)
    failed, infinite, stale, fresh, *bounds = ranks.reduce(seen, largest=True).tolist()
    if failed:
        mine.failures.raise_together()
    largest, least = bounds[: len(numbers)], [-x for x in bounds[len(numbers) :]]
    same = [a == b for a, b in zip(largest, least, strict=True)]
    near = [math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(largest[2:], least[2:], strict=True)]
    if not same[0] or not all(near):
        raise RuntimeError(f"ranks disagree on options or model: {_difference(ranks.gather(explained()))}")
    present = mine.present
    if not same[1]:
        there = torch.tensor(present, dtype=torch.float64, device=device)
        present = [bool(x) for x in ranks.reduce(there, largest=True).tolist()]
    return View(mine.failures, not infinite, bool(stale), bool(fresh), mine.settings, mine.rates, present)


def _number(text: str) -> float:
    """A digest that a float64 holds exactly."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big"))


def _difference(ranks: Sequence[list[dict[str, Any]]]) -> str:
    """The first thing in which a rank's groups differ from those of rank 0."""
    for rank, groups in enumerate(ranks):
        if len(groups) != len(ranks[0]):
            return f"rank 0 has {len(ranks[0])} parameter groups, rank {rank} {len(groups)}"
        for i, (there, here) in enumerate(zip(ranks[0], groups, strict=True)):
            for name in [*there, *here]:
                if not _near(there.get(name), here.get(name)):
                    values = f"{there.get(name)} on rank 0, {here.get(name)} on rank {rank}"
                    return f"{name} in parameter group {i} is {values}"
    return "the order of the parameters"


def _near(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=TOLERANCE) if type(a) is type(b) is float else a == b


_meetings: dict[tuple[int, ...], int] = {}
"""How often this process has met those of a group."""


@contextmanager
def announced(ranks: Ranks) -> Iterator[None]:
    """Something that all ranks do: who has waited in it for a minute is told whom for."""
    if ranks.world == 1:
        yield
        return
    _meetings[ranks.members] = _meetings.get(ranks.members, 0) + 1
    key = f"hf_shampoo4/{hash(ranks.members)}/{_meetings[ranks.members]}"
    store = dist.distributed_c10d._get_default_store().clone()  # its own connection: the other one may be waiting
    store.set(f"{key}/{ranks.rank}", "")
    timer = threading.Timer(PATIENCE, _tell_who_is_missing, (ranks, store, key))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _tell_who_is_missing(ranks: Ranks, store: Any, key: str) -> None:
    missing = [member for rank, member in enumerate(ranks.members) if not store.check([f"{key}/{rank}"])]
    if missing:
        warnings.warn(
            f"Shampoo4bit has waited for {PATIENCE:.0f} seconds in its first step for ranks {missing[:8]} of "
            f"{ranks.world}, which have not called step(): all ranks of a process group train one model together.  "
            "If these do not train, give the optimizer the group of those that do (process_group=), or set "
            "communicate=False where every process trains a model of its own",
            RuntimeWarning,
            stacklevel=2,
        )
