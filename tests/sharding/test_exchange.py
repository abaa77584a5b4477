"""Collectives between ranks, with one that stands for torch's."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

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


def test_small_numbers_travel_by_the_parameters_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of the CPU, whose backend `async_save` uses meanwhile, in a thread: the two would mix."""
    cpu, meta = torch.device("cpu"), torch.device("meta")  # stands for a GPU
    both, sent_from = SimpleNamespace(_device_types=[cpu, meta]), []
    monkeypatch.setattr(dist, "all_reduce", lambda x, *_, async_op, **__: sent_from.append(x.device) or Work())
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: torch.empty_like(self, device=device))  # also back
    for device in (meta, cpu):
        assert Ranks(0, 2, group=both, device=device).reduce(torch.zeros(3)).device == cpu
    assert sent_from == [meta, cpu]
