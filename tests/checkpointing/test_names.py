"""Whose parameters a checkpoint has: a model that is wrapped otherwise is the same, any other difference is named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hf_shampoo4 import Shampoo4bit, load_optimizer, param_groups, save_optimizer
from hf_shampoo4.checkpointing.names import renamed
from hf_shampoo4.exceptions import CheckpointError

WRAPPED = [
    ("", "_orig_mod."),
    ("module.", ""),
    ("", "base_model.model."),
    ("module.base_model.model.", ""),
    ("a.b.", "b."),
]
FORMS = ("numbered", "named", "folder")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def made(model: nn.Module, prefix: str = "", steps: int = 0) -> Shampoo4bit:
    """For a model that is inside others, so that its parameters' names have a prefix."""
    groups = param_groups(model)
    for group in groups:
        group["params"] = [(prefix + name, p) for name, p in group["params"]]
    optimizer = Shampoo4bit(groups, lr=1e-2)
    for t in range(steps):
        step(optimizer, t)
    return optimizer


def step(optimizer: Shampoo4bit, t: int) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t + p.numel()))
    optimizer.step()


def named(state_dict: dict[str, Any]) -> dict[str, Any]:
    """As FSDP's files are."""
    groups = state_dict["param_groups"]
    name = {i: n for group in groups for i, n in zip(group["params"], group["param_names"], strict=True)}
    renamed_groups = [{**group, "params": group["param_names"]} for group in groups]
    return {"state": {name[i]: entry for i, entry in state_dict["state"].items()}, "param_groups": renamed_groups}


def move(first: Shampoo4bit, second: Shampoo4bit, form: str, folder: Path) -> None:
    if form == "folder":
        save_optimizer(first, folder)
        load_optimizer(second, folder)
    else:
        found = copy.deepcopy(first.state_dict())
        second.load_state_dict(named(found) if form == "named" else found)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("there", "here"), WRAPPED)
def test_a_model_that_is_wrapped_otherwise_goes_on_to_the_same_bits(
    there: str, here: str, form: str, tmp_path: Path
) -> None:
    model = network()
    first = made(model, there, steps=3)
    other = copy.deepcopy(model)
    second = made(other, here)
    names = second.names(0)
    move(first, second, form, tmp_path / "saved")
    step(first, 3)
    step(second, 3)
    assert all(map(torch.equal, weights(model), weights(other)))
    assert [group["step"] for group in second.param_groups] == [4] * len(second.param_groups)
    assert second.names(0) == names


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ((), (0,), r"only there are 2 \('0.bias', '0.weight'\).  If they are frozen now, let them require gradients"),
        ((0,), (), r"only here are 2 \('0.bias', '0.weight'\).  If they were frozen then, freeze them when"),
        ((0,), (2,), r"only here are 2 \('0.bias', '0.weight'\), only there 2 \('2.bias', '2.weight'\).  Wrap, freeze"),
    ],
)
def test_what_is_frozen_or_trained_there_alone_is_named_with_what_to_do(
    there: tuple[int, ...], here: tuple[int, ...], message: str, form: str, tmp_path: Path
) -> None:
    model, other = network(), network()
    for one, frozen in ((model, there), (other, here)):
        for layer in frozen:
            one[layer].requires_grad_(False)
    first, second = made(model, steps=1), made(other)
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(CheckpointError, match=f"of other parameters than .* has: .*{message}.*start the opt"):
        move(first, second, form, tmp_path / "saved")
    assert second.state_dict() == before
    step(second, 0)


@pytest.mark.parametrize("form", FORMS)
def test_parameters_in_other_groups_are_told_so(form: str, tmp_path: Path) -> None:
    model, other = network(), network()
    first = made(model, steps=1)
    groups = param_groups(other)
    groups[1]["params"].append(groups[0]["params"].pop())
    with pytest.raises(CheckpointError, match=r"the same are in other groups.  Make these as they were"):
        move(first, Shampoo4bit(groups), form, tmp_path / "saved")


def test_names_are_renamed_by_one_prefix_alone() -> None:
    assert renamed(["b.w", "a.w"], ["x.a.w", "x.b.w"]) == {"a.w": "x.a.w", "b.w": "x.b.w"}
    assert renamed(["x.a.w", "x.b.w"], ["a.w", "b.w"]) == {"x.a.w": "a.w", "x.b.w": "b.w"}
    assert renamed(["a.w", "b.w"], ["x.a.w", "y.b.w"]) == {}
    assert renamed(["a.w", "b.w"], ["xa.w", "xb.w"]) == {}
    assert renamed(["a.w"], ["x.a.w", "x.b.w"]) == {}
    assert renamed(["a.w"], ["a.w"]) == {}
    assert renamed([], []) == {}


