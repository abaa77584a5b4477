"""What programs may expect of any torch optimizer: what is trained, hooks, keys, copies, the arguments of AdamW."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit, metrics
from hf_shampoo4.checkpointing.command import main
from hf_shampoo4.checkpointing.optimizer_folder import load_optimizer, save_optimizer
from hf_shampoo4.exceptions import CheckpointError, OptionError
from hf_shampoo4.options import NAMES
from hf_shampoo4.state_report import rows, table
from tests.support import used

OFTEN: dict[str, Any] = {"stats_every": 1}
ALGORITHMS: list[dict[str, Any]] = [
    {"algorithm": "kl_shampoo"}, {"algorithm": "soap"}, {"algorithm": "kl_soap"}, {"algorithm": "elementwise"},
    {"algorithm": "shampoo", "roots_every": 2},
    {"algorithm": "shampoo", "base": "sgdm", "nesterov": True, "roots_every": 2},
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
    settings = used({"lr": 0.1, "weight_decay": 0.1, **OFTEN, **options})
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


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()


def trained(steps: int = 1, **options: Any) -> Shampoo4bit:
    model = OneLayer()
    optimizer = Shampoo4bit(model.parameters(), **options)
    train(model, optimizer, steps)
    return optimizer


def test_the_recipe_of_torchs_documentation_adapts_a_one_layer_checkpoint_to_two_layers() -> None:
    """torch.optim, "How to utilize named parameters to load optimizer state dict", its hook word for word."""
    model = OneLayer()
    optimizer = Shampoo4bit(model.named_parameters(), lr=0.5)
    train(model, optimizer, 3)
    model2 = TwoLayers()
    optimizer2 = Shampoo4bit(model2.named_parameters())

    def adapt_state_dict_ids(optimizer, state_dict):
        adapted_state_dict = deepcopy(optimizer.state_dict())
        # Copy over the param_groups settings, but leave the names and ids
        for k, v in state_dict["param_groups"][0].items():
            if k not in ["params", "param_names"]:
                adapted_state_dict["param_groups"][0][k] = v

        lookup_dict = {"fc1.weight": "fc.weight", "fc1.bias": "fc.bias"}
        clone_deepcopied = lambda d: {k: deepcopy(v) for k, v in d.items()}  # noqa: E731
        for param_id, param_name in zip(
            optimizer.state_dict()["param_groups"][0]["params"],
            optimizer.state_dict()["param_groups"][0]["param_names"],
            strict=True,
        ):
            name_in_loaded = lookup_dict.get(param_name)
            if name_in_loaded is None:
                continue
            index_in_loaded_list = state_dict["param_groups"][0]["param_names"].index(name_in_loaded)
            id_in_loaded = state_dict["param_groups"][0]["params"][index_in_loaded_list]
            # Copy the state of the corresponding parameter
            if id_in_loaded in state_dict["state"]:
                adapted_state_dict["state"][param_id] = clone_deepcopied(state_dict["state"][id_in_loaded])
        return adapted_state_dict

    optimizer2.register_load_state_dict_pre_hook(adapt_state_dict_ids)
    with pytest.warns(UserWarning, match="2 of .*'fc2.weight'.* start afresh: the checkpoint has"):
        optimizer2.load_state_dict(deepcopy(optimizer.state_dict()))
    assert optimizer2.param_groups[0]["lr"] == 0.5
    for name in ("weight", "bias"):
        mine, theirs = optimizer2.state[getattr(model2.fc1, name)], optimizer.state[getattr(model.fc, name)]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], t) for key, t in theirs.items())
    train(model2, optimizer2)
    assert optimizer2.state[model2.fc1.bias]["4/steps.dense"].item() == 4
    assert optimizer2.state[model2.fc2.bias]["2/steps.dense"].item() == 1


def test_hooks_of_load_state_dict_see_real_tensors_and_may_leave_notes() -> None:
    optimizer = trained()
    seen = []

    def before(optimizer, state_dict):
        seen.append({type(t) for entry in state_dict["state"].values() for t in entry.values()})
        state_dict["param_groups"][0]["lr"] = 7.0  # in torch, too, this reaches the caller's groups

    def after(optimizer):
        seen.append({type(t) for entry in optimizer.state.values() for t in entry.values()})
        optimizer.state["loaded"] = True

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [{torch.Tensor}, {torch.Tensor}]
    assert optimizer.state["loaded"] is True
    assert optimizer.param_groups[0]["lr"] == 7.0
    run(optimizer, range(1))
    assert metrics(optimizer)["optim/state_bytes"] > 0
    assert optimizer.state_dict()["state"]["loaded"] is True


@pytest.mark.parametrize("make", [torch.optim.AdamW, Shampoo4bit], ids=["AdamW", "ours"])
def test_what_hooks_of_state_dict_add_is_carried_along(make: Any, tmp_path: Path) -> None:
    """torch's own optimizer under the same test."""
    model = OneLayer()
    optimizer = make(model.parameters())
    train(model, optimizer)
    optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.state.update(note={"epoch": 3}))
    calls: list[set[Any]] = []

    def post_hook(optimizer, state_dict):
        calls.append(set(state_dict["state"]))
        return {**state_dict, "written_by": "a hook"}

    optimizer.register_state_dict_post_hook(post_hook)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert calls == [{0, 1, "note"}]
    found = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert found["written_by"] == "a hook"
    other = make(OneLayer().parameters())
    other.load_state_dict(found)
    assert other.state["note"] == {"epoch": 3}
    run(other, range(1))
    assert other.state_dict()["state"]["note"] == {"epoch": 3}
    if make is Shampoo4bit:
        main(["inspect", str(tmp_path)])
        main(["convert", str(tmp_path), "--output", str(tmp_path / "converted.pt")])
        other.load_state_dict(torch.load(tmp_path / "converted.pt", weights_only=True))
        assert other.state["note"] == {"epoch": 3}


