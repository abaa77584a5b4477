"""What torch's own suite (TestOptimRenewed) asks of an optimizer, of five of our configurations.

The inputs, schedulers and erroneous inputs are those of `torch.testing._internal.common_optimizers`, as torch ships
them; the tests are our own.  What test_torch_contract.py holds (hooks of load_state_dict, maximize, names) is not here.
"""

from __future__ import annotations

import inspect
import pickle
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.exceptions import CheckpointError
from hf_shampoo4.options import NAMES


def torchs_cases() -> Any:
    """torch's list of optimizers; the module wants expecttest, of which nothing is used, and freezes torch.backends."""
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    added = sys.modules.setdefault("expecttest", stand_in) is stand_in
    try:
        with mock.patch.object(torch.backends, "disable_global_flags"):
            return pytest.importorskip("torch.testing._internal.common_optimizers", exc_type=ImportError)
    finally:
        if added:
            del sys.modules["expecttest"]


CASES = torchs_cases()
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "kl_shampoo": {},
    "shampoo": {"algorithm": "shampoo", "stats_every": 2, "roots_every": 2},
    "soap": {"algorithm": "soap"},
    "adamw4bit": {"algorithm": "elementwise"},
    "sgdm": {"algorithm": "elementwise", "base": "sgdm", "moments": "fp32"},
}
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)
ACCEPTED = {*inspect.signature(Shampoo4bit).parameters} | {*NAMES}


def inputs(device: str = "cpu", dtype: Any = None) -> list[Any]:
    """torch's inputs for AdamW and SGD that mean something here."""
    found = CASES.optim_inputs_func_adamw(device, dtype) + CASES.optim_inputs_func_sgd(device, dtype)
    known = [case for case in found if set(case.kwargs) <= ACCEPTED and "nesterov" not in case.kwargs]
    return list({case.desc: case for case in known}.values())


ADAM = next(info for info in CASES.optim_db if info.optim_cls is torch.optim.Adam)
OURS = CASES.OptimizerInfo(
    Shampoo4bit, optim_inputs_func=inputs, scheduler_inputs=ADAM.scheduler_inputs,
    optim_error_inputs_func=CASES.optim_error_inputs_func_adamw, supported_impls=(), supports_complex=False,
)  # fmt: skip


def settings(name: str) -> list[dict[str, Any]]:
    """The configuration with each of torch's inputs."""
    return [{**CONFIGURATIONS[name], **case.kwargs} for case in OURS.optim_inputs_func(device="cpu")]


