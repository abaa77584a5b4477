"""`hf-shampoo4 errors`: what quantising a preconditioner costs its inverse fourth root, beside the papers' figures.

Each scheme quantises something of a matrix A (A itself, its eigenvectors U, its Cholesky factor C) and decodes it
again; the error is that of f(A) = A^-1/4, as 2405.18144 (table 1) and 2412.10663 measure it:

    NRE = |f(A) - f(g(A))|_F / |f(A)|_F        AE = arccos <f(A), f(g(A))> / (|f(A)|_F |f(g(A))|_F)

A matrix that its quantisation made indefinite is taken at its absolute value, U |lambda| U^T: the papers' singular
values.  Everything but the quantisers runs in float64.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_shampoo4.numerics.linalg import ROOTS, bjorck
from hf_shampoo4.numerics.storage import Blockwise, Dense, OffDiagonal, Triangles, allocate, roundtrip
from hf_shampoo4.preconditioners.factors import EXPONENT, Cholesky
from hf_shampoo4.studies.quantization_matrices import (
    BLOCK,
    SCHEMES,
    Matrix,
    Scheme,
    geometric,
    load,
    two_valued,
    with_spectrum,
)
from hf_shampoo4.studies.quantization_report import Found, draw, print_table, summary
from hf_shampoo4.training.arguments import DataArguments
from hf_shampoo4.utils.files import write_json

STORES = 60  # times that error feedback stores the same matrix; the mean is over the last half


def measure(matrix: Matrix, schemes: Sequence[Scheme] = SCHEMES) -> dict[Scheme, tuple[float, float]]:
    """NRE and AE (degrees) of every scheme at one matrix."""
    exact = inverse_root(matrix.a, matrix.damping)
    basis = torch.linalg.eigh(matrix.a)
    fed_back = feedback(matrix.a) if any(s.quantised.startswith("C+EF") for s in schemes) else {}
    found = {}
    for scheme in schemes:
        if scheme.quantised in fed_back:
            decoded = fed_back[scheme.quantised]
        else:
            decoded = decode(scheme, matrix.a, *basis)
        found[scheme] = compare(exact, inverse_root(decoded, matrix.damping))
    return found


def decode(scheme: Scheme, a: Tensor, eigenvalues: Tensor, u: Tensor) -> Tensor:
    """g(A): quantised as the scheme says and decoded, float64 (k, k)."""
    k, bits = len(a), scheme.bits
    whole = Blockwise((k, k), scheme.codebook, bits, BLOCK[bits], columns=True)
    if scheme.quantised == "A":
        return _through(OffDiagonal(whole), a)
    if scheme.quantised == "U":
        v = bjorck(_through(whole, u).unsqueeze(0), scheme.bjorck)[0]
        return (v * eigenvalues) @ v.mT
    c = _through(Triangles(k, scheme.codebook, bits, BLOCK[bits], upper=False), torch.linalg.cholesky(a))
    return c @ c.mT


def feedback(a: Tensor) -> dict[str, Tensor]:
    """A stored `STORES` times through `Cholesky` with its error feedback: the last decoded one, and the late mean."""
    k = len(a)
    triangles = Triangles(k, "linear2", 4, BLOCK[4], upper=True)
    factor = Cholesky(k, triangles, Dense((k, k)), beta=0.0, damping=1e-9, solver="eigh", error_beta=0.95)
    state = {name: allocate(storage, 1, "cpu") for name, storage in factor.storages().items()}
    factor.initialise(state)
    gram, total = a.float().unsqueeze(0), torch.zeros_like(a)
    for i in range(STORES):
        factor.update(state, gram)
        c = triangles.read(state["triangles"])[0].tril().double()
        total += c if i >= STORES // 2 else 0.0
    mean = total / (STORES - STORES // 2)
    return {"C+EF": c @ c.mT, "C+EF mean": mean @ mean.mT}


def inverse_root(a: Tensor, damping: float) -> Tensor:
    """(|A| + damping lambda_max I)^-1/4 of the symmetric part of A, float64."""
    eigenvalues, u = torch.linalg.eigh((a + a.mT) / 2)
    magnitudes = eigenvalues.abs() + damping * eigenvalues.abs().max()
    return (u * magnitudes.pow(EXPONENT)) @ u.mT


def compare(exact: Tensor, other: Tensor) -> tuple[float, float]:
    """NRE, and AE in degrees."""
    cosine = (exact * other).sum() / (exact.norm() * other.norm())
    return float((exact - other).norm() / exact.norm()), math.degrees(math.acos(min(1.0, float(cosine))))


def _through(storage: Any, x: Tensor) -> Tensor:
    return roundtrip(storage, x.float().unsqueeze(0))[0].double()


RUN: dict[str, Any] = {  # W is 1200 x 768, the shape of the paper's block of Swin-Tiny
    "model": "llama_tiny",
    "model_overrides": "hidden_size=768,intermediate_size=1200,num_hidden_layers=1,num_attention_heads=12,"
    "num_key_value_heads=12,head_dim=32",
    "dataset": "stdlib", "tokenizer": "bpe", "vocab_size": 4096, "seq_len": 128, "max_validation_sequences": 8,
    "optim": "shampoo4bit",
    "optim_args": "algorithm=shampoo,factor=direct,bits=32,moments=fp32,block_size=1200,stats_every=2,roots_every=40",
    "learning_rate": 1e-3, "warmup_steps": 0.1, "max_steps": 120, "per_device_train_batch_size": 4,
    "logging_steps": 20, "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "seed": 0,
}  # fmt: skip
COLLECTED = {  # state key of a parameter -> file
    ("model.layers.0.mlp.gate_proj.weight", "1200x768/left.matrix.dense"): "gate_proj_left",
    ("model.layers.0.mlp.down_proj.weight", "768x1200/right.matrix.dense"): "down_proj_right",
}


def collected_folder() -> Path:
    """Where `collect` puts matrices: beside the cached text, not in the repository (11 MB each)."""
    return DataArguments().cache / "preconditioners"


def collect() -> list[Path]:
    """Train a LLaMA layer of width 768 x 1200 with 32-bit Shampoo for 120 steps and save statistics of order 1200.

    Five minutes on one core.

    Returns:
        The .npy files, float32 (1200, 1200).
    """
    from hf_shampoo4.training.pretrain import parse, run

    with tempfile.TemporaryDirectory() as folder:
        trainer = run(parse({**RUN, "output_dir": folder})).trainer
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    collected_folder().mkdir(parents=True, exist_ok=True)
    paths = []
    for parameter, entry in trainer.optimizer.state.items():
        for key, value in entry.items():
            if file := COLLECTED.get((names[parameter], key)):
                paths.append(collected_folder() / f"{file}.npy")
                np.save(paths[-1], value[0].numpy())
    return paths


def time_solvers(orders: Sequence[int] = (128, 256, 512, 1024), elements: int = 1 << 20) -> list[dict[str, Any]]:
    """CPU milliseconds a block of every inverse-root solver, on stacks of statistics of condition 1e6 after damping.

    CPU time, so that other work on the machine does not count; best of three.
    """
    rows = []
    for order in orders:
        blocks = max(1, elements // order**2)
        a = with_spectrum(torch.logspace(0, -6, order, dtype=torch.float64), 0).float().expand(blocks, -1, -1)
        milliseconds = {name: round(1e3 * _cpu_seconds(solve, a) / blocks, 2) for name, solve in ROOTS.items()}
        rows.append({"order": order, "blocks": blocks, **milliseconds})
    return rows


def _cpu_seconds(solve: Any, a: Tensor) -> float:
    took = []
    for _ in range(3):
        began = time.process_time()
        solve(a, EXPONENT, 1e-6)
        took.append(time.process_time() - began)
    return min(took)


def time_all(folder: Path) -> None:
    """The solvers' times, printed and in `errors_solvers.json`."""
    rows = time_solvers()
    print("\n".join("  ".join(f"{key} {value}" for key, value in row.items()) for row in rows))
    write_json(folder / "errors_solvers.json", rows)


def measure_all(folder: Path, order: int, files: Sequence[Path] | None, first_collect: bool) -> None:
    """Every scheme on every matrix: tables on the way, `errors.json` and `errors.png` at the end.

    Args:
        folder: for the two files.
        order: of the synthetic matrices.
        files: matrices in .npy; None: those that were collected.
        first_collect: train, and collect them.
    """
    if first_collect:
        collect()
    files = sorted(collected_folder().glob("*.npy")) if files is None else files
    matrices = [two_valued(order), geometric(order), *(load(file) for file in files)]
    found: Found = {}
    for matrix in matrices:
        found[matrix.name] = measure(matrix)
        print_table(matrix, found[matrix.name])
    told = summary(matrices, found)
    write_json(folder / "errors.json", told)
    draw(told, folder / "errors.png")
    print(f"Numbers: {folder / 'errors.json'}   picture: {folder / 'errors.png'}")