@pytest.mark.parametrize("make", [torch.optim.AdamW, Shampoo4bit], ids=["AdamW", "ours"])
def test_what_wrappers_keep_in_a_parameters_state_is_carried_along(make: Any, tmp_path: Path) -> None:
    """timm's Lookahead has its slow weights there.  torch's own optimizer under the same test."""
    model, other = OneLayer(), OneLayer()
    optimizer, second = make(model.parameters(), lr=0.1), make(other.parameters())
    train(model, optimizer)
    slow = {p: torch.full_like(p, 7.0) for p in model.parameters()}
    for p in model.parameters():
        optimizer.state[p].update(lookahead_slow_buff=slow[p], times=3)
    train(model, optimizer)
    if make is Shampoo4bit:
        optimizer.param_groups[0]["damping"] = 1e-3  # a new plan
    train(model, optimizer)
    assert all(optimizer.state[p]["lookahead_slow_buff"] is slow[p] for p in slow)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    if make is Shampoo4bit:
        main(["inspect", str(tmp_path)])
        main(["convert", str(tmp_path), "--output", str(tmp_path / "converted.pt")])
        (tmp_path / "converted.pt").replace(tmp_path / "optimizer.pt")
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for optimizer in (second, deepcopy(second)):
        run(optimizer, range(1))
        for p in owners(optimizer):
            assert torch.equal(optimizer.state[p]["lookahead_slow_buff"], torch.full_like(p, 7.0))
            assert optimizer.state[p]["times"] == 3


def test_a_hook_that_raises_leaves_everything_as_it_was() -> None:
    optimizer = trained()
    before = deepcopy(optimizer.state_dict())

    def hook(optimizer, state_dict):
        raise KeyError("no such layer")

    optimizer.register_load_state_dict_pre_hook(hook)
    with pytest.raises(KeyError, match="no such layer"):
        optimizer.load_state_dict(deepcopy(before))
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    run(optimizer, range(1))


def test_the_state_of_a_parameter_that_is_in_no_group_any_more_is_not_saved() -> None:
    optimizer = Shampoo4bit(parameters((4, 4), (5, 5)))
    run(optimizer, range(1))
    optimizer.param_groups[0]["params"].pop()
    assert list(optimizer.state_dict()["state"]) == [0]


# -------------------------------------------------------------------------------------------------- what is trained