class Problem:
    """|W x + b|^2, from one start whatever the memory of its parameters looks like."""

    def __init__(self, contiguous: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        w, b, self.x = (torch.randn(shape, generator=generator) for shape in ((10, 5), (10,), (5,)))
        self.store = [torch.full((*t.shape, 2), 7.0) for t in (w, b)]
        w, b = (t if contiguous else s[..., 0].copy_(t) for t, s in zip((w, b), self.store, strict=True))
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)
        self.parameters = [self.w, self.b]

    def loss(self) -> Tensor:
        return (self.w @ self.x + self.b).square().sum()

    def closure(self) -> Tensor:
        for p in self.parameters:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def train(self, optimizer: torch.optim.Optimizer, steps: int, *schedulers: Any) -> list[Tensor]:
        """The parameters afterwards."""
        for _ in range(steps):
            loss = optimizer.step(self.closure)
            for scheduler in schedulers:
                scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        return [p.detach().clone() for p in self.parameters]

    def went_right(self, start: float, maximize: bool) -> bool:
        return self.loss().item() > start if maximize else self.loss().item() < start


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def same_saved(a: Any, b: Any) -> bool:
    """Of state dicts: tensors bit for bit, all else equal."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_saved(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_saved, a, b))
    return bool(a == b)


# ---------------------------------------------------------------------------------------------- the right direction


def test_the_cases_are_torchs() -> None:
    assert {"default", "non-default lr", "nonzero weight_decay", "tensor lr", "maximize"} <= {c.desc for c in inputs()}
    assert len(OURS.scheduler_inputs) >= 5


@every_configuration
def test_steps_go_in_the_right_direction_and_any_memory_gives_the_same_bits(name: str) -> None:
    for options in settings(name):
        ends = []
        for contiguous in (True, False):
            problem = Problem(contiguous)
            start = problem.loss().item()
            ends.append(problem.train(Shampoo4bit(problem.parameters, **options), 6))
            assert problem.went_right(start, options.get("maximize", False)), options
            assert all((s[..., 1] == 7.0).all() for s in problem.store), "memory beside the parameters"
        assert same(*ends), options


@every_configuration
def test_a_tensor_as_the_rate_is_the_number(name: str) -> None:
    ends = []
    for lr in (0.01, torch.tensor(0.01)):
        problem = Problem()
        ends.append(problem.train(Shampoo4bit(problem.parameters, lr=lr, **CONFIGURATIONS[name]), 4))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)  # a float32 has not all digits of the number


@every_configuration
def test_every_scheduler_of_torchs_list_lets_the_loss_fall(name: str) -> None:
    for makers in OURS.scheduler_inputs:
        problem = Problem()
        start = problem.loss().item()
        optimizer = Shampoo4bit(problem.parameters, lr=0.01, **CONFIGURATIONS[name])
        problem.train(optimizer, 5, *(make(optimizer) for make in makers))
        assert problem.went_right(start, False)


@every_configuration
@pytest.mark.parametrize(
    "of_second", [{"lr": 0.002}, {"weight_decay": 0.3}, {"lr": 0.002, "weight_decay": 0.0}], ids=str
)
def test_each_group_has_its_own_rate_and_decay(name: str, of_second: dict[str, float]) -> None:
    """A group moves as it does alone under the same values."""
    shared = {"lr": 0.01, "weight_decay": 0.1}

    def groups(problem: Problem) -> list[dict[str, Any]]:
        return [{"params": [problem.w]}, {"params": [problem.b], **of_second}]

    together, apart = Problem(), Problem()
    optimizer = Shampoo4bit(groups(together), **shared, **CONFIGURATIONS[name])
    each = [Shampoo4bit([apart.w], **shared, **CONFIGURATIONS[name]),
            Shampoo4bit([apart.b], **{**shared, **of_second}, **CONFIGURATIONS[name])]  # fmt: skip
    start = together.loss().item()
    for _ in range(6):
        together.train(optimizer, 1)
        apart.closure()
        for alone in each:
            alone.step()
    assert together.went_right(start, False)
    torch.testing.assert_close(together.parameters, apart.parameters)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, of_second.get("lr", 0.01)]


# ------------------------------------------------------------------------------------------- saved, copied, pickled


@every_configuration
def test_a_loaded_optimizer_goes_on_bit_for_bit_and_saves_the_same(name: str, tmp_path: Path) -> None:
    for options in settings(name):
        problem = Problem()
        optimizer = Shampoo4bit(problem.parameters, **options)
        problem.train(optimizer, 3)
        other = deepcopy(problem)
        second = Shampoo4bit(other.parameters, **options)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        assert same_saved(optimizer.state_dict(), second.state_dict()), options
        assert same(problem.train(optimizer, 2), other.train(second, 2)), options
        assert same_saved(optimizer.state_dict(), second.state_dict()), options


@every_configuration
@pytest.mark.parametrize("copied", [deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_has_the_state_and_every_public_attribute(name: str, copied: Callable[[Any], Any]) -> None:
    problem = Problem()
    optimizer = Shampoo4bit(problem.parameters, **CONFIGURATIONS[name])
    problem.train(optimizer, 3)
    other = Problem()
    twin, ps = copied((optimizer, problem.parameters))
    other.w, other.b = other.parameters = ps
    public = lambda o: {key for key in vars(o) if not key.startswith("_")}  # noqa: E731
    assert public(twin) == public(optimizer)
    assert same_saved(optimizer.state_dict(), twin.state_dict())
    assert same(problem.train(optimizer, 3), other.train(twin, 3))


def test_step_counts_of_another_type_are_refused_before_anything_is_changed() -> None:
    """torch's suite loads numbers for tensors, which its own formats once had; ours never had any."""
    problem = Problem()
    optimizer = Shampoo4bit(problem.parameters)
    problem.train(optimizer, 2)
    of_group, of_state = deepcopy(optimizer.state_dict()), deepcopy(optimizer.state_dict())
    of_group["param_groups"][0]["step"] = torch.tensor(2.0)
    of_state["state"][0].update({key: 2 for key in of_state["state"][0] if "steps" in key})
    kept = deepcopy(optimizer.state_dict())
    for damaged in (of_group, of_state):
        with pytest.raises(CheckpointError, match="damaged checkpoint"):
            optimizer.load_state_dict(damaged)
        assert same_saved(optimizer.state_dict(), kept)


