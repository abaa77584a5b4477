"""Stochastic rounding: unbiased, to neighbours only, and a function of (seed, step, block, position)."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from hf_shampoo4.numerics.rounding import noise_at, noise_bits, to_bfloat16
from tests.support.reference import PROPERTY

SEED_OFFSETS = torch.tensor([-5, 0, 7, 2**31 - 1], dtype=torch.int32)


def neighbours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two bfloat16 numbers around x: towards zero, and away from it."""
    down = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    up = ((x.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    return down, up


@PROPERTY
@given(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=20), st.integers(0, 2**31))
def test_the_result_is_a_neighbour(values: list[float], seed: int) -> None:
    x = torch.tensor(values)
    noise = noise_bits(torch.tensor([1], dtype=torch.int32), 1, seed, len(values))[0]
    rounded = to_bfloat16(x, noise)
    assert rounded.dtype == torch.bfloat16
    down, up = neighbours(x)
    assert ((rounded.float() == down) | (rounded.float() == up)).all()


def test_numbers_that_bfloat16_has_stay() -> None:
    x = torch.randn(1000).bfloat16().float()
    assert torch.equal(to_bfloat16(x, noise_bits(SEED_OFFSETS[:1], 3, 0, 1000)[0]).float(), x)


@pytest.mark.parametrize("value", [1.0 + 1 / 1024, -3.1415926, 1e-30, -7e8])
def test_unbiased(value: float) -> None:
    count = 1 << 16
    x = torch.full((count,), value)
    down, up = (t[0].double().item() for t in neighbours(x))
    share = (x[0].double().item() - down) / (up - down)  # of the roundings that go up
    rounded = to_bfloat16(x, noise_bits(SEED_OFFSETS[:1], 1, 0, count)[0]).double()
    found = (rounded == up).double().mean().item()
    assert abs(found - share) < 5 * (share * (1 - share) / count) ** 0.5


def test_noise_is_uniform_in_every_bit_and_uncorrelated() -> None:
    noise = noise_bits(SEED_OFFSETS, 1, 0, 1 << 14)
    deviation = 5 * 0.5 / noise.numel() ** 0.5
    bits = [(noise >> k & 1).double() for k in range(32)]
    assert max(abs(b.mean().item() - 0.5) for b in bits) < deviation
    low = (noise & 0xFFFF).double() / 65535 - 0.5
    for a, b in ((low[0], low[1]), (low[0, :-1], low[0, 1:]), (low[2], low[3])):  # blocks, and neighbouring positions
        assert abs((a * b).mean().item()) < 5 / 12 / len(a) ** 0.5


def test_noise_depends_on_each_of_its_arguments_and_on_nothing_else() -> None:
    a = noise_bits(SEED_OFFSETS, 5, 1, 100)
    torch.manual_seed(123)
    assert torch.equal(a, noise_bits(SEED_OFFSETS, 5, 1, 100))
    assert torch.equal(a[2:3], noise_bits(SEED_OFFSETS[2:3], 5, 1, 100))  # not on the blocks beside it
    assert torch.equal(a[:, :40], noise_bits(SEED_OFFSETS, 5, 1, 40))
    assert (a != noise_bits(SEED_OFFSETS, 6, 1, 100)).float().mean() > 0.99
    assert (a != noise_bits(SEED_OFFSETS, 5, 2, 100)).float().mean() > 0.99
    assert (a[0] != a[1]).float().mean() > 0.99
    assert noise_bits(SEED_OFFSETS, 10**7, 2**40 + 3, 4).shape == (4, 4)  # any seed and step


def literal(seed_offset: int, step: int, seed: int, stream: int, position: int) -> int:
    """One number of the noise in Python's integers: Wellons' lowbias32, over and over."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    start = mix((seed_offset + seed * 0x9E3779B9) % 2**32)
    start = mix((start + step * 0x85EBCA6B) % 2**32)
    if stream:
        start = mix((start + stream * 0xC2B2AE35) % 2**32)
    return mix((mix(position) + start) % 2**32)


@pytest.mark.parametrize("stream", [0, 2])
@pytest.mark.parametrize(("step", "seed"), [(1, 0), (5, 1), (10**7, 2**40 + 3)])
def test_the_noise_is_the_one_that_old_checkpoints_were_trained_with(step: int, seed: int, stream: int) -> None:
    """A resume by a later version must draw the same numbers."""
    positions = [0, 1, 2, 1000, 2**31 - 1]
    found = noise_at(SEED_OFFSETS, step, seed, torch.tensor(positions, dtype=torch.int32), stream)
    expected = [
        [literal(seed_offset, step, seed, stream, i) for i in positions] for seed_offset in SEED_OFFSETS.tolist()
    ]
    assert (found.long() % 2**32).tolist() == expected
