"""Every moment recipe against a literal float64 reference, outsiders, and the properties its paper claims."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.numerics import storage as storage_module
from hf_shampoo4.numerics.codebooks import levels
from hf_shampoo4.numerics.quantize import dequantize_block, encode_between, quantize_block
from hf_shampoo4.numerics.rounding import Noise, PreconditionerSpace, Settling, Stochastic, noise_bits
from hf_shampoo4.numerics.storage import Bitsandbytes, Blockwise, Factored, allocate, roundtrip
from hf_shampoo4.options import Options
from hf_shampoo4.preconditioners.moments import (
    ENDED,
    FIRST_STREAM,
    SECOND_STREAM,
    make_base,
    radial_bias,
    unmoved,
)
from tests.support import used
from tests.support.reference import (
    DYNAMIC,
    DYNAMIC_UNSIGNED,
    LINEAR0,
    PROPERTY,
    decode_rows,
    excess_error,
    scales_of_rank1,
    scales_of_rows,
    unpack,
)

RECIPES = ["fp32", "bf16", "8bit", "4bit", "4bit_factored", "4bit_eden", "4bit_zipsr"]
KINDS = [("adamw", recipe) for recipe in RECIPES] + [("sgdm", recipe) for recipe in RECIPES[:4]]
NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
DYNAMIC0 = DYNAMIC_UNSIGNED[1:]
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-6, 0.1

Array = np.ndarray


def optimizer(parameters, recipe: str, base: str = "adamw", **options) -> Shampoo4bit:
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "algorithm": "elementwise"}
    return Shampoo4bit(parameters, base=base, moments=recipe, **{**settings, **options})


def needs(recipe: str) -> None:
    if recipe == "8bit":
        pytest.importorskip("bitsandbytes")


# ------------------------------------------------------------------------------- a literal reference, step by step


class Reference:
    """One parameter from the bytes that the optimizer stored before a step to those it should store after it."""

    def __init__(self, recipe: str, base: str, shape: tuple[int, ...], stochastic_first: bool) -> None:
        self.recipe, self.base, self.shape, self.stochastic_first = recipe, base, shape, stochastic_first
        self.modern = recipe in ("4bit_eden", "4bit_zipsr")
        self.first_levels = NF4 if self.modern else DYNAMIC
        self.second_levels = {"4bit_eden": DYNAMIC0, "4bit_zipsr": DYNAMIC_UNSIGNED}.get(recipe, LINEAR0)
        self.rank1 = recipe == "4bit" and len(shape) == 2
        self.factored = recipe == "4bit_factored" and len(shape) == 2

    def read(self, entry: dict[str, Array], moment: str) -> Array:
        table = self.first_levels if moment == "first" else self.second_levels
        size = math.prod(self.shape)
        if moment == "second" and self.factored:
            rows, columns = entry["second.rows"][0].astype(float), entry["second.columns"][0].astype(float)
            return np.outer(rows, columns) / rows.mean() if rows.any() else np.zeros(self.shape)
        if moment == "second" and self.rank1:
            codes = unpack(entry["second.codes"][0], size, 4).reshape(self.shape)
            rows, columns = entry["second.rows"][0], entry["second.columns"][0]
            return np.asarray(table)[codes] * np.minimum.outer(rows, columns).astype(float)
        return decode_rows(entry[f"{moment}.codes"], entry[f"{moment}.scales"], table, 128, size).reshape(self.shape)

    def step(self, x: Array, g: Array, t: int, before: dict[str, Array]) -> tuple[Array, Array, Array]:
        """The new parameter and the working moments; SGD's gradient has the weight decay in it."""
        (b1, b2), m = BETAS, self.read(before, "first")
        if self.base == "sgdm":
            m = b1 * m + g
            return x - LR * m, m, m
        m = b1 * m + (1 - b1) * g
        v = b2 * self.read(before, "second") + (1 - b2) * g**2
        u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + EPS)
        return x - LR * DECAY * x - LR * u, m, v

    def check_first(
        self, m: Array, g: Array, after: dict[str, Array], uniform: Array, hashing: tuple[int, int]
    ) -> None:
        flat, stored = m.reshape(1, -1), self.read(after, "first").reshape(1, -1)
        scale = scales_of_rows(flat, 128)
        np.testing.assert_allclose(after["first.scales"], block_maxima(flat), rtol=1e-5)
        if not self.stochastic_first:
            ended = (np.abs(g) <= np.abs(m) / 8 * (1 if self.base == "adamw" else 1 - BETAS[0])).reshape(1, -1)
            assert excess_error(np.where(ended, stored, flat), stored, scale, self.first_levels) < 1e-5
            of_upper = lambda x, a, b, s: (x - a) / (b - a)  # noqa: E731
            of_ended = (x[ended][None] for x in (flat, stored, scale))
            noise = np.array([((j * hashing[0] + hashing[1]) % 2**32 // 2 + 0.5) / 2**31 for j in range(m.size)])
            check_between(*of_ended, self.first_levels, noise[ended[0]], of_upper, upper_first=True)
            return
        check_between(flat, stored, scale, self.first_levels, uniform, lambda x, a, b, s: (b - x) / (b - a))

    def check_second(self, v: Array, t: int, after: dict[str, Array], uniform: Array) -> None:
        stored = self.read(after, "second")
        if self.factored:
            np.testing.assert_allclose(after["second.rows"][0], v.mean(1), rtol=1e-5)
            np.testing.assert_allclose(after["second.columns"][0], v.mean(0), rtol=1e-5)
        elif self.rank1:
            assert excess_error(v, stored, scales_of_rank1(v), LINEAR0) < 1e-5
        elif self.recipe == "4bit_eden":
            self.check_eden(v.reshape(1, -1), after)
        elif self.recipe == "4bit_zipsr":
            h = lambda x: 1 / (np.sqrt(x / (1 - BETAS[1] ** t)) + EPS)  # noqa: E731
            odds = lambda x, a, b, s: (h(x * s) - h(b * s)) / (h(a * s) - h(b * s))  # noqa: E731
            flat = v.reshape(1, -1)
            check_between(flat, stored.reshape(1, -1), scales_of_rows(flat, 128), DYNAMIC_UNSIGNED, uniform, odds)
        else:
            flat = v.reshape(1, -1)
            assert excess_error(flat, stored.reshape(1, -1), scales_of_rows(flat, 128), LINEAR0) < 1e-5

    def check_eden(self, v: Array, after: dict[str, Array]) -> None:
        codes = unpack(after["second.codes"], v.size, 4)
        for k, start in enumerate(range(0, v.size, 128)):
            x, q = v[0, start : start + 128], np.asarray(DYNAMIC0)[codes[0, start : start + 128]]
            s = x.max()
            assert excess_error(x[None], q[None] * s, np.full((1, x.size), s), DYNAMIC0) < 1e-5
            corrected = s * (x @ x) / max(x @ (s * q), 1e-12 * s * s)
            np.testing.assert_allclose(after["second.scales"][0, k], corrected, rtol=1e-5)


def block_maxima(x: Array) -> Array:
    return np.array([[np.abs(x[0, i : i + 128]).max() for i in range(0, x.size, 128)]])


def check_between(
    x: Array, stored: Array, scale: Array, table, uniform: Array, odds: Callable, upper_first: bool = False
) -> None:
    """Each stored number is the level that the noise and the odds (of the lower, or the upper one) say clearly."""
    unclear = 0
    for value, found, s, u in zip(x[0] / scale[0], stored[0] / scale[0], scale[0], uniform, strict=True):
        j = max(k for k, level in enumerate(table[:-1]) if level <= max(value, table[0]))
        a, b = table[j], table[j + 1]
        p = odds(min(max(value, a), b), a, b, s)
        near_a_level = (a != 0 and abs(value - a) < 1e-6) or abs(value - b) < 1e-6
        if abs(u - p) < 1e-4 or near_a_level:
            unclear += 1
        else:
            assert abs(found - (a if (u < p) != upper_first else b)) < 1e-6
    assert unclear <= 0.25 * x.size


@pytest.mark.parametrize(
    ("base", "recipe", "shape", "late"),
    [
        ("adamw", "4bit", (65, 66), False),
        ("adamw", "4bit", (4200,), True),
        ("adamw", "4bit_factored", (65, 66), False),
        ("adamw", "4bit_factored", (4200,), False),
        ("adamw", "4bit_eden", (65, 66), True),
        ("adamw", "4bit_eden", (4200,), False),
        ("adamw", "4bit_zipsr", (65, 66), False),
        ("adamw", "4bit_zipsr", (4200,), True),
        ("sgdm", "4bit", (65, 66), False),
        ("sgdm", "4bit", (4200,), True),
    ],
)
def test_each_step_as_a_float64_reference(base: str, recipe: str, shape: tuple[int, ...], late: bool) -> None:
    p = torch.nn.Parameter(torch.randn(shape))
    ours = optimizer([p], recipe, base, stochastic_from=4 if late else 0, seed=7)
    prefix = "x".join(map(str, shape)) + "/"
    before: dict[str, Array] = {}
    for t in range(1, 6):
        x = p.detach().double().numpy().copy()
        p.grad = torch.randn(shape) * 10 ** (torch.rand(shape) * 4 - 4)
        ours.step()
        seed_offsets = ours.waves(0)[0].stacks[0].seed_offsets
        noise = Noise(seed_offsets, t, 7)
        uniforms = [noise.uniform(k, p.numel())[0].numpy() for k in (FIRST_STREAM, SECOND_STREAM)]
        after = {key.removeprefix(prefix): value.numpy().copy() for key, value in ours.state[p].items()}
        reference = Reference(recipe, base, shape, late and t >= 4)
        g = p.grad.double().numpy() + (DECAY * x if base == "sgdm" else 0.0)
        expected, m, v = reference.step(x, g, t, before or zeros_like(after))
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-5, atol=LR * 1e-4)
        reference.check_first(m, g, after, uniforms[0], noise.multiply_shift(FIRST_STREAM))
        if base == "adamw":
            reference.check_second(v, t, after, uniforms[1])
        before = after


def zeros_like(entry: dict[str, Array]) -> dict[str, Array]:
    return {name: np.zeros_like(value) for name, value in entry.items()}


# --------------------------------------------------------------------------------------------------------- outsiders


@pytest.mark.parametrize("shape", [(64, 64), (80, 65), (5000,)])
def test_8_bits_as_bitsandbytes_adamw8bit(shape: tuple[int, ...]) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    optim.GlobalOptimManager.get_instance().initialize()  # a Trainer's overrides (32 bits) outlive its optimizer
    start = torch.randn(shape)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours = optimizer([p], "8bit")
    theirs = optim.AdamW8bit([q], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    prefix = "x".join(map(str, shape)) + "/"
    for _ in range(5):
        p.grad = q.grad = torch.randn(shape) * 10 ** (torch.rand(shape) * 3 - 3)
        ours.step()
        theirs.step()
        for mine, peer, absmax in (("first", "state1", "absmax1"), ("second", "state2", "absmax2")):
            codes, scales = ours.state[p][f"{prefix}{mine}.codes"], ours.state[p][f"{prefix}{mine}.scales"]
            torch.testing.assert_close(scales.view(-1), theirs.state[q][absmax].view(-1), rtol=1e-4, atol=0)
            difference = (codes.view(-1).int() - theirs.state[q][peer].view(-1).int()).abs()
            assert (difference == 0).float().mean() > 0.98
            assert difference.max() <= 1
    assert torch.isclose(p, q, rtol=1e-4, atol=LR * 1e-2).float().mean() > 0.98


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_storage_is_bitsandbytes_own_round_trip(signed: bool, blocks: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    storage = Bitsandbytes((50, 13), signed)  # 650 = 2 * 256 + 138: a row's last block is not shared with the next row
    x = torch.randn(blocks, 50, 13)
    x = x if signed else x.abs()
    buffers = allocate(storage, blocks, "cpu")
    storage.write(buffers, x)
    code = functional.create_dynamic_map(signed=signed)
    for i in range(blocks):
        quantised, state = functional.quantize_blockwise(x[i].flatten(), code=code, blocksize=256)
        assert torch.equal(buffers["codes"][i], quantised)
        assert torch.equal(buffers["scales"][i], state.absmax)
        back = functional.dequantize_blockwise(quantised, state).view(50, 13)
        assert torch.equal(storage.read(buffers)[i], back)


def test_4_bit_first_moment_as_torchaos_state() -> None:
    """torchao stores a matrix's first moment as we do; its second has blocks where ours has rank-1 scales."""
    subclass = pytest.importorskip("torchao.optim.subclass_4bit")
    p = torch.nn.Parameter(torch.zeros(64, 66))
    ours = optimizer([p], "4bit")
    p.grad = torch.randn(64, 66)
    ours.step()
    theirs = subclass.OptimState4bit.zeros((64, 66), signed=True, block_size=128)
    theirs.copy_(p.grad * (1 - BETAS[0]))
    torch.testing.assert_close(ours.state[p]["64x66/first.scales"][0], theirs.scale, rtol=1e-6, atol=0)
    assert (ours.state[p]["64x66/first.codes"][0] == theirs.codes).float().mean() > 0.998


def test_factored_second_moment_keeps_adafactors_averages() -> None:
    storage = Factored((5, 7))
    buffers = allocate(storage, 2, "cpu")
    rows, columns = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.float64)
    for _ in range(5):
        g2 = torch.randn(2, 5, 7).square()
        storage.write(buffers, storage.read(buffers).mul_(0.9).add_(g2, alpha=0.1))
        rows = 0.9 * rows + 0.1 * g2.double().mean(2)
        columns = 0.9 * columns + 0.1 * g2.double().mean(1)
        expected = torch.einsum("bi,bj->bij", rows, columns) / rows.mean(1)[:, None, None]
        torch.testing.assert_close(storage.read(buffers).double(), expected, rtol=1e-5, atol=0)


def test_factored_second_moment_of_zeros_and_of_a_single_entry() -> None:
    storage = Factored((3, 4))
    buffers = allocate(storage, 1, "cpu")
    assert torch.equal(storage.read(buffers), torch.zeros(1, 3, 4))
    x = torch.zeros(1, 3, 4)
    x[0, 1, 2] = 1e-20
    storage.write(buffers, x)
    torch.testing.assert_close(storage.read(buffers), x, rtol=1e-5, atol=0)


def test_factored_second_moment_of_squares_whose_sum_is_no_float32() -> None:
    storage = Factored((3, 5))
    buffers = allocate(storage, 1, "cpu")
    x = torch.full((1, 3, 5), 3e38)
    storage.write(buffers, x)
    torch.testing.assert_close(storage.read(buffers), x, rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------------------------------- properties

GRID = 4096
uniform_grid = (torch.arange(GRID, dtype=torch.float32) + 0.5) / GRID


def rounded_over_the_grid(x: float, codebook: str, make: Callable[[torch.Tensor], Stochastic], scale: float = 1.0):
    """x under every noise of the grid: float64 levels (GRID,)."""
    values = torch.full((GRID,), x)
    codes = encode_between(values, codebook, 4, make(uniform_grid), torch.full((GRID,), scale))
    return torch.tensor(levels(codebook, 4), dtype=torch.float64)[codes.long()]


@PROPERTY
@given(st.sampled_from(["nf4", "dynamic", "linear2", "linear0", "dynamic_unsigned"]), st.floats(-1, 1, width=32))
def test_stochastic_rounding_is_unbiased(codebook: str, x: float) -> None:
    """E[Q(x)] = x between the lowest and the highest level; beyond them (dynamic has no -1) it is the level."""
    table = levels(codebook, 4)
    rounded = rounded_over_the_grid(x, codebook, Stochastic)
    expected = min(max(x, table[0]), table[-1])
    assert abs(rounded.mean().item() - expected) < 1.1 / GRID
    assert len(rounded.unique()) <= 2  # neighbours only


@PROPERTY
@given(
    st.floats(0, 1, width=32),
    st.sampled_from([1e-8, 1e-5, 1e-3, 1e-1]),
    st.sampled_from([1e-14, 1e-8, 1e-4, 1.0]),
    st.sampled_from([1e-3, 0.05, 1.0]),
)
def test_zip_sr_keeps_the_preconditioner_on_average(x: float, eps: float, scale: float, bias: float) -> None:
    """E[h(Q(v))] = h(v), h(v) = 1 / (sqrt(v / bias) + eps), down to v = 0, which is a level."""
    v = torch.tensor([x])
    lower = max(k for k, level in enumerate(levels("dynamic_unsigned", 4)[:-1]) if level <= x)
    a, b = torch.tensor(levels("dynamic_unsigned", 4)[lower : lower + 2]).unsqueeze(1)
    rounding = PreconditionerSpace(torch.zeros(1), torch.tensor([bias]), eps)
    p = rounding.odds_of_lower(v, a, b, torch.tensor([scale])).double().item()

    def h(level: float) -> float:
        return 1 / (math.sqrt(level * scale / bias) + eps)

    assert 0 <= p <= 1
    expectation = p * h(a.item()) + (1 - p) * h(b.item())
    assert expectation == pytest.approx(h(v.item()), rel=2e-5, abs=1e-6 * (h(a.item()) - h(b.item())))
    rounded = rounded_over_the_grid(
        x, "dynamic_unsigned", lambda u: PreconditionerSpace(u, torch.tensor(bias), eps), scale
    )
    share = (rounded == rounded.min()).double().mean().item() if len(rounded.unique()) == 2 else None
    if share is not None:
        assert abs(share - p) <= 1 / GRID
    else:
        assert p < 1 / GRID or p > 1 - 1 / GRID or x == a.item()


def test_zip_sr_seldom_takes_the_zero_and_does_so_by_the_odds_of_the_paper() -> None:
    """p(0) = eps (1 - sqrt(v / b)) / (sqrt(v / bias) + eps), of the order of eps."""
    v, b, eps, bias = 0.001, 0.00325, 1e-4, 0.1
    rounding = PreconditionerSpace(torch.zeros(1), torch.tensor([bias]), eps)
    p = rounding.odds_of_lower(*(torch.tensor([z]) for z in (v, 0.0, b, 1.0))).item()
    assert p == pytest.approx(eps * (1 - math.sqrt(v / b)) / (math.sqrt(v / bias) + eps), rel=1e-4)


def test_zip_sr_over_steps_keeps_the_mean_inverse_root() -> None:
    """The same, through the storage and with its own noise, on a block of ordinary second moments."""
    v = torch.rand(1, 64, 128) ** 2 + 1e-3
    storage = make_base((64, 128), Options(algorithm="shampoo", moments="4bit_zipsr"), quantise=True).second
    buffers, eps, bias, total, runs = allocate(storage, 1, "cpu"), 1e-3, 0.5, 0.0, 400
    h = lambda x: 1 / ((x / bias).sqrt() + eps)  # noqa: E731
    for t in range(runs):
        uniform = Noise(torch.tensor([3], dtype=torch.int32), t, 0).uniform(SECOND_STREAM, v.numel())
        storage.write(buffers, v, PreconditionerSpace(uniform, torch.tensor([[bias]]), eps))
        total = total + h(storage.read(buffers)).double()
    error = (total / runs / h(v) - 1).view(-1)
    assert abs(error.mean().item()) < 1e-3
    assert error.std().item() < 0.05


@PROPERTY
@given(st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([1e-30, 1e-12, 1.0, 1e30]), st.floats(0, 4))
def test_ze_eden_keeps_each_blocks_own_direction(length: int, seed: int, size: float, spread: float) -> None:
    """<x, Q(x)> = |x|^2, block by block."""
    generator = torch.Generator().manual_seed(seed)
    x = size * 10 ** (-spread * torch.rand(2, length, generator=generator))
    q = dequantize_block(*quantize_block(x, "dynamic0", 4, 128, fit="eden"), "dynamic0", 4, 128, length)
    for start in range(0, length, 128):
        a, b = (t[:, start : start + 128].double() for t in (x, q))
        torch.testing.assert_close((a * b).sum(1), (a * a).sum(1), rtol=1e-5, atol=0)


def test_ze_eden_of_a_block_of_zeros() -> None:
    codes, scales = quantize_block(torch.zeros(1, 256), "dynamic0", 4, 128, fit="eden")
    assert torch.equal(dequantize_block(codes, scales, "dynamic0", 4, 128, 256), torch.zeros(1, 256))


@PROPERTY
@given(st.sampled_from(["4bit", "4bit_factored", "4bit_eden"]), st.integers(0, 2**31), st.floats(0, 9))
def test_no_stored_second_moment_is_zero_where_it_was_not(recipe: str, seed: int, spread: float) -> None:
    """The zero-point problem: 1 / sqrt(0) would explode (2309.01507, section 4.1)."""
    storage = make_base((64, 65), Options(algorithm="shampoo", moments=recipe), quantise=True).second
    generator = torch.Generator().manual_seed(seed)
    v = 10 ** (-spread * torch.rand(2, 64, 65, generator=generator))
    buffers = allocate(storage, 2, "cpu")
    storage.write(buffers, v)
    assert (storage.read(buffers) > 0).all()


def test_noise_of_tensors_steps_blocks_and_seeds_is_independent() -> None:
    seed_offsets = torch.tensor([1, 2], dtype=torch.int32)
    draws = [Noise(seed_offsets, t, s).uniform(k, 1 << 12) for t, s, k in [(1, 0, 1), (1, 0, 2), (2, 0, 1), (1, 1, 1)]]
    rows = torch.stack([row for draw in draws for row in draw]).double() - 0.5
    assert rows.abs().max() < 0.5
    correlation = rows @ rows.T / rows.shape[1] * 12 - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / math.sqrt(1 << 12)
    # nor the parameter's write-back
    assert not torch.equal(noise_bits(seed_offsets, 1, 0, 9, 1), noise_bits(seed_offsets, 1, 0, 9))


# --------------------------------------------------------------------------------------- through the whole optimizer

SHAPES = [(64, 65), (64, 65), (4100,), (10,), (70, 60)]


def gradients(t: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(t)
    return [torch.randn(s, generator=generator) * 0.1 for s in SHAPES]


def run(opt: Shampoo4bit, parameters, steps: range) -> None:
    for t in steps:
        for p, g in zip(parameters, gradients(t), strict=True):
            p.grad = g.to(p.dtype)
        opt.step()


def everything(opt: Shampoo4bit, parameters) -> list[torch.Tensor]:
    state = [opt.state[p][key] for p in parameters for key in sorted(opt.state[p])]
    return [p.detach() for p in parameters] + state


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(99)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


@pytest.mark.parametrize(("base", "recipe"), KINDS)
@pytest.mark.parametrize("algorithm", ["elementwise", "shampoo"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(base: str, recipe: str, algorithm: str) -> None:
    needs(recipe)
    late = 3 if recipe.startswith("4bit") else 0

    def make(ps) -> Shampoo4bit:
        often = used({"algorithm": algorithm, "stats_every": 2, "roots_every": 3, "block_size": 50})
        return optimizer(ps, recipe, base, stochastic_from=late, stochastic_rounding=True, seed=5, **often)

    whole = parameters(torch.bfloat16)
    uninterrupted = make(whole)
    run(uninterrupted, whole, range(6))
    first, second = parameters(torch.bfloat16), parameters(torch.bfloat16)
    before, after = make(first), make(second)
    run(before, first, range(4))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for p, q in zip(first, second, strict=True):
            q.copy_(p)
    run(after, second, range(4, 6))
    for a, b in zip(everything(uninterrupted, whole), everything(after, second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", ["4bit_zipsr", "4bit"])
def test_noise_does_not_depend_on_what_a_block_is_computed_with(recipe: str) -> None:
    """As on another number of ranks: named parameters alone, in another order, or all together."""
    together, alone = parameters(), parameters()
    names = [f"p{i}" for i in range(len(SHAPES))]
    options = {"seed": 3, "stochastic_from": 1}
    a = optimizer(list(zip(names, together, strict=True)), recipe, **options)
    others = [optimizer([pair], recipe, **options) for pair in zip(names, alone, strict=True)]
    run(a, together, range(3))
    for t in range(3):
        for p, g, other in zip(alone, gradients(t), others, strict=True):
            p.grad = g
            other.step()
    for p, q, other in zip(together, alone, others, strict=True):
        assert all(torch.equal(a.state[p][key], other.state[q][key]) for key in a.state[p])


def test_seed_and_step_change_the_noise_and_nothing_else_does() -> None:
    runs = []
    for seed in (0, 0, 1):
        ps = parameters()
        run(optimizer(ps, "4bit_zipsr", seed=seed), ps, range(2))
        runs.append(ps[0].detach())
        torch.manual_seed(seed + 100)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_stochastic_from_counts_the_groups_steps() -> None:
    """Up to that step the runs are the same; from it on the first moment differs."""
    ps, qs = parameters(), parameters()
    nearest, late = optimizer(ps, "4bit_eden"), optimizer(qs, "4bit_eden", stochastic_from=3)
    run(nearest, ps, range(2))
    run(late, qs, range(2))
    assert all(torch.equal(a, b) for a, b in zip(everything(nearest, ps), everything(late, qs), strict=True))
    run(nearest, ps, range(2, 3))
    run(late, qs, range(2, 3))
    assert torch.equal(ps[0], qs[0])  # the update used the moments before they were stored
    assert torch.equal(nearest.state[ps[0]]["64x65/second.codes"], late.state[qs[0]]["64x65/second.codes"])
    changed = nearest.state[ps[0]]["64x65/first.codes"] != late.state[qs[0]]["64x65/first.codes"]
    assert changed.float().mean() > 0.1
    assert torch.equal(nearest.state[ps[3]]["10/first.dense"], late.state[qs[3]]["10/first.dense"])


@pytest.mark.parametrize(("base", "recipe"), KINDS)
def test_the_update_uses_moments_before_they_are_stored(base: str, recipe: str) -> None:
    """So the first step is that of the exact base, whatever the storage."""
    needs(recipe)
    ps, qs = parameters(), parameters()
    run(optimizer(ps, recipe, base), ps, range(1))
    run(optimizer(qs, "fp32", base), qs, range(1))
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_zero_gradients_give_zero_updates(recipe: str) -> None:
    needs(recipe)
    p = torch.nn.Parameter(torch.randn(64, 65))
    before, opt = p.detach().clone(), optimizer([p], recipe, weight_decay=0.0)
    for _ in range(2):
        p.grad = torch.zeros_like(p)
        opt.step()
    assert torch.equal(p, before)
    p.grad = torch.randn_like(p)  # and the state is not spoilt
    opt.step()
    assert p.isfinite().all()
    assert not torch.equal(p, before)


BYTES = {
    "fp32": 8.0,
    "bf16": 4.0,
    "8bit": 2.04,
    "4bit": 1.1,
    "4bit_factored": 0.6,
    "4bit_eden": 1.07,
    "4bit_zipsr": 1.07,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_a_parameter_of_live_state(recipe: str) -> None:
    needs(recipe)
    p = torch.nn.Parameter(torch.randn(512, 256))
    opt = optimizer([p], recipe)
    p.grad = torch.randn_like(p)
    opt.step()
    held = sum(t.numel() * t.element_size() for t in opt.state[p].values())
    assert held / p.numel() <= BYTES[recipe] + 4 / p.numel()  # and the block's step counter


@pytest.mark.parametrize("recipe", ["8bit", "4bit", "4bit_factored", "4bit_eden", "4bit_zipsr"])
def test_parameters_under_4096_elements_are_kept_exactly(recipe: str) -> None:
    needs(recipe)
    ps = [torch.nn.Parameter(torch.randn(63, 65)), torch.nn.Parameter(torch.randn(64, 64))]
    opt = optimizer(ps, recipe)
    for p in ps:
        p.grad = torch.randn_like(p)
    opt.step()
    assert {t.dtype for t in opt.state[ps[0]].values()} == {torch.float32}
    assert torch.uint8 in {t.dtype for t in opt.state[ps[1]].values()}


def loss_after_training(moments: str, batch: int, **options) -> float:
    """Of a small non-linear regression with noisy targets, on batches (0: on all at every step)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    target = torch.randn(64, 64, generator=generator) / 8
    y = torch.tanh(x @ target) + 0.3 * torch.randn(512, 64, generator=generator)
    w = torch.nn.Parameter(torch.randn(64, 64, generator=generator) / 8)
    opt = optimizer([w], moments, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, **options)
    for t in range(200):
        rows = torch.randint(0, 512, (batch,), generator=generator) if batch else slice(None)
        opt.param_groups[0]["lr"] = 3e-3 * min(1.0, (200 - t) / 60)
        opt.zero_grad()
        (torch.tanh(x[rows] @ w) - y[rows]).square().mean().backward()
        opt.step()
    return (torch.tanh(x @ w) - y).square().mean().item()


@pytest.mark.parametrize(
    ("recipe", "worse"),
    [("8bit", 1.02), ("4bit", 1.2), ("4bit_factored", 1.05), ("4bit_eden", 1.05), ("4bit_zipsr", 1.1)],
)
def test_learns_on_batches_nearly_as_with_exact_moments(recipe: str, worse: float) -> None:
    needs(recipe)
    assert loss_after_training(recipe, 32) < worse * loss_after_training("fp32", 32)


def test_without_noise_in_the_gradients_the_first_moment_stalls_unless_rounded_stochastically() -> None:
    """Small steady gradients are rounded back to the old code at every step; with stochastic rounding they add up."""
    exact = loss_after_training("fp32", 0)
    assert loss_after_training("4bit_eden", 0) > 1.4 * exact
    assert loss_after_training("4bit_eden", 0, stochastic_from=1) < 1.05 * exact


# ------------------------------------------------------------------------------------------------- choices, refusals


def test_auto_codebooks_and_overrides() -> None:
    def kinds(**options) -> tuple[str, str]:
        moments = make_base((64, 64), Options(algorithm="shampoo", **options), quantise=True)
        return moments.first.codebook, getattr(moments.second, "codebook", "")

    assert kinds(moments="4bit") == ("dynamic", "linear0")
    assert kinds(moments="4bit", first_codebook="nf4", second_codebook="dynamic0") == ("nf4", "dynamic0")
    assert kinds(moments="4bit_factored", first_codebook="nf4") == ("nf4", "")
    assert kinds(moments="4bit_eden") == ("nf4", "dynamic0")
    assert kinds(moments="4bit_eden", second_codebook="linear0") == ("nf4", "linear0")
    assert kinds(moments="4bit_zipsr", first_codebook="dynamic") == ("dynamic", "dynamic_unsigned")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moments": "4bit", "second_codebook": "dynamic_unsigned"}, "auto, linear0, dynamic0 .*only 4bit_zipsr"),
        ({"moments": "4bit_eden", "second_codebook": "dynamic_unsigned"}, "auto, dynamic0, linear0 .*only 4bit_zipsr"),
        ({"moments": "4bit_zipsr", "second_codebook": "linear0"}, "auto, dynamic_unsigned with"),
        ({"moments": "4bit_factored", "second_codebook": "linear0"}, "must be one of auto with"),
        ({"moments": "fp32", "first_codebook": "nf4"}, "only 4-bit moments have a choice"),
        ({"moments": "8bit", "stochastic_from": 5}, "only a 4-bit first moment"),
        ({"moments": "4bit", "stochastic_from": -1}, "an integer >= 0"),
        ({"base": "sgdm", "moments": "4bit_factored"}, "one of fp32, bf16, 8bit, 4bit with base=sgdm"),
        ({"base": "sgdm", "moments": "4bit_zipsr"}, "one of fp32, bf16, 8bit, 4bit with base=sgdm"),
        ({"base": "sgdm", "moments": "4bit", "second_codebook": "linear0"}, "must be one of auto with base=sgdm"),
        ({"moments": "4bits"}, "one of fp32, bf16, 8bit, 4bit, 4bit_factored, 4bit_eden, 4bit_zipsr"),
    ],
)
def test_nonsense_is_refused_at_construction(options: dict, message: str) -> None:
    p = torch.nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(OptionError, match=message):
        Shampoo4bit([p], algorithm="elementwise", **options)
    with pytest.raises(OptionError, match=message):
        Shampoo4bit([{"params": [p], **options}], algorithm="elementwise")


def test_a_groups_options_are_checked_together_with_the_constructors() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    opt = optimizer([{"params": [p], "second_codebook": "dynamic_unsigned", "stochastic_from": 9}], "4bit_zipsr")
    with pytest.raises(OptionError, match="only 4-bit moments have a choice"):
        opt.add_param_group({"params": [q], "moments": "fp32", "first_codebook": "nf4"})
    assert len(opt.param_groups) == 1


def test_8_bits_without_bitsandbytes_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "find_spec", lambda name: None)
    p = torch.nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(ImportError, match=r"hf-shampoo4\[bnb\]"):
        optimizer([p], "8bit")


def test_a_checkpoint_of_another_recipe_is_refused() -> None:
    ps, qs = parameters(), parameters()
    a, b = optimizer(ps, "4bit_eden"), optimizer(qs, "4bit_zipsr")
    run(a, ps, range(1))
    with pytest.raises(ValueError, match=r"moments=4bit_eden, this run has moments=4bit_zipsr"):
        b.load_state_dict(a.state_dict())


# ------------------------------------------------------------------------------------------------------- diagnostics


def test_radial_bias() -> None:
    m = torch.randn(3, 4, 5)
    m[2] = 0.0
    torch.testing.assert_close(radial_bias(m, 0.9 * m), torch.tensor([-0.1, -0.1, 0.0], dtype=torch.float64))
    assert radial_bias(m, m).tolist() == [0.0, 0.0, 0.0]


def test_nf4_shrinks_a_moment_less_when_rounded_stochastically() -> None:
    """2610.12444, table 11: the larger error has the smaller bias."""
    m = torch.randn(1, 256, 256) ** 3
    storage, buffers = Blockwise((256, 256), "nf4", 4, 128), {}
    buffers = allocate(storage, 1, "cpu")
    storage.write(buffers, m)
    nearest = storage.read(buffers)
    noise = Noise(torch.tensor([1], dtype=torch.int32), 1, 0)
    storage.write(buffers, m, Stochastic(noise.uniform(FIRST_STREAM, m.numel())))
    stochastic = storage.read(buffers)
    assert (stochastic - m).norm() > (nearest - m).norm()
    assert abs(radial_bias(m, stochastic).item()) < abs(radial_bias(m, nearest).item())


def test_unmoved_counts_codes() -> None:
    a = torch.tensor([[0x12, 0x34], [0x56, 0x78]], dtype=torch.uint8)
    b = torch.tensor([[0x12, 0x35], [0x65, 0x87]], dtype=torch.uint8)
    assert unmoved(a, b, 4).tolist() == [0.75, 0.0]
    assert unmoved(a, b, 8).tolist() == [0.5, 0.0]


# ------------------------------------------------------------------------------------------ gradients that end

WAYS = {
    **{f"adamw-{m}": {"algorithm": "elementwise", "moments": m} for m in ("4bit", "4bit_factored", "4bit_eden")},
    "adamw-4bit_zipsr": {"algorithm": "elementwise", "moments": "4bit_zipsr"},
    "sgdm": {"algorithm": "elementwise", "base": "sgdm"},
    "shampoo": {"algorithm": "shampoo", "factor": "direct"},
    "soap": {"algorithm": "soap"},
    "kl_shampoo": {"algorithm": "kl_shampoo"},
}


def moved_columns(faint: float, **options: Any) -> tuple[float, float]:
    """How far some columns go in 250 steps after their gradients have become `faint`, and the largest step there."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(48, 192))
    optimizer = Shampoo4bit([p], lr=1.0, betas=(0.9, 0.95), **options)
    drawn = 0.5 * torch.randn(p.shape, generator=generator)
    quiet, start, largest = slice(10, 14), torch.zeros(()), 0.0
    for t in range(350):
        before = p.detach().clone()
        p.grad = torch.randn(p.shape, generator=generator) + drawn
        if t >= 100:
            p.grad[:, quiet] *= faint
        if t == 100:
            start = before
        optimizer.step()
        if t >= 100:
            largest = max(largest, float((p.detach() - before)[:, quiet].square().mean().sqrt()))
    return float((p.detach() - start)[:, quiet].square().mean().sqrt()), largest


@pytest.mark.parametrize("faint", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_gradients_any_more_comes_to_rest_as_in_32_bits(way: str, faint: float) -> None:
    """Dead units: to the nearest of 16 levels their moment stayed where it was, while the second one, or the scale of
    their column, was forgotten: steps of 8,000 learning rates with AdamW's recipe."""
    far, largest = moved_columns(faint, **WAYS[way])
    exact, exact_largest = moved_columns(faint, **{**WAYS[way], "moments": "fp32"})
    assert far < (2.5 if faint == 0.1 else 1.5) * exact  # .1: 7 times as far before
    assert largest < 2.5 * exact_largest


@pytest.mark.parametrize("way", ["adamw-4bit", "adamw-4bit_eden", "sgdm"])
def test_what_has_none_on_most_steps_and_zeros_on_the_others_comes_to_rest(way: str) -> None:
    """An expert that is seldom chosen, a parameter of another task: its gradients are None on other steps."""
    rested = []
    for moments in (WAYS[way].get("moments", "4bit"), "fp32"):
        generator = torch.Generator().manual_seed(0)
        p, q = torch.nn.Parameter(torch.zeros(64, 64)), torch.nn.Parameter(torch.zeros(64, 64))
        ours = Shampoo4bit([p, q], lr=1.0, betas=(0.9, 0.95), **{**WAYS[way], "moments": moments})
        start = p.detach()
        for t in range(400):
            q.grad = torch.randn(64, 64, generator=generator)
            p.grad = None if t % 3 else torch.randn(64, 64, generator=generator)
            if p.grad is not None and t > 100:
                p.grad[:, :8] = 0.0
            ours.step()
            if t == 102:
                start = p.detach().clone()
        rested.append(float((p.detach() - start)[:, :8].square().mean().sqrt()))
    assert rested[0] < 1.5 * rested[1]


@pytest.mark.parametrize("b1", [0.9, 0.95, 0.98])
@pytest.mark.parametrize("codebook", ["nf4", "dynamic"])
def test_live_moments_are_as_large_as_to_the_nearest_level(codebook: str, b1: float) -> None:
    """Gradients that are tiny by chance end nothing: <Q(m), m> over <m, m> is hardly less than without settling."""
    storage, blocks, shrunk = Blockwise((128,), codebook, 4, 128), 400, dict[bool, float]()
    for settles in (False, True):
        generator = torch.Generator().manual_seed(0)
        m, exact, found = torch.zeros(blocks, 128), torch.zeros(blocks, 128), []
        for t in range(1, 151):
            g = torch.randn(blocks, 128, generator=generator)
            m, exact = b1 * m + (1 - b1) * g, b1 * exact + (1 - b1) * g
            noise = Noise(torch.arange(blocks, dtype=torch.int32), t, 0)
            m = storage.read(
                storage.encoded(m, Settling(g, ENDED, noise.multiply_shift(FIRST_STREAM)) if settles else None)
            )
            found.append(float((m * exact).sum() / exact.square().sum()))
        shrunk[settles] = sum(found[50:]) / 100
    assert shrunk[True] > shrunk[False] - 0.01


def test_a_moment_falls_where_its_block_has_others() -> None:
    """By .9 a step on average, stored in between; what lies on its level, for its block falls along, stays there."""
    storage, blocks = Blockwise((200 * 128,), "nf4", 4, 128), 200
    is_large = torch.arange(blocks * 128).unsqueeze(0) % 128 == 0
    g, start = is_large.float(), torch.where(is_large, 4.0, 2.0)
    noise = lambda t: Noise(torch.tensor([7], dtype=torch.int32), t, 0)  # noqa: E731
    found = {}
    for settles in (False, True):
        m = start
        for t in range(1, 11):
            m = torch.where(g > 0, 4.0, 0.9 * m)
            rounding = Settling(g, 0.0, noise(t).multiply_shift(FIRST_STREAM)) if settles else None
            m = storage.read(storage.encoded(m, rounding))
        found[settles] = float(m[~is_large].mean())
    assert found[False] > 1.5
    assert found[True] == pytest.approx(2.0 * 0.9**10, rel=0.02)
    alone = roundtrip(storage, torch.randn(1, blocks * 128))
    for t in range(30):
        expected = 0.9 * alone
        alone = storage.read(
            storage.encoded(expected, Settling(torch.zeros_like(alone), 0.0, noise(t).multiply_shift(FIRST_STREAM)))
        )
        torch.testing.assert_close(alone, expected)
