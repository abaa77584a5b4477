"""One side of a Kronecker preconditioner: its statistic, how that is kept, and its inverse root.

A factor is a frozen description, like a storage; its state is a nested dict of buffers.  Three verbs:

    factor.update(state, gram)    # A <- beta A + (1 - beta) gram            every T1 steps
    factor.refresh(state)         # root <- (A + eps max(lambda) I)^-1/4     every T2 steps
    factor.root(state)            # (B, k, k), read at every step

`update` and `refresh` return bool (B,): blocks whose new value was not finite and which kept their last good one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..numerics.blocks import Buffers, State
from ..numerics.linalg import ROOTS, bjorck, finite_blocks, power_qr, replace_bad_blocks, safe_cholesky, symmetric_power
from ..numerics.storage import SMALL, Blockwise, Dense, OffDiagonal, Storage, Triangles, roundtrip, write_good
from ..options import Options
from .operations import Work, bjorck_work, cholesky_work, coding_workspace, product, qr_work, root_work

ROOT_WORKSPACE = {
    "eigh": 4,
    "newton": 11,
    "newton_db": 14,
}  # matrices of a factor's order that a root takes at once
EXPONENT = -0.25  # two sides, each to the -1/4 (Shampoo, 1802.09568)


class Factor(Protocol):
    """What every factor offers."""

    def storages(self) -> dict[str, Storage]:
        """Name -> storage of each tensor it keeps."""

    def initialise(self, state: State) -> None:
        """Write the state before the first update: A = 0, root = I (buffers come zeroed).

        The papers start from A = eps I, an absolute 1e-6.  Where gradients are small (rms 3e-5 at order 64) that prior
        outweighs what is learnt for hundreds of updates.  Here the factor scales with the gradients.
        """

    def update(self, state: State, gram: Tensor) -> Tensor:
        """Blend a statistic (B, k, k) float32, G G^T or G^T G, into the factor; bool (B,): failed."""

    def refresh(self, state: State) -> Tensor:
        """Recompute the inverse root, (A + damping lambda_max I)^-1/4; bool (B,): failed."""

    def root(self, state: State) -> Tensor:
        """The inverse root, (B, k, k) float32."""

    def work(self) -> tuple[Work, Work]:
        """Operations of an `update`, without the statistic, and of a `refresh`."""

    def workspace(self, square: int) -> tuple[int, int]:
        """float32 numbers that both take, the statistic included, of blocks with so many entries of a factor."""


@dataclass(frozen=True)
class Eigen:
    """Eigenvectors, quantised down their columns, and float32 eigenvalues (2405.18144, algorithms 1 and 2)."""

    basis: Storage
    eigenvalues: Dense
    inverse_root: Storage
    beta: float
    damping: float
    rectify_stats: int
    rectify_roots: int
    solver: str

    def storages(self) -> dict[str, Storage]:
        return {"basis": self.basis, "eigenvalues": self.eigenvalues, "root": self.inverse_root}

    def initialise(self, state: State) -> None:
        eye = _identity(state["root"], self.eigenvalues.shape[0])
        self.basis.write(state["basis"], eye)
        self.inverse_root.write(state["root"], eye)

    def update(self, state: State, gram: Tensor) -> Tensor:
        # V = bjorck(D(U));  A = beta V diag(lambda) V^T + (1 - beta) M
        v = bjorck(self.basis.read(state["basis"]), self.rectify_stats)
        old = self._or_prior(self.eigenvalues.read(state["eigenvalues"]), gram)
        a = torch.baddbmm(gram, v * old.unsqueeze(-2), v.mT, beta=1 - self.beta, alpha=self.beta)
        # U' = qr(A V).Q;  lambda' = diag(U'^T A U')
        good = finite_blocks(a)
        u, new = power_qr(replace_bad_blocks(a, good), v)
        good &= finite_blocks(u, new)
        write_good(self.basis, state["basis"], u, good)
        write_good(self.eigenvalues, state["eigenvalues"], new, good)
        return ~good

    def _or_prior(self, eigenvalues: Tensor, gram: Tensor) -> Tensor:
        """Eigenvalues (B, k), or those of A = eps mean(diag M) I at the first update.

        Without a prior the eigenvectors of the null space would be arbitrary.

        Args:
            eigenvalues: (B, k), zero before the first update.
            gram: (B, k, k), M.
        """
        prior = self.damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        return torch.where(eigenvalues.amax(-1, keepdim=True) > 0, eigenvalues, prior)

    def refresh(self, state: State) -> Tensor:
        v = bjorck(self.basis.read(state["basis"]), self.rectify_roots)
        eigenvalues = self.eigenvalues.read(state["eigenvalues"])
        if self.solver == "eigh":
            # root = V diag((lambda + eps max(lambda))^-1/4) V^T,  V = bjorck(D(U))
            root = symmetric_power(v, eigenvalues, EXPONENT, self.damping)
        else:
            # root = (A + eps max(lambda))^-1/4,  A = V diag(lambda) V^T
            root = ROOTS[self.solver]((v * eigenvalues.unsqueeze(-2)) @ v.mT, EXPONENT, self.damping)
        return _keep_root(self.inverse_root, state, root)

    def root(self, state: State) -> Tensor:
        return self.inverse_root.read(state["root"])

    def work(self) -> tuple[Work, Work]:
        k = self.eigenvalues.shape[0]
        # V diag(lambda) V^T, A V, A U
        update = bjorck_work(k, self.rectify_stats) + product(k, k, k) * 3 + qr_work(k)
        root = Work() if self.solver == "eigh" else root_work(k, self.solver)
        return update, bjorck_work(k, self.rectify_roots) + product(k, k, k) + root

    def workspace(self, square: int) -> tuple[int, int]:
        coder = coding_workspace(square)
        return max(8 * square, 5 * square + coder), ROOT_WORKSPACE[self.solver] * square + coder


@dataclass(frozen=True)
class Direct:
    """The factor itself: 32-bit Shampoo when dense, the naive low-bit baseline when quantised."""

    order: int
    matrix: Storage
    inverse_root: Storage
    beta: float
    damping: float
    solver: str

    def storages(self) -> dict[str, Storage]:
        return {"matrix": self.matrix, "root": self.inverse_root}

    def initialise(self, state: State) -> None:
        eye = _identity(state["root"], self.order)
        self.inverse_root.write(state["root"], eye)

    def update(self, state: State, gram: Tensor) -> Tensor:
        # A <- beta A + (1 - beta) M
        a = torch.lerp(gram, self.matrix.read(state["matrix"]), self.beta)
        good = finite_blocks(a)
        write_good(self.matrix, state["matrix"], a, good)
        return ~good

    def refresh(self, state: State) -> Tensor:
        # root = (A + eps max(lambda))^-1/4
        root = ROOTS[self.solver](self.matrix.read(state["matrix"]), EXPONENT, self.damping)
        return _keep_root(self.inverse_root, state, root)

    def root(self, state: State) -> Tensor:
        return self.inverse_root.read(state["root"])

    def work(self) -> tuple[Work, Work]:
        return Work(), root_work(self.order, self.solver)

    def workspace(self, square: int) -> tuple[int, int]:
        coder = coding_workspace(square)
        return 4 * square + coder, ROOT_WORKSPACE[self.solver] * square + coder


@dataclass(frozen=True)
class Cholesky:
    """The Cholesky factor: semidefinite by construction, half of a matrix's bytes (2412.10663).

    `triangles` holds C in its lower triangle; with error feedback (`error_beta`) the transpose of the error state E,
    strictly lower triangular, in its upper one.
    """

    order: int
    triangles: Storage
    inverse_root: Storage
    beta: float
    damping: float
    solver: str
    error_beta: float | None

    def storages(self) -> dict[str, Storage]:
        return {"triangles": self.triangles, "root": self.inverse_root}

    def initialise(self, state: State) -> None:
        eye = _identity(state["root"], self.order)
        self.inverse_root.write(state["root"], eye)

    def update(self, state: State, gram: Tensor) -> Tensor:
        # A = beta D(C) D(C)^T + (1 - beta) M
        stored = self.triangles.read(state["triangles"])
        old = stored.tril()
        a = torch.baddbmm(gram, old, old.mT, beta=1 - self.beta, alpha=self.beta)
        # C = chol(A + eps I)
        good = finite_blocks(a)
        a = replace_bad_blocks(a, good)
        c = safe_cholesky(a, self.damping)
        # no gradient yet: no factor, whose root is the identity; that of the least eps would be 1e9 times as large
        c.masked_fill_((a.diagonal(dim1=-2, dim2=-1).amax(-1) <= 0)[:, None, None], 0.0)
        good &= finite_blocks(c)
        if self.error_beta is not None:
            # C' = Q(C + E);  E <- be E + (1 - be) (C + E - D(C'))
            error = stored.triu(1).mT
            c = c + error
            error = torch.lerp(c - roundtrip(self.triangles, c).tril(), error, self.error_beta)
            c = c + error.mT
        write_good(self.triangles, state["triangles"], c, good)
        return ~good

    def refresh(self, state: State) -> Tensor:
        # root = (A + eps max(lambda))^-1/4,  A = D(C) D(C)^T
        c = self.triangles.read(state["triangles"]).tril()
        return _keep_root(self.inverse_root, state, ROOTS[self.solver](c @ c.mT, EXPONENT, self.damping))

    def root(self, state: State) -> Tensor:
        return self.inverse_root.read(state["root"])

    def work(self) -> tuple[Work, Work]:
        k = self.order
        rebuilt = product(k, k, k)  # D(C) D(C)^T
        return rebuilt + cholesky_work(k), rebuilt + root_work(k, self.solver)

    def workspace(self, square: int) -> tuple[int, int]:
        coder = coding_workspace(square)
        return 9 * square + coder, ROOT_WORKSPACE[self.solver] * square + coder


def make_factor(order: int, options: Options) -> Factor:
    """The factor that the options name, for a side of `order` rows; float32 where it is too small to quantise."""
    shape = (order, order)
    bits = options.bits if order * order >= SMALL else 32
    rest = Blockwise(shape, options.factor_codebook, bits, options.factor_block, columns=True)
    off_diagonal: Storage = OffDiagonal(rest) if bits < 32 else Dense(shape)
    if options.factor == "direct":
        return Direct(order, off_diagonal, off_diagonal, options.factor_beta, options.damping, options.root)
    if options.factor in ("cholesky", "cholesky_ef"):
        feedback = options.factor == "cholesky_ef"
        triangles = Triangles(order, options.factor_codebook, bits, options.factor_block, upper=feedback)
        return Cholesky(
            order=order,
            triangles=triangles if bits < 32 else Dense(shape),
            inverse_root=off_diagonal,
            beta=options.factor_beta,
            damping=options.damping,
            solver=options.root,
            error_beta=options.error_beta if feedback else None,
        )
    return Eigen(
        basis=rest if bits < 32 else Dense(shape),
        eigenvalues=Dense((order,)),
        inverse_root=off_diagonal,
        beta=options.factor_beta,
        damping=options.damping,
        rectify_stats=options.rectify_stats if bits < 32 else 0,
        rectify_roots=options.rectify_roots if bits < 32 else 0,
        solver=options.root,
    )


def _identity(buffers: Buffers, order: int) -> Tensor:
    """(B, order, order), B and device as the buffers have them."""
    like = next(iter(buffers.values()))
    return torch.eye(order, dtype=torch.float32, device=like.device).expand(like.shape[0], order, order)


def _keep_root(storage: Storage, state: State, root: Tensor) -> Tensor:
    """Store the finite roots; which blocks failed, bool (B,)."""
    good = finite_blocks(root)
    write_good(storage, state["root"], root, good)
    return ~good
