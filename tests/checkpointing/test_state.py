"""The rules that keep the optimizer's state safe: docs/design.md, "State", one test or more for each."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit, load_optimizer, save_optimizer
from hf_shampoo4.exceptions import CheckpointError, OptionError
from hf_shampoo4.numerics import linalg as matrix
from hf_shampoo4.options import users_of

SHAPES = [(70, 66), (64, 64), (3, 20, 30), (9,), (5000,)]
OFTEN = {"algorithm": "shampoo", "stats_every": 1, "roots_every": 2}


def parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def owners(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def run(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(1000 + t)
        for p in owners(optimizer):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if p.requires_grad else None
        optimizer.step()


def saved(optimizer: torch.optim.Optimizer) -> dict:
    """Through a file, and the loader that the Trainer uses."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def tensors(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    return [(key, t) for p in owners(optimizer) for key, t in sorted(optimizer.state[p].items())]


def snapshot(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    return [(key, t.clone()) for key, t in tensors(optimizer)]


def same(a: list[tuple[str, torch.Tensor]], b: list[tuple[str, torch.Tensor]]) -> bool:
    """Equal names, dtypes and bits."""
    return len(a) == len(b) and all(
        x == y and s.dtype == t.dtype and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True)
    )


# ------------------------------------------------------------------------------------ 1. plain, and loads anywhere


def test_a_checkpoint_loads_without_this_package(tmp_path) -> None:
    optimizer = Shampoo4bit(
        [(f"layer.{i}", p) for i, p in enumerate(parameters())], preset="paper_eigen", row_splits=(), **OFTEN
    )
    run(optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    code = (
        "import sys, torch; sd = torch.load(sys.argv[1], weights_only=True); "
        "assert 'hf_shampoo4' not in sys.modules; print(len(sd['state']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "optimizer.pt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(len(SHAPES))


def test_state_is_plain_tensors_and_groups_are_plain_values() -> None:
    optimizer = Shampoo4bit(parameters(), **OFTEN)
    run(optimizer, range(1))
    state_dict = optimizer.state_dict()
    for entry in state_dict["state"].values():
        assert {type(key) for key in entry} == {str}
        assert {type(value) for value in entry.values()} == {torch.Tensor}
    plain = (bool, int, float, str, tuple, list, type(None))
    for group in state_dict["param_groups"]:
        assert all(type(value) in plain for value in group.values())


# -------------------------------------------------------------------------------------------- 2. dtypes survive


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_and_scales_keep_their_dtypes_in_a_half_precision_model(dtype: torch.dtype) -> None:
    optimizer = Shampoo4bit(parameters(dtype), **OFTEN)
    run(optimizer, range(2))
    other = Shampoo4bit(parameters(dtype), **OFTEN)
    other.load_state_dict(saved(optimizer))
    found = {key: t.dtype for key, t in tensors(other)}
    assert {t for key, t in found.items() if key.endswith("codes")} == {torch.uint8}
    assert {t for key, t in found.items() if key.endswith(("scales", "rows", "diagonal"))} == {torch.float32}
    assert {t for key, t in found.items() if "failures" in key} == {torch.int32}
    assert same(tensors(other), tensors(optimizer))


def test_a_loaded_state_is_a_copy() -> None:
    optimizer = Shampoo4bit(parameters(), **OFTEN)
    run(optimizer, range(2))
    state_dict = optimizer.state_dict()
    other = Shampoo4bit(parameters(), **OFTEN)
    other.load_state_dict(state_dict)
    before = snapshot(optimizer)
    run(other, range(2, 4))
    assert same(before, tensors(optimizer))
    for entry in state_dict["state"].values():
        assert all(isinstance(value, torch.Tensor) for value in entry.values())  # the caller's dict is as it was


# ------------------------------------------------------------------------------------------ 3. lazy, and in place


def test_no_state_before_the_first_step_and_loading_that_works() -> None:
    optimizer = Shampoo4bit(parameters(), **OFTEN)
    assert not optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())  # what AcceleratedOptimizer does
    assert not optimizer.state
    run(optimizer, range(1))
    twin = Shampoo4bit(parameters(), **OFTEN)
    run(twin, range(1))
    assert same(tensors(optimizer), tensors(twin))


def test_state_is_written_in_place() -> None:
    optimizer = Shampoo4bit(parameters(), **OFTEN)
    run(optimizer, range(1))
    before = {key: (id(t), t.data_ptr()) for p in owners(optimizer) for key, t in optimizer.state[p].items()}
    run(optimizer, range(1, 4))
    owners(optimizer)[1].grad = None
    optimizer.step()
    assert before == {key: (id(t), t.data_ptr()) for p in owners(optimizer) for key, t in optimizer.state[p].items()}


def test_replaced_state_tensors_are_adopted() -> None:
    """Offloading code rebinds them: `state[key] = tensor.to(device)`."""
    optimizer, twin = Shampoo4bit(parameters(), **OFTEN), Shampoo4bit(parameters(), **OFTEN)
    run(optimizer, range(2))
    run(twin, range(2))
    for p in owners(optimizer):
        optimizer.state[p] = {key: t.clone() for key, t in optimizer.state[p].items()}
    run(optimizer, range(2, 4))
    run(twin, range(2, 4))
    assert same(tensors(optimizer), tensors(twin))


@pytest.mark.parametrize("replaced", [False, True])
def test_emptied_state_begins_afresh_and_says_so(replaced: bool) -> None:
    optimizer, new = Shampoo4bit(parameters(), **OFTEN), Shampoo4bit(parameters(), **OFTEN)
    run(optimizer, range(2))
    optimizer.state.clear()
    if replaced:  # as FSDP2 does, which leaves the state behind
        optimizer.param_groups[0]["params"] = parameters()
    with pytest.warns(UserWarning, match=r"5 of .* \('0.0', '0.1', '0.2', ...\) start afresh.*load the last"):
        run(optimizer, range(2, 3))
    optimizer.param_groups[0]["step"] = 0
    run(new, range(2, 3))
    assert {key: t.shape for key, t in tensors(optimizer)} == {key: t.shape for key, t in tensors(new)}
    assert all(t.eq(1).all() for key, t in tensors(optimizer) if "steps" in key)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, range(3, 5))


