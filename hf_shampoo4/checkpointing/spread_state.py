"""State that is spread over ranks, brought together for a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from torch import Tensor

from ..execution.plans import Plans, entries_of
from ..execution.state_layout import Entry
from ..execution.waves import Wave
from ..sharding.agreement import all_or_none
from ..sharding.local_parameter import in_deepspeed, in_fsdp1
from ..sharding.rendezvous import all_come


class SpreadState:
    """The whole state of parameters whose state is spread over the ranks, and what of it was fetched already."""

    def __init__(self, plans: Plans) -> None:
        self._plans, self._steps = plans, 0
        self.fetched: dict[Tensor, Entry] = {}
        """What `consolidate` has brought since the last step, in the CPU's memory."""

    def new_step(self) -> None:
        """The state is about to change."""
        self.fetched.clear()
        self._steps += 1

    def consolidate(self, state: Mapping[Tensor, Entry]) -> None:
        """Bring what `shard_state` has spread to every rank; every rank must call it.  Not done twice."""
        spread = [wave for wave in self._plans.waves() if _only_consolidated(wave)]
        if self.fetched or not spread:
            return
        with self._plans.announced("consolidate()"):
            for wave in spread:
                found = wave.state.full(entries_of(wave, state))
                with all_or_none(self._plans.ranks):
                    for m, entry in found.items():
                        kept = {key: t.to("cpu", copy=True) for key, t in entry.items()}
                        self.fetched[wave.members[m].parameter] = kept

    def full(self, kept: Mapping[Tensor, Entry]) -> dict[Tensor, Entry]:
        """Parameter -> its whole state, of those whose state is spread over the ranks; under DeepSpeed this rank's.

        Args:
            kept: what `optimizer.state` has.

        Raises:
            RuntimeError: it is not read yet, or other ranks that it needs have not called this.
        """
        if self._plans.reader is not None and not self._plans:
            raise RuntimeError(
                "the state is read at the first step after load_optimizer: make one before it is saved again or "
                "copied; accelerate's `prepare` copies it: prepare the optimizer before loading it"
            )
        if not self.fetched and any(map(_only_consolidated, self._plans.waves())):
            self._meet()
            self.consolidate(kept)
        found = dict(self.fetched)
        spread = [w for w in self._plans.waves() if not w.replicated and w.members[0].parameter not in found]
        alone = all(in_deepspeed(wave.members[0].parameter) for wave in spread)
        with nullcontext() if alone else self._plans.announced("state_dict()"):
            for wave in spread:
                entries = entries_of(wave, kept)
                state = wave.state.partial(entries) if alone else wave.state.full(entries)
                found.update({wave.members[m].parameter: entry for m, entry in state.items()})
        return found

    def of_copy(self, state: dict[Tensor, Entry]) -> dict[Tensor, Entry]:
        """What a copy of the optimizer keeps of it: one rank may make it alone, so nothing can be fetched.

        Raises:
            RuntimeError: this rank has a part of the state only.
        """
        waves = self._plans.waves()
        spread = {member.parameter for wave in waves if not wave.replicated for member in wave.members}
        if spread - self.fetched.keys() or self._plans.reader is not None:
            raise RuntimeError(
                "a copy or pickle of this optimizer would have a part of its state only, which is spread over ranks or "
                "not read yet: use state_dict() and load_state_dict() on every rank, save_optimizer() or, with "
                "shard_state, consolidate() on every rank before the copy"
            )
        return {p: {**state[p], **entry} for p, entry in self.fetched.items() if state.get(p)}

    def _meet(self) -> None:
        """Wait for every rank to call `state_dict()`.

        Raises:
            RuntimeError: they do not.
        """
        advice = (
            "with shard_state the state is spread over the ranks: call state_dict() on every rank, or, before one rank "
            "calls it alone, consolidate() on every rank (as the Trainer does after hf_shampoo4.register(), with "
            "trainer_kwargs() or with Shampoo4bitCallback)"
        )
        if not all_come(f"{self._plans.meeting}/{self._steps}", self._plans.ranks, advice):
            raise RuntimeError(f"other ranks have not called state_dict(); {advice}")


def _only_consolidated(wave: Wave) -> bool:
    """Whether state is on its owners alone while every rank has the parameters, so that one rank may be asked alone."""
    first = wave.members[0]
    of_an_engine = in_fsdp1(first.parameter) or in_deepspeed(first.parameter)
    return not wave.replicated and first.placement.whole and not of_an_engine