def test_a_gradient_is_followed_whether_or_not_it_is_required() -> None:
    """Hand-written gradients, evolution strategies, a model that is frozen after backward: as torch's optimizers do."""
    free, required = ([p.detach().requires_grad_(flag) for p in parameters((20, 30), (9,))] for flag in (False, True))
    ours, theirs = Shampoo4bit(free, lr=0.1, **OFTEN), Shampoo4bit(required, lr=0.1, **OFTEN)
    start = [p.clone() for p in free]
    ours.step()
    assert not ours.state
    assert not rows(ours)
    run(ours, range(3))
    run(theirs, range(3))
    assert all(map(torch.equal, free, required))
    assert not any(map(torch.equal, free, start))
    assert [row.shape for row in rows(ours)] == [row.shape for row in rows(theirs)] == [(20, 30), (9,)]
    ours.zero_grad()
    ours.step()  # nothing to do, and the plan stays as it is
    give_gradients(free[:1], 3)
    ours.step()
    assert ours.state[free[1]]["9/steps.dense"].item() == 3
    again = Shampoo4bit([p.clone() for p in free], lr=0.1, **OFTEN)
    again.load_state_dict(ours.state_dict())
    run(again, range(4, 6))
    run(ours, range(4, 6))
    assert all(map(torch.equal, free, owners(again)))


@pytest.mark.parametrize("at_once", [True, False])
def test_freezing_and_unfreezing_keeps_the_state_and_moves_nothing_that_is_frozen(at_once: bool) -> None:
    ps, qs = parameters((20, 30), (30, 20), (9,)), parameters((20, 30), (30, 20), (9,))
    frozen, kept = Shampoo4bit(ps, **OFTEN), Shampoo4bit(qs, **OFTEN)
    run(frozen, range(2))
    run(kept, range(2))
    ps[1].requires_grad_(False)
    for t in range(2, 4):
        for of_one in (ps, qs):
            give_gradients([of_one[0], of_one[2]], t)
            of_one[1].grad = None
        frozen.step()
        kept.step()
    if not at_once:  # resumed while it is frozen
        saved = deepcopy(frozen.state_dict())
        assert list(saved["state"]) == [0, 1, 2]
        frozen = Shampoo4bit(ps, **OFTEN)
        frozen.load_state_dict(saved)
    ps[1].requires_grad_(True)
    run(frozen, range(4, 6))
    run(kept, range(4, 6))
    assert all(map(torch.equal, ps, qs))


@pytest.mark.parametrize("made", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_frozen_parameters_of_any_kind_are_left_alone_until_they_are_unfrozen(made: torch.dtype) -> None:
    model = nn.Linear(64, 64)
    model.quantised = nn.Parameter(torch.zeros(8, 4).to(made), requires_grad=False)
    optimizer = Shampoo4bit(model.parameters())
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4, 4).to(made), requires_grad=False)]})

    def step() -> None:
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()

    step()
    assert model.quantised not in optimizer.state
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    step()
    if made == torch.complex64:
        model.quantised.requires_grad_(True)
        model.quantised.grad = torch.ones_like(model.quantised)
        with pytest.raises(TypeError, match=r"shape \(8, 4\) is torch.complex64: only real floating point"):
            step()


@pytest.mark.parametrize("way", ["clear", "defaultdict", "one", "new"])
def test_state_that_is_emptied_on_purpose_begins_afresh(way: str) -> None:
    """fastai's fine_tune, resets of dormant layers, pruned layers: AdamW begins these afresh."""
    ps = parameters((20, 30), (30, 20), (9,))
    optimizer = Shampoo4bit(ps, **OFTEN)
    run(optimizer, range(3))
    if way == "clear":
        optimizer.state.clear()
    elif way == "defaultdict":
        optimizer.state = defaultdict(dict, {})
    elif way == "one":
        del optimizer.state[ps[1]]
    else:
        optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.zeros(25, 20))
    with pytest.warns(UserWarning, match="start afresh: their state was emptied, or they took the place of others"):
        run(optimizer, range(3, 4))
    steps = [int(t.max()) for p in owners(optimizer) for key, t in optimizer.state[p].items() if "steps" in key]
    assert steps == ([1, 1, 1] if way in ("clear", "defaultdict") else [4, 1, 4])
    run(optimizer, range(4, 6))
    other = Shampoo4bit([nn.Parameter(torch.zeros_like(p)) for p in owners(optimizer)], **OFTEN)
    other.load_state_dict(optimizer.state_dict())