def test_a_part_of_a_parameters_state_that_is_gone_is_an_error() -> None:
    optimizer = Shampoo4bit(parameters(), **OFTEN)
    run(optimizer, range(2))
    del optimizer.state[owners(optimizer)[1]]["64x64/left.basis.codes"]
    with pytest.raises(RuntimeError, match=r"the state of '0.1' lacks tensors on ranks \[0\]"):
        run(optimizer, range(2, 3))


# ----------------------------------------------------------------------------------------------- 4. zero in, zero out

EVERY_KIND = [
    {"algorithm": "shampoo", "factor": factor, "bits": bits, "moments": moments}
    for factor in ("eigen", "direct")
    for bits in (4, 8, 32)
    for moments in ("fp32", "bf16", "4bit")
]
each_kind = pytest.mark.parametrize("options", EVERY_KIND, ids=lambda o: "-".join(map(str, o.values())))


@each_kind
def test_zero_gradients_move_nothing_and_leave_no_nan(options: dict) -> None:
    optimizer = Shampoo4bit(parameters(), lr=0.1, stats_every=1, roots_every=1, **options)
    start = [p.detach().clone() for p in owners(optimizer)]
    for _ in range(2):
        for p in owners(optimizer):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(owners(optimizer), start, strict=True))
    assert all(torch.isfinite(t.float()).all() for _, t in tensors(optimizer))
    run(optimizer, range(3))
    assert all(torch.isfinite(p).all() for p in owners(optimizer))
    assert not any(t.any() for key, t in tensors(optimizer) if "failures" in key)


SIZES = (1e-40, 1e-25, 1e-10, 1e10, 1e18, 1e19, 1e25, 1e38)


@pytest.mark.parametrize("scale", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        *({"algorithm": "shampoo", "graft": graft} for graft in ("norm", "block", "none")),
        *({"algorithm": name} for name in users_of("refresh_warmup")),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_gradients_of_any_size_leave_no_nan(options: dict[str, Any], scale: float) -> None:
    every_step = {"stats_every": 1, **({"roots_every": 1} if "graft" in options else {})}
    optimizer = Shampoo4bit(parameters(), lr=1e-3, **options, **every_step)
    run(optimizer, range(1))
    for p in owners(optimizer):
        p.grad = torch.randn_like(p).clamp(-3, 3) * scale
    for _ in range(3):
        optimizer.step()
    run(optimizer, range(1, 4))
    assert all(torch.isfinite(p).all() for p in owners(optimizer))
    assert not any(t.isnan().any() for _, t in tensors(optimizer))


def test_no_gradient_and_lr_0_move_nothing() -> None:
    optimizer = Shampoo4bit(parameters(), lr=0.1, weight_decay=0.1, **OFTEN)
    start = [p.detach().clone() for p in owners(optimizer)]
    optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(owners(optimizer), start, strict=True))
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, range(3))
    assert all(torch.equal(p, x) for p, x in zip(owners(optimizer), start, strict=True))
    assert len(optimizer.state) == len(SHAPES)


