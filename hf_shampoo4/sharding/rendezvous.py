"""Whether all ranks come to the same place: told through the store by which they found each other.

A collective would hang where one rank is alone, and could not say why.
"""

from __future__ import annotations

import time
import warnings
from datetime import timedelta

import torch.distributed as dist

from .exchange import Ranks

REMINDER = timedelta(seconds=10)
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
                missing = [rank for rank, key in enumerate(arrived) if not store.check([key])]
                warnings.warn(f"rank {ranks.rank} waits for ranks {missing}: {advice}", stacklevel=2)
            time.sleep(0.01)
    return bool(store.get(verdict) == b"all")
