"""Moments on stacks against torch.optim.AdamW and torchao, and which storage a moment gets."""

from __future__ import annotations

import pytest
import torch

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.numerics.rounding import Noise
from hf_shampoo4.numerics.storage import Blockwise, Dense, RankOne, allocate
from hf_shampoo4.options import Options
from hf_shampoo4.preconditioners import moments as moments_module
from hf_shampoo4.preconditioners.moments import Adam, MomentStep, make_base

BETAS, EPS = (0.9, 0.999), 1e-8


def at(steps: torch.Tensor, betas: tuple[float, float] = BETAS, eps: float = EPS, **more) -> MomentStep:
    return MomentStep(betas, eps, steps, **more)


def buffers(adam: Adam, blocks: int) -> dict:
    return {name: allocate(storage, blocks, "cpu") for name, storage in adam.storages().items()}


@pytest.mark.parametrize(
    ("moments", "quantise", "shape", "first", "second"),
    [
        ("fp32", True, (64, 64), Dense((64, 64)), Dense((64, 64))),
        ("bf16", True, (64, 64), Dense((64, 64), torch.bfloat16), Dense((64, 64), torch.bfloat16)),
        ("4bit", False, (64, 63), Dense((64, 63)), Dense((64, 63))),
        ("4bit", True, (64, 64), Blockwise((64, 64), "dynamic", 4, 128), RankOne((64, 64), "linear0", 4)),
        ("4bit", True, (4096,), Blockwise((4096,), "dynamic", 4, 128), Blockwise((4096,), "linear0", 4, 128)),
    ],
)
def test_storage_of_moments(moments: str, quantise: bool, shape: tuple[int, ...], first, second) -> None:
    assert make_base(shape, Options(algorithm="shampoo", moments=moments), quantise) == Adam(first, second)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.95, 0.0), (0.0, 0.99)])