def test_the_way_distributed_checkpoints_initialise_an_optimizer() -> None:
    state = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = nn.Sequential(nn.Linear(70, 66), nn.Linear(66, 64))
    optimizer = Shampoo4bit(model.parameters(), lr=0.1, **OFTEN)
    run(optimizer, range(3))
    weights, there = state.get_state_dict(model, optimizer)
    other_model = nn.Sequential(nn.Linear(70, 66), nn.Linear(66, 64))
    other = Shampoo4bit(other_model.parameters(), lr=0.1, **OFTEN)
    state.set_state_dict(other_model, other, model_state_dict=weights, optim_state_dict=there)
    assert same(tensors(other), tensors(optimizer))
    run(optimizer, range(3, 6))
    run(other, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(owners(other), owners(optimizer), strict=True))


# ------------------------------------------------------------------------------------- 6. non-finite gradients


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2e19])
@pytest.mark.parametrize("where", [0, 3])
def test_a_non_finite_gradient_changes_nothing_but_the_count(value: float, where: int) -> None:
    optimizer = Shampoo4bit([{"params": parameters()[:2]}, {"params": parameters()[2:]}], **OFTEN)
    run(optimizer, range(2))
    state, weights = snapshot(optimizer), [p.detach().clone() for p in owners(optimizer)]
    for p in owners(optimizer):
        p.grad = torch.randn_like(p)
    owners(optimizer)[where].grad.view(-1)[1] = value
    optimizer.step()
    assert same(state, tensors(optimizer))
    assert all(torch.equal(p, x) for p, x in zip(owners(optimizer), weights, strict=True))
    assert [group["skipped_steps"] for group in optimizer.param_groups] == [1, 1]
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]
    twin = Shampoo4bit([{"params": parameters()[:2]}, {"params": parameters()[2:]}], **OFTEN)
    run(twin, range(3))
    run(optimizer, range(2, 3))
    assert same(tensors(twin), tensors(optimizer))


# ------------------------------------------------------------------------------------- 7. failures keep the last good


def failures(optimizer: Shampoo4bit) -> dict[str, list[int]]:
    return {key: t.tolist() for key, t in optimizer.state[owners(optimizer)[0]].items() if "failures" in key}


