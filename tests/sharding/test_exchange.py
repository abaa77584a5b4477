"""Collectives between ranks, with one that stands for torch's."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.distributed as dist

from hf_shampoo4.sharding.exchange import Ranks


class Work:
    def wait(self) -> None:
        pass


def test_gloos_thread_is_not_the_last_to_have_a_reductions_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for Python's lock, and a script that ends after its last step was aborted (SIGABRT) 1 time in 8."""
    works: list[weakref.ref[Work]] = []

    def all_reduce(tensor: torch.Tensor, operation: object, group: object, async_op: bool) -> Work:
        work = Work()
        works.append(weakref.ref(work))
        return work

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(Ranks, "_wire", lambda self, device: device)
    ranks = Ranks(0, 2)
    ranks.reduce(torch.zeros(()))
    assert works[0]() is not None
    ranks.reduce(torch.zeros(()))
    assert [work() is not None for work in works] == [False, True]
