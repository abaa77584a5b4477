"""The code tables, against the papers and docs/design.md, and against the libraries that they come from."""

from __future__ import annotations

import math

import pytest
import torch

from hf_shampoo4.numerics.codebooks import CODEBOOKS, ONLY_4_BITS, levels
from tests.support.reference import LEVELS


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_levels_are_those_of_the_papers(name: str) -> None:
    assert levels(name, 4) == pytest.approx(LEVELS[name], abs=1e-15)


def test_linear2_in_full() -> None:
    squares = [j * j / 225 for j in (15, 13, 11, 9, 7, 5, 3)]
    assert levels("linear2", 4) == pytest.approx(
        [-x for x in squares] + [0.0] + [j * j / 225 for j in range(1, 16, 2)], abs=1e-15
    )
    assert levels("linear2", 4)[7] == 0.0  # level 7 is exactly 0, not the -1/225 that it replaces


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", sorted(CODEBOOKS))
def test_shape_of_every_codebook(name: str, bits: int) -> None:
    if name in ONLY_4_BITS and bits == 8:
        pytest.skip(f"{name} has 4 bits")
    table = levels(name, bits)
    assert list(table) == sorted(set(table))
    assert len(table) == 2**bits - (name == "dynamic0")
    assert table[-1] == 1.0
    signed = name in ("linear2", "dynamic", *ONLY_4_BITS)
    assert (table[0] < 0) == signed
    assert table[0] >= -1.0
    assert (0.0 in table) == (name not in ("linear0", "dynamic0"))
    assert all(math.isfinite(x) for x in table)


def test_dynamic0_is_dynamic_unsigned_without_its_zero() -> None:
    assert levels("dynamic0", 4) == levels("dynamic_unsigned", 4)[1:]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("name", "signed"), [("dynamic", True), ("dynamic_unsigned", False)])
def test_dynamic_is_bitsandbytes_map(name: str, signed: bool, bits: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed, max_exponent_bits=bits - 1, total_bits=bits).unique()
    torch.testing.assert_close(torch.tensor(levels(name, bits)), theirs, rtol=0, atol=6e-8)


def test_dynamic_and_linear0_are_torchaos_maps() -> None:
    torchao = pytest.importorskip("torchao.optim.subclass_4bit")
    assert levels("dynamic", 4) == pytest.approx(torchao.get_qmap_signed(), abs=6e-8)
    assert levels("linear0", 4) == pytest.approx(torchao.get_qmap_unsigned(), abs=6e-8)


def test_dynamic_8_bits_are_torchaos_maps() -> None:
    utils = pytest.importorskip("torchao.optim.quant_utils")
    assert levels("dynamic", 8) == pytest.approx(utils.create_dynamic_map(True, 7, 8), abs=6e-8)
    assert levels("dynamic_unsigned", 8) == pytest.approx(utils.create_dynamic_map(False, 7, 8), abs=6e-8)


def test_nf4_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(torch.tensor(levels("nf4", 4)), theirs, rtol=0, atol=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown codebook 'nf5'; known: dynamic, dynamic0"):
        levels("nf5", 4)
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        levels("linear2", 3)
    for name in ONLY_4_BITS:
        with pytest.raises(ValueError, match=f"{name} has 4 bits, not 8"):
            levels(name, 8)


def test_lloyd16_is_lloyds_fixed_point() -> None:
    """Each level is the mean of its cell, every block weighing as its scale squared; but for the ends and zero."""
    x = torch.randn(1 << 18, 16, dtype=torch.float64)
    scale = x.abs().amax(-1, keepdim=True)
    table = torch.tensor(levels("lloyd16", 4), dtype=torch.float64)
    code = torch.bucketize(x / scale, (table[1:] + table[:-1]) / 2)
    weight = (scale**2).expand_as(x)
    sums, weights = (
        torch.zeros(16, dtype=torch.float64).index_add_(0, code.flatten(), y.flatten())
        for y in (x / scale * weight, weight)
    )
    free = torch.tensor([0 < j < 15 and j != 7 for j in range(16)])
    torch.testing.assert_close((sums / weights)[free], table[free], atol=1e-3, rtol=0)
    assert (scale * table[code] - x).norm() / x.norm() == pytest.approx(0.0746, abs=2e-4)