@pytest.mark.parametrize("bits", [4, 32])
def test_a_failed_eigh_keeps_the_last_root_of_that_block_alone(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = Shampoo4bit(
        parameters(shapes=[(70, 140)]),
        algorithm="shampoo",
        factor="direct",
        bits=bits,
        block_size=70,
        stats_every=1,
        roots_every=1,
    )
    run(optimizer, range(2))
    before = dict(snapshot(optimizer))
    real = torch.linalg.eigh
    singles = []

    def eigh(a: torch.Tensor):
        if a.dim() == 2:
            singles.append(None)
            if len(singles) != 2:  # of the left side's two blocks the second succeeds; the right side's both fail
                raise torch.linalg.LinAlgError("no convergence")
            return real(a)
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(matrix.torch.linalg, "eigh", eigh)
    run(optimizer, range(2, 3))
    monkeypatch.undo()
    after = dict(snapshot(optimizer))
    assert failures(optimizer) == {"70x70/failures.dense": [2, 1]}
    for key, old in before.items():
        if "left.root" in key:
            assert torch.equal(after[key][0], old[0])
            assert not torch.equal(after[key][1], old[1])
        if "right.root" in key:
            assert torch.equal(after[key], old)
    run(optimizer, range(3, 5))
    assert failures(optimizer) == {"70x70/failures.dense": [2, 1]}
    assert torch.isfinite(owners(optimizer)[0]).all()


@pytest.mark.parametrize("factor", ["eigen", "direct"])
def test_an_overflowing_statistic_keeps_the_last_one_of_that_block_alone(factor: str) -> None:
    """A gradient of 5e18 has a finite square; its Gram matrix is not finite."""
    optimizer = Shampoo4bit(
        parameters(shapes=[(70, 140)]), algorithm="shampoo", factor=factor, block_size=70, stats_every=1, roots_every=1
    )
    run(optimizer, range(2))
    before = dict(snapshot(optimizer))
    p = owners(optimizer)[0]
    p.grad = torch.randn_like(p).clamp(-3, 3)
    p.grad[:, :70] *= 5e18
    optimizer.step()
    assert failures(optimizer) == {"70x70/failures.dense": [2, 0]}
    for key, t in tensors(optimizer):
        if any(name in key for name in ("basis", "eigenvalues", "matrix")):
            assert torch.equal(t[0], before[key][0]), key
    changed = [key for key, t in tensors(optimizer) if not torch.equal(t[1], before[key][1])]
    assert any("left" in key for key in changed)
    run(optimizer, range(3, 5))
    assert torch.isfinite(p).all()
    assert failures(optimizer) == {"70x70/failures.dense": [2, 0]}


def test_a_failed_qr_keeps_the_last_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = Shampoo4bit(
        parameters(shapes=[(70, 140)]), algorithm="shampoo", block_size=70, stats_every=1, roots_every=1
    )
    run(optimizer, range(2))
    before = dict(snapshot(optimizer))
    real = matrix.power_qr

    def power_qr(a: torch.Tensor, v: torch.Tensor):
        u, eigenvalues = real(a, v)
        u[1, 3, 4] = torch.nan
        return u, eigenvalues

    from hf_shampoo4.preconditioners import factors

    monkeypatch.setattr(factors, "power_qr", power_qr)
    run(optimizer, range(2, 3))
    assert failures(optimizer) == {"70x70/failures.dense": [0, 2]}
    for key, t in tensors(optimizer):
        if "basis" in key or "eigenvalues" in key:
            assert torch.equal(t[1], before[key][1]), key
            assert not torch.equal(t[0], before[key][0]), key


# ------------------------------------------------------------------------------------- copies, frozen, unused, grown


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(way: str) -> None:
    optimizer = Shampoo4bit(parameters(), **OFTEN)
    run(optimizer, range(2))
    clone = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert same(tensors(clone), tensors(optimizer))
    before = snapshot(optimizer)
    run(clone, range(2, 5))
    assert same(before, tensors(optimizer))
    assert clone.refresh_seconds() > 0
    run(optimizer, range(2, 5))
    assert same(tensors(clone), tensors(optimizer))
    assert all(torch.equal(p, q) for p, q in zip(owners(clone), owners(optimizer), strict=True))


def test_unused_parameters_have_a_state_and_frozen_ones_have_none() -> None:
    ps = parameters()
    ps[0].requires_grad_(False)
    optimizer = Shampoo4bit(ps, **OFTEN)
    start = [p.detach().clone() for p in ps]
    for t in range(3):
        for p in ps[2:]:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        optimizer.step()
    assert torch.equal(ps[0], start[0])
    assert torch.equal(ps[1], start[1])
    assert ps[0] not in optimizer.state
    assert optimizer.state[ps[1]]
    other_ps = parameters()
    other_ps[0].requires_grad_(False)
    other = Shampoo4bit(other_ps, **OFTEN)
    other.load_state_dict(saved(optimizer))
    assert same(tensors(other), tensors(optimizer))


def test_unfreezing_begins_a_state_and_keeps_the_others() -> None:
    ps = parameters()
    ps[1].requires_grad_(False)
    optimizer = Shampoo4bit(ps, **OFTEN)
    run(optimizer, range(2))
    kept = {key: t.clone() for key, t in optimizer.state[ps[0]].items()}
    ps[1].requires_grad_(True)
    optimizer.step()  # ps[1] has no gradient yet; the others step again
    assert optimizer.state[ps[1]]["64x64/steps.dense"].item() == 0
    assert optimizer.state[ps[0]]["70x66/steps.dense"].item() == 3
    assert kept["70x66/steps.dense"].item() == 2
    run(optimizer, range(2, 4))
    assert all(torch.isfinite(p).all() for p in ps)


def test_a_group_added_later() -> None:
    ps = parameters()
    optimizer = Shampoo4bit(ps[:2], **OFTEN)
    run(optimizer, range(2))
    optimizer.add_param_group({"params": ps[2:], "bits": 8})
    run(optimizer, range(2, 5))
    assert [group["step"] for group in optimizer.param_groups] == [5, 3]
    assert len(optimizer.state) == len(ps)


# --------------------------------------------------------------------------------------------------------- 8. resume


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_for_bit(options: dict, dtype: torch.dtype) -> None:
    settings = {
        **options, **OFTEN, "lr": 1e-2, "weight_decay": 0.1, "block_size": 48, "stochastic_rounding": True, "seed": 3,
    }  # fmt: skip
    shapes = [(70, 66), (64, 64), (9,), (5000,)]
    unbroken = Shampoo4bit(parameters(dtype, shapes), **settings)
    run(unbroken, range(6))
    first = Shampoo4bit(parameters(dtype, shapes), **settings)
    run(first, range(3))
    second = Shampoo4bit([nn.Parameter(p.detach().clone()) for p in owners(first)], **settings)
    second.load_state_dict(saved(first))
    run(second, range(3, 6))
    assert same(tensors(second), tensors(unbroken))
    assert all(torch.equal(p, q) for p, q in zip(owners(second), owners(unbroken), strict=True))


def test_resume_after_a_skipped_step_and_with_missing_gradients() -> None:
    def broken(optimizer: Shampoo4bit, steps: range) -> None:
        for t in steps:
            for i, p in enumerate(owners(optimizer)):
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
                p.grad = None if (t + i) % 3 == 0 else g * (torch.inf if t == 2 and i == 2 else 1.0)
            optimizer.step()

    unbroken, first = Shampoo4bit(parameters(), **OFTEN), Shampoo4bit(parameters(), **OFTEN)
    broken(unbroken, range(8))
    broken(first, range(4))
    second = Shampoo4bit([nn.Parameter(p.detach().clone()) for p in owners(first)], **OFTEN)
    second.load_state_dict(saved(first))
    assert second.param_groups[0]["skipped_steps"] == 1
    broken(second, range(4, 8))
    assert same(tensors(second), tensors(unbroken))
    assert all(torch.equal(p, q) for p, q in zip(owners(second), owners(unbroken), strict=True))


@pytest.mark.parametrize("form", ["state_dict", "folder"])
@pytest.mark.parametrize("change", ["appended", "taken out"])
def test_what_is_saved_of_a_group_that_was_edited_can_be_loaded(change: str, form: str, tmp_path: Path) -> None:
    """A list `params` that is edited by hand is one longer or shorter than the names beside it."""

    def made(values: list[torch.Tensor]) -> Shampoo4bit:
        named = [(f"layer.{i}", torch.nn.Parameter(value.clone())) for i, value in enumerate(values[:2])]
        optimizer = Shampoo4bit(named, lr=1e-2)
        edited = optimizer.param_groups[0]["params"]
        if change == "appended":
            edited.append(torch.nn.Parameter(values[2].clone()))
        else:
            del edited[0]
        return optimizer

    def stepped(optimizer: Shampoo4bit) -> list[torch.Tensor]:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = p.detach().sin()
        optimizer.step()
        return [p.detach().clone() for p in optimizer.param_groups[0]["params"]]

    values = [torch.randn(6, 4) for _ in range(3)]
    first = made(values)
    now = stepped(first)
    second = made([torch.zeros(6, 4), *now] if change == "taken out" else now)
    if form == "folder":
        save_optimizer(first, tmp_path / "saved")
        load_optimizer(second, tmp_path / "saved")
    else:
        second.load_state_dict(saved(first))
    assert all(torch.equal(p, q) for p, q in zip(stepped(first), stepped(second), strict=True))


def test_options_that_are_not_structural_come_from_the_checkpoint() -> None:
    theirs = {"stats_every": 3, "roots_every": 7, "damping": 1e-3, "weight_decay": 0.3, "betas": (0.8, 0.9)}
    first = Shampoo4bit(parameters(), algorithm="shampoo", lr=0.5, **theirs)
    run(first, range(1))
    second = Shampoo4bit(parameters(), algorithm="shampoo", lr=0.1, stats_every=1, roots_every=1)
    with pytest.warns(
        UserWarning, match=r"from the checkpoint.*: stats_every=3, not 1, damping=0.001, not 1e-06"
    ) as it:
        second.load_state_dict(saved(first))
    assert "weight_decay=0.3, not 0.0, betas=(0.8, 0.9), not (0.9, 0.9" in str(it[0].message)
    group = second.param_groups[0]
    assert (group["lr"], group["stats_every"], group["roots_every"], group["damping"]) == (0.5, 3, 7, 1e-3)


@pytest.mark.parametrize("change", [{"factor_beta": 0.5}, {"damping": 1e-2}, {"rectify_roots": 0}, {"root": "newton"}])
def test_an_option_that_is_changed_in_training_is_heeded_at_once(change: dict) -> None:
    def trained() -> Shampoo4bit:
        optimizer = Shampoo4bit(parameters(), **OFTEN)
        run(optimizer, range(3))
        return optimizer

    first = trained()
    first.param_groups[0].update(change)
    second = trained()
    second.param_groups[0].update(change)
    second.load_state_dict(saved(second))
    for optimizer in (first, second):
        run(optimizer, range(3, 7))
    assert same(tensors(first), tensors(second))
    assert not same(tensors(first), tensors(trained()))


def test_what_the_run_alone_decides_is_taken_over_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    first, second = Shampoo4bit(parameters()), Shampoo4bit(parameters(), lr=0.5, diagnose_every=2, max_skipped=3)
    second.load_state_dict(saved(first))
    assert (second.param_groups[0]["diagnose_every"], second.param_groups[0]["max_skipped"]) == (2, 3)
    assert not recwarn


@pytest.mark.parametrize(
    "change", [{"bits": 8}, {"algorithm": "soap"}, {"codebook": "linear2"}, {"block_size": 16}, {"moments": "8bit"}]
)
def test_what_the_state_means_is_not_changed_in_training(change: dict[str, Any]) -> None:
    """A second moment of zeros at step 1,000, or codes of other levels, would be wrong without a word."""
    optimizer = Shampoo4bit(parameters())
    run(optimizer, range(2))
    before, weights = snapshot(optimizer), [p.detach().clone() for p in owners(optimizer)]
    usual = {name: optimizer.param_groups[0][name] for name in change}
    optimizer.param_groups[0].update(change)
    with pytest.raises(OptionError, match=f"{next(iter(change))} was changed from .* means something else"):
        run(optimizer, range(2, 3))
    assert same(before, tensors(optimizer))
    assert all(torch.equal(p, q) for p, q in zip(owners(optimizer), weights, strict=True))
    optimizer.param_groups[0].update(usual)
    run(optimizer, range(2, 3))
    optimizer.state.clear()
    optimizer.param_groups[0].update(change)
    with pytest.warns(UserWarning, match="start afresh"):
        run(optimizer, range(3, 4))


@pytest.mark.parametrize("change", [{"codebook": "linear2"}, {"algorithm": "elementwise"}])
def test_a_parameter_that_is_moved_to_a_group_of_another_structure_leaves_its_state_behind(
    change: dict[str, Any],
) -> None:
    a, b, c = parameters(shapes=[(32, 32)] * 3)
    optimizer = Shampoo4bit([{"params": [a, b]}, {"params": [c], **change}])
    run(optimizer, range(1))
    first, second = (group["params"] for group in optimizer.param_groups)
    second.append(first.pop())
    with pytest.raises(OptionError, match=f"{next(iter(change))} was changed from .* in the parameter group of '1.1'"):
        run(optimizer, range(1, 2))
    del optimizer.state[b]
    with pytest.warns(UserWarning, match="start afresh"):
        run(optimizer, range(1, 2))


def test_state_that_does_not_fit_a_parameters_shape_is_refused() -> None:
    optimizer = Shampoo4bit(parameters())
    run(optimizer, range(1))
    p = owners(optimizer)[0]
    p.data, p.grad = torch.zeros(30, 66), None
    with pytest.raises(ValueError, match=r"state of '0.0' does not fit its shape, \(30, 66\), any more: delete it"):
        run(optimizer, range(1, 2))
    del optimizer.state[p]
    with pytest.warns(UserWarning, match="start afresh"):
        run(optimizer, range(1, 2))


def test_state_that_is_moved_to_another_parameter_goes_on(recwarn: pytest.WarningsRecorder) -> None:
    """As programs do that put a new parameter in an old one's place, with its state."""
    first, second = (Shampoo4bit(parameters()) for _ in range(2))
    for optimizer in (first, second):
        run(optimizer, range(2))
    old = owners(second)[0]
    new = nn.Parameter(old.detach().clone())
    second.param_groups[0]["params"][0] = new
    second.state[new] = second.state.pop(old)
    for optimizer in (first, second):
        run(optimizer, range(2, 4))
    assert same(tensors(first), tensors(second))
    assert not recwarn


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_rate_that_is_no_number_is_refused_before_it_ruins_the_weights(name: str, rate: float) -> None:
    optimizer = Shampoo4bit(parameters(shapes=SHAPES[1:2]))
    run(optimizer, range(1))
    weights, usual = owners(optimizer)[0].detach().clone(), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = rate
    with pytest.raises(OptionError, match=f"{name}={rate} is not allowed: it must be a number >= 0; look at"):
        run(optimizer, range(1, 2))
    assert torch.equal(owners(optimizer)[0], weights)
    optimizer.param_groups[0][name] = usual
    run(optimizer, range(1, 2))


def test_a_share_of_a_training_of_unknown_length_is_said_to_have_no_effect(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(UserWarning, match="stochastic_last=0.5 has no effect without the length"):
        run(Shampoo4bit(parameters(), stochastic_last=0.5), range(1))
    recwarn.clear()
    optimizer = Shampoo4bit(parameters(), stochastic_last=0.5)
    optimizer.param_groups[0]["stochastic_from"] = 3  # as the Trainer's callback does, who knows
    run(optimizer, range(1))
    assert not recwarn


def test_what_auto_stands_for_fits_what_auto_wrote() -> None:
    first = Shampoo4bit(parameters(), algorithm="kl_shampoo")
    run(first, range(1))
    Shampoo4bit(parameters(), algorithm="kl_shampoo", codebook="lloyd16", quant_block=16).load_state_dict(saved(first))
    with pytest.raises(CheckpointError, match="was written with codebook=lloyd16, this run has codebook=nf4"):
        Shampoo4bit(parameters(), algorithm="kl_shampoo", codebook="nf4").load_state_dict(saved(first))


def test_an_option_that_an_older_checkpoint_lacks_takes_its_default() -> None:
    first = Shampoo4bit(parameters(), **OFTEN)
    run(first, range(1))
    state_dict = saved(first)
    del state_dict["param_groups"][0]["graft"]
    second = Shampoo4bit(parameters(), graft="block", **OFTEN)
    second.load_state_dict(state_dict)
    assert second.param_groups[0]["graft"] == "block"
    run(second, range(1, 2))


def test_an_option_without_effect_that_an_older_version_took_goes_back_to_its_default() -> None:
    first = Shampoo4bit(parameters(), algorithm="shampoo")
    run(first, range(1))
    state_dict = saved(first)
    state_dict["param_groups"][0]["rotation_precision"] = "float32"
    second = Shampoo4bit(parameters(), algorithm="shampoo")
    second.load_state_dict(state_dict)
    assert second.param_groups[0]["rotation_precision"] == "auto"


def test_a_pickled_optimizer_that_lacks_an_option_takes_its_default() -> None:
    optimizer = Shampoo4bit(parameters(), **OFTEN)
    run(optimizer, range(1))
    for of_one in (optimizer.defaults, *optimizer.param_groups):
        del of_one["working_memory"]
    clone = pickle.loads(pickle.dumps(optimizer))
    run(clone, range(1, 2))
    assert clone.param_groups[0]["working_memory"] == 0.0


# ---------------------------------------------------------------------------------------------- refused checkpoints


def refuse(optimizer: Shampoo4bit, state_dict: dict, message: str) -> None:
    """Loading raises, names the reason, and leaves everything as it was."""
    run(optimizer, range(1))
    state, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(state_dict)
    assert same(state, tensors(optimizer))
    assert len(optimizer.state) == len(owners(optimizer))
    assert groups == optimizer.state_dict()["param_groups"]
    run(optimizer, range(1, 2))
    twin = Shampoo4bit(parameters(), **{name: groups[0][name] for name in ("bits", "factor", "moments", *OFTEN)})
    run(twin, range(2))
    assert same(tensors(twin), tensors(optimizer))


@pytest.fixture
def written() -> dict:
    optimizer = Shampoo4bit(parameters(), **OFTEN)
    run(optimizer, range(2))
    return saved(optimizer)


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (
            {"bits": 8},
            "was written with bits=4, this run has bits=8: resume with bits=4, or start the optimizer afresh",
        ),
        ({"factor": "direct"}, "was written with factor=eigen, this run has factor=direct"),
        ({"moments": "fp32"}, "was written with moments=4bit, this run has moments=fp32"),
    ],
)
def test_another_structure_is_refused(written: dict, here: dict, message: str) -> None:
    refuse(Shampoo4bit(parameters(), **OFTEN, **here), written, message)


