"""What a step does in Python beside its torch calls: counted, for a time decides nothing on a busy machine."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.options import Options


def steps_of(layers: int) -> Shampoo4bit:
    """An optimizer of so many matrices and vectors, alike, some steps on."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(64, 64), (64,)] * layers]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer = Shampoo4bit(parameters, lr=1e-3, stats_every=100, refresh_warmup=0, stagger=False)
    for _ in range(2):
        optimizer.step()
    return optimizer


def calls_of(optimizer: Shampoo4bit) -> Counter[str]:
    """Functions of Python that a step enters."""
    entered = Counter[str]()

    def count(frame: FrameType, event: str, value: Any) -> None:
        if event == "call":
            entered[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return entered


def test_a_parameter_more_costs_few_calls_and_none_of_them_looks_at_its_state_or_options() -> None:
    few, many = calls_of(steps_of(4)), calls_of(steps_of(12))
    assert (many.total() - few.total()) / 16 <= 31  # more parameters; there were 67
    for name in ("own_state", "is_own", "state_layout", "blocks_that_change", "storages", "_is_expanded"):
        assert many[name] == 0


def test_a_step_of_two_waves_enters_few_functions() -> None:
    assert calls_of(steps_of(12)).total() <= 1120  # there were 2,156


def test_options_are_not_checked_again_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = steps_of(2)
    monkeypatch.setattr(Options, "__post_init__", lambda self: pytest.fail("checked again"))
    optimizer.step()
