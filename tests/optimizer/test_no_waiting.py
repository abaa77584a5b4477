"""An ordinary step never waits for the device: on `meta`, whose values cannot be read, it would raise.

And where the host learns a step later that gradients were not finite, everything is as where it knew at once.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.execution import gradients

ALGORITHMS: dict[str, dict[str, Any]] = {
    "kl_shampoo": {"orthogonalise": "cholesky_qr"},
    "kl_shampoo, short": {"orthogonalise": "cholesky_qr", "sides": "short"},
    "soap": {"algorithm": "soap", "orthogonalise": "cholesky_qr"},
    "kl_soap, zip": {"algorithm": "kl_soap", "moments": "4bit_zipsr"},
    "eigen": {"algorithm": "shampoo", "stats_every": 2, "roots_every": 4},
    "direct": {"algorithm": "shampoo", "factor": "direct", "root": "eigh", "stats_every": 2, "roots_every": 4},
    "elementwise": {"algorithm": "elementwise", "moments": "4bit_eden"},
    "sgdm": {"algorithm": "elementwise", "base": "sgdm", "nesterov": True},
    "32 bits": {"bits": 32, "moments": "fp32"},
    "bfloat16 rotations": {"rotation_precision": "bfloat16", "moments": "bf16"},
}
CASES = [*((name, torch.bfloat16) for name in ALGORITHMS), ("kl_shampoo", torch.float32), ("32 bits", torch.float32)]


def parameters(device: str, dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = ((96, 80), (80, 96), (64, 320), (72,), (3, 64, 64))
    return [nn.Parameter(torch.randn(shape).to(dtype).to(device)) for shape in shapes]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_an_ordinary_step_reads_nothing_from_the_device(name: str, dtype: torch.dtype) -> None:
    ps = parameters("meta", dtype)
    optimizer = Shampoo4bit(ps, weight_decay=0.1, stochastic_rounding=True, **ALGORITHMS[name])
    for _ in range(5):
        for p in ps:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 5


def trained(name: str, dtype: torch.dtype, broken: tuple[int, ...]) -> tuple[list[nn.Parameter], Shampoo4bit]:
    """Eight steps, the gradients of some of which are not finite in one entry."""
    ps = parameters("cpu", dtype)
    optimizer = Shampoo4bit(ps, lr=0.01, weight_decay=0.1, stochastic_rounding=True, **ALGORITHMS[name])
    for t in range(8):
        generator = torch.Generator().manual_seed(t)
        for p in ps:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        if t in broken:
            ps[1].grad[2, 3] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    return ps, optimizer


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) if isinstance(a, list) else a == b


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_verdict_that_comes_later_changes_no_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights, state and counts, whether steps are skipped at the start, in a row, or at the end."""
    for broken in ((), (0, 3, 4, 7)):
        monkeypatch.setattr(gradients, "UNREAD", ())
        weights, at_once = trained(name, dtype, broken)
        monkeypatch.setattr(gradients, "UNREAD", ("cpu",))
        weights_later, later = trained(name, dtype, broken)
        assert all(map(torch.equal, weights, weights_later))
        with pytest.warns(UserWarning, match="not finite") if broken else warnings.catch_warnings():
            assert same(later.state_dict(), at_once.state_dict())


def test_skipped_steps_are_said_and_end_the_training_a_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "UNREAD", ("cpu",))
    p = nn.Parameter(torch.ones(8, 8))
    optimizer = Shampoo4bit([("layer.weight", p)], lr=1.0, max_skipped=2)
    p.grad = torch.full((8, 8), torch.inf)
    optimizer.step()
    with pytest.warns(UserWarning, match=r"not finite.*layer\.weight"):
        optimizer.step()
    group = optimizer.param_groups[0]
    assert torch.equal(p, torch.ones(8, 8))
    assert len(optimizer.state_dict()["state"]) == 1, "saving never ends a training"
    assert (group["step"], group["skipped_steps"]) == (0, 2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        optimizer.step()
    p.grad = torch.ones(8, 8)
    optimizer.step()
    assert (group["step"], group["skipped_steps"]) == (1, 3)
    assert not torch.equal(p, torch.ones(8, 8))