@pytest.mark.parametrize("name", ["block_size", "quant_block"])
def test_another_partition_is_refused(written: dict, name: str) -> None:
    optimizer = Shampoo4bit(parameters(), **OFTEN, **{name: 32})
    with pytest.raises(CheckpointError, match=f"was written with {name}=.*, this run has {name}=32"):
        optimizer.load_state_dict(written)
    assert not optimizer.state


def test_another_optimizers_checkpoint_is_refused() -> None:
    adamw = torch.optim.AdamW(parameters())
    run(adamw, range(1))
    message = r"was not written by Shampoo4bit .*its state holds \['exp_avg', 'exp_avg_sq', 'step'\]"
    refuse(Shampoo4bit(parameters(), **OFTEN), saved(adamw), message)


def test_another_model_is_refused_by_group_sizes(written: dict) -> None:
    written["param_groups"][0]["params"].append(5)
    refuse(Shampoo4bit(parameters(), **OFTEN), written, r"other parameters .*: groups of \[6\], here \[5\]")
    written["param_groups"] *= 2
    refuse(Shampoo4bit(parameters(), **OFTEN), written, r"other parameters .*: groups of \[6, 6\], here \[5\]")


def test_another_model_is_refused_by_shapes(written: dict) -> None:
    shapes = [(66, 70), *SHAPES[1:]]
    optimizer = Shampoo4bit(parameters(shapes=shapes), **OFTEN)
    said = r"state of '0.0' does not fit: saved of blocks of 70x66, here 66x70: has a vocabulary or a width changed\?  "
    with pytest.raises(CheckpointError, match=said + r"missing \['66x70/"):
        optimizer.load_state_dict(written)
    assert not optimizer.state


