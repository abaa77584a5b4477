"""Options and rates that a program sets in `optimizer.param_groups` by hand, before the first step or in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.options import NAMES, Options


class Counted(float):
    """A rate that counts how often its number is asked for; of a tensor on a GPU each time is a wait for it."""

    asked = 0

    def __float__(self) -> float:
        Counted.asked += 1
        return super().__float__()


def made(steps: int = 0, **options: Any) -> Shampoo4bit:
    """Of two groups, some steps on."""
    generator = torch.Generator().manual_seed(0)
    a, b = (nn.Parameter(torch.randn(8, 6, generator=generator)) for _ in range(2))
    groups = [{"params": [a], "kind": "matrix"}, {"params": [b], "kind": "matrix"}]
    optimizer = Shampoo4bit(groups, lr=1e-2, **options)
    for p in (a, b):
        p.grad = torch.ones_like(p)
    for _ in range(steps):
        optimizer.step()
    return optimizer


def weights(optimizer: Shampoo4bit) -> list[torch.Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def as_text(value: Any) -> str:
    """As a command line has it."""
    if isinstance(value, tuple):
        return ";".join(str(x) if isinstance(x, int) else f"{x[0]}:{x[1]}" for x in value)
    return str(value)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_is_set_as_text_is_read_as_everywhere(name: str, steps: int) -> None:
    optimizer = made(steps, rates={"matrix": 2.0})
    group = optimizer.param_groups[0]
    value = group[name]
    group[name] = as_text(value)
    optimizer.step()
    assert (group[name], type(group[name])) == (value, type(value))
    assert group["step"] == steps + 1


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_cannot_be_is_refused_as_everywhere_and_changes_nothing(name: str, steps: int) -> None:
    optimizer = made(steps)
    group, before = optimizer.param_groups[0], weights(optimizer)
    value, usual = group[name], f"option {name}(=.* is not allowed: it must be | has no effect with )"
    for bad in ("abc", None, 1e999, object()):
        group[name] = bad
        with pytest.raises(OptionError, match=usual):
            optimizer.step()
    with pytest.raises(OptionError, match=usual):
        optimizer.report()
    assert all(map(torch.equal, weights(optimizer), before))
    group[name] = value
    optimizer.step()
    assert group["step"] == steps + 1


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("stats_every", "20", 20),
        ("damping", "1e-3", 1e-3),
        ("stagger", "false", False),
        ("rates", "embedding:6", (("embedding", 6.0),)),
        ("rates", {"matrix": 6}, (("matrix", 6.0),)),
        ("working_memory", 1, 1.0),
    ],
)
def test_a_new_value_is_read_as_everywhere_and_heeded(name: str, given: Any, read: Any) -> None:
    first, second = made(2), made(2)
    first.param_groups[0][name], second.param_groups[0][name] = given, read
    for optimizer in (first, second):
        optimizer.step()
    assert first.param_groups[0][name] == read
    assert all(map(torch.equal, weights(first), weights(second)))


def test_what_is_loaded_into_edited_groups_fits_what_they_mean() -> None:
    first, second = made(1, stats_every=20), made()
    second.param_groups[0]["block_size"] = "1024"
    with pytest.warns(UserWarning, match="stats_every=20, not 10"):
        second.load_state_dict(first.state_dict())
    second.param_groups[0]["block_size"] = "abc"
    with pytest.raises(OptionError, match="option block_size='abc' is not allowed"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "any", "rates": "matrix:2"}, "needs parameter groups of one kind each"),
        ({"roots_every": 5}, "option roots_every has no effect with algorithm=kl_shampoo"),
        ({"stats_every": 0}, "stats_every=0 is not allowed"),
        ({"lr": "abc"}, "lr='abc' is not allowed: it must be a number >= 0"),
        ({"lr": None}, "lr=None is not allowed: it must be a number >= 0"),
        ({"eps": float("nan")}, "eps=nan is not allowed: it must be a number >= 0; look at the schedule"),
        ({"betas": (0.9, 1.0)}, "betas=.* is not allowed: it must be two numbers in"),
        ({"betas": 0.9}, "betas=0.9 is not allowed: it must be two numbers in"),
    ],
)
def test_what_cannot_be_together_is_refused_with_the_usual_message(change: dict[str, Any], message: str) -> None:
    optimizer = made(2)
    optimizer.param_groups[0].update(change)
    with pytest.raises(OptionError, match=message):
        optimizer.step()


def test_a_rate_is_asked_for_once_a_step() -> None:
    optimizer = made(2)
    optimizer.param_groups[0]["lr"] = Counted(1e-2)
    Counted.asked = 0
    optimizer.step()
    assert Counted.asked == 1


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("called", [(0, 1), (0,), (1,)])
def test_a_rate_that_is_no_number_is_refused_though_an_engine_steps_through_a_part_of_the_groups(
    broken: int, called: tuple[int, ...]
) -> None:
    """Before any part of the step is made: DeepSpeed calls `step` for one group after the other."""
    optimizer = made(2)
    groups, before = optimizer.param_groups, weights(optimizer)
    groups[broken]["lr"] = float("nan")
    optimizer.param_groups = [groups[i] for i in called]
    with pytest.raises(OptionError, match="lr=nan is not allowed: it must be a number >= 0; look at the schedule"):
        optimizer.step()
    optimizer.param_groups = groups
    assert all(map(torch.equal, weights(optimizer), before))


def test_every_option_is_tried_here() -> None:
    assert set(made().param_groups[0]) >= set(vars(Options()))
