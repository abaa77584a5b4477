"""Where every rank changes its own weights: whether all still have the same bits.

Owners send what becomes of a block, so replicas are equal whatever gradients and processors are.  What every rank
computes for itself (all of a block's update with `apply`, the last line of it where owners send updates, as they do
with `wire=bf16`) is equal only if what it computes it from is, to the last bit, and if all round alike and make every
step.  So a number of all bits (numerics/digest.py) goes along in the all-reduce that a step begins with: after 1, 2, 4,
... steps, after every `CHECK_EVERY`, and after one that failed.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..numerics.digest import digest
from ..sharding.agreement import gather_or_raise
from ..sharding.exchange import Ranks
from .state_layout import Entry
from .waves import Wave, WaveParameter

CHECK_EVERY = 97
"""Steps; a prime, so that it is not always after a refresh, which makes blocks equal again."""


class EqualReplicas:
    """When the ranks compare their bits, and what becomes of a difference."""

    def __init__(self) -> None:
        self._made = 0
        """Steps since a plan was made or a step failed; the same on every rank."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step is made inside; after one that fails on any rank, and so raises on all, the next one compares."""
        made, self._made = self._made, 0
        yield
        self._made = made + 1

    def begin(self) -> None:
        """A plan was made."""
        self._made = 0

    def digest(self, waves: Sequence[Wave]) -> Tensor | None:
        """float64 of no dimension: of this rank's bits, if they are to be compared in this step."""
        if self._made.bit_count() > 1 and self._made % CHECK_EVERY:
            return None
        by_device: dict[torch.device, list[Tensor]] = {}
        for t in (t for wave in _on_their_own(waves) for t in _tensors(wave)):
            by_device.setdefault(t.device, []).append(t)
        found = [digest(tensors) for tensors in by_device.values()]
        return sum((of_device.to(found[0].device) for of_device in found[1:]), found[0]) if found else None

    def settle(self, ranks: Ranks, waves: Sequence[Wave], groups: Sequence[Mapping[str, Any]]) -> None:
        """The ranks' numbers differ: owners update all from here on, which makes replicas equal, or all ranks raise.

        Args:
            waves: all.
            groups: the optimizer's.

        Raises:
            RuntimeError: a group has apply=all, or a wire on which owners send no weights.
        """
        self._made = 0
        found = _on_their_own(waves)
        by_rank = gather_or_raise(ranks, lambda: [bits for wave in found for bits in _bits(wave)])
        said = _difference(by_rank, [member for wave in found for member in wave.members])
        if not said:  # they only counted their steps differently
            return
        by_all, half = any(wave.all_apply for wave in found), not all(wave.sends_weights for wave in found)
        said += (
            ".  Every rank updates all blocks itself, which needs the same gradients on all ranks, to the last bit, "
            "processors that round alike, and every step made on all"
            if by_all
            else ".  With wire=bf16 owners send updates, and every rank changes its weights itself, which needs equal "
            "weights at first, processors that round alike, and every step made on all"
        )
        if half or any(group["apply"] == "all" for group in groups):
            set_to = ["apply=owners"] * by_all + ["wire=exact"] * half
            raise RuntimeError(
                f"{said}.  Set {' and '.join(set_to)}, with which each block's owner sends its weights, and go on from "
                "the last checkpoint"
            )
        warnings.warn(
            f"{said}.  As apply=auto lets it, each block's owner updates it from here on, and sends its weights and "
            "state, so that they become equal again",
            stacklevel=2,
        )
        for wave in found:
            wave.all_apply = False


def require_equal_state(ranks: Ranks, taken: Sequence[tuple[Wave, Sequence[Entry]]]) -> None:
    """Make sure that all ranks go on from the same state of what each of them has whole; every rank must call it.

    Owners would take each block's from their own, and nothing else would show that it is another training's.

    Args:
        taken: waves, and what there is of their members' state.

    Raises:
        RuntimeError: they do not; the message says of which parameter and on which ranks.
    """
    found = [(wave, entries) for wave, entries in taken if ranks.world > 1 and wave.whole]
    if not found:
        return
    of_all = gather_or_raise(ranks, lambda: [bits for wave in found for bits in _bits_of_whole(*wave)])
    members = [member for wave, _ in found for member in wave.members]
    compared = [m for m, of_one in enumerate(zip(*of_all, strict=True)) if None not in of_one]
    by_rank = [[bits for m in compared if (bits := of_rank[m]) is not None] for of_rank in of_all]
    if said := _difference(by_rank, [members[m] for m in compared]):
        raise RuntimeError(
            f"{said}.  It was loaded so: load the same checkpoint on every rank, from a disk that all share or from "
            "copies that are the same"
        )


def _bits_of_whole(wave: Wave, entries: Sequence[Entry]) -> list[tuple[float, float] | None]:
    """Of each member's state a number, if all of it is there."""
    whole = wave.state.whole_here(entries)
    return [
        (0.0, digest([entry[key] for key in sorted(entry)]).item()) if is_whole else None
        for entry, is_whole in zip(entries, whole, strict=True)
    ]


def _on_their_own(waves: Sequence[Wave]) -> list[Wave]:
    """Whose weights every rank has, and changes itself."""
    return [
        wave for wave in waves if wave.ranks.world > 1 and wave.whole and (wave.all_apply or not wave.sends_weights)
    ]


def _tensors(wave: Wave) -> list[Tensor]:
    """Weights, and the state that every rank computes."""
    state = [t for stack in wave.stacks for buffers in stack.state.values() for t in buffers.values()]
    return [*(member.local.weights() for member in wave.members), *(state if wave.all_apply else ())]


def _bits(wave: Wave) -> list[tuple[float, float]]:
    """Of each member a number of its weights, and one of its state."""
    entries = wave.state.local() if wave.all_apply else {}
    return [
        (digest([member.local.weights()]).item(), digest([*entries.get(m, {}).values()]).item())
        for m, member in enumerate(wave.members)
    ]


def _difference(by_rank: Sequence[Sequence[tuple[float, float]]], members: Sequence[WaveParameter]) -> str:
    """What differs, and where; "" if nothing does."""
    differing = [m for m, of_one in enumerate(zip(*by_rank, strict=True)) if len(set(of_one)) > 1]
    if not differing:
        return ""
    first = [of_rank[differing[0]] for of_rank in by_rank]
    what = "weights" if len({weights for weights, _ in first}) > 1 else "state"
    (most, _), *_ = Counter(first).most_common()  # of as many the first rank's
    others = [rank for rank, found in enumerate(first) if found != most]
    return (
        f"ranks are no longer equal: the {what} of parameter {members[differing[0]].name!r} have other bits on ranks "
        f"{others[:8]} than on rank {first.index(most)} ({len(differing)} of {len(members)} parameters differ)"
    )