def test_a_group_of_which_nothing_is_there_is_named_by_its_parameters() -> None:
    """torch's loading, not strict, makes such a group of the parameters alone."""
    model, other = network(), network()
    model[0].requires_grad_(False)
    other[2].requires_grad_(False)
    options = StateDictOptions(strict=False)
    found = copy.deepcopy(get_optimizer_state_dict(model, made(model, steps=1), options=options))
    with pytest.raises(CheckpointError, match=r"has nothing of the parameter group of \['0.weight'\]: load"):
        set_optimizer_state_dict(other, made(other), found, options=options)


@pytest.mark.parametrize("flat", [False, True])
def test_what_is_frozen_since_is_left_out_by_torchs_loading_by_names(flat: bool) -> None:
    """As FSDP2 loads a checkpoint; torch leaves the parameters out of the groups, and not their names."""
    model, other = network(), network()
    first = made(model, steps=2)
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        one[0].requires_grad_(False)
    second = made(other)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    found = copy.deepcopy(get_optimizer_state_dict(model, first, options=options))
    set_optimizer_state_dict(other, second, found, options=options)
    step(second, 2)
    for p in model[0].parameters():
        p.grad = None
    for p, q in zip(list(model.parameters())[2:], list(other.parameters())[2:], strict=True):
        p.grad = q.grad.clone()
    first.step()
    assert all(map(torch.equal, weights(model), weights(other)))
    assert second.names(0) == ["2.weight"]


def lists_and_one_more(steps: int = 0) -> tuple[list[nn.Parameter], Shampoo4bit]:
    """Parameters called "0.0" and "1.0", and one without a name, whose position is 1.0."""
    torch.manual_seed(0)
    lists = nn.ModuleList(nn.ParameterList([torch.randn(24, 16)]) for _ in range(2))
    optimizer = Shampoo4bit(list(lists.named_parameters()), lr=1e-2)
    more = nn.Parameter(torch.randn(24, 16))
    optimizer.add_param_group({"params": [more]})
    for t in range(steps):
        uneven_step(optimizer, t)
    return [*lists.parameters(), more], optimizer


def uneven_step(optimizer: Shampoo4bit, t: int) -> None:
    """With another gradient for each parameter, also for those of one shape."""
    generator = torch.Generator().manual_seed(t)
    for p in [p for group in optimizer.param_groups for p in group["params"]]:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_a_position_is_told_from_a_name_that_looks_like_it(tmp_path: Path) -> None:
    trained, first = lists_and_one_more(steps=4)
    fresh, second = lists_and_one_more()
    assert [second.names(0), second.names(1)] == [["0.0", "1.0"], [".1.0"]]
    save_optimizer(first, tmp_path / "saved")
    load_optimizer(second, tmp_path / "saved")
    with torch.no_grad():
        for p, q in zip(fresh, trained, strict=True):
            p.copy_(q)
    for optimizer in (first, second):
        uneven_step(optimizer, 4)
    assert all(map(torch.equal, trained, fresh))


@pytest.mark.parametrize(("name", "now"), [("1.0", ".1.0"), ("w", "0.0")])
def test_state_is_not_lost_where_a_group_that_is_added_changes_the_names(name: str, now: str, tmp_path: Path) -> None:
    def made() -> Shampoo4bit:
        optimizer = Shampoo4bit([("w", nn.Parameter(torch.ones(8, 6)))])
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(8, 6))})
        return optimizer

    first, second = made(), made()
    uneven_step(first, 0)
    save_optimizer(first, tmp_path / "saved")
    load_optimizer(second, tmp_path / "saved")
    second.add_param_group({"params": [(name, nn.Parameter(torch.ones(8, 6)))]})
    with pytest.raises(CheckpointError, match=rf"other names than when .* was loaded \('{now}'\).*after the next step"):
        uneven_step(second, 1)


def test_a_position_stays_as_it_was_where_no_name_looks_like_it() -> None:
    """So that earlier versions' folders can be read; two models' "1.0" are no name of either."""
    lists = [nn.ModuleList(nn.ParameterList([torch.ones(8, 6)]) for _ in range(2)) for _ in range(2)]
    optimizer = Shampoo4bit([{"params": list(one.named_parameters())} for one in lists])
    assert [optimizer.names(0), optimizer.names(1)] == [["0.0", "0.1"], ["1.0", "1.1"]]
