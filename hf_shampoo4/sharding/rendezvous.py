"""Whether all ranks come to the same place: told through the store by which they found each other.

A collective would hang where one rank is alone, and could not say why.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .exchange import Ranks

REMINDER = timedelta(seconds=10)
LATE = timedelta(minutes=1)  # in what would hang
PATIENCE = timedelta(minutes=10)  # one rank may be writing the model's weights meanwhile


def all_come(place: str, ranks: Ranks, advice: str) -> bool:
    """Wait until every rank has called it; the same answer on all that do.

    Args:
        place: a name that is used for one meeting only, the same on every rank.
        ranks: who is expected.
        advice: what to do if some do not come; shown after `REMINDER`.

    Returns:
        Whether they have; False after `PATIENCE`.
    """
    if ranks.world == 1:
        return True
    store = dist.distributed_c10d._get_default_store()
    arrived, verdict = [f"hf_shampoo4/{place}/{rank}" for rank in range(ranks.world)], f"hf_shampoo4/{place}/verdict"
    store.set(arrived[ranks.rank], "")
    start, reminded = time.monotonic(), False
    while not store.check([verdict]):
        waited = timedelta(seconds=time.monotonic() - start)
        if store.check(arrived):
            store.compare_set(verdict, "", "all")  # the first word counts: somebody may have lost patience just now
        elif waited > PATIENCE:
            store.compare_set(verdict, "", "some")
        else:
            if waited > REMINDER and not reminded:
                reminded = True
                missing = [ranks.global_ranks[rank] for rank, key in enumerate(arrived) if not store.check([key])]
                warnings.warn(
                    f"rank {ranks.global_ranks[ranks.rank]} waits for ranks {missing}: {advice}", stacklevel=2
                )
            time.sleep(0.01)
    return bool(store.get(verdict) == b"all")


_meetings: dict[tuple[int, ...], int] = {}
"""How often this process has met those of a group."""


def in_first_step(ranks: Ranks) -> AbstractContextManager[None]:
    """What all ranks do in their first step: who has waited in it for a minute is told whom for."""
    if ranks.world == 1:
        return nullcontext()
    _meetings[ranks.global_ranks] = _meetings.get(ranks.global_ranks, 0) + 1
    said = (
        "in its first step for ranks {ranks}, which have not called step(): all ranks of a process group train one "
        "model together.  If these do not train, give the optimizer the group of those that do (process_group=), or "
        "set communicate=False where every process trains a model of its own"
    )
    return announced(ranks, f"{hash(ranks.global_ranks)}/{_meetings[ranks.global_ranks]}", said)


@contextmanager
def announced(ranks: Ranks, place: str, said: str) -> Iterator[None]:
    """Something that all ranks do: who has waited in it for a minute is told whom for, if the store works.

    Args:
        ranks: who is expected.
        place: a name that is used once only, the same on every rank.
        said: where this rank waits for "{ranks}", and what to do.
    """
    if ranks.world == 1:
        yield
        return
    timer = None
    with suppress(Exception):  # one rank alone must not fail here: the others would wait for it
        timer = _reminder(ranks, f"hf_shampoo4/{place}", said)
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def _reminder(ranks: Ranks, key: str, said: str) -> threading.Timer:
    store: Any = dist.distributed_c10d._get_default_store()
    store.set(f"{key}/{ranks.rank}", "")
    timer = threading.Timer(LATE.total_seconds(), _tell_who_is_missing, (ranks, store, key, said))
    timer.daemon = True
    timer.start()
    return timer


def _tell_who_is_missing(ranks: Ranks, store: Any, key: str, said: str) -> None:
    store = store.clone() if hasattr(store, "clone") else store  # its own connection: the other one may be waiting
    missing = [member for rank, member in enumerate(ranks.global_ranks) if not store.check([f"{key}/{rank}"])]
    if missing:
        where = said.format(ranks=f"{missing[:8]} of {ranks.world}")
        warnings.warn(f"Shampoo4bit has waited for {LATE.seconds} seconds {where}", RuntimeWarning, stacklevel=2)