@every_configuration
def test_a_state_dict_does_not_change_with_the_callers_copy(name: str) -> None:
    problem = Problem()
    optimizer = Shampoo4bit(problem.parameters, **CONFIGURATIONS[name])
    problem.train(optimizer, 2)
    saved = deepcopy(optimizer.state_dict())
    kept = deepcopy(saved)
    second = Shampoo4bit(deepcopy(problem.parameters), **CONFIGURATIONS[name])
    second.load_state_dict(saved)
    for t in range(2):
        for p in second.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 1.0 + t)
        second.step()
    assert same_saved(saved, kept)


@every_configuration
def test_hooks_of_state_dict_run_in_order_and_may_replace_it(name: str) -> None:
    problem = Problem()
    optimizer = Shampoo4bit(problem.parameters, **CONFIGURATIONS[name])
    problem.train(optimizer, 1)
    order: list[str] = []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda o: order.append("before")),
        optimizer.register_state_dict_post_hook(lambda o, saved: order.append("after")),
        optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "tag": len(saved)}),
        optimizer.register_state_dict_pre_hook(lambda o: order.append("first"), prepend=True),
    ]
    assert optimizer.state_dict()["tag"] == 2
    assert order == ["first", "before", "after"]
    for handle in handles:
        handle.remove()
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    assert len(order) == 3


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.fixture
def order() -> Iterator[list[str]]:
    """Of the global hooks, removed afterwards."""
    found: list[str] = []
    handles = [register_optimizer_step_pre_hook(lambda *_: found.append("all before")),
               register_optimizer_step_post_hook(lambda *_: found.append("all after"))]  # fmt: skip
    yield found
    for handle in handles:
        handle.remove()


@every_configuration
def test_hooks_of_step_run_around_it_and_see_its_arguments(name: str, order: list[str]) -> None:
    problem = Problem()
    optimizer = Shampoo4bit(problem.parameters, **CONFIGURATIONS[name])
    start = problem.w.detach().clone()

    def before(o: Any, args: Any, kwargs: Any) -> None:
        assert o is optimizer
        assert (args[-1], kwargs) == (problem.closure, {})
        assert torch.equal(problem.w, start)
        order.append("before")

    def after(o: Any, args: Any, kwargs: Any) -> None:
        assert not torch.equal(problem.w, start)
        order.append("after")

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    optimizer.step(problem.closure)
    assert order == ["all before", "before", "after", "all after"]
    for handle in handles:
        handle.remove()
    optimizer.step(problem.closure)
    assert order[4:] == ["all before", "all after"]


