"""The quantiser against brute force in float64, its own documentation, bitsandbytes and torchao."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from hf_shampoo4.numerics import quantize
from hf_shampoo4.numerics.codebooks import CODEBOOKS, ONLY_4_BITS, levels
from hf_shampoo4.numerics.quantize import (
    FLOAT32_MAX,
    Fit,
    decode,
    dequantize_block,
    dequantize_rank1,
    encode,
    pack,
    packed_length,
    quantize_block,
    quantize_rank1,
)
from hf_shampoo4.numerics.rounding import Noise, PreconditionerSpace, Settling, Stochastic
from tests.support.reference import PROPERTY, excess_error, nearest, scales_of_rank1, scales_of_rows

SIGNED = [name for name in CODEBOOKS if levels(name, 4)[0] < 0]
UNSIGNED = [name for name in CODEBOOKS if name not in SIGNED]
KINDS = [(name, bits) for name in sorted(CODEBOOKS) for bits in (4, 8) if bits == 4 or name not in ONLY_4_BITS]

kinds = st.sampled_from(KINDS)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def numbers(shape: tuple[int, ...], name: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Heavy-tailed, some zeros; not negative where the codebook is not."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) ** 3 * (torch.rand(shape, generator=generator) > 0.1)
    return (x.abs() if name in UNSIGNED else x).to(dtype)


def roundtrip(x: torch.Tensor, name: str, bits: int, block: int) -> torch.Tensor:
    return dequantize_block(*quantize_block(x, name, bits, block), name, bits, block, x.shape[-1])


def array(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


# ------------------------------------------------------------------------------------------------ nearest level


@PROPERTY
@given(kinds, st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=50))
def test_encode_picks_the_nearest_level(kind: tuple[str, int], values: list[float]) -> None:
    table = levels(*kind)
    codes = encode(torch.tensor(values), *kind).tolist()
    for x, code in zip(values, codes, strict=True):
        assert abs(x - table[code]) <= abs(x - table[nearest(x, table)]) + 1e-7


@pytest.mark.parametrize(("name", "bits"), KINDS)
def test_a_tie_goes_to_the_lower_level_and_every_level_is_reached(name: str, bits: int) -> None:
    table = torch.tensor(levels(name, bits), dtype=torch.float64)
    middles = ((table[1:] + table[:-1]) / 2).float()
    assert encode(middles, name, bits).tolist() == list(range(len(table) - 1))
    assert encode(torch.nextafter(middles, torch.tensor(2.0)), name, bits).tolist() == list(range(1, len(table)))
    assert encode(table.float(), name, bits).tolist() == list(range(len(table)))


@PROPERTY
@given(kinds, sizes, st.integers(1, 70), st.integers(1, 40), seeds, dtypes)
def test_blocks_decode_to_the_nearest_level(kind, rows, length, block, seed, dtype) -> None:
    x = numbers((rows, length), kind[0], seed, dtype)
    codes, scales = quantize_block(x, *kind, block)
    assert codes.shape == (rows, packed_length(length, kind[1]))
    assert codes.dtype == torch.uint8
    assert scales.shape == (rows, math.ceil(length / block))
    assert scales.dtype == torch.float32
    decoded = dequantize_block(codes, scales, *kind, block, length)
    assert decoded.dtype == torch.float32
    scale = scales_of_rows(array(x), block)
    assert excess_error(array(x), array(decoded), scale, levels(*kind)) < 1e-6


@PROPERTY
@given(kinds, st.integers(1, 12), st.integers(1, 12), seeds, dtypes)
def test_rank1_decodes_to_the_nearest_level(kind, m, n, seed, dtype) -> None:
    x = numbers((3, m, n), kind[0], seed, dtype)
    codes, rows, columns = quantize_rank1(x, *kind)
    assert codes.shape == (3, packed_length(m * n, kind[1]))
    assert torch.equal(rows, x.float().abs().amax(2))
    assert torch.equal(columns, x.float().abs().amax(1))
    decoded = dequantize_rank1(codes, rows, columns, *kind)
    for matrix, result in zip(x, decoded, strict=True):
        scale = scales_of_rank1(array(matrix))
        assert excess_error(array(matrix), array(result), scale, levels(*kind)) < 1e-6


@PROPERTY
@given(kinds, st.integers(1, 70), st.integers(1, 40), seeds, dtypes)
def test_half_precision_input_counts_as_the_float32_that_it_is(kind, length, block, seed, dtype) -> None:
    x = numbers((2, length), kind[0], seed, dtype)
    for half, full in zip(quantize_block(x, *kind, block), quantize_block(x.float(), *kind, block), strict=True):
        assert torch.equal(half, full)


def test_input_is_not_changed_and_layout_does_not_matter() -> None:
    x = numbers((37, 21), "linear2", 0)
    before = x.clone()
    transposed = quantize_block(x.T, "linear2", 4, 16)
    assert torch.equal(x, before)
    for a, b in zip(transposed, quantize_block(x.T.contiguous(), "linear2", 4, 16), strict=True):
        assert torch.equal(a, b)


def count_below(x: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """What `_count_below` looks up, by its definition."""
    return (x.unsqueeze(-1) > thresholds).sum(-1, dtype=torch.uint8)


@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize(("name", "bits"), KINDS)
def test_look_up_counts_thresholds_over_all_of_float32(name: str, bits: int, floor: bool) -> None:
    """Every cell's ends and middle, the neighbours of every threshold on both sides of zero, and both infinities."""
    thresholds = quantize._thresholds(name, bits, floor)
    cells = torch.arange(1 << 16, dtype=torch.int32) << 16
    near = torch.cat([thresholds.view(torch.int32) + d for d in (-2, -1, 0, 1, 2)])
    x = torch.cat([cells, cells | 0x8000, cells | 0xFFFF, near, near ^ -(1 << 31)]).view(torch.float32)
    x = x[~x.isnan()]
    cells = quantize._cells(name, bits, floor, x.device)
    for part in x.split(1 << 14):
        assert torch.equal(quantize._count_below(part, cells), count_below(part, thresholds))


