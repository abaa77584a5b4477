"""Rotations in TF32 and bfloat16: on a CPU their operands are rounded as a GPU rounds them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.numerics import precision as p
from hf_shampoo4.numerics.precision import exact_float32, lacks, rotate, rotation_precision, rounded


@pytest.mark.parametrize(("precision", "bits"), [("tf32", 10), ("bfloat16", 7)])
def test_operands_keep_as_many_bits_as_they_say(precision: str, bits: int) -> None:
    x = torch.randn(1000, dtype=torch.float64).float()
    mantissa, exponent = torch.frexp(x.double())
    nearest = torch.ldexp((mantissa * 2.0 ** (bits + 1)).round() * 2.0 ** -(bits + 1), exponent)  # ties go to even
    assert torch.equal(rounded(x, precision).double(), nearest)
    ties = torch.tensor([1 + 2.0 ** -(bits + 1), 1 + 3 * 2.0 ** -(bits + 1), -1 - 2.0 ** -(bits + 1), 0.0])
    assert rounded(ties, precision).tolist() == [1.0, 1 + 2.0 ** (1 - bits), -1.0, 0.0]
    assert torch.equal(rounded(x.view(10, 100).T, precision), rounded(x, precision).view(10, 100).T)


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-6), ("tf32", 1e-3), ("bfloat16", 8e-3)])
def test_a_rotation_errs_by_its_operands_rounding_and_no_more(precision: str, error: float) -> None:
    torch.manual_seed(0)
    a, b = (torch.linalg.qr(torch.randn(2, k, k)).Q for k in (96, 64))
    x = torch.randn(2, 96, 64)
    exact = a.double().mT @ x.double() @ b.double()
    found = rotate(a, x, b, precision)
    assert found.dtype == torch.float32
    relative = (torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact)).max()
    assert error / 20 < relative < error
    assert torch.equal(rotate(None, x, b, precision), rotate(None, x, b, precision))
    assert rotate(None, x, None, precision) is x


def test_float32_rotations_are_plain_products() -> None:
    a, x, b = torch.randn(2, 8, 8), torch.randn(2, 8, 6), torch.randn(2, 6, 6)
    assert torch.equal(rotate(a, x, b), a.mT @ x @ b)


def test_tf32_is_on_for_the_products_alone() -> None:
    matmul = torch.backends.cuda.matmul
    newer = hasattr(matmul, "fp32_precision")  # and reading the older one then is an error
    name, off, on = ("fp32_precision", "ieee", "tf32") if newer else ("allow_tf32", False, True)
    before = getattr(matmul, name)
    with exact_float32("cuda"):
        assert getattr(matmul, name) == off
        with p._float32_products("cuda", exact=False):
            assert getattr(matmul, name) == on
        assert getattr(matmul, name) == off
    assert getattr(matmul, name) == before


def test_auto_is_float32_on_a_cpu_and_tf32_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rotation_precision("auto", torch.device("cpu")) == "float32"
    for why, chosen in (("", "tf32"), ("no tensor cores", "float32")):
        monkeypatch.setattr(p, "lacks", lambda precision, device, why=why: why)
        assert rotation_precision("auto", torch.device("cuda")) == chosen
        assert rotation_precision("bfloat16", torch.device("cuda")) == "bfloat16"


def test_a_device_that_lacks_a_precision_is_said_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lacks("tf32", torch.device("mps")) == "mps devices have float32 alone here"
    assert lacks("float32", torch.device("mps")) == lacks("bfloat16", torch.device("cpu")) == ""
    monkeypatch.setattr("hf_shampoo4.execution.build.lacks", lambda precision, device: "it is too old")
    w = nn.Parameter(torch.ones(8, 8))
    w.grad = torch.ones(8, 8)
    optimizer = Shampoo4bit([w], lr=1.0, rotation_precision="tf32")
    with pytest.raises(OptionError, match=r"rotation_precision='tf32'.* auto or float32 .* on cpu: it is too old"):
        optimizer.step()
    assert torch.equal(w, torch.ones(8, 8))
    assert optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize("algorithm", ["kl_shampoo", "soap"])
@pytest.mark.parametrize(("precision", "most"), [("tf32", 0.02), ("bfloat16", 0.1)])
def test_a_training_goes_nearly_the_same_way(algorithm: str, precision: str, most: float) -> None:
    def trained(how: str) -> torch.Tensor:
        torch.manual_seed(0)
        w = nn.Parameter(torch.zeros(80, 64))
        optimizer = Shampoo4bit(
            [w], lr=0.1, algorithm=algorithm, bits=32, moments="fp32", weight_decay=0.0, rotation_precision=how
        )
        target = torch.randn(80, 64) * torch.logspace(0, -2, 64)
        for _ in range(20):
            w.grad = w.detach() - target + 0.1 * torch.randn(80, 64)
            optimizer.step()
        return w.detach()

    exact, found = trained("float32"), trained(precision)
    assert not torch.equal(found, exact)
    assert (found - exact).norm() < most * exact.norm()


def laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers in memory as they may be: row by row, by columns as bases are, or a part of a weight."""
    if how == "columns":
        return x.mT.contiguous().mT
    return torch.nn.functional.pad(x, (1, 7, 3, 0))[:, 3:, 1:-7] if how == "part" else x


def test_a_cpus_own_products_round_float32_sums_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p, "multiplies_bfloat16", lambda: True)
    torch.manual_seed(0)
    a, x, b = (torch.randn(3, m, n) for m, n in ((96, 96), (96, 200), (200, 200)))
    half = rotate(a, x, None, "bfloat16")
    exact = a.bfloat16().double().mT @ x.bfloat16().double()
    assert half.dtype == torch.float32
    assert (half == exact.bfloat16()).double().mean() > 0.999  # but for what float32's own rounding carries over a tie
    assert torch.allclose(half.double(), exact, rtol=2.0**-8, atol=1e-4)
    exact = half.double() @ b.bfloat16().double()
    assert torch.allclose(rotate(a, x, b, "bfloat16").double(), exact, rtol=2.0**-8, atol=1e-3)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("m", "n"), [(8, 6), (64, 64), (40, 1), (128, 344), (700, 512)])
def test_a_block_has_the_same_bits_in_any_stack_and_layout(
    own: bool, m: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own and not p.multiplies_bfloat16():
        pytest.skip("this processor has no bfloat16 products, so torch's are not used")
    monkeypatch.setattr(p, "multiplies_bfloat16", lambda: own)
    torch.manual_seed(0)
    x, *bases = (torch.randn(4, *shape) for shape in ((m, n), (m, m), (n, n)))
    whole = rotate(bases[0], x, bases[1], "bfloat16")
    for how in ("rows", "columns", "part"):
        some, left, right = (laid_out(t[1:3], how) for t in (x, *bases))
        assert torch.equal(rotate(left, some, right, "bfloat16"), whole[1:3]), how


def test_a_cpu_without_bfloat16_products_rounds_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p, "multiplies_bfloat16", lambda: False)
    x, b = torch.randn(2, 64, 48), torch.randn(2, 48, 48)
    assert torch.equal(rotate(None, x, b, "bfloat16"), x.bfloat16().float() @ b.bfloat16().float())


def test_whether_a_cpu_has_them_is_known_without_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=found: found)
        assert p.multiplies_bfloat16.__wrapped__() == (found and torch.backends.mkldnn.is_available())
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")  # of an older torch
    assert p.multiplies_bfloat16.__wrapped__() is False
