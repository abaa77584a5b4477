"""Shampoo4bit against torch.optim.AdamW, in low precision, and what a step must not depend on."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.numerics import quantize
from hf_shampoo4.state_report import rows
from tests.support import used

SHAPES = [(70, 40), (64, 64), (3, 20, 30), (6, 4, 3, 3), (9,), (), (5000,), (7, 1)]
OFTEN = {"algorithm": "shampoo", "stats_every": 1, "roots_every": 1}


def parameters(shapes=SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(shapes, t: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + t)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(optimizer: Shampoo4bit, steps: range, owners: list[nn.Parameter] | None = None) -> None:
    owners = owners if owners is not None else [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        for p, g in zip(owners, gradients([p.shape for p in owners], t), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


# -------------------------------------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_elementwise_fp32_is_adamw(weight_decay: float) -> None:
    shapes = [*SHAPES, (4, 3, 5, 5)]
    ours, theirs = parameters(shapes), parameters(shapes)
    for p in (ours[-1], theirs[-1]):
        p.data = p.data.to(memory_format=torch.channels_last)
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": weight_decay}
    a = Shampoo4bit([{"params": ours[:4]}, {"params": ours[4:], "lr": 3e-3}],
                    algorithm="elementwise", moments="fp32", **settings)  # fmt: skip
    b = torch.optim.AdamW([{"params": theirs[:4]}, {"params": theirs[4:], "lr": 3e-3}], **settings)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(t / 10, 1.0) * (1 - t / 60)) for o in (a, b)]
    for t in range(50):
        for i, (p, q, g) in enumerate(zip(ours, theirs, gradients(shapes, t), strict=True)):
            absent = (i == 1 and t % 3 == 0) or (i == 4 and t < 7) or (i == 5 and t % 2)
            p.grad, q.grad = (None, None) if absent else (g.clone(), g.clone())
        a.step()
        b.step()
        for schedule in schedules:
            schedule.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


def test_shampoo_before_its_first_root_is_adamw() -> None:
    ours, theirs = parameters(), parameters()
    a = Shampoo4bit(ours, algorithm="shampoo", lr=1e-2, weight_decay=0.1, moments="fp32", roots_every=11)
    b = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    run(a, range(10))
    run(b, range(10))  # type: ignore[arg-type]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    run(a, range(10, 12))
    run(b, range(10, 12))  # type: ignore[arg-type]
    assert (ours[0] - theirs[0]).abs().max() > 1e-3
    torch.testing.assert_close(ours[4], theirs[4], rtol=1e-4, atol=1e-5)


def test_tensor_lr_and_closure() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo4bit([p], lr=torch.tensor(0.1), algorithm="shampoo")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 16.0
    torch.testing.assert_close(p.detach(), torch.full((4, 4), 0.9))


@pytest.fixture(scope="module")
def regression():
    """Loss after 200 steps on y = W x with badly scaled, rotated inputs, of any optimizer."""
    torch.manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(64, 64)).Q * torch.logspace(0, -2, 64)
    x = torch.randn(128, 64) @ mixing.T
    y = x @ torch.randn(64, 64).T

    def loss_after(make, lr: float = 0.1) -> float:
        p = nn.Parameter(torch.zeros(64, 64))
        optimizer = make([p])
        for t in range(200):
            for group in optimizer.param_groups:
                group["lr"] = torch.full_like(group["lr"], lr) if torch.is_tensor(group["lr"]) else lr
                group["lr"] *= 1 - t / 200
            optimizer.zero_grad()
            loss = ((x @ p.T - y) ** 2).mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    return loss_after


def test_learns_faster_than_adamw(regression) -> None:
    """What it is all for: both sides with float32 moments, then both with 4-bit moments."""
    adamw = regression(lambda ps: torch.optim.AdamW(ps, weight_decay=0.0))
    often = {"algorithm": "shampoo", "stats_every": 4, "roots_every": 4}
    full = regression(lambda ps: Shampoo4bit(ps, bits=32, factor="direct", moments="fp32", **often))
    four = regression(lambda ps: Shampoo4bit(ps, moments="fp32", **often))
    naive = regression(lambda ps: Shampoo4bit(ps, factor="direct", moments="fp32", **often))
    assert full < 0.3 * adamw
    assert four < 0.6 * adamw
    assert four < 0.5 * naive  # eigenvectors, not the factor itself: the paper's point
    adamw4 = regression(lambda ps: Shampoo4bit(ps, algorithm="elementwise"))
    assert regression(lambda ps: Shampoo4bit(ps, **often)) < 0.8 * adamw4


def test_4_bit_moments_do_no_worse_than_torchaos(regression, monkeypatch: pytest.MonkeyPatch) -> None:
    torchao = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    theirs = regression(lambda ps: torchao.AdamW4bit(ps, weight_decay=0.0))
    assert regression(lambda ps: Shampoo4bit(ps, algorithm="elementwise", moments="4bit")) < 1.1 * theirs


# ------------------------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"algorithm": "elementwise"}, OFTEN], ids=["adamw", "shampoo"])
def test_half_parameters_get_float32_arithmetic_rounded_once(dtype: torch.dtype, options: dict) -> None:
    half, full = parameters(dtype=dtype), [nn.Parameter(p.detach().float()) for p in parameters(dtype=dtype)]
    a, b = (Shampoo4bit(ps, lr=1e-2, weight_decay=0.1, moments="fp32", **options) for ps in (half, full))
    for t in range(5):
        for p, q, g in zip(half, full, gradients(SHAPES, t, dtype), strict=True):
            p.grad, q.grad = g, g.float()
        a.step()
        b.step()
        for p, q in zip(half, full, strict=True):
            assert torch.equal(p, q.to(dtype))
            q.data.copy_(p.data)


@pytest.mark.parametrize("options", [{"algorithm": "elementwise"}, OFTEN], ids=["adamw", "shampoo"])
def test_float32_gradients_of_bfloat16_parameters_are_used_as_they_are(options: dict) -> None:
    """torch's `grad_dtype`: the state is that of float32 parameters."""
    shapes = [(70, 64), (64, 64), (9,)]
    half, full = parameters(shapes, torch.bfloat16), parameters(shapes)
    for p in half:
        p.grad_dtype = torch.float32
    a, b = (Shampoo4bit(ps, lr=1e-2, **used({**options, "block_size": 32})) for ps in (half, full))
    for t in range(3):
        for p, q, g in zip(half, full, gradients(shapes, t), strict=True):
            p.grad, q.grad = g, g.clone()
        a.step()
        b.step()
    for p, q in zip(half, full, strict=True):
        assert all(torch.equal(t, b.state[q][key]) for key, t in a.state[p].items())