@pytest.mark.parametrize("fit", ["largest", "eden", "least_squares"])
@pytest.mark.parametrize(("name", "bits"), [("linear2", 4), ("dynamic0", 4), ("dynamic", 8)])
def test_pieces_are_the_whole(name: str, bits: int, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is worked on at a time changes nothing, whether rows are shorter or longer than a piece."""
    for shape in ((1, 97), (7, 13), (3, 5, 8), (2, 24)):
        x = numbers(shape, name, 0)
        uniform = torch.rand(shape)
        bias = torch.rand(*shape[:-1], 1)
        roundings = (None, Stochastic(uniform), PreconditionerSpace(uniform, bias, 1e-8))
        for rounding in roundings[: 3 if name in UNSIGNED else 2]:
            results = []
            for piece in (1, 20, 1 << 18):
                monkeypatch.setattr(quantize, "CPU_PIECE", piece)
                codes, scales = quantize_block(x, name, bits, 5, rounding, fit)
                results.append((codes, scales, dequantize_block(codes, scales, name, bits, 5, shape[-1])))
            for result in results[:-1]:
                assert all(torch.equal(a, b) for a, b in zip(result, results[-1], strict=True))


@pytest.mark.parametrize("name", ["nf4", "dynamic", "linear2"])
def test_what_has_ended_is_rounded_between_its_levels_in_any_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a noise that is a function of its position; all else to the nearest level."""
    hashing = Noise(torch.zeros(1, dtype=torch.int32), step=3, seed=5).multiply_shift(1)
    for shape in ((1, 97), (7, 13), (2, 24)):
        x, g = numbers(shape, name, 0), torch.randn(shape) * (torch.rand(shape) < 0.5)
        ended = g.abs() <= x.abs() / 8
        assert 0.2 < ended.float().mean() < 0.9
        noise = torch.tensor([(j * hashing[0] + hashing[1]) % 2**32 / 2**32 for j in range(shape[1])])
        around = quantize_block(x, name, 4, 5, Stochastic(1 - noise.expand(shape)))  # the lower one first
        between, nearest = (unpacked(codes, shape[1]) for codes in (around[0], quantize_block(x, name, 4, 5)[0]))
        for piece in (1, 20, 1 << 18):
            monkeypatch.setattr(quantize, "CPU_PIECE", piece)
            codes, scales = quantize_block(x, name, 4, 5, Settling(g, 1 / 8, hashing))
            assert torch.equal(unpacked(codes, shape[1]), torch.where(ended, between, nearest))
            assert torch.equal(scales, around[1])


def unpacked(codes: torch.Tensor, length: int) -> torch.Tensor:
    return torch.stack([codes >> 4, codes & 15], -1).flatten(-2)[..., :length]


@pytest.mark.parametrize("fit", ["largest", "least_squares"])
@pytest.mark.parametrize(("name", "bits"), [("linear2", 4), ("nf4", 4), ("dynamic0", 4), ("dynamic", 8)])
def test_a_gpus_few_operations_give_the_same_bits(
    name: str, bits: int, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.cat([numbers((5, 64), name, 1), torch.zeros(1, 64), 1e-42 * numbers((1, 64), name, 2)])
    x[2, 17] = torch.inf
    x[3, :16] = torch.tensor(levels(name, bits))[torch.arange(16) % len(levels(name, bits))]
    expected = quantize_block(x, name, bits, 16, None, fit)
    decoded = dequantize_block(*expected, name, bits, 16, 64)
    monkeypatch.setattr(quantize, "_has_whole_blocks", lambda device, length, block: length % block == 0)
    for piece in (20, 1 << 18):
        monkeypatch.setattr(quantize, "CPU_PIECE", piece)
        assert all(map(torch.equal, quantize_block(x, name, bits, 16, None, fit), expected))
    assert torch.equal(dequantize_block(*expected, name, bits, 16, 64), decoded)


@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 1, 50), (40, 2, 3), (2, 3, 5, 4)])
def test_rank1_in_pieces_is_the_whole(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(shape, "linear0", 0)
    results = []
    for piece in (1, 20, 1 << 18):
        monkeypatch.setattr(quantize, "CPU_PIECE", piece)
        stored = quantize_rank1(x, "linear0", 4)
        results.append((*stored, dequantize_rank1(*stored, "linear0", 4)))
    for result in results[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[-1], strict=True))


