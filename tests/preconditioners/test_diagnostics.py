"""The state's health: figures against what they say, and that looking changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4 import state_report as report
from hf_shampoo4.preconditioners.diagnostics import Probe


def optimizer_of(**options: object) -> Shampoo4bit:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(96, 80)), nn.Parameter(torch.randn(80, 96))]
    return Shampoo4bit(parameters, lr=1e-2, **{"diagnose_every": 2, **options})


def advance(optimizer: Shampoo4bit, steps: int, size: float = 1.0) -> None:
    for _ in range(steps):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = size * torch.randn_like(p)
        optimizer.step()


EVERY_STEP = {"algorithm": "shampoo", "stats_every": 1, "roots_every": 1}
FAMILY = {"algorithm": "kl_shampoo", "stats_every": 1}


@pytest.mark.parametrize("options", [EVERY_STEP, FAMILY, {"algorithm": "soap", "stats_every": 1}], ids=str)
def test_figures_reach_the_metrics_at_the_chosen_interval(options: dict) -> None:
    optimizer = optimizer_of(**options)
    advance(optimizer, 1)
    assert not optimizer.diagnostics()
    advance(optimizer, 1)
    found = report.metrics(optimizer)
    assert 0 <= found["optim/unmoved_first"] < 0.9
    assert abs(found["optim/radial_bias"]) < 0.1
    assert 0 < found["optim/basis_turn"] < 1
    assert 0 < found["optim/condition"] < 8
    assert all(math.isfinite(value) for value in found.values())


def test_a_stalled_moment_is_seen() -> None:
    optimizer = optimizer_of(algorithm="elementwise")
    advance(optimizer, 2)
    moving = optimizer.diagnostics()[0]["optim/unmoved_first"]
    optimizer.param_groups[0]["betas"] = (0.999, 0.999999)
    advance(optimizer, 2)
    stalled = optimizer.diagnostics()[0]
    assert moving < 0.6 < 0.95 < stalled["optim/unmoved_first"]
    assert stalled["optim/unmoved_second"] > 0.95


def test_float32_state_has_no_codes_to_look_at() -> None:
    optimizer = optimizer_of(bits=32, factor="direct", moments="fp32", **EVERY_STEP)
    advance(optimizer, 2)
    assert optimizer.diagnostics() == [{}]


def test_a_basis_that_stays_has_not_changed() -> None:
    optimizer = optimizer_of(algorithm="soap", stats_every=100, refresh_warmup=0)
    advance(optimizer, 2)
    assert "optim/basis_turn" not in optimizer.diagnostics()[0]


@pytest.mark.parametrize("options", [EVERY_STEP, FAMILY, {"algorithm": "shampoo", "base": "sgdm"}], ids=str)
def test_looking_changes_nothing(options: dict) -> None:
    watched, unwatched = optimizer_of(**options), optimizer_of(**{**options, "diagnose_every": 0})
    for optimizer in (watched, unwatched):
        torch.manual_seed(1)
        advance(optimizer, 4)
    for p, q in zip(watched.param_groups[0]["params"], unwatched.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(watched.state[p][key], unwatched.state[q][key]) for key in watched.state[p])


def test_the_condition_is_the_worst_blocks() -> None:
    probe = Probe()
    probe._add("condition", torch.tensor(2.0), 1)
    probe._add("condition", torch.tensor(5.0), 1)
    probe._add("radial_bias", torch.tensor(0.1), 3)
    probe._add("radial_bias", torch.tensor(-0.1), 1)
    assert probe.metrics() == {"optim/condition": 5.0, "optim/radial_bias": 0.05}
