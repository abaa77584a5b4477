"""The Triton kernels in Triton's interpreter, against the torch reference.  No GPU is needed, and none is used.

`test_kernels_compile_for_a_gpu` builds them for one, which needs none either.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from hf_shampoo4.numerics import quantize
from hf_shampoo4.numerics.codebooks import CODEBOOKS, ONLY_4_BITS, levels
from hf_shampoo4.numerics.rounding import Noise, Settling
from hf_shampoo4.numerics.storage import Blockwise, DoubleQuantized, allocate
from hf_shampoo4.options import Options
from hf_shampoo4.preconditioners import moments
from hf_shampoo4.preconditioners.moments import MomentStep, make_base

pytest.importorskip("triton", reason="Triton is not installed (the extra `triton`): its kernels are not tested")

KINDS = [(name, bits) for name in sorted(CODEBOOKS) for bits in (4, 8) if bits == 4 or name not in ONLY_4_BITS]
SHAPES = [(3, 200, 64), (2, 77, 16), (1, 5, 64), (5, 1, 2), (2, 4200, 128)]  # rows, length, block
CPU = torch.device("cpu")


@pytest.fixture
def kernels() -> ModuleType:
    """The kernels, interpreted (conftest.py says so to Triton)."""
    return quantize.kernels()


def numbers(rows: int, length: int, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Heavy-tailed; a row of zeros, zeros elsewhere, denormals, an infinity and a NaN."""
    x = torch.randn(rows, length) ** 3 * (torch.rand(rows, length) > 0.1)
    x[0, -1] = 1e-40
    if rows > 2:
        x[1] = 0
        x[2, 0], x[2, -1] = torch.inf, torch.nan
    return (x if levels(name, 4)[0] < 0 else x.abs()).to(dtype)


@pytest.mark.parametrize(("name", "bits"), KINDS)
def test_quantise_and_back_are_the_references_bit_for_bit(kernels: ModuleType, name: str, bits: int) -> None:
    table, thresholds = quantize.padded(name, bits, CPU)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for i, (rows, length, block) in enumerate(SHAPES):
        x = numbers(rows, length, name, dtypes[i % 3])
        codes, scales = kernels.quantize(x, table, thresholds, bits, block)
        expected = quantize.quantize_block(x, name, bits, block)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scales, expected[1])
        decoded = kernels.dequantize(codes, scales, table, bits, block, length)
        assert torch.equal(decoded, quantize.dequantize_block(*expected, name, bits, block, length))


@pytest.mark.parametrize(("name", "bits"), [("lloyd16", 4), ("linear2", 8), ("dynamic0", 4)])
def test_fitted_scales_are_the_references_up_to_their_sums(
    kernels: ModuleType, name: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows, length, block in SHAPES:
        x = numbers(rows, length, name)
        codes, scales = quantize.quantize_block(x, name, bits, block, fit="least_squares")
        with monkeypatch.context() as patched:
            patched.setattr(quantize, "has_kernels", lambda device, block: True)
            found = quantize.quantize_block(x, name, bits, block, fit="least_squares")
        assert torch.equal(found[0], codes)
        torch.testing.assert_close(found[1], scales, rtol=1e-5, atol=0)
        assert torch.isfinite(scales).all()


@pytest.mark.parametrize("name", [name for name, bits in KINDS if bits == 4 and levels(name, 4)[0] < 0])
def test_what_has_ended_is_rounded_as_the_reference_does_bit_for_bit(kernels: ModuleType, name: str) -> None:
    tables = quantize.padded(name, 4, CPU)
    for rows, length, block in SHAPES:
        x, g = numbers(rows, length, name), torch.randn(rows, length) * 0.3
        g[:, ::3] = 0.0
        settling = Settling(g, 1 / 8, (-1_234_567_891, 987_654_321))
        expected = quantize.quantize_block(x, name, 4, block, settling)
        found = kernels.quantize(x, *tables, 4, block, settling=settling)
        assert all(map(torch.equal, found, expected))
        nearest = quantize.quantize_block(x, name, 4, block)[0]
        assert length < 70 or not torch.equal(found[0], nearest)


def test_quantise_takes_the_kernels_and_any_shape(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(6, 40, "linear2").view(2, 3, 40).transpose(1, 2)
    expected = quantize.quantize_block(x, "linear2", 4, 2)
    monkeypatch.setattr(quantize, "has_kernels", lambda device, block: True)
    codes, scales = quantize.quantize_block(x, "linear2", 4, 2)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])
    decoded = quantize.dequantize_block(codes, scales, "linear2", 4, 2, 3)
    assert decoded.shape == x.shape