@every_configuration
def test_a_step_before_any_gradient_and_after_zero_grad_moves_nothing_and_keeps_no_state(name: str) -> None:
    for options in settings(name):
        problem = Problem()
        start = [p.detach().clone() for p in problem.parameters]
        optimizer = Shampoo4bit(problem.parameters, **options)
        optimizer.step()
        problem.loss().backward()
        optimizer.zero_grad()
        assert all(p.grad is None for p in problem.parameters)
        optimizer.step()
        assert same(start, [p.detach() for p in problem.parameters])
        assert not any(optimizer.state.values())


@every_configuration
def test_zero_gradients_move_nothing_without_decay_and_only_decay_moves_with_it(name: str) -> None:
    for decay in (0.0, 0.1):
        problem = Problem()
        problem.closure()
        start = [p.detach().clone() for p in problem.parameters]
        optimizer = Shampoo4bit(problem.parameters, lr=0.1, weight_decay=decay, **CONFIGURATIONS[name])
        optimizer.zero_grad(set_to_none=False)
        assert all(not p.grad.any() for p in problem.parameters if p.grad is not None)
        optimizer.step()
        assert same(start, [p.detach() for p in problem.parameters]) is (decay == 0.0)
        assert all(torch.isfinite(p).all() for p in problem.parameters)


@every_configuration
def test_parameters_without_entries_are_no_error(name: str) -> None:
    problem = Problem()
    empty = nn.Parameter(torch.empty(0))
    optimizer = Shampoo4bit([empty, *problem.parameters], **CONFIGURATIONS[name])
    start = problem.loss().item()
    empty.grad = torch.empty(0)
    problem.train(optimizer, 3)
    assert problem.went_right(start, False)


@every_configuration
def test_a_frozen_parameter_beside_trained_ones_stays(name: str) -> None:
    problem = Problem()
    still = nn.Parameter(torch.ones(6, 6), requires_grad=False)
    optimizer = Shampoo4bit(
        [{"params": [still]}, {"params": problem.parameters}], weight_decay=0.1, **CONFIGURATIONS[name]
    )
    problem.train(optimizer, 3)
    assert torch.equal(still, torch.ones(6, 6))
    assert not optimizer.state.get(still)


@every_configuration
def test_values_changed_after_construction_are_kept_and_count(name: str) -> None:
    """Schedulers and programs write into param_groups and defaults."""
    changed, made = Problem(), Problem()
    optimizer = Shampoo4bit(changed.parameters, lr=0.5, weight_decay=0.0, **CONFIGURATIONS[name])
    optimizer.param_groups[0].update(lr=0.01, weight_decay=0.1)
    reference = Shampoo4bit(made.parameters, lr=0.01, weight_decay=0.1, **CONFIGURATIONS[name])
    assert same(changed.train(optimizer, 3), made.train(reference, 3))
    optimizer.defaults["lr"] = 0.03
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))]})
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.03]


# ------------------------------------------------------------------------------------------------------------ errors


def test_what_torch_refuses_is_refused() -> None:
    """A parameter twice in a group, of which torch warns that it will be an error, is one; mixed betas are fine."""
    cases = [case for case in OURS.optim_error_inputs_func("cpu", torch.float32)
             if "betas must be either" not in case.optimizer_error_input.desc]  # fmt: skip
    assert len(cases) >= 8
    for case in cases:
        given = case.optimizer_error_input
        parameters = [nn.Parameter(torch.ones(4, 4))] if given.params is None else given.params
        wanted = (TypeError, ValueError) if case.error_type is UserWarning else case.error_type
        with pytest.warns() if case.error_type is UserWarning else pytest.raises(wanted):
            if case.error_type is UserWarning:
                with pytest.raises(ValueError, match="in its group twice"):
                    Shampoo4bit(parameters, **given.kwargs)
            else:
                Shampoo4bit(parameters, **given.kwargs)


@every_configuration
def test_complex_parameters_are_refused_in_words(name: str) -> None:
    w = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    with pytest.raises(TypeError, match="only real floating point"):
        Shampoo4bit([w], **CONFIGURATIONS[name])