def test_float64_parameters_lose_nothing_to_a_step_of_zero() -> None:
    p = nn.Parameter(torch.full((4, 4), 1 / 3, dtype=torch.float64))
    before = p.detach().clone()
    optimizer = Shampoo4bit([p], lr=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, before)


def test_stochastic_rounding_moves_what_nearest_leaves() -> None:
    def after(**options: object) -> torch.Tensor:
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = Shampoo4bit([p], lr=1e-4, moments="fp32", algorithm="elementwise", **options)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().float()

    assert torch.equal(after(), torch.ones(64, 64))  # 1 - 1e-4 rounds to 1
    moved = after(stochastic_rounding=True)
    assert abs(moved.mean().item() - 0.99) < 3e-4  # unbiased: 100 steps of 1e-4; its deviation is about 4e-5
    assert torch.equal(moved, after(stochastic_rounding=True))
    assert not torch.equal(moved, after(stochastic_rounding=True, seed=1))


def test_stochastic_noise_differs_between_parameters_blocks_and_steps() -> None:
    ps = [nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = Shampoo4bit(ps, lr=1e-3, block_size=16, stochastic_rounding=True, moments="fp32")
    seen = []
    for _ in range(2):
        for p in ps:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen += [p.detach()[r, c].clone() for p in ps for r in (slice(16), slice(16, 32)) for c in (slice(16, 32),)]
    assert all(0 < (x != 1).float().mean() < 1 for x in seen)
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_stochastic_rounding_does_not_depend_on_the_other_parameters() -> None:
    def after(names: list[str], watched: str) -> torch.Tensor:
        made = {name: nn.Parameter(torch.ones(20, 20, dtype=torch.bfloat16)) for name in names}
        optimizer = Shampoo4bit(list(made.items()), lr=1e-3, stochastic_rounding=True)
        for p in made.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return made[watched].detach()

    alone = after(["a.weight"], "a.weight")
    assert torch.equal(alone, after(["b.weight", "a.weight"], "a.weight"))
    assert torch.equal(alone, after(["module.a.weight"], "module.a.weight"))  # DDP's wrapper
    assert not torch.equal(alone, after(["b.weight"], "b.weight"))


# ------------------------------------------------------------------------------- what a step must not depend on

INDEPENDENT = [
    {"factor": "direct", "bits": 32, "moments": "fp32"},
    {"factor": "eigen", "bits": 32, "moments": "fp32", "damping": 1e-2},
    {"factor": "eigen", "bits": 4, "moments": "4bit"},
]


@pytest.mark.parametrize("options", INDEPENDENT, ids=["direct32", "eigen32", "eigen4"])
def test_waves_do_not_matter(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(40, 64), (64, 40), (70, 70), (40, 64), (9,), (70, 70)]
    together, apart = parameters(shapes), parameters(shapes)
    a = Shampoo4bit(together, lr=1e-2, block_size=64, **OFTEN, **options)
    b = Shampoo4bit(apart, lr=1e-2, block_size=64, **OFTEN, **options)
    run(a, range(3))
    monkeypatch.setattr(import_module("hf_shampoo4.execution.blocking"), "WAVE_ELEMENTS", 1)
    run(b, range(3))
    assert len(a.waves(0)) == 1
    assert len(b.waves(0)) == len(shapes)
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", INDEPENDENT, ids=["direct32", "eigen32", "eigen4"])
def test_order_of_parameters_does_not_matter(options: dict) -> None:
    shapes = [(40, 64), (64, 40), (70, 70), (40, 64), (9,), (70, 70)]
    straight, reverse = parameters(shapes), parameters(shapes)
    a = Shampoo4bit(straight, lr=1e-2, block_size=64, **OFTEN, **options)
    b = Shampoo4bit(reverse[::-1], lr=1e-2, block_size=64, **OFTEN, **options)
    run(a, range(3), straight)
    run(b, range(3), reverse)
    for p, q in zip(straight, reverse, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_two_groups_are_two_optimizers() -> None:
    shapes = [(40, 64), (64, 40)]
    ps, qs = parameters(shapes), parameters(shapes)
    both = Shampoo4bit([{"params": [ps[0]], "bits": 32}, {"params": [ps[1]], "lr": 0.1}], lr=1e-2, **OFTEN)
    alone = [Shampoo4bit([qs[0]], lr=1e-2, bits=32, **OFTEN), Shampoo4bit([qs[1]], lr=0.1, **OFTEN)]
    for t in range(3):
        for p, q, g in zip(ps, qs, gradients(shapes, t), strict=True):
            p.grad, q.grad = g, g
        both.step()
        for optimizer in alone:
            optimizer.step()
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(p, q)


def test_surroundings_do_not_matter() -> None:
    """Autocast, the gradient's memory layout, and the global random state."""
    shapes = [(66, 70), (8, 8, 3, 3)]
    ps, qs = parameters(shapes), parameters(shapes)
    a, b = Shampoo4bit(ps, lr=1e-2, **OFTEN), Shampoo4bit(qs, lr=1e-2, **OFTEN)
    for t in range(3):
        for p, q, g in zip(ps, qs, gradients(shapes, t), strict=True):
            p.grad, q.grad = g.clone(), g.transpose(0, 1).contiguous().transpose(0, 1)
        a.step()
        torch.manual_seed(t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            b.step()
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has only the old interface"
)
def test_tf32_asked_for_by_the_new_interface() -> None:
    p = parameters([(20, 20)])
    optimizer = Shampoo4bit(p, **OFTEN)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        run(optimizer, range(1))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_gradients_are_not_changed() -> None:
    ps = parameters()
    optimizer = Shampoo4bit(ps, **OFTEN)
    expected = gradients(SHAPES, 0)
    run(optimizer, range(1))
    for p, g in zip(ps, expected, strict=True):
        assert torch.equal(p.grad, g)


def test_deterministic() -> None:
    ps, qs = parameters(), parameters()
    for owners in (ps, qs):
        run(Shampoo4bit(owners, lr=1e-2, **OFTEN), range(4))
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(p, q)


def test_a_parameter_without_gradient_leaves_the_others_alone() -> None:
    """Two of three equal blocks of a stack have a gradient; the third is untouched, bit for bit."""
    shapes = [(40, 64)] * 3
    ps, qs = parameters(shapes), parameters(shapes)
    a, b = Shampoo4bit(ps, lr=1e-2, **OFTEN), Shampoo4bit([qs[0], qs[2]], lr=1e-2, **OFTEN)
    run(a, range(1))
    for q, g in zip(qs, gradients(shapes, 0), strict=True):
        q.grad = g
    b.step()
    state = {name: t.clone() for name, t in a.state[ps[1]].items()}
    before = ps[1].detach().clone()
    for t in range(1, 4):
        for p, q, g in zip(ps, qs, gradients(shapes, t), strict=True):
            p.grad, q.grad = g, g
        ps[1].grad = None
        a.step()
        b.step()
    assert torch.equal(ps[1], before)
    assert all(torch.equal(t, state[name]) for name, t in a.state[ps[1]].items())
    torch.testing.assert_close(ps[0], qs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ps[2], qs[2], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------- options and groups


def test_groups_take_options_of_their_own_as_text_or_numbers() -> None:
    ps = parameters([(8, 8), (9, 9)])
    optimizer = Shampoo4bit([{"params": [ps[0]], "bits": "8"}, {"params": [ps[1]]}], preset="paper_eigen", block_size=7)
    assert [group["bits"] for group in optimizer.param_groups] == [8, 4]
    assert [group["block_size"] for group in optimizer.param_groups] == [7, 7]
    assert [group["stats_every"] for group in optimizer.param_groups] == [200, 200]
    optimizer.add_param_group({"params": parameters([(3, 3)]), "algorithm": "elementwise", "lr": 1.0})
    assert optimizer.param_groups[2]["algorithm"] == "elementwise"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_sise": 3}, "unknown option 'block_sise'"),
        ({"bits": 3}, "option bits=3 is not allowed: it must be one of 4, 8, "),
        ({"preset": "x"}, "unknown preset 'x'"),
        ({"config": "/absent.yaml"}, "cannot be read"),
        ({"lr": -1.0}, "lr=-1.0 is not allowed: it must be a number >= 0"),
        ({"lr": float("nan")}, "lr=nan is not allowed"),
        ({"betas": (0.9, 1.0)}, "betas=.0.9, 1.0. is not allowed: it must be two numbers in"),
        ({"betas": (-0.1, 0.9)}, "betas="),
        ({"eps": -1e-8}, "eps=-1e-08 is not allowed: it must be a number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is not allowed"),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(settings: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Shampoo4bit(parameters([(4, 4)]), **settings)
    if not {"preset", "config", "block_sise"} & settings.keys():
        optimizer = Shampoo4bit(parameters([(4, 4)]))
        with pytest.raises(OptionError, match=message):
            optimizer.add_param_group({"params": parameters([(4, 4)]), **settings})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("typo", [{"block_sise": 64}, {"preset": "nope"}, {"config": "/absent.yaml"}], ids=str)
def test_a_groups_unknown_option_is_refused(typo: dict) -> None:
    with pytest.raises(OptionError):
        Shampoo4bit([{"params": parameters([(4, 4)]), **typo}])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2])
def test_complex_and_8_bit_parameters_are_refused(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(4, 4).to(dtype))
    with pytest.raises(TypeError, match=r"parameter of shape \(4, 4\) is torch.*: only real floating point"):
        Shampoo4bit([p])
    optimizer = Shampoo4bit(parameters([(4, 4)]))
    with pytest.raises(TypeError, match="only real floating point"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("shapes", [[(5,), (), (7, 1)], [(4096,)]])
def test_parameters_without_a_matrix_are_updated_by_the_base_alone_as_the_table_says(
    shapes: list[tuple[int, ...]],
) -> None:
    ps, qs = parameters(shapes), parameters(shapes)
    ours, plain = Shampoo4bit(ps), Shampoo4bit(qs, algorithm="elementwise")
    run(ours, range(3))
    run(plain, range(3))
    assert all(map(torch.equal, ps, qs))
    assert all(row.treatment.startswith("AdamW") for row in rows(ours))


def test_row_splits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"row_splits=?\s?\(3, 3\) add up to 6"):
        Shampoo4bit(parameters([(8, 4)]), row_splits=(3, 3))


def test_row_splits_precondition_each_matrix_apart() -> None:
    fused, (q, k) = parameters([(30, 20)])[0], parameters([(20, 20), (10, 20)])
    with torch.no_grad():
        q.copy_(fused[:20])
        k.copy_(fused[20:])
    a = Shampoo4bit([fused], lr=1e-2, row_splits="20;10", graft="block", moments="fp32", **OFTEN)
    b = Shampoo4bit([q, k], lr=1e-2, graft="block", moments="fp32", **OFTEN)
    for t in range(3):
        fused.grad = gradients([(30, 20)], t)[0]
        q.grad, k.grad = fused.grad[:20], fused.grad[20:]
        a.step()
        b.step()
    torch.testing.assert_close(fused.detach(), torch.cat([q, k]).detach(), rtol=1e-5, atol=1e-6)


def test_a_sparse_gradient_is_refused_and_changes_nothing() -> None:
    embedding = nn.Embedding(20, 8, sparse=True)
    matrix = nn.Parameter(torch.randn(8, 8))
    optimizer = Shampoo4bit([("matrix", matrix), ("table.weight", embedding.weight)], **OFTEN)
    (embedding(torch.tensor([1, 2])) @ matrix).sum().backward()
    before = copy.deepcopy([matrix.data, embedding.weight.data])
    with pytest.raises(TypeError, match=r"parameter 'table.weight' has a sparse gradient.*sparse=False"):
        optimizer.step()
    assert torch.equal(matrix, before[0])
    assert torch.equal(embedding.weight, before[1])
    assert optimizer.param_groups[0]["step"] == 0
    assert not optimizer.state


def test_a_step_on_zeros_before_training_with_copies_of_the_parameters_does_nothing() -> None:
    """As DeepSpeed without ZeRO tries 16-bit trainings; the same on the parameters themselves is a step."""
    rehearsed, plain = (Shampoo4bit(parameters(dtype=torch.bfloat16), weight_decay=0.1, **OFTEN) for _ in range(2))
    for optimizer in (rehearsed, plain):
        group = optimizer.param_groups[0]
        group["params"] = [p.detach().float().requires_grad_() for p in group["params"]]
    copies = rehearsed.param_groups[0]["params"]
    before = copy.deepcopy(copies)
    for p in copies:
        p.grad = torch.zeros_like(p)
    rehearsed.step()
    assert rehearsed.param_groups[0]["step"] == 0
    assert not rehearsed.state
    assert all(map(torch.equal, copies, before))
    for optimizer in (rehearsed, plain):
        run(optimizer, range(3))
    assert rehearsed.param_groups[0]["step"] == 3
    assert all(map(torch.equal, copies, plain.param_groups[0]["params"]))
    for p in copies:
        p.grad = torch.zeros_like(p)
    rehearsed.step()
    assert rehearsed.param_groups[0]["step"] == 4
    own = Shampoo4bit(parameters(), **OFTEN)
    for p in own.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    own.step()
    assert own.param_groups[0]["step"] == 1


def test_small_tensors_stay_in_float32_by_the_whole_parameters_size() -> None:
    """Moments by the parameter, not the block; factors by the order."""
    ps = parameters([(63, 65), (64, 64), (4095,), (4096,)])
    optimizer = Shampoo4bit(ps, block_size=32, **OFTEN)
    run(optimizer, range(1))
    keys = [set(optimizer.state[p]) for p in ps]
    assert any(key.endswith("/first.dense") for key in keys[0])
    assert not any("codes" in key for key in keys[0])
    assert {"32x32/first.codes", "32x32/second.codes"} <= keys[1]
    assert not any("left" in key and "codes" in key for key in keys[1])  # order 32: 1,024 entries
    assert "4095/first.dense" in keys[2]
    assert "4096/first.codes" in keys[3]
    p, q = parameters([(64, 63), (64, 1000)])
    optimizer = Shampoo4bit([p, q], **OFTEN)
    run(optimizer, range(1))
    assert {"64x63/left.basis.codes", "64x63/right.basis.dense"} <= optimizer.state[p].keys()
    assert {"64x1000/left.root.codes", "64x1000/right.root.codes"} <= optimizer.state[q].keys()


def test_parameters_of_two_models_with_equal_names() -> None:
    """A generator and a discriminator in one group, or in two: each keeps its own blocks and its own state."""
    torch.manual_seed(0)
    two = [torch.nn.Sequential(torch.nn.Linear(*shape)) for shape in ((80, 96), (64, 70))]
    named = [list(model.named_parameters()) for model in two]
    optimizers = [
        Shampoo4bit([*named[0], *named[1]], lr=0.1, weight_decay=0.0),
        Shampoo4bit([{"params": of_one} for of_one in named], lr=0.1, weight_decay=0.0),
    ]
    for optimizer in optimizers:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in trained]
        for p in trained:
            p.grad = torch.randn_like(p)
        optimizer.step()
        for p, old in zip(trained, before, strict=True):
            assert (p != old).all()
        rows = optimizer.named_blocks()
        assert sum(row.numel() for row in rows.values()) == sum(
            t.numel() for entry in optimizer.state.values() for t in entry.values()
        )
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()


@pytest.mark.parametrize(
    "options", [{}, {"algorithm": "soap"}, {"algorithm": "shampoo"}, {"algorithm": "shampoo", "factor": "cholesky_ef"}]
)
def test_torchs_default_dtype_does_not_matter(options: dict[str, object]) -> None:
    """Scripts set it to bfloat16 to make their model, and leave it there."""

    def trained() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.zeros((80, 96), dtype=torch.float32))
        optimizer = Shampoo4bit([p], lr=0.1, stats_every=1, **options)
        for _ in range(3):
            p.grad = torch.randn((80, 96), generator=generator, dtype=torch.float32)
            optimizer.step()
        return p.detach()

    usual = trained()
    for cached in (quantize._table, quantize._thresholds, quantize._cells, quantize._pair_table):
        cached.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(trained(), usual)
    finally:
        torch.set_default_dtype(torch.float32)