def test_fine_tuning_as_fastai_does_it() -> None:
    """The state is emptied, the body frozen, the head trained; then the same with all layers."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    optimizer = Shampoo4bit(model.parameters(), **OFTEN)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()

    step()
    optimizer.state = defaultdict(dict, {})
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"2 of the parameters that are trained \('0.2', '0.3'\) start afresh"):
        step()
    assert not optimizer.state.get(model[0].weight)
    optimizer.state = defaultdict(dict, {})
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match="start afresh"):
        step()
    assert optimizer.state[model[0].weight]


def test_a_checkpoint_of_a_frozen_layer_goes_on_unfrozen_and_the_other_way_round() -> None:
    def begin(frozen: bool) -> tuple[list[nn.Parameter], Shampoo4bit]:
        ps = parameters((64, 64), (8, 64), (8,))
        ps[0].requires_grad_(not frozen)
        return ps, Shampoo4bit(ps, **OFTEN)

    for there, here in ((True, False), (False, True)):
        ps, first = begin(there)
        give_gradients(ps[1:] if there else ps, 0)
        first.step()
        qs, second = begin(here)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            second.load_state_dict(deepcopy(first.state_dict()))
        assert [("'0.0'" in str(w.message), "frozen when it was written" in str(w.message)) for w in said] == [
            (True, True)
        ] * there
        give_gradients(qs[1:] if here else qs, 1)
        second.step()
        assert bool(second.state_dict()["state"].get(0)) is True


def test_one_optimizer_a_parameter_stepped_inside_backward() -> None:
    """torch's optimizer-in-backward, torchtune's optimizer_in_bwd: the same as one optimizer for all."""
    model, other = (nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    optimizers = {p: Shampoo4bit([(name, p)], **OFTEN) for name, p in model.named_parameters()}

    def step_now(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    together = Shampoo4bit(other.named_parameters(), **OFTEN)
    for t in range(3):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(t))
        model(x).square().mean().backward()
        together.zero_grad()
        other(x).square().mean().backward()
        together.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert "AdamW" in table(optimizers[model[0].bias])


# ------------------------------------------------------------------------------------------------------ command lines


def test_the_signature_has_every_option_with_its_type() -> None:
    """Lightning's and other command lines are made of it; litgpt passes what is in it and nothing else."""
    shown = inspect.signature(Shampoo4bit).parameters
    assert list(shown)[:7] == ["params", "lr", "betas", "eps", "weight_decay", "preset", "config"]
    assert list(shown)[-len(NAMES) :] == list(NAMES)
    assert shown["bits"].annotation == Literal[4, 8, 32] | None
    assert shown["betas"].annotation == tuple[float, float]
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in shown.values())


def test_an_option_of_none_is_not_given() -> None:
    """A command line passes the default of each option that its user left out: that must not undo a preset."""
    left_out = {name: p.default for name, p in inspect.signature(Shampoo4bit).parameters.items() if p.default is None}
    plain, preset = (Shampoo4bit(parameters((4, 4)), **{**left_out, "preset": name}) for name in (None, "paper_eigen"))
    assert plain.param_groups[0]["algorithm"] == "kl_shampoo"
    assert preset.param_groups[0]["stats_every"] == 200
    with pytest.raises(OptionError, match=r"unknown option 'block_sise' \(did you mean 'block_size'"):
        Shampoo4bit(parameters((4, 4)), block_sise=None)


def test_a_gradient_that_is_not_finite_is_said_at_once_and_ends_the_training_if_it_stays() -> None:
    p = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = Shampoo4bit([("w", p)], lr=0.1, max_skipped=3)

    def step(value: float) -> None:
        p.grad = torch.full((8, 8), value)
        optimizer.step()

    with pytest.warns(UserWarning, match=r"not finite, or too large to square \(on this rank of \['w'\]\)"):
        step(math.nan)
    step(math.inf)
    step(1.0)  # the row is broken
    with pytest.warns(UserWarning, match="nothing was updated"):
        step(math.nan)
    step(math.nan)
    with pytest.raises(RuntimeError, match=r"3 steps in a row made no update.*max_skipped=3; 0 lets it go on"):
        step(math.nan)
    assert optimizer.param_groups[0]["skipped_steps"] == 5
    assert torch.isfinite(p).all()