def test_another_model_is_refused_by_the_number_of_blocks() -> None:
    optimizer = Shampoo4bit(parameters(shapes=[(3, 20, 30)]), **OFTEN)
    run(optimizer, range(1))
    other = Shampoo4bit(parameters(shapes=[(4, 20, 30)]), **OFTEN)
    with pytest.raises(CheckpointError, match=r"is \(3,\) .*, expected \(4,\) .*: another model\?"):
        other.load_state_dict(saved(optimizer))


def test_the_parameters_that_only_one_of_two_models_has_are_named() -> None:
    def named(*names: str) -> Shampoo4bit:
        return Shampoo4bit([(name, nn.Parameter(torch.ones(4, 4))) for name in names])

    message = r"groups of \[2\], here \[3\]; only here are 2 \('c', 'd'\), only there 1 \('b'\).  Wrap, freeze and tie"
    with pytest.raises(CheckpointError, match=message):
        named("a", "c", "d").load_state_dict(saved(named("a", "b")))


def test_another_model_is_refused_by_names() -> None:
    def make(names: list[str]) -> Shampoo4bit:
        return Shampoo4bit(list(zip(names, parameters(shapes=[(8, 8), (8, 8)]), strict=True)), **OFTEN)

    first = make(["a.weight", "b.weight"])
    run(first, range(1))
    other = make(["b.weight", "a.weight"])
    with pytest.raises(CheckpointError, match=r"another model: parameter 'a.weight' there, 'b.weight' here"):
        other.load_state_dict(saved(first))
    assert not other.state
    make(["module.a.weight", "_orig_mod.b.weight"]).load_state_dict(saved(first))  # wrappers are no difference