# ------------------------------------------------------------------------------------------------------- packing


@PROPERTY
@given(st.integers(1, 33), st.integers(1, 4), seeds)
def test_packing_round_trip(length: int, rows: int, seed: int) -> None:
    codes = torch.randint(16, (rows, length), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, 4)
    assert packed.shape == (rows, (length + 1) // 2)
    table = torch.tensor(levels("linear2", 4))
    assert torch.equal(decode(packed, "linear2", 4, length), table[codes.int()])


def test_the_first_code_is_in_the_high_half() -> None:
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x12, 0x30]]
    assert pack(torch.ones(2, 4, 3, dtype=torch.uint8), 4).tolist() == 2 * [4 * [[0x11, 0x10]]]
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 8).tolist() == [[1, 2, 3]]


# --------------------------------------------------------------------------------------------------- idempotence


@PROPERTY
@given(kinds.filter(lambda kind: kind[0] != "dynamic"), st.integers(1, 70), st.integers(1, 40), seeds)
def test_quantising_a_decoded_tensor_changes_nothing(kind, length, block, seed) -> None:
    # Not so for signed `dynamic`: it has +1 but no -1, so a block whose largest magnitude is negative shrinks.
    once = roundtrip(numbers((3, length), kind[0], seed), *kind, block)
    assert torch.equal(roundtrip(once, *kind, block), once)


@PROPERTY
@given(st.sampled_from([kind for kind in KINDS if kind[0] in UNSIGNED]), st.integers(1, 9), st.integers(1, 9), seeds)
def test_rank1_of_a_decoded_matrix_changes_nothing(kind, m, n, seed) -> None:
    once = dequantize_rank1(*quantize_rank1(numbers((2, m, n), kind[0], seed), *kind), *kind)
    assert torch.equal(dequantize_rank1(*quantize_rank1(once, *kind), *kind), once)


def test_signed_dynamic_shrinks_a_negative_extreme() -> None:
    assert roundtrip(torch.tensor([[-1.0, 0.5]]), "dynamic", 4, 2)[0, 0].item() == pytest.approx(-0.8875)


# ------------------------------------------------------------------------------------------------ special values


@pytest.mark.parametrize(("name", "bits"), KINDS)
def test_zeros_decode_to_zeros(name: str, bits: int) -> None:
    x = torch.zeros(2, 10)
    x[1, 5:] = 1.0  # a block of zeros beside one that is not
    assert torch.equal(roundtrip(x, name, bits, 5), x)
    assert torch.equal(dequantize_rank1(*quantize_rank1(x, name, bits), name, bits)[:, 5:], x[:, 5:])


@pytest.mark.parametrize(("name", "bits"), KINDS)
def test_denormals_are_kept(name: str, bits: int) -> None:
    x = torch.tensor([[1e-40, 3e-41, 0.0, 1e-41]])
    decoded = roundtrip(x, name, bits, 4)
    assert decoded[0, 0].item() == x[0, 0].item()
    table = levels(name, bits)
    assert excess_error(array(x), array(decoded), scales_of_rows(array(x), 4), table) < 1e-4  # 1e-40 has 17 bits


