"""In which precision matrices are multiplied.

Everything is float32 proper but rotations, which may have the operands of tensor cores: their sums are float32 still.
A CPU with bfloat16 products of its own (avx512_bf16, amx) uses them, which takes half of float32's time; it gives their
sums rounded to bfloat16.  On other devices without such cores operands are rounded as they would be, which shows what
that does to a training, and takes longer than float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

TF32_DROPS = 13  # of float32's 23 bits of mantissa


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """float32 matrix products without TF32 (or bfloat16, on CPUs that have it) and without autocast."""
    # meta has none;  to make an autocast takes longer than many an operation
    is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    without = torch.autocast(device_type, enabled=False) if is_on else nullcontext()
    with _float32_products(device_type, exact=True), without:
        yield


def rotate(a: Tensor | None, x: Tensor, b: Tensor | None, precision: str = "float32") -> Tensor:
    """A^T X B.

    Args:
        a: (B, m, m) float32; None is the identity.
        x: (B, m, n) float32.
        b: (B, n, n) float32; None is the identity.
        precision: of the operands of both products: "float32", "tf32" or "bfloat16".

    Returns:
        (B, m, n) float32; of bfloat16 products on a CPU that has them, rounded to bfloat16.
    """
    if precision == "tf32" and x.is_cuda:
        with _float32_products("cuda", exact=False):
            return _rotated(a, x, b, precision)
    return _rotated(a, x, b, precision)


def _rotated(a: Tensor | None, x: Tensor, b: Tensor | None, precision: str) -> Tensor:
    x = x if a is None else _product(a.mT, x, precision)
    return (x if b is None else _product(x, b, precision)).float()


def rotation_precision(option: str, device: torch.device) -> str:
    """What `Options.rotation_precision` stands for on a device: auto is tf32 where that is fast, else float32."""
    if option != "auto":
        return option
    return "tf32" if device.type == "cuda" and lacks("tf32", device) == "" else "float32"


def lacks(precision: str, device: torch.device) -> str:
    """Why a device cannot multiply in a precision; "" if it can."""
    if precision in ("auto", "float32") or device.type in ("cpu", "meta"):
        return ""
    if device.type != "cuda":
        return f"{device.type} devices have float32 alone here"
    with torch.cuda.device(device):
        there = torch.cuda.is_tf32_supported() if precision == "tf32" else torch.cuda.is_bf16_supported(False)
        name = torch.cuda.get_device_name()
    if not there:
        return f"{name} has no tensor cores for it (compute capability 8.0 or newer has)"
    if precision == "bfloat16" and "dtype" not in torch.ops.aten.bmm.overloads():
        return f"torch {torch.__version__} has no products of bfloat16 with float32 sums (2.8 and newer have)"
    return ""


def rounded(x: Tensor, precision: str) -> Tensor:
    """float32 with no more bits than an operand of a precision has, to the nearest and ties to even."""
    if precision == "bfloat16":
        return x.bfloat16().float()
    bits = x.view(torch.int32)
    half = (1 << (TF32_DROPS - 1)) - 1
    return bits.add(bits >> TF32_DROPS & 1).add_(half).bitwise_and_(-1 << TF32_DROPS).view(torch.float32)


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16 (avx512_bf16, as every CPU with amx), at twice float32's rate."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() and torch.backends.mkldnn.is_available()


def _product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """A B, (B, m, k) times (B, k, n), summed in float32; the sums are bfloat16 where a CPU multiplies in it."""
    if precision == "float32" or (precision == "tf32" and a.is_cuda):
        return a @ b
    if precision == "bfloat16" and a.is_cuda:
        return torch.bmm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    if precision == "bfloat16" and a.device.type == "cpu" and multiplies_bfloat16():
        return torch.bmm(a.bfloat16(), b.bfloat16())
    return rounded(a, precision) @ rounded(b, precision)


@contextmanager
def _float32_products(device_type: str, exact: bool) -> Iterator[None]:
    """float32 matrix products proper, or with TF32, and the setting as it was afterwards."""
    matmul = torch.backends.cuda.matmul if device_type == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    # torch < 2.9 has the older switch only (and none for CPUs); a newer torch does not let the two be mixed
    newer = hasattr(matmul, "fp32_precision")
    name, value = ("fp32_precision", "ieee" if exact else "tf32") if newer else ("allow_tf32", not exact)
    before = getattr(matmul, name, None)
    if matmul is not None:
        setattr(matmul, name, value)
    try:
        yield
    finally:
        if matmul is not None:
            setattr(matmul, name, before)