def test_a_truncated_state_is_refused(written: dict) -> None:
    del written["state"][0]["70x66/left.basis.scales"]
    refuse(Shampoo4bit(parameters(), **OFTEN), written, r"state of '0.0' does not fit: missing \['70x66/left.basis.sc")


def test_a_parameter_without_an_entry_starts_afresh_and_says_so(written: dict) -> None:
    """A layer that was frozen when the checkpoint was written, or that a hook has left out."""
    del written["state"][2]
    optimizer = Shampoo4bit(parameters(), **OFTEN)
    with pytest.warns(UserWarning, match=r"1 of .* \('0.2'\) start afresh: the checkpoint has no state"):
        optimizer.load_state_dict(written)
    run(optimizer, range(2, 3))
    steps = [t.tolist() for key, t in tensors(optimizer) if "steps" in key]
    assert steps == [[3], [3], [1, 1, 1], [3], [3]]


def test_a_cast_state_is_refused(written: dict) -> None:
    """What torch's own loading makes of the codes."""
    entry = written["state"][0]
    entry["70x66/left.basis.codes"] = entry["70x66/left.basis.codes"].float()
    refuse(
        Shampoo4bit(parameters(), **OFTEN), written, r"left.basis.codes is .* torch.float32, expected .* torch.uint8"
    )


@pytest.mark.parametrize("junk", [{}, {"state": {}}, {"param_groups": []}, {"state": [], "param_groups": []}], ids=str)
def test_what_is_no_state_dict_is_refused(junk: dict) -> None:
    refuse(Shampoo4bit(parameters(), **OFTEN), junk, "not an optimizer state dict|groups of")


def test_an_entry_of_no_parameter_is_refused(written: dict) -> None:
    written["state"][99] = {"x": torch.ones(1)}
    refuse(Shampoo4bit(parameters(), **OFTEN), written, "99")


def test_an_entry_that_is_no_dict_is_refused(written: dict) -> None:
    written["state"][0] = torch.ones(1)
    refuse(Shampoo4bit(parameters(), **OFTEN), written, "no parameter's state: .0")
