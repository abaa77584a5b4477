"""`hf-shampoo4 errors`: what quantising a preconditioner costs its inverse fourth root, beside the papers' figures.

Each scheme quantises something of a matrix A (A itself, its eigenvectors U, its Cholesky factor C) and decodes it
again; the error is that of f(A) = A^-1/4, as 2405.18144 (table 1) and 2412.10663 measure it:

    NRE = |f(A) - f(g(A))|_F / |f(A)|_F        AE = arccos <f(A), f(g(A))> / (|f(A)|_F |f(g(A))|_F)

A matrix that its quantisation made indefinite is taken at its absolute value, U |lambda| U^T: the papers' singular
values.  Everything but the quantisers runs in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.numerics.linalg import ROOTS, bjorck
from hf_shampoo4.numerics.storage import Blockwise, Dense, OffDiagonal, Triangles, allocate, roundtrip
from hf_shampoo4.preconditioners.factors import EXPONENT, Cholesky
from hf_shampoo4.training.data import DataArguments
from hf_shampoo4.utils.files import write_figure, write_json

BLOCK = {4: 64, 8: 256}  # entries that share a scale; the paper's 8-bit rows have 256 (its table 7)
STORES = 60  # times that error feedback stores the same matrix; the mean is over the last half


# ------------------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Scheme:
    """One row of the table."""

    quantised: str
    """`A`, `U`, `C` (Cholesky factor), `C+EF` (with error feedback, last store), `C+EF mean` (mean of the stores)."""
    codebook: str
    bits: int
    bjorck: int = 0
    """Steps that make decoded eigenvectors orthogonal again."""

    @property
    def label(self) -> str:
        """For a table and a picture."""
        steps = f", {self.bjorck} Björck" if self.bjorck else ""
        return f"{self.quantised}, {self.codebook} {self.bits}-bit{steps}"


SCHEMES: tuple[Scheme, ...] = (
    *(Scheme("A", codebook, bits) for codebook in ("dynamic", "linear2") for bits in (8, 4)),
    *(Scheme("U", codebook, 4, steps) for codebook in ("dynamic", "linear2") for steps in (0, 1, 4)),
    *(Scheme("U", "linear2", 8, steps) for steps in (0, 1)),
    *(Scheme("C", codebook, 4) for codebook in ("dynamic", "linear2")),
    Scheme("C", "linear2", 8),
    *(Scheme(what, "linear2", 4) for what in ("C+EF", "C+EF mean")),
)


@dataclass(frozen=True)
class Matrix:
    """A preconditioner to quantise."""

    name: str
    a: Tensor
    """float64 (k, k), symmetric, positive semidefinite."""
    damping: float
    """f(A) = (|A| + damping lambda_max I)^-1/4."""
    paper: Mapping[Scheme, tuple[float, float]]
    """Published NRE and AE (degrees) of the matrix that this one stands for."""


# 2405.18144, tables 1 and 7: A1 is a preconditioner of Swin-Tiny.
PAPER_A1 = {
    Scheme("A", "dynamic", 8): (0.2192, 8.3014),
    Scheme("A", "dynamic", 4): (0.6241, 17.319),
    Scheme("U", "dynamic", 4): (0.0709, 4.0426),
    Scheme("U", "dynamic", 4, 1): (0.0455, 2.5615),
    Scheme("A", "linear2", 8): (0.2164, 7.9751),
    Scheme("A", "linear2", 4): (0.6243, 17.293),
    Scheme("U", "linear2", 4): (0.0543, 3.1066),
    Scheme("U", "linear2", 4, 1): (0.0343, 1.9456),
    Scheme("U", "linear2", 8): (0.0037, 0.2121),
    Scheme("U", "linear2", 8, 1): (0.0023, 0.1312),
}
# 2405.18144, table 1: A2 has two distinct eigenvalues.
PAPER_A2 = {
    Scheme("A", "dynamic", 8): (0.1896, 10.877),
    Scheme("A", "dynamic", 4): (0.4615, 17.189),
    Scheme("U", "dynamic", 4): (0.1224, 7.0144),
    Scheme("U", "dynamic", 4, 1): (0.0878, 4.9960),
    Scheme("A", "linear2", 8): (0.1310, 7.4717),
    Scheme("A", "linear2", 4): (0.4465, 15.338),
    Scheme("U", "linear2", 4): (0.0942, 5.3998),
    Scheme("U", "linear2", 4, 1): (0.0669, 3.8166),
}
# 2412.10663 prints sums over 100 matrices, angles in radians: see docs/results/errors.md.
PAPER_CHOLESKY = {
    Scheme("A", "linear2", 4): (0.4614, math.degrees(0.2719)),
    Scheme("C", "linear2", 4): (0.0919, math.degrees(0.0920)),
}
PAPER_CHOLESKY_REAL = {
    Scheme("A", "linear2", 4): (0.2571, math.degrees(0.1851)),
    Scheme("C", "linear2", 4): (0.0485, math.degrees(0.0485)),
}


def two_valued(order: int, seed: int = 0) -> Matrix:
    """Random eigenvectors, 5/8 of the eigenvalues 1 and 3/8 of them 1e-3 (2405.18144, figure 2b and proposition 1).

    The paper gives neither the share nor the damping: these reproduce its rows best (docs/results/errors.md).
    """
    eigenvalues = torch.ones(order, dtype=torch.float64)
    eigenvalues[order * 5 // 8 :] = 1e-3
    return Matrix("synthetic, two eigenvalues", with_spectrum(eigenvalues, seed), 5e-4, PAPER_A2)


def geometric(order: int, seed: int = 0) -> Matrix:
    """Random eigenvectors, eigenvalues in a geometric sequence over three decades (2412.10663's synthetic matrix)."""
    eigenvalues = torch.logspace(0, -3, order, dtype=torch.float64)
    return Matrix("synthetic, geometric", with_spectrum(eigenvalues, seed), 0.0, PAPER_CHOLESKY)


def with_spectrum(eigenvalues: Tensor, seed: int) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors, float64 (k, k)."""
    generator = torch.Generator().manual_seed(seed)
    k = len(eigenvalues)
    u = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=generator)).Q
    return (u * eigenvalues) @ u.mT


# ------------------------------------------------------------------------------------------------- measuring


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


# ------------------------------------------------------------------------------------------------- real matrices

REAL_ORDER = 1200
RUN: dict[str, Any] = {  # W is 1200 x 768, the shape of the paper's block of Swin-Tiny
    "model": "llama_tiny",
    "model_overrides": "hidden_size=768,intermediate_size=1200,num_hidden_layers=1,num_attention_heads=12,"
    "num_key_value_heads=12,head_dim=32",
    "dataset": "stdlib", "tokenizer": "bpe", "vocab_size": 4096, "seq_len": 128, "max_validation_sequences": 8,
    "optim": "shampoo4bit",
    "optim_args": "factor=direct,bits=32,moments=fp32,block_size=1200,stats_every=2,roots_every=40",
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


def load(path: Path) -> Matrix:
    """A symmetric matrix from an .npy file.

    Raises:
        ConfigError: no such file, or not a square matrix of finite numbers.
    """
    if not path.is_file():
        raise ConfigError(f"matrix {str(path)!r} does not exist")
    a = torch.from_numpy(np.load(path, allow_pickle=False)).double()
    if a.dim() != 2 or a.shape[0] != a.shape[1] or not a.isfinite().all():
        raise ConfigError(f"matrix {str(path)!r} must be a square matrix of finite numbers, not {tuple(a.shape)}")
    paper = {**PAPER_A1, Scheme("C", "linear2", 4): PAPER_CHOLESKY_REAL[Scheme("C", "linear2", 4)]}
    return Matrix(f"real, {path.stem}", (a + a.mT) / 2, 1e-6, paper)


# ------------------------------------------------------------------------------------------------- output

Found = dict[str, dict[Scheme, tuple[float, float]]]


def print_table(matrix: Matrix, found: Mapping[Scheme, tuple[float, float]]) -> None:
    """One matrix, the paper's values beside ours."""
    from rich.console import Console
    from rich.table import Table

    table = Table("quantised", "codebook", "bits", "Björck", "NRE", "paper", "AE", "paper", title=matrix.name)
    for column in table.columns[2:]:
        column.justify = "right"
    for s, (nre, ae) in found.items():
        paper = [f"{x:.{d}f}" for x, d in zip(matrix.paper[s], (4, 2), strict=True)] if s in matrix.paper else ["", ""]
        steps = str(s.bjorck) if s.quantised == "U" else ""
        table.add_row(s.quantised, s.codebook, str(s.bits), steps, f"{nre:.4f}", paper[0], f"{ae:.2f}", paper[1])
    Console().print(table)


def summary(matrices: Sequence[Matrix], found: Found) -> dict[str, Any]:
    """Everything as JSON."""
    return {
        matrix.name: {
            "order": len(matrix.a),
            "condition": float(f"{_condition(matrix.a):.3e}"),
            "damping": matrix.damping,
            "rows": [
                {
                    **dataclasses.asdict(s),
                    "block": BLOCK[s.bits],
                    "nre": round(nre, 5),
                    "ae_degrees": round(ae, 3),
                    "paper": [round(x, 4) for x in matrix.paper[s]] if s in matrix.paper else None,
                }
                for s, (nre, ae) in found[matrix.name].items()
            ],
        }
        for matrix in matrices
    }


def _condition(a: Tensor) -> float:
    eigenvalues = torch.linalg.eigvalsh(a)
    return float(eigenvalues[-1] / eigenvalues[0].clamp_min(1e-300))


COLOURS = {"A": "#d9480f", "U": "#1971c2", "C": "#2f9e44", "C+EF": "#862e9c", "C+EF mean": "#862e9c"}


def draw(matrices: Sequence[Matrix], found: Found, path: Path) -> None:
    """A panel for each matrix: a dot for our NRE, a diamond for the paper's.

    Args:
        matrices: what was measured.
        found: name -> scheme -> (NRE, AE).
        path: the PNG file.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.1 + 2.9 * len(matrices), 5.8), dpi=150, layout="constrained")
        panels: list[Any] = list(figure.subplots(1, len(matrices), sharey=True, sharex=True, squeeze=False)[0])
        schemes = list(found[matrices[0].name])
        for axes, matrix in zip(panels, matrices, strict=True):
            for y, scheme in enumerate(schemes):
                nre = found[matrix.name][scheme][0]
                colour = COLOURS[scheme.quantised]
                axes.plot([1e-4, nre], [y, y], color=colour, alpha=0.25, linewidth=2)
                axes.plot(nre, y, "o", color=colour, markersize=7)
                if scheme in matrix.paper:
                    axes.plot(matrix.paper[scheme][0], y, "D", markersize=8, fillstyle="none", color="#212529")
            axes.set(
                xscale="log", xlim=(1.5e-3, 1.2), title=matrix.name.replace(", ", ",\n"), xlabel="NRE of $A^{-1/4}$"
            )
            axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
        panels[0].set_yticks(range(len(schemes)), [scheme.label for scheme in schemes])
        panels[0].invert_yaxis()
        marks = [
            Line2D([], [], marker="o", color="#495057", linestyle="", label="ours"),
            Line2D([], [], marker="D", color="#212529", fillstyle="none", linestyle="", label="published"),
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
        order = len(matrices[0].a)
        figure.suptitle(f"Error of the inverse fourth root after quantising a preconditioner of order {order}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_figure(path, figure)


# ------------------------------------------------------------------------------------------------- solvers


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


def main(arguments: Sequence[str]) -> None:
    """`errors [--output_dir DIR] [--order N] [--matrix FILE ...] [--collect] [--solvers]`."""
    parser = argparse.ArgumentParser(prog="hf-shampoo4 errors", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/errors"), help="default: %(default)s")
    parser.add_argument("--order", type=int, default=REAL_ORDER, help="of the synthetic matrices; default: %(default)s")
    parser.add_argument("--matrix", type=Path, nargs="*", help=".npy files; default: those that --collect left")
    parser.add_argument("--collect", action="store_true", help="first train and save real preconditioners (5 minutes)")
    parser.add_argument("--solvers", action="store_true", help="time the inverse-root solvers instead")
    args = parser.parse_args(arguments)
    if args.order < 2:
        raise ConfigError(f"--order {args.order} is not allowed: it must be at least 2")
    if args.solvers:
        rows = time_solvers()
        print("\n".join("  ".join(f"{key} {value}" for key, value in row.items()) for row in rows))
        write_json(args.output_dir / "errors_solvers.json", rows)
        return
    if args.collect:
        collect()
    files = sorted(collected_folder().glob("*.npy")) if args.matrix is None else args.matrix
    matrices = [two_valued(args.order), geometric(args.order), *(load(file) for file in files)]
    found: Found = {}
    for matrix in matrices:
        found[matrix.name] = measure(matrix)
        print_table(matrix, found[matrix.name])
    write_json(args.output_dir / "errors.json", summary(matrices, found))
    draw(matrices, found, args.output_dir / "errors.png")
    print(f"Numbers: {args.output_dir / 'errors.json'}   picture: {args.output_dir / 'errors.png'}")