@pytest.mark.parametrize("settles", [False, True])
@pytest.mark.parametrize("eden", [False, True])
@pytest.mark.parametrize("length", [300, 4097])
def test_adamw_in_one_pass(
    kernels: ModuleType, eden: bool, settles: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_base(
        (length,), Options(algorithm="elementwise", moments="4bit_eden" if eden else "4bit"), quantise=True
    )
    passes = []
    for fused in (False, True):
        monkeypatch.setattr(moments, "has_kernels", lambda device, block, fused=fused: fused)
        torch.manual_seed(0)
        state = {name: allocate(storage, 2, "cpu") for name, storage in recipe.storages().items()}
        for t in (1, 2, 3):
            g = torch.randn(2, length) * torch.tensor([1.0, 1.0, 1.0, 0.0, 1e-3])[torch.arange(length) % 5] ** (t > 1)
            noise = Noise(torch.tensor([3, -7], dtype=torch.int32), t, 5) if settles else None
            at = MomentStep((0.9, 0.99), 1e-8, torch.tensor([float(t), t + 1.0]), noise)
            u = recipe.direction(state, g, at)
        decoded = {name: storage.read(state[name]) for name, storage in recipe.storages().items()}
        passes.append((u, decoded))
    (u, decoded), (fused_u, fused_decoded) = passes
    # a rounding may move a number over a threshold, to the neighbouring code; the next steps feel that
    assert torch.isclose(fused_u, u, rtol=1e-5, atol=1e-6).float().mean() > 0.995
    for name in decoded:
        assert torch.isclose(fused_decoded[name], decoded[name], rtol=1e-5, atol=1e-9).float().mean() > 0.995


@pytest.mark.parametrize("order", [16, 65])
def test_scales_that_are_shares_are_decoded_in_the_same_pass_bit_for_bit(
    kernels: ModuleType, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = DoubleQuantized(Blockwise((order, order), "lloyd16", 4, 16, columns=True, fit="least_squares"))
    buffers = allocate(storage, 2, "cpu")
    x = torch.randn(2, order, order) ** 3
    x[1, :, 3] = 0
    storage.write(buffers, x)
    expected = storage.read(buffers)
    monkeypatch.setattr(quantize, "has_kernels", lambda device, block: True)
    assert torch.equal(storage.read(buffers), expected)


def test_blocks_that_do_not_fit_are_left_to_torch(kernels: ModuleType) -> None:
    assert [block for block in range(1, 70) if kernels.can_run(block)] == [2, 4, 8, 16, 32, 64]
    assert not quantize.has_kernels(CPU, 64)


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_shampoo4.numerics.kernels import blockwise, descent, eigenvalues, whitened

BITS = {4: "*u8", 8: "*u8", 16: "*bf16", 32: "*fp32"}
types = {"x": "*bf16", "carried_at": "*i32", "seeds": "*i32", "good": "*i1", "counts": "*i1"}
types |= dict.fromkeys(("targets", "offsets"), "*i64")
types |= dict.fromkeys(("length", "blocks", "width", "height", "row", "column", "count"), "i32")
types |= dict.fromkeys(("seed_term", "step_term", "multiplier", "addend", "target_stride", "update_stride"), "i32")
types |= dict.fromkeys(("beta1", "beta2", "weight1", "weight2", "eps", "weight", "most", "keep", "lr", "ended"), "fp32")
types |= dict.fromkeys(("damping", "floor", "tiny"), "fp32")
WITHOUT = {
    "CODES": ("scales", "table", "thresholds"), "CARRIED": ("carried", "carried_at"), "COUNTED": ("counts",),
    "STOCHASTIC": ("seeds",), "ROWS": ("of_rows",), "COLUMNS": ("of_columns",),
    "ALL": ("of_all",), "SHARES": ("largest",), "WEIGHTED": ("row_weights", "column_weights"),
}
coded = [(4, 64, 16), (8, 16, 128), (4, 1, 128), (4, 2, 4)]  # bits, tile, block
dense = [(4, 16, 128), (8, 8, 256), (16, 1, 128), (32, 16, 128)]
sums = [(True, True, True, True), (True, False, False, True), (False, True, True, False)]
kernels = (
    (blockwise._quantize, [(c[0] == 4, fit, *c) for fit, c in zip((True, False, False, True), coded)]),
    (blockwise._dequantize, [(False, *c) for c in coded]),
    (blockwise._dequantize, [(True, *c) for c in coded]),
    (blockwise._adamw, [(not fit, fit, *c) for fit, c in zip((True, False, False, True), coded)]),
    (whitened._moment, [(carried, c[0] == 4, *c) for carried, c in zip((True, False, False, True), dense)]),
    (whitened._lerped, dense),
    (whitened._square_sums, [(*which, 16, 128) for which in sums]),
    (whitened._clear, [(1024,)]),
    (eigenvalues._roots, [(1024,)]),
    (eigenvalues._weights, [(True, 1024)]),
    (eigenvalues._follow, [(True, True, True, 1024), (True, False, True, 1024), (False, True, False, 1024)]),
    (eigenvalues._follow_alone, [(1024,)]),
    (descent._descend, [(True, True, tl.bfloat16, 1024), (False, False, tl.float32, 1024)]),
)
for kernel, variants in kernels:
    divides = []
    for values in [*variants, variants[-1]]:
        constants = dict(zip([name for name in kernel.arg_names if name.isupper()], values, strict=True))
        if len(divides) == len(variants):  # Triton makes constants of all that is 1
            small = {"width", "height", "row", *(("chunks", "rows", "columns") if kernel is descent._descend else ())}
            constants |= dict.fromkeys(small & set(kernel.arg_names), 1)
        for flag, unused in WITHOUT.items():
            if not (constants["BITS"] <= 8 if flag == "CODES" and "BITS" in constants else constants.get(flag, True)):
                constants |= dict.fromkeys(set(unused) & set(kernel.arg_names))
        codes = dict.fromkeys(("codes", "codes1", "codes2"), BITS[constants.get("BITS", 4)])
        known = {**types, **codes, **({"x": "*fp32"} if "BITS" not in constants else {})}
        others = dict.fromkeys(("chunks", "rows", "columns"), "i32") if kernel is descent._descend else {}
        if constants.get("SHARES"):
            others = {"scales": "*u8"}
        known |= others
        signature = {name: "constexpr" if name in constants else known.get(name, "*fp32") for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if "*" in signature[name]}
        source = ASTSource(kernel, signature, constants, aligned)
        divides.append("div.rn.f32" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
    assert len(set(divides)) == 1
    print(kernel.__name__ + "_shares" * constants.get("SHARES", False), divides[0])
"""


def test_where_triton_cannot_build_pytorch_works_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantize._triton_works.__wrapped__(CPU)  # in the interpreter
    monkeypatch.setattr(quantize.kernels(), "quantize", lambda *_: (_ for _ in ()).throw(RuntimeError("no C compiler")))
    with pytest.warns(UserWarning, match="Triton builds no kernels for cpu, plain PyTorch .*: no C compiler"):
        assert not quantize._triton_works.__wrapped__(CPU)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path: os.PathLike[str]) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    divide = ["_quantize", "_adamw", "_moment", "_weights", "_dequantize_shares"]
    others = ["_dequantize", "_lerped", "_square_sums", "_clear", "_roots", "_follow", "_follow_alone", "_descend"]
    lines = dict(line.split() for line in done.stdout.splitlines())
    assert lines == {**dict.fromkeys(divide, "True"), **dict.fromkeys(others, "False")}
