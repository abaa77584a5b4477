"""The bases in float32 against torch.optim, alone and under Shampoo; what a base refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.state_report import rows
from tests.support.reference import Shampoo32

SHAPES = [(40, 30), (30, 40), (40, 30), (4, 3, 3, 3), (9,), (2, 20, 20), ()]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def run_both(ours, ps, theirs, qs, steps: int = 8) -> None:
    for t in range(steps):
        for i, (p, q) in enumerate(zip(ps, qs, strict=True)):
            absent = (t + i) % 4 == 3  # now and then a parameter has no gradient
            p.grad = q.grad = None if absent else torch.randn_like(p)
        ours.step()
        theirs.step()
        for p, q in zip(ps, qs, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)


# Shampoo whose roots are never computed is its base: P = I G I.
IDLE = [{"algorithm": "elementwise"}, {"algorithm": "shampoo", "stats_every": 99, "roots_every": 99, "block_size": 16}]


@pytest.mark.parametrize("options", IDLE)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgdm_as_torch(momentum: float, nesterov: bool, weight_decay: float, options: dict) -> None:
    ps, qs = parameters(), parameters()
    theirs = torch.optim.SGD(qs, lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    ours = Shampoo4bit(
        ps, lr=0.05, betas=(momentum, 0.999), base="sgdm", nesterov=nesterov, weight_decay=weight_decay,
        moments="fp32", **options,
    )  # fmt: skip
    run_both(ours, ps, theirs, qs)


@pytest.mark.parametrize("options", IDLE)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_as_torch(weight_decay: float, options: dict) -> None:
    ps, qs = parameters(), parameters()
    settings = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    run_both(Shampoo4bit(ps, moments="fp32", **settings, **options), ps, torch.optim.AdamW(qs, **settings), qs)


def test_a_group_without_preconditioner_may_ask_for_nesterov_where_the_base_beneath_has_it() -> None:
    a, b = parameters()[:2]
    groups = [{"params": [a]}, {"params": [b], "algorithm": "elementwise", "nesterov": True}]
    optimizer = Shampoo4bit(groups, algorithm="shampoo", base="sgdm")
    assert [group["nesterov"] for group in optimizer.param_groups] == [False, True]


@pytest.mark.parametrize("nesterov", [False, True])
def test_shampoo_over_sgdm_as_a_float64_reference(nesterov: bool) -> None:
    """The preconditioned gradient takes the gradient's place; L2 is added after it, as a wrapper around SGD does."""
    lr, mu, decay = 0.05, 0.9, 0.01
    p = torch.nn.Parameter(torch.randn(20, 12))
    options = {
        "stats_every": 1,
        "roots_every": 2,
        "damping": 1e-3,
        "factor": "direct",
        "bits": 32,
        "algorithm": "shampoo",
    }
    ours = Shampoo4bit(
        [p], lr=lr, betas=(mu, 0.999), base="sgdm", nesterov=nesterov, weight_decay=decay, moments="fp32", **options
    )
    x = p.detach().double().numpy().copy()
    reference = Shampoo32(x, t1=1, t2=2, damping=1e-3)
    reference.base = Passes()
    m = np.zeros_like(x)
    for _ in range(8):
        p.grad = torch.randn(20, 12)
        g = reference.step(np.zeros_like(x), p.grad.double().numpy(), 1.0) + decay * x
        m = mu * m + g
        x = x - lr * (g + mu * m if nesterov else m)
        ours.step()
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=2e-4, atol=2e-5)


class Passes:
    """A base that gives the reference's preconditioned gradient away."""

    def step(self, x: np.ndarray, p: np.ndarray, lr: float) -> np.ndarray:
        return p


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sgdm_on_other_dtypes(dtype: torch.dtype) -> None:
    ps, qs = parameters(dtype), parameters(dtype)
    ours = Shampoo4bit(ps, lr=0.05, base="sgdm", algorithm="elementwise", moments="fp32", weight_decay=0.1)
    exact = torch.optim.SGD([q.data.float() for q in qs], lr=0.05, momentum=0.9, weight_decay=0.1)
    wide = exact.param_groups[0]["params"]
    for _ in range(3):
        for p, q in zip(ps, wide, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        ours.step()
        exact.step()
    for p, q in zip(ps, wide, strict=True):
        torch.testing.assert_close(p.float(), q, rtol=2e-2, atol=2e-2)


def test_sgdm_keeps_one_moment_and_ignores_the_second_beta() -> None:
    runs = []
    for beta2 in (0.9, 0.999):
        p = torch.nn.Parameter(torch.ones(64, 64))
        ours = Shampoo4bit([p], betas=(0.9, beta2), base="sgdm", algorithm="elementwise")
        for t in range(3):
            p.grad = torch.full_like(p, 0.1 * (t + 1))
            ours.step()
        assert not any("second" in key for key in ours.state[p])
        runs.append(p.detach())
    assert torch.equal(*runs)
    held = sum(t.numel() * t.element_size() for t in ours.state[p].values())
    assert held / p.numel() < 0.55


def test_the_report_names_base_and_moments() -> None:
    named = [
        ("adamw", "4bit_eden", "AdamW 4bit_eden", "Shampoo eigen 4-bit, 4bit_eden moments"),
        ("sgdm", "8bit", "SGDM 8bit", "Shampoo eigen 4-bit over SGDM, 8bit moments"),
        ("sgdm", "bf16", "SGDM bf16", "Shampoo eigen 4-bit over SGDM, bf16 moments"),
    ]
    for base, moments, elementwise, preconditioned in named:
        if moments == "8bit":
            pytest.importorskip("bitsandbytes")
        ps = [torch.nn.Parameter(torch.zeros(s)) for s in ((64, 64), (5000,), (10,))]
        treatments = {
            row.shape: row.treatment for row in rows(Shampoo4bit(ps, algorithm="shampoo", base=base, moments=moments))
        }
        assert treatments[64, 64] == preconditioned
        assert treatments[5000,] == elementwise
        assert treatments[10,] == elementwise.split()[0] + (" bf16" if moments == "bf16" else " fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nesterov": True}, "nesterov=True is not allowed: it must be false unless base=sgdm"),
        ({"base": "sgdm", "nesterov": True, "betas": (0.0, 0.9)}, "nesterov needs a momentum"),
        ({"base": "sgd"}, "one of adamw, sgdm"),
        ({"base": "sgdm", "moments": "4bit_eden"}, "one of fp32, bf16, 8bit, 4bit with base=sgdm"),
    ],
)
def test_nonsense_is_refused_at_construction(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Shampoo4bit([torch.nn.Parameter(torch.zeros(8, 8))], algorithm="shampoo", **options)
