"""State and weights that other programs move, replace, copy back or empty between steps, as those that offload do."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit

OPTIONS: list[dict[str, Any]] = [
    {},
    {"algorithm": "shampoo"},
    {"algorithm": "soap", "refresh_warmup": 0},
    {"algorithm": "elementwise"},
]


class Training:
    """A small model on fixed data."""

    def __init__(self, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
        self.optimizer = Shampoo4bit(self.model.parameters(), lr=1e-2, **options)
        self.x, self.y = torch.randn(64, 32, generator=generator), torch.randn(64, 16, generator=generator)

    def losses(self, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = (self.model(self.x) - self.y).square().mean()
            loss.backward()
            self.optimizer.step()
            found.append(loss.item())
        return found

    def saved(self) -> Any:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def entries(self) -> Iterator[tuple[dict[str, Any], str]]:
        for entry in self.optimizer.state.values():
            for key in list(entry):
                yield entry, key

    def resumed(self, saved: Any) -> Training:
        self.model.load_state_dict(saved[0])
        self.optimizer.load_state_dict(saved[1])
        return self


def replaced(training: Training) -> None:
    for entry, key in training.entries():
        entry[key] = entry[key].clone()


def given_other_memory(training: Training) -> None:
    for entry, key in training.entries():
        entry[key].data = entry[key].data.clone()


@pytest.mark.parametrize("move", [replaced, given_other_memory])
@pytest.mark.parametrize("options", OPTIONS)
def test_moved_state_is_what_is_trained_and_saved(move: Callable[[Training], None], options: dict[str, Any]) -> None:
    training, still = Training(**options), Training(**options)
    for steps in (5, 7):
        assert training.losses(steps) == still.losses(steps)
        before = training.saved()[1]["state"]
        move(training)
        after = training.saved()[1]["state"]
        assert all(torch.equal(t, after[p][key]) for p, entry in before.items() for key, t in entry.items())
    assert training.losses(6) == still.losses(6)
    saved = training.saved()
    assert Training(**options).resumed(saved).losses(5) == training.losses(5)


def test_entries_that_change_places_are_each_others() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(32, 48, generator=generator)) for _ in range(2)]
    optimizer = Shampoo4bit(parameters, lr=1e-2)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    first, second = (optimizer.state[p] for p in parameters)
    before = [{key: t.clone() for key, t in entry.items()} for entry in (first, second)]
    optimizer.state[parameters[0]], optimizer.state[parameters[1]] = second, first
    optimizer.state_dict()
    optimizer.named_blocks()
    for p, wanted in zip(parameters, reversed(before), strict=True):
        assert all(torch.equal(optimizer.state[p][key], t) for key, t in wanted.items())
    assert not all(torch.equal(t, before[1][key]) for key, t in before[0].items())


def test_saving_offloaded_state_does_not_bring_it_back() -> None:
    training = Training()
    training.losses(3)
    offloaded(training)
    saved = training.optimizer.state_dict()["state"]
    assert {t.device.type for entry in saved.values() for t in entry.values()} == {"meta"}
    assert not any(t.numel() for wave in training.optimizer.waves() for stack in wave.stacks for t in held(stack))


def held(stack: Any) -> list[torch.Tensor]:
    return [t for buffers in stack.held.values() for t in buffers.values()]


def test_emptied_state_is_no_blocks_to_save() -> None:
    training = Training()
    training.losses(3)
    training.optimizer.state.clear()
    with pytest.raises(RuntimeError, match=r"was emptied or replaced since the last step .*: make a step before"):
        training.optimizer.named_blocks()
    assert not training.optimizer.state_dict()["state"]
    assert not training.optimizer.state, "looking makes no entries"


def test_a_step_that_was_put_back_is_that_of_every_unit() -> None:
    training = Training()
    training.losses(9)
    group, plans = training.optimizer.param_groups[0], training.optimizer._plans
    (plan,) = plans.of_unit.values()
    other = copy.copy(plan)  # DeepSpeed makes several of a group
    for put, counted in ((5, 6), (7, 8), (7, 8)):
        group["step"] = put
        plans.of_unit[0, 1] = other
        plans.follow_steps()
        assert [plan.count(group), other.count(group), plan.count(group)] == [counted, counted, counted + 1]
        del plans.of_unit[0, 1]
        group["step"] = plan.step = counted


def test_blocks_are_saved_as_they_are_in_the_state() -> None:
    training = Training()
    training.losses(3)
    for entry, key in training.entries():
        entry[key] = torch.ones_like(entry[key])
    assert all((row == 1).all() for row in training.optimizer.named_blocks().values())


@pytest.mark.parametrize(
    ("options", "first", "more"),
    [({}, 205, 33), *((options, 7, 16) for options in OPTIONS)],  # bases rarer after 200
)
@pytest.mark.parametrize("past_autograd", [False, True])
def test_state_copied_back_in_place_goes_on_from_there(
    options: dict[str, Any], first: int, more: int, past_autograd: bool
) -> None:
    training = Training(**options)
    training.losses(first)
    weights = copy.deepcopy(training.model.state_dict())
    state = [entry[key].clone() for entry, key in training.entries()]
    numbers = [{k: v for k, v in group.items() if k != "params"} for group in training.optimizer.param_groups]
    ahead = training.losses(more)
    training.model.load_state_dict(weights)
    for (entry, key), t in zip(training.entries(), state, strict=True):
        (entry[key].data if past_autograd else entry[key]).copy_(t)
    for group, there in zip(training.optimizer.param_groups, numbers, strict=True):
        group.update(there)
    assert training.losses(more) == ahead
    assert [group["step"] for group in training.optimizer.param_groups] == [first + more]


def offloaded(training: Training) -> None:
    for entry, key in training.entries():
        entry[key] = entry[key].to("meta")


def emptied(training: Training) -> None:
    training.optimizer.state.clear()


@pytest.mark.parametrize("move", [offloaded, emptied])
def test_moved_state_frees_its_memory_at_once(move: Callable[[Training], None]) -> None:
    training = Training()
    training.losses(3)
    stacks = [
        weakref.ref(t)
        for wave in training.optimizer.waves()
        for stack in wave.stacks
        for buffers in stack.state.values()
        for t in buffers.values()
    ]
    gc.collect()
    gc.disable()
    try:
        assert all(ref() is not None for ref in stacks)
        move(training)
        assert not any(ref() is not None for ref in stacks)
    finally:
        gc.enable()


def test_a_discarded_optimizer_frees_its_memory_at_once() -> None:
    training = Training()
    training.losses(3)
    training.resumed(training.saved()).losses(1)
    views = [weakref.ref(entry[key]) for entry, key in training.entries()]
    gc.collect()
    gc.disable()
    try:
        del training.optimizer
        assert not any(ref() is not None for ref in views)
    finally:
        gc.enable()


@pytest.fixture
def swapped() -> Iterator[None]:
    """As torch moves modules whose parameters are DTensors: by exchanging what two tensors are."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapped")
def test_a_model_is_moved_while_it_has_an_optimizer() -> None:
    training, still = Training(), Training()
    training.model.cpu()
    for steps in (1, 4, 3):
        assert training.losses(steps) == still.losses(steps)
        training.optimizer.zero_grad()  # torch swaps no parameter that a graph has
        training.model.cpu()
        training.model.load_state_dict(copy.deepcopy(training.model.state_dict()))
    training.model.to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for group in training.optimizer.param_groups for p in group["params"])


def test_parameters_that_others_have_replaced_are_let_go() -> None:
    training = Training()
    group = training.optimizer.param_groups[0]
    before = [weakref.ref(p) for p in group["params"]]
    training.model.requires_grad_(False)
    fresh = Training()
    group["params"] = list(fresh.model.parameters())
    training.model = fresh.model
    training.losses(2)
    gc.collect()
    assert not any(ref() is not None for ref in before)


def test_a_lazy_module_is_called_first() -> None:
    model: Any = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="lazy module has no shape yet: call the model before making the optimizer"):
        Shampoo4bit(model.parameters(), lr=1e-2)
    model(torch.randn(2, 4))
    Shampoo4bit(model.parameters(), lr=1e-2)
