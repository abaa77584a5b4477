"""The stages of `hf-shampoo4 bench --gpu-check` that measure, each in a process of its own: see gpu_check.py."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hf_shampoo4.numerics import quantize
from hf_shampoo4.numerics.linalg import safe_qr
from hf_shampoo4.numerics.orthogonal import orthogonal_iteration
from hf_shampoo4.numerics.precision import exact_float32
from hf_shampoo4.numerics.rounding import Noise
from hf_shampoo4.numerics.storage import allocate
from hf_shampoo4.options import Options
from hf_shampoo4.preconditioners.moments import MOMENT_BLOCK, MomentStep, make_base
from hf_shampoo4.studies.bench_contestants import CONTESTANTS, Settings
from hf_shampoo4.studies.ceilings_here import Timer, measured_ceilings
from hf_shampoo4.studies.gpu_check import Notes, Scale
from hf_shampoo4.studies.muon import orthogonalised


def ceilings(notes: Notes, scale: Scale, seconds: float) -> None:
    """Copy, products by precision, a launch, decompositions of single matrices."""
    notes.once("row", lambda: measured_ceilings(_timer(scale), scale.orders, scale.products))


def decompositions(notes: Notes, scale: Scale, seconds: float) -> None:
    """Milliseconds for one matrix of a stack, and how far Q is from orthogonal: QR, CholeskyQR2, Newton-Schulz."""
    for order in scale.orders:
        for stack in sorted({1, max(1, scale.stack_numbers // order**2)}):
            notes.once(f"{order} x {stack}", lambda order=order, stack=stack: _orthogonalised(scale, order, stack))  # type: ignore[misc]


def _orthogonalised(scale: Scale, order: int, stack: int) -> dict[str, Any]:
    generator = torch.Generator(scale.device).manual_seed(0)
    x = torch.randn(stack, order, 2 * order, device=scale.device, generator=generator)
    factor = x @ x.mT / (2 * order)  # a statistic of as many samples as twice its order
    ways: dict[str, Callable[[], Any]] = {
        "qr": lambda: safe_qr(factor),
        "cholesky_qr2": lambda: orthogonal_iteration(factor)[0],
        "newton_schulz": lambda: orthogonalised(factor),
    }
    found: dict[str, Any] = {"order": order, "stack": stack}
    for name, way in ways.items():
        with exact_float32(scale.device):
            taken = _timer(scale).seconds(way, times=3) / stack
            given = way()
            q: Tensor = given[0] if isinstance(given, tuple) else given
            off = torch.linalg.matrix_norm(q.mT @ q - torch.eye(order, device=q.device), torch.inf).max()
        found[name] = {"ms": 1e3 * taken, "off": float(off)}
    return found


def kernels(notes: Notes, scale: Scale, seconds: float) -> None:
    """Bytes a second of quantising, beside the same in plain PyTorch and a copy; what a step waits for."""
    device = torch.device(scale.device)
    x = torch.randn(scale.kernel_numbers, device=device)
    notes.once("copy", lambda: _rate(scale, lambda: x.clone(), 8 * x.numel()))
    works = scale.device == "cuda" and quantize.has_kernels(device, MOMENT_BLOCK)
    if not works:
        notes.leave_out("Triton kernels", "they need a CUDA device and Triton that works there")
    for way in ("triton", "plain") if works else ("plain",):
        with _has_kernels(way == "triton"):
            for what, (run, moved) in _passes(x).items():
                notes.once(f"{what}, {way}", lambda run=run, moved=moved: _rate(scale, run, moved))  # type: ignore[misc]
    if scale.device == "cuda":
        notes.once("waits", lambda: waits(scale))


@contextmanager
def _has_kernels(there: bool) -> Iterator[None]:
    """Every module's answer to whether Triton's kernels are to be taken."""
    with ExitStack() as stack:
        for module in [m for name, m in sys.modules.items() if name.startswith("hf_shampoo4.")]:
            if not there and hasattr(module, "has_kernels"):
                stack.enter_context(mock.patch.object(module, "has_kernels", return_value=False))
        yield


def _passes(x: Tensor) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is done to quantised numbers, and the bytes that it reads and writes at least."""
    rows, n = x.view(64, -1), x.numel()
    codes, scales = quantize.quantize_block(rows, "nf4", 4, MOMENT_BLOCK)
    base = make_base(tuple(rows.shape[1:]), Options(algorithm="elementwise", moments="4bit"), quantise=True)
    state = {name: allocate(storage, len(rows), x.device) for name, storage in base.storages().items()}
    noise = Noise(torch.zeros(len(rows), dtype=torch.int32, device=x.device), step=2, seed=0)
    step = MomentStep((0.9, 0.999), 1e-8, torch.full((len(rows),), 2.0, device=x.device), noise)
    return {
        "encode": (lambda: quantize.quantize_block(rows, "nf4", 4, MOMENT_BLOCK), 9 * n // 2),
        "decode": (lambda: quantize.dequantize_block(codes, scales, "nf4", 4, MOMENT_BLOCK, rows.shape[1]), 9 * n // 2),
        "adamw4bit": (lambda: base.direction(state, rows, step), 10 * n),
    }


def _rate(scale: Scale, run: Callable[[], Any], moved: int) -> dict[str, float]:
    taken = _timer(scale).seconds(run, times=3, inner=3)
    return {"ms": 1e3 * taken, "bytes_per_second": moved / taken}


def waits(scale: Scale) -> str:
    """Where a late step waits for the device, as torch's synchronisation check says; "" nowhere."""
    from hf_shampoo4.studies.bench import Bench

    bench = Bench(CONTESTANTS["shampoo4bit"], Settings(model="llama_tiny", device=scale.device))
    for _ in range(3):
        bench.optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            bench.optimizer.step()
    except RuntimeError as error:
        return str(error)[:500]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def steps(notes: Notes, scale: Scale, seconds: float) -> None:
    """Steps of whole models, model by model; `bench` keeps each contestant as it finishes."""
    from hf_shampoo4.studies.bench import write_report

    each = seconds / len(scale.models) / len(scale.contestants)
    first = scale.contestants[:3]  # of all models, before the others of any
    for names, (model, layers) in itertools.product((first, scale.contestants), scale.models):
        settings = Settings(
            model=model, layers=layers, seconds=each, threads=torch.get_num_threads(), device=scale.device,
            clock="wall" if scale.device == "cuda" else "cpu",
        )  # fmt: skip
        folder = notes.path.parents[1] / "steps" / model
        print(f"{model}, each at most {each:.1f} s", flush=True)
        notes.put(model, str(folder / "bench.json"))
        write_report(names, settings, folder)


def _timer(scale: Scale) -> Timer:
    return Timer(torch.device(scale.device), "wall" if scale.device == "cuda" else "cpu")
