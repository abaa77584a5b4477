"""What `hf-shampoo4 errors` compares: schemes of quantisation, matrices, and the papers' figures for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_shampoo4.exceptions import ConfigError

BLOCK = {4: 64, 8: 256}  # entries that share a scale; the paper's 8-bit rows have 256 (its table 7)


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