def test_blocks_count_their_own_steps(betas: tuple[float, float]) -> None:
    """Block i started i steps late, as a parameter does whose first gradients were None."""
    adam = make_base((3, 5), Options(algorithm="shampoo", moments="fp32"), quantise=False)
    state, steps = buffers(adam, 3), torch.zeros(3)
    m, v = torch.zeros(3, 3, 5, dtype=torch.float64), torch.zeros(3, 3, 5, dtype=torch.float64)
    for t in range(1, 8):
        g = torch.randn(3, 3, 5)
        for i in range(3):
            if t <= i:
                continue
            one = {name: {b: x[i : i + 1] for b, x in tensors.items()} for name, tensors in state.items()}
            steps[i] += 1
            u = adam.direction(one, g[i : i + 1], at(steps[i : i + 1], betas))
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g[i].double()
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g[i].double() ** 2
            n = t - i
            expected = (m[i] / (1 - betas[0] ** n)) / ((v[i] / (1 - betas[1] ** n)).sqrt() + EPS)
            torch.testing.assert_close(u[0].double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("base", ["adamw", "sgdm"])
def test_who_watches_sees_the_first_moment_before_it_is_stored(base: str) -> None:
    """Diagnostics compare what is stored with it."""
    exact, seen = make_base((64, 64), Options(algorithm="shampoo", moments="fp32", base=base), quantise=False), []
    stored = make_base((64, 64), Options(algorithm="shampoo", moments="4bit", base=base), quantise=True)
    g = torch.randn(2, 64, 64)
    state, rounded = buffers(exact, 2), buffers(stored, 2)
    exact.direction(state, g, at(torch.ones(2)))
    stored.direction(
        rounded, g, at(torch.ones(2), watch=lambda m: seen.append((m, stored.first.read(rounded["first"]))))
    )
    ((unrounded, there),) = seen
    torch.testing.assert_close(unrounded, state["first"]["dense"])
    assert not torch.equal(there, unrounded)
    torch.testing.assert_close(there, unrounded, rtol=0, atol=0.15 * float(unrounded.abs().max()))


def test_bias_correction_keeps_its_digits_near_one() -> None:
    adam = make_base((1,), Options(algorithm="shampoo", moments="fp32"), quantise=False)
    state = buffers(adam, 1)
    u = adam.direction(state, torch.ones(1, 1), at(torch.ones(1), (0.999999, 0.9999999), 0.0))
    torch.testing.assert_close(u, torch.ones(1, 1), rtol=1e-5, atol=0)


def test_the_gradient_is_not_changed_and_the_update_uses_moments_before_they_are_stored() -> None:
    shape = (64, 64)
    quantised = make_base(shape, Options(algorithm="shampoo", moments="4bit"), quantise=True)
    exact = make_base(shape, Options(algorithm="shampoo", moments="fp32"), quantise=False)
    g = torch.randn(2, *shape)
    before = g.clone()
    u = quantised.direction(buffers(quantised, 2), g, at(torch.ones(2)))
    assert torch.equal(g, before)
    assert torch.equal(u, exact.direction(buffers(exact, 2), g, at(torch.ones(2))))


def test_a_zero_gradient_gives_a_zero_update() -> None:
    for moments in ("fp32", "bf16", "4bit"):
        adam = make_base((64, 64), Options(algorithm="shampoo", moments=moments), quantise=True)
        state = buffers(adam, 1)
        for t in (1.0, 2.0):
            u = adam.direction(state, torch.zeros(1, 64, 64), at(torch.tensor([t])))
            assert torch.equal(u, torch.zeros(1, 64, 64))


def test_no_stored_second_moment_is_zero_where_its_row_and_column_are_not() -> None:
    """The zero-point problem: 1 / sqrt(0) would explode (2309.01507, section 4.1)."""
    adam = make_base((64, 64), Options(algorithm="shampoo", moments="4bit"), quantise=True)
    state = buffers(adam, 1)
    g = torch.randn(1, 64, 64) * 10.0 ** torch.randint(-6, 2, (1, 64, 64))
    adam.direction(state, g, at(torch.ones(1)))
    assert (adam.second.read(state["second"]) > 0).all()


def test_a_bf16_second_moment_decays() -> None:
    adam = make_base((8, 8), Options(algorithm="shampoo", moments="bf16"), quantise=True)
    state = buffers(adam, 1)
    adam.direction(state, torch.ones(1, 8, 8), at(torch.ones(1)))
    start = adam.second.read(state["second"]).clone()
    for t in range(2, 1002):
        noise = Noise(torch.zeros(1, dtype=torch.int32), t, seed=0)
        adam.direction(state, torch.zeros(1, 8, 8), at(torch.tensor([float(t)]), noise=noise))
    ratio = adam.second.read(state["second"]) / start
    assert 0.3 < ratio.mean() < 0.45  # in float32: 0.37; rounded to nearest, v - 0.001 v would stay v for ever


@pytest.mark.parametrize("numel", [4096, 128 * 35])
def test_vectors_as_torchaos_4_bit_adamw(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long vector is stored block-wise, as torchao stores everything: the same algorithm, step by step, but that
    torchao's moments do not settle."""
    monkeypatch.setattr(moments_module, "ENDED", -1.0)
    torchao = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # torchao compiles its step; the arithmetic is the same
    start = torch.randn(numel)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    a = Shampoo4bit([ours], algorithm="elementwise", moments="4bit", **settings)
    b = torchao.AdamW4bit([theirs], block_size=128, **settings)
    for _ in range(10):
        ours.grad = theirs.grad = torch.randn(numel)
        a.step()
        b.step()
        stored, peer = a.state[ours], b.state[theirs]
        for name, moment in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            torch.testing.assert_close(stored[f"{numel}/{name}.scales"][0], peer[moment].scale, rtol=1e-5, atol=0)
            assert (stored[f"{numel}/{name}.codes"][0] == peer[moment].codes).float().mean() > 0.99
    close = torch.isclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert close.float().mean() > 0.98  # a number midway between two levels may fall either way
    assert (ours - theirs).abs().max() < 0.05
