"""What all ranks must see alike before they work on a step together, and what becomes of an error on one of them.

A rank that fails in something that all do together goes on taking part in it, so that no other waits for it; at the end
all ranks raise (`Failures`).  What each sees when a step begins is compared in one all-reduce whose length is the same
whatever a rank sees (`agree`).
"""

from __future__ import annotations

import hashlib
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .exchange import Ranks

TOLERANCE = 1e-6  # between learning rates, which processors may compute with other last bits
NO_RATES = [0.0] * 5


@dataclass
class Failures:
    """What went wrong on this rank in something that all ranks do together."""

    ranks: Ranks
    first: Exception | None = None

    def kept(self) -> Kept:
        """Keep an error until all ranks raise; one process raises it at once."""
        return Kept(self)

    def raise_on_all(self) -> None:
        """Raise if a rank has failed, as all must call it: each failed one its own error, the others what it was.

        Raises:
            Exception: this rank's.
            RuntimeError: another rank failed.
        """
        if self.ranks.world == 1:
            return
        if self.ranks.reduce(torch.tensor([float(self.first is not None)]), largest=True).item():
            self.exchange(None)

    def exchange(self, value: Any) -> list[Any]:
        """What each rank gives, any small object; or all raise, as `raise_on_all` does."""
        messages = self.ranks.gather((f"{type(self.first).__name__}: {self.first}" if self.first else "", value))
        if self.first is not None:
            raise self.first
        for rank, (message, _) in enumerate(messages):
            if message:
                raise RuntimeError(f"rank {rank} failed, so no rank goes on; there: {message}")
        return [given for _, given in messages]


class Kept:
    """See `Failures.kept`; a step enters it many times, which a generator would make dearer."""

    def __init__(self, failures: Failures) -> None:
        self._failures = failures

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception) or self._failures.ranks.world == 1:
            return False
        traceback.clear_frames(trace)  # whose tensors may be what there is no memory for
        self._failures.first = self._failures.first or error
        return True


@contextmanager
def all_or_none(ranks: Ranks) -> Iterator[None]:
    """All ranks leave the block, or all raise; a rank must not fail in it before others wait for it."""
    failures = Failures(ranks)
    with failures.kept():
        yield
    failures.raise_on_all()


def gather_or_raise(ranks: Ranks, make: Callable[[], Any]) -> list[Any]:
    """What `make` gives on each rank, any small object; or all ranks raise."""
    failures, mine = Failures(ranks), None
    with failures.kept():
        mine = make()
    return failures.exchange(mine)


@dataclass
class View:
    """What a rank sees when a step begins."""

    failures: Failures
    finite: bool = True
    """Whether its gradients are; true where the host does not know yet."""
    stale: bool = False
    """Whether it has to plan: all ranks do, if one does."""
    fresh: bool = False
    """Whether it has a gradient by which replicas can be told from what is not, see replicas.py."""
    settings: str = ""
    """Options and parameters, which must be the same on all ranks."""
    rates: list[list[float]] = field(default_factory=list)
    """Of each group numbers which must be nearly the same, and of which the largest are taken; none, if this rank has
    failed before it knew them."""
    alike: bool = True
    """Whether all ranks have gradients of the same parameters and dtypes."""
    bits: Tensor | None = None
    """float64 of no dimension, within 2^53: of what must be equal bit for bit, if that is compared in this step."""
    apart: bool = False
    """Whether ranks have other bits."""
    names: list[str] = field(default_factory=list)
    """Of the parameters that are to be updated; the same on all ranks, if the settings are."""
    present: dict[str, int] = field(default_factory=dict)
    """Those that have a gradient, and a number for its dtype: of what ranks have, the largest is taken."""
    verdict: Any = None
    """An `execution.gradients.Verdict`, which tells later whether they are finite: of one process alone."""


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
    said = (mine.settings, repr(sorted(mine.present.items())), repr(mine.rates))
    numbers = [*map(_number, said), *(_weighted(mine.rates) if mine.rates else NO_RATES)]
    seen = torch.tensor([*flags, 0, 0, *numbers, *(-x for x in numbers)], dtype=torch.float64, device=device)
    if mine.bits is not None:
        seen[len(flags) : len(flags) + 2] = torch.stack([mine.bits, -mine.bits])  # which the host does not wait for
    failed, infinite, stale, fresh, bits, least_bits, *bounds = ranks.reduce(seen, largest=True).tolist()
    if failed:
        mine.failures.raise_on_all()
    largest, least = bounds[: len(numbers)], [-x for x in bounds[len(numbers) :]]
    same = [a == b for a, b in zip(largest, least, strict=True)]
    near = [
        math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(largest[len(said) :], least[len(said) :], strict=True)
    ]
    if not same[0] or not all(near):
        raise RuntimeError(
            f"ranks disagree on options or model: {_difference(ranks.gather(explained()))}.  All ranks of a "
            "process group train one model together; where each has parameters of its own, as pipeline parallelism and "
            "ZeroRedundancyOptimizer make them, set communicate=False or give each model's process_group"
        )
    present = mine.present
    if not same[1]:
        there = torch.tensor([float(present.get(name, 0)) for name in mine.names], dtype=torch.float64, device=device)
        kinds = ranks.reduce(there, largest=True).tolist()
        present = {name: int(kind) for name, kind in zip(mine.names, kinds, strict=True) if kind}
    rates = mine.rates
    if not same[2]:
        rates = ranks.reduce(torch.tensor(rates, dtype=torch.float64, device=device), largest=True).tolist()
    return replace(
        mine,
        finite=not infinite,
        stale=bool(stale),
        fresh=bool(fresh),
        rates=rates,
        alike=same[1],
        apart=bits != -least_bits,
        present=present,
        verdict=None,
    )


def _weighted(rates: Sequence[Sequence[float]]) -> list[float]:
    """Of each kind a sum over groups that tells them apart."""
    return [sum((i + 1) * rate for i, rate in enumerate(of_kind)) for of_kind in zip(*rates, strict=True)]


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
