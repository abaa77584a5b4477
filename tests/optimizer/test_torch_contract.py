"""What programs may expect of any torch optimizer: what is trained, hooks, keys, copies, the arguments of AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.exceptions import CheckpointError, OptionError

OFTEN: dict[str, Any] = {"stats_every": 1}
ALGORITHMS: list[dict[str, Any]] = [
    {"algorithm": "kl_shampoo"}, {"algorithm": "soap"}, {"algorithm": "kl_soap"}, {"algorithm": "elementwise"},
    {"algorithm": "shampoo", "roots_every": 2}, {"base": "sgdm", "nesterov": True, "roots_every": 2},
]  # fmt: skip


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def owners(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(ps: list[nn.Parameter], t: int) -> None:
    generator = torch.Generator().manual_seed(1000 + t)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator)


def run(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        give_gradients(owners(optimizer), t)
        optimizer.step()


# ------------------------------------------------------------------------------------------ the arguments of AdamW


@pytest.mark.parametrize("name", ["fused", "foreach", "amsgrad", "capturable", "differentiable"])
def test_an_argument_of_adamw_that_asks_for_nothing_is_no_error_and_any_other_value_is(name: str) -> None:
    groups = [{"params": parameters((4, 4)), name: False}, {"params": parameters((4, 4))}]
    optimizer = Shampoo4bit(groups, **{name: False})
    assert name not in optimizer.param_groups[0]
    optimizer.add_param_group({"params": parameters((4, 4)), name: False})
    if name in ("fused", "foreach"):
        Shampoo4bit(parameters((4, 4)), **{name: None})
    for refused in (lambda: Shampoo4bit(parameters((4, 4)), **{name: True}),
                    lambda: optimizer.add_param_group({"params": parameters((4, 4)), name: True})):  # fmt: skip
        with pytest.raises(OptionError, match=f"option {name}=True is not allowed: it must be .*False.*leave it out"):
            refused()
    assert len(optimizer.param_groups) == 3


@pytest.mark.parametrize("options", ALGORITHMS, ids=lambda o: o.get("algorithm", "sgdm"))
def test_maximize_follows_the_gradient_up(options: dict[str, Any]) -> None:
    settings = {"lr": 0.1, "weight_decay": 0.1, **OFTEN, **options}
    up = Shampoo4bit(parameters((80, 70), (9,)), maximize=True, **settings)
    down = Shampoo4bit(parameters((80, 70), (9,)), **settings)
    for t in range(3):
        give_gradients(owners(up), t)
        before = [p.grad.clone() for p in owners(up)]
        for p, q in zip(owners(up), owners(down), strict=True):
            q.grad = -p.grad
        up.step()
        down.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(owners(up), before, strict=True))
    assert all(map(torch.equal, owners(up), owners(down)))
    group = up.state_dict()["param_groups"][0]
    assert group["maximize"] is True
    assert up.add_param_group({"params": parameters((4, 4)), "maximize": False}) is None
    assert [group["maximize"] for group in up.param_groups] == [True, False]


@pytest.mark.parametrize("theirs", ["AdamW", "SGD"])
def test_maximize_is_torchs(theirs: str) -> None:
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "maximize": True}
    ps, qs = parameters((5,), (8, 3)), parameters((5,), (8, 3))
    ours = Shampoo4bit(ps, moments="fp32", base="adamw" if theirs == "AdamW" else "sgdm", algorithm="elementwise",
                       **settings)  # fmt: skip
    extra = {"momentum": 0.9} if theirs == "SGD" else {}
    reference = getattr(torch.optim, theirs)(qs, **settings, **extra)
    run(ours, range(4))
    run(reference, range(4))
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("caught", [TypeError, RuntimeError])
def test_a_sparse_gradient_is_caught_as_torchs_optimizers_have_it_and_as_ours_had(caught: type[Exception]) -> None:
    embedding = nn.Embedding(20, 8, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(caught, match="sparse gradient"):
        Shampoo4bit(embedding.parameters()).step()


def test_of_groups_of_several_formats_the_one_that_is_not_ours_is_named() -> None:
    optimizer = Shampoo4bit([{"params": [p]} for p in parameters((4, 4), (4, 4))])
    state_dict = optimizer.state_dict()
    for there in (1, 99):
        state_dict["param_groups"][1]["format"] = there
        with pytest.raises(CheckpointError, match=rf"state format {there}, here \d"):
            optimizer.load_state_dict(state_dict)


# ------------------------------------------------------------------------------------------------------ state dicts


def test_a_loaded_optimizers_state_dict_has_the_keys_of_the_originals() -> None:
    first, second = (Shampoo4bit([("a", parameters((4, 4))[0])]) for _ in range(2))
    run(first, range(1))
    second.load_state_dict(first.state_dict())
    mine, theirs = first.state_dict(), second.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert [list(entry) for entry in mine["state"].values()] == [list(entry) for entry in theirs["state"].values()]