def cut(optimizer: torch.optim.Optimizer, wanted: Sequence[Sequence[int]]) -> None:
    """Put groups with these parameters, copies of the first, in the place of all, as programs do that edit the list."""
    first = optimizer.param_groups[0]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.param_groups = [{**first, "params": [params[i] for i in places]} for places in wanted]


def append(optimizer: torch.optim.Optimizer, new: Sequence[torch.nn.Parameter]) -> None:
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": list(new)})


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("wanted", [[[0, 1], [2]], [[2], [0, 1]], [[2], [1], [0]]])
def test_groups_that_are_cut_in_the_list_are_trained_on_as_one_was(wanted: list[list[int]], before: int) -> None:
    """Lightning's BaseFinetuning puts another list there when it resumes: nothing was trained, without a word."""
    whole, parts = one_group(), one_group()
    for steps in (before, 4):
        for parameters, optimizer in (whole, parts):
            follow(parameters, optimizer, steps)
        if steps == before:
            cut(parts[1], wanted)
            assert len(parts[1].report().splitlines()) > 3
    assert all(map(torch.equal, whole[0], parts[0]))
    resumed = one_group()
    cut(resumed[1], wanted)
    resumed[1].load_state_dict(parts[1].state_dict())
    for here, there in zip(resumed[0], parts[0], strict=True):
        here.data.copy_(there)
    for parameters, optimizer in (resumed, parts):
        follow(parameters, optimizer, 2)
    assert all(map(torch.equal, resumed[0], parts[0]))


def test_groups_that_are_put_into_the_list_taken_out_or_turned_round() -> None:
    parameters, optimizer = one_group()
    follow(parameters, optimizer, 2)
    new = torch.nn.Parameter(torch.ones(6, 6))
    append(optimizer, [new])
    follow([*parameters, new], optimizer, 1)
    assert not torch.equal(new, torch.ones(6, 6))
    optimizer.param_groups.reverse()
    before = [p.clone() for p in (*parameters, new)]
    follow([*parameters, new], optimizer, 1)
    assert not any(map(torch.equal, before, (*parameters, new)))
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [new]})
    before = [p.clone() for p in (*parameters, new)]
    follow([*parameters, new], optimizer, 1)
    assert [torch.equal(a, b) for a, b in zip(before, (*parameters, new), strict=True)] == [True, True, True, False]
    optimizer.load_state_dict(optimizer.state_dict())
    follow([new], optimizer, 1)
    optimizer.param_groups.append({"params": parameters, "lr": 1e-2})
    with pytest.raises(OptionError, match=r"parameter group 1 was put into param_groups without .*add_param_group"):
        follow(parameters, optimizer, 1)


def test_groups_that_are_joined_in_the_list_have_their_state_once() -> None:
    parameters, optimizer = one_group()
    cut(optimizer, [[0, 1], [2]])
    follow(parameters, optimizer, 3)
    held = metrics(optimizer)["optim/state_bytes"]
    optimizer.param_groups[0]["params"] += optimizer.param_groups[1]["params"]
    del optimizer.param_groups[1]
    follow(parameters, optimizer, 1)
    assert metrics(optimizer)["optim/state_bytes"] == held
    members = [member.parameter for wave in optimizer.waves() for member in wave.members]
    assert len(members) == len(set(members)) == 3


def named_groups(count: int) -> Shampoo4bit:
    """Each of one matrix with a name, the last of as many as there could be."""
    shapes = ((12, 8), (8, 20), (6, 6))[-count:]
    return Shampoo4bit([{"params": [(f"{shape}", torch.nn.Parameter(torch.ones(shape)))]} for shape in shapes], lr=1e-2)