@pytest.mark.parametrize(("name", "bits"), [kind for kind in KINDS if kind[0] in SIGNED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinity_counts_as_the_largest_float32(name: str, bits: int, dtype: torch.dtype) -> None:
    x = torch.tensor([[math.inf, -math.inf, 1.0, 0.0], [1.0, -0.5, 0.25, 0.0]], dtype=dtype)
    codes, scales = quantize_block(x, name, bits, 4)
    assert scales[0].item() == FLOAT32_MAX
    decoded = dequantize_block(codes, scales, name, bits, 4, 4)
    assert decoded[0, 0].item() == FLOAT32_MAX
    assert decoded[0, 1].item() == torch.tensor(levels(name, bits)[0]).mul(FLOAT32_MAX).item()
    assert decoded[0, 2:].tolist() == [0.0, 0.0]
    assert torch.equal(decoded[1:], roundtrip(x[1:], name, bits, 4))
    for fit in ("eden", "least_squares"):
        assert torch.isfinite(quantize_block(x, name, bits, 4, fit=fit)[1]).all()
    assert torch.isfinite(dequantize_rank1(*quantize_rank1(x, name, bits), name, bits)).all()


@pytest.mark.parametrize("fit", ["largest", "eden", "least_squares"])
@pytest.mark.parametrize(("name", "bits"), KINDS)
def test_a_block_with_nan_decodes_to_zeros(name: str, bits: int, fit: Fit) -> None:
    x = torch.tensor([[1.0, math.nan, 0.5, 0.25]])
    fitted = quantize_block(x, name, bits, 2, fit=fit)
    assert fitted[1][0, 0].item() == 0.0
    codes, scales = quantize_block(x, name, bits, 2)
    assert scales[0, 0].item() == 0.0
    decoded = dequantize_block(codes, scales, name, bits, 2, 4)
    assert decoded[0, :2].abs().tolist() == [0.0, 0.0]
    assert torch.equal(decoded[:, 2:], roundtrip(x[:, 2:], name, bits, 2))
    assert torch.isfinite(dequantize_rank1(*quantize_rank1(x, name, bits), name, bits)).all()


@pytest.mark.parametrize("scale", [1e-34, 1e-20, 1.0, 1e20, 1e38])
@pytest.mark.parametrize("name", SIGNED)
def test_scale_does_not_matter(name: str, scale: float) -> None:
    x = numbers((4, 64), name, 0)
    x /= x.abs().max()
    torch.testing.assert_close(roundtrip(x * scale, name, 4, 16) / scale, roundtrip(x, name, 4, 16), atol=0, rtol=1e-5)


# ----------------------------------------------------------------------------------------------- trusted outsiders


def differing(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Share of entries that differ by more than rounding."""
    return (~torch.isclose(ours, theirs, rtol=1e-6, atol=0)).float().mean().item()


def excess(x: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor, block: int) -> tuple[float, float]:
    """How much farther from x theirs is than ours, in scales: the least and the most."""
    scale = torch.tensor(scales_of_rows(array(x).reshape(1, -1), block)).view_as(x)
    by = ((theirs.double() - x).abs() - (ours.double() - x).abs()) / scale
    return by.min().item(), by.max().item()


@pytest.mark.parametrize("block", [64, 128])
def test_nf4_as_bitsandbytes(block: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(64, 128)
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(x, blocksize=block, quant_type="nf4"))
    ours = roundtrip(x.view(1, -1), "nf4", 4, block).view_as(x)
    assert differing(ours, theirs) < 1e-3
    least, most = excess(x, ours, theirs, block)
    assert -1e-6 < least
    assert most < 1e-6


@pytest.mark.parametrize(("name", "bits"), KINDS)
def test_blockwise_as_bitsandbytes_with_the_same_code(name: str, bits: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = numbers((1, 8192), name, 0)
    table = torch.tensor(levels(name, bits))
    code = torch.cat([table, torch.full((256 - len(table),), math.inf)])  # the kernel always reads 256 entries
    quantised, state = functional.quantize_blockwise(x, code=code, blocksize=256)
    theirs = table[quantised.int()] * state.absmax.repeat_interleave(256)
    ours = roundtrip(x, name, bits, 256)
    # Their CPU kernel rounds x to a grid of about 3e-5 first, so a few of theirs are not nearest (0 among them, where
    # an 8-bit code has a level as near as that); ours always is.
    assert differing(ours[x != 0], theirs[x != 0]) < (1e-3 if bits == 4 else 0.15)
    least, most = excess(x, ours, theirs, 256)
    assert -1e-6 < least
    assert most < 4e-5


@pytest.mark.parametrize(("name", "signed"), [("dynamic", True), ("linear0", False)])
def test_moments_as_torchao(name: str, signed: bool) -> None:
    torchao = pytest.importorskip("torchao.optim.subclass_4bit")
    x = numbers((64, 128), name, 0)
    state = torchao.OptimState4bit.zeros(x.shape, signed=signed, block_size=128)
    state.copy_(x)
    codes, scales = quantize_block(x.view(1, -1), name, 4, 128)
    theirs, ours = state.dequantize(), dequantize_block(codes, scales, name, 4, 128, x.numel()).view_as(x)
    torch.testing.assert_close(scales.view(-1), state.scale, rtol=0, atol=0)
    assert differing(ours, theirs) < 1e-3
    least, most = excess(x, ours, theirs, 128)
    assert -1e-6 < least
    assert most < 1e-6
    assert (codes.view(-1) == state.codes).float().mean() > 0.999  # the same bytes: packed in the same order