def assert_resumed_from_a_folder(optimizer: Shampoo4bit, resumed: Shampoo4bit, folder: Path) -> None:
    """The next step of both is the same, once one has the other's weights and, by way of a folder, its state."""
    save_optimizer(optimizer, folder)
    load_optimizer(resumed, folder)
    for here, there in zip(owners(resumed), owners(optimizer), strict=True):
        here.data.copy_(there)
    for one in (resumed, optimizer):
        follow(owners(one), one, 1)
    assert all(map(torch.equal, owners(resumed), owners(optimizer)))


def test_what_is_saved_of_a_list_without_its_first_group_is_that_of_the_others(tmp_path: Path) -> None:
    optimizer, resumed = named_groups(3), named_groups(2)
    follow(owners(optimizer), optimizer, 2)
    del optimizer.param_groups[0]
    assert (optimizer.names(0), optimizer.parameters(0)) == (["(8, 20)"], optimizer.param_groups[0]["params"])
    follow(owners(optimizer), optimizer, 1)
    assert_resumed_from_a_folder(optimizer, resumed, tmp_path / "saved")


def test_a_report_changes_nothing_where_a_group_is_out_of_the_list_for_a_while() -> None:
    """One rank alone may ask for it: the ranks would have planned other groups, and that group's state was dropped."""
    told, asked = named_groups(3), named_groups(3)
    for optimizer in (told, asked):
        follow(owners(optimizer), optimizer, 2)
        taken = optimizer.param_groups.pop(0)
        if optimizer is asked:
            assert "12x8" not in asked.report()
            assert "8x20" in asked.report()
        follow(owners(optimizer), optimizer, 1)
        optimizer.param_groups.insert(0, taken)
        follow(owners(optimizer), optimizer, 2)
    assert all(map(torch.equal, owners(told), owners(asked)))


def test_a_folder_is_written_once_an_edited_list_is_planned_and_read_into_such_a_list(
    tmp_path: Path,
) -> None:
    first, second = named_groups(2), named_groups(2)
    for optimizer in (first, second):
        follow(owners(optimizer), optimizer, 1)
        group = {**optimizer.param_groups[0], "params": [torch.nn.Parameter(torch.ones(6, 4))], "param_names": ["new"]}
        optimizer.param_groups.insert(0, group)
    with pytest.raises(RuntimeError, match=r"known after the first step .*, and after groups were put into"):
        save_optimizer(first, tmp_path / "saved")
    follow(owners(first), first, 1)
    assert_resumed_from_a_folder(first, second, tmp_path / "saved")


def test_a_list_that_is_edited_between_load_optimizer_and_the_step_that_reads_is_refused(tmp_path: Path) -> None:
    """Groups are read by their places: the last one's state was not, without a word."""
    optimizer, resumed = named_groups(2), named_groups(2)
    follow(owners(optimizer), optimizer, 2)
    save_optimizer(optimizer, tmp_path / "saved")
    load_optimizer(resumed, tmp_path / "saved")
    new = {**resumed.param_groups[0], "params": [torch.nn.Parameter(torch.ones(6, 4))], "param_names": ["new"]}
    resumed.param_groups.insert(0, new)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="param_groups was edited after load_optimizer"):
            follow(owners(resumed), resumed, 1)
    del resumed.param_groups[0]
    load_optimizer(resumed, tmp_path / "saved")
    follow(owners(resumed), resumed, 1)
    resumed.param_groups.insert(0, new)
    follow(owners(resumed), resumed, 1)


def test_other_groups_as_many_as_there_were_need_their_options_too() -> None:
    optimizer = named_groups(2)
    optimizer.param_groups = [{"params": group["params"], "lr": 1e-2} for group in optimizer.param_groups]
    with pytest.raises(OptionError, match=r"parameter group 0 was put into param_groups without .*add_param_group"):
        follow(owners(optimizer), optimizer, 1)


def one_group() -> tuple[list[torch.nn.Parameter], Shampoo4bit]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((12, 8), (8,), (8, 20))]
    return parameters, Shampoo4bit(parameters, lr=1e-2, stats_every=2)


def follow(parameters: Sequence[torch.nn.Parameter], optimizer: Shampoo4bit, steps: int) -> None:
    """Some steps down a bowl."""
    for _ in range(steps):
        for p in parameters:
            p.grad = p.detach() + 1
        optimizer.step()
