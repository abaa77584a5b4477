"""The eigenbasis family: SOAP, KL-Shampoo and KL-SOAP, with no stored inverse root.

A side keeps an orthogonal basis U (its columns quantised) and eigenvalues; the moments live in the rotated space

    G' = U_L^T G U_R

where the factors are nearly diagonal.  Eigenvalues are updated at every step.  A *basis update*, when due
(`Eigenbasis.intervals`), is one step of orthogonal iteration (a QR) towards the factors' eigenvectors; the first
moment is rotated along.

SOAP (2409.11321): Adam on G'.  KL-Shampoo (2509.03378): each factor is whitened by the other, and the step is
m' / sqrt(lambda_L lambda_R^T), without a second moment.  KL-SOAP: KL-Shampoo's bases, SOAP's moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics.blocks import Index, State, covers, gather_blocks, joined, scatter_joined
from ..numerics.linalg import bjorck, finite_blocks, replace_bad_blocks, safe_qr
from ..numerics.orthogonal import orthogonal_iteration
from ..numerics.quantize import FLOAT32_MAX
from ..numerics.storage import SMALL, Blockwise, Dense, DoubleQuantized, Storage, transposed, write_good  # fmt: skip
from ..options import Options
from .operations import Work, bjorck_work, cholesky_qr_work, product, qr_work

MIN_DECAY = 0.3  # least weight of the old factor in a new one; .3, .6 and .8 train alike (docs/experiments.md)
TINY = torch.finfo(torch.float32).tiny
MOST_EXCESS = 1e36  # of a jump, so that neither it nor its reciprocal leaves float32
MAGNIFIED = 100.0  # a sample, at most, when it is scaled to the eigenvalues; ordinary training does not reach it
FAR = 65536.0  # between the sides' largest eigenvalues: 4.8 decades of the 38 that float32 has each way
LEAST = 1e-12  # of the largest eigenvalue, in a factor that is to be definite: QR cannot tell less from 0 either


@dataclass(frozen=True)
class Side:
    """One Kronecker factor A = U diag(lambda) U^T, in the coordinates of its own basis U."""

    order: int
    basis: Storage | None
    """None: the side is not rotated, its factor is diagonal."""
    bjorck_steps: int = 0
    """On the decoded basis before its update, so that its rounding does not add up over the updates."""
    orthogonalise: str = "auto"
    """See `Options`."""

    def storages(self) -> dict[str, Storage]:
        basis: dict[str, Storage] = {} if self.basis is None else {"basis": self.basis}
        return {**basis, "eigenvalues": Dense((self.order,))}

    def update_work(self) -> Work:
        """Of `DecodedSide.update_basis`, without the statistic: Bjorck steps, QR (also for auto), U Q."""
        k = self.order
        iteration = cholesky_qr_work(k) if self.orthogonalise == "cholesky_qr" else qr_work(k)
        return bjorck_work(k, self.bjorck_steps) + iteration + product(k, k, k) if self.basis else Work()

    def by_cholesky(self, device: torch.device) -> bool:
        """Whether bases are updated by Cholesky factors; by QR if not."""
        return self.orthogonalise == "cholesky_qr" or (self.orthogonalise == "auto" and device.type == "cuda")

    def initialise(self, state: State) -> None:
        """U = I; eigenvalues of 0 say that there was no gradient yet (buffers come zeroed)."""
        if self.basis is not None:
            like = state["eigenvalues"]["dense"]
            eye = torch.eye(self.order, dtype=torch.float32, device=like.device)
            self.basis.write(state["basis"], eye.expand(*like.shape, self.order))


class DecodedSide:
    """A stack's side while a step works on it: decoded once, written through."""

    def __init__(self, side: Side, state: State) -> None:
        self.described, self.state = side, state
        self.vectors = None if side.basis is None else side.basis.read(state["basis"])
        """U, or None; orthogonal up to the rounding."""
        self.eigenvalues = state["eigenvalues"]["dense"]
        """lambda, (B, k), the buffer itself."""
        self._largest: Tensor | None = None

    @property
    def has_basis(self) -> bool:
        """Whether the side has a basis."""
        return self.vectors is not None

    @property
    def largest(self) -> Tensor:
        """The largest eigenvalue, (B, 1)."""
        if self._largest is None:
            self._largest = self.eigenvalues.amax(-1, keepdim=True)
        return self._largest

    def changed(self) -> None:
        """Eigenvalues were changed elsewhere."""
        self._largest = None

    def take_over(self, blocks: Index, vectors: Tensor) -> None:
        """New bases of some blocks, (b, k, k), whose eigenvalues are new too."""
        self._largest = None
        if self.vectors is None or covers(blocks, len(self.vectors)):
            self.vectors = vectors
        else:
            self.vectors[blocks] = vectors

    def start_eigenvalues(self, level: Tensor) -> None:
        """Give eigenvalues to the blocks that had no gradient before: `level` (B,), all alike."""
        largest, level = self.largest, level.unsqueeze(-1)
        fresh = largest <= 0
        torch.where(fresh, level, self.eigenvalues, out=self.eigenvalues)
        self._largest = torch.where(fresh, level, largest)

    def update_eigenvalues(self, diagonal: Tensor, beta: float, bad: Tensor) -> None:
        """lambda <- beta lambda + (1 - beta) diagonal, but for blocks whose gradient is zero, or too large to square.

        Forgotten at beta a step on both sides, eigenvalues would go as fast as the first moment, and KL-Shampoo's
        direction, their ratio, not at all.

        Args:
            diagonal: (B, k) float32, of the factor's new sample in the basis.
            beta: the decay of a step.
            bad: bool (B,), blocks that are to stay as they are: of some the sum of all squares alone is too large.
        """
        largest = diagonal.amax(-1, keepdim=True).masked_fill_(bad.unsqueeze(-1), 0.0)
        tells = (largest > 0) & (largest <= FLOAT32_MAX)
        self.eigenvalues.lerp_(torch.where(tells, diagonal, self.eigenvalues), 1 - beta)
        self._largest = None

    def update_basis(self, sample: Tensor, decay: float, blocks: Index) -> tuple[Tensor, Tensor]:
        """`update_bases` of one step."""
        return update_bases([BasisStep(self, blocks, [sample], decay)])[0]


class BasisStep(NamedTuple):
    """One step of orthogonal iteration of some blocks' bases towards the eigenvectors of their factors."""

    side: DecodedSide
    blocks: Index
    """Which b of the B blocks."""
    sample: list[Tensor]
    """(b, k, k), the factors' new statistic in the coordinates of U; taken out, to be freed when it has served."""
    decay: float
    """The old factor's weight in the new one."""


def update_bases(steps: Sequence[BasisStep]) -> list[tuple[Tensor, Tensor]]:
    """Take some steps at once, all of one kind: order, storage and decay.

    Returns:
        Of each:
        rotation: (b, k, k), Q: the bases after it in coordinates of those before.
        failed: bool (b,), blocks that kept their basis.

    Raises:
        ValueError: a side has no basis.
    """
    side = steps[0].side.described
    vectors = [step.side.vectors[step.blocks].mT for step in steps if step.side.vectors is not None]
    if side.basis is None or len(vectors) < len(steps):
        raise ValueError("a side without a basis has none to update")
    states = [gather_blocks(step.side.state, step.blocks) for step in steps]
    state = joined(states)
    eigenvalues = state["eigenvalues"]["dense"]
    # Q R = A', one orthogonal iteration from U;  lambda <- diag(Q^T A' Q)
    iterate = _by_cholesky if side.by_cholesky(eigenvalues.device) else _by_qr
    factor = [factor_in_basis(eigenvalues, _all_of([step.sample.pop() for step in steps]), steps[0].decay)]
    q, diagonal, good = iterate(factor.pop())
    torch.where(good[:, None], diagonal, eigenvalues, out=eigenvalues)
    # U <- U Q
    u = bjorck(_all_of(vectors), side.bjorck_steps)
    del vectors
    write_good(side.basis, state["basis"], (q.mT @ u).mT, good)
    del u
    sizes = [len(of_one["eigenvalues"]["dense"]) for of_one in states]
    scatter_joined([(step.side.state, step.blocks) for step in steps], states, state)
    for step, new in zip(steps, side.basis.read(state["basis"]).split(sizes), strict=True):
        step.side.take_over(step.blocks, new)
    return list(zip(q.split(sizes), good.logical_not().split(sizes), strict=True))


def _all_of(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def rotated_sides(rows: int, columns: int, options: Options) -> tuple[bool, bool]:
    """Which sides of a matrix have a basis; the other one's factor is diagonal: an eigenvalue for each row, or column.

    | `sides` | of a matrix | of a vocabulary |
    |---|---|---|
    | auto | both; if one is `oblong` times as long as the other, the short one | the short one |
    | both | both | the short one |
    | short | the short one; of a square the columns | the short one |

    A long side's basis would take most of the bytes and of the operations, and is what its loss minds least.

    Args:
        rows: of the whole matrix, not of a block or a rank's part of it.
        columns: the same.
    """
    short, long = min(rows, columns), max(rows, columns)
    oblong = options.sides == "short" or (options.sides == "auto" and long >= options.oblong * short)
    if options.vocabulary or oblong:
        return rows < columns, rows >= columns
    return True, True


def make_sides(shape: tuple[int, ...], options: Options, rotated: tuple[bool, bool]) -> tuple[Side, Side]:
    """Left and right side of blocks of `shape`; a basis is float32 where it is too small to quantise."""
    left, right = (_side(order, has_basis, options) for order, has_basis in zip(shape, rotated, strict=True))
    return left, right


def _side(order: int, has_basis: bool, options: Options) -> Side:
    shape = (order, order)
    if not has_basis:
        return Side(order, None)
    if options.bits == 32 or order * order < SMALL:
        # one Bjorck step: float32's rounding adds up too, to 3e-3 in 100,000 updates
        return Side(order, Dense(shape), 1, options.orthogonalise)
    columns = Blockwise(
        shape, options.factor_codebook, options.bits, options.factor_block, columns=True, fit="least_squares"
    )
    return Side(order, DoubleQuantized(columns), options.rectify_stats, options.orthogonalise)


class Jump(NamedTuple):
    """How much of a sample is more than eigenvalues can have grown by, and on which side; `of` measures it.

    Each side's sample is whitened by what the other side was, so where gradients grow by r, both samples grow by r^2.
    Taken in by both, (1 - beta)^2 r^4 would come into lambda_L lambda_R^T, and the step would stand still for as long
    as eigenvalues take to forget that.  Where columns come back that had no gradient for long, and so next to no
    eigenvalue, every row's sample is as large, and no row has changed.
    """

    excess: Tensor
    """(B, 1), at least 1: (1 - beta) times the mean of G'^2 / lambda_L lambda_R^T; 1 as good as always."""
    ratio: Tensor
    """(B, 1), of the columns' typical growth to the rows', within 1 / excess and excess."""

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, weight: float) -> Jump:
        """
        Args:
            rows: (B, m) float32, samples over their eigenvalues: around 1 where nothing has changed.
            columns: (B, n), the same.
            weight: 1 - beta.
        """
        excess = rows.mean(-1, keepdim=True).mul_(weight).clamp_(1.0, MOST_EXCESS)
        # a side's typical growth is mean((1 + x)^-1/4)^-4 of what has a gradient at all: a few that have grown out of
        # all measure do not move it
        of_sides, some = torch._foreach_add([rows, columns], 1.0), torch._foreach_sign([rows, columns])
        torch._foreach_clamp_max_(of_sides, MOST_EXCESS)
        torch._foreach_sqrt_(of_sides)
        torch._foreach_sqrt_(of_sides)
        torch._foreach_reciprocal_(of_sides)
        torch._foreach_mul_(of_sides, some)
        of_rows, of_columns, some_rows, some_columns = (x.sum(-1, keepdim=True) for x in (*of_sides, *some))
        ratio = (of_rows * some_columns).div_(of_columns * some_rows)
        return cls(excess, ratio.square_().square_().clamp_(1 / excess, excess))

    def shares(self) -> tuple[Tensor, Tensor]:
        """What both sides take in of their samples, (B, 1): their product grows by (1 - beta), as a second moment."""
        root, excess = self.ratio.sqrt(), self.excess.sqrt()
        return root / excess, 1 / (root * excess)

    def of_rows_alone(self) -> Tensor:
        """What the rows take in, (B, 1), if the columns follow after them: all but the columns' growth."""
        return self.ratio.clamp_max(1.0)


def balance(left: DecodedSide, right: DecodedSide) -> None:
    """Move powers of two from one side's eigenvalues to the other's, where their largest are 2^16 apart.

    Gradients tell of lambda_L lambda_R^T alone.  What share of it is on which side drifts, by tens of decades in some
    thousand steps, and would leave float32.  Even powers, so that roots, and so every step, are the same to the bit.
    """
    of_left, of_right = left.largest, right.largest
    least = torch.minimum(of_left, of_right)
    far = (least > 0) & (torch.maximum(of_left, of_right) > FAR * least)
    if far.device.type == "cpu" and not far.any():
        return
    apart = torch.frexp(of_left).exponent - torch.frexp(of_right).exponent  # at most 276
    moved = torch.where(far, torch.div(apart, 4, rounding_mode="floor") * 2, 0)
    for side, by in ((left, -moved), (right, moved)):
        half = torch.div(by, 2, rounding_mode="trunc")  # 2^by itself may be no float32
        for power in (half, by - half):
            side.eigenvalues.mul_(((power + 127) << 23).view(torch.float32))
        side.changed()


def statistic(g: Tensor, whitening: Tensor) -> Tensor:
    """A factor's sample, X diag(1 / whitening) X^T / n.

    Args:
        g: (B, k, n), the gradient in the basis.
        whitening: (B, n) or (B, 1).

    Returns:
        (B, k, k).
    """
    return (g / (g.shape[-1] * whitening.clamp_min(TINY)).unsqueeze(-2)) @ g.mT


def factor_in_basis(eigenvalues: Tensor, sample: Tensor, decay: float) -> Tensor:
    """U^T A U from its diagonal, updated at every step, and the correlations of a sample, all there is of the rest.

    A' = D (decay I + (1 - decay) C) D, D = diag(lambda)^1/2, C the sample scaled to a unit diagonal: positive
    semidefinite, and lambda remains its diagonal.  A sample far below lambda, as after a spike or where gradients have
    shrunk, is scaled by `MAGNIFIED` at the most: it is noise beside what lambda remembers, and would turn the basis
    away from what the first moment is made of.

    Args:
        eigenvalues: (B, k) float32, lambda.
        sample: (B, k, k) float32, positive semidefinite.
        decay: the old factor's weight, in [0, 1].

    Returns:
        (B, k, k).
    """
    diagonal = sample.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, (eigenvalues / diagonal).clamp_(max=MAGNIFIED).sqrt_(), 0.0)
    a = (sample * ((1 - decay) * scale.unsqueeze(-1))).mul_(scale.unsqueeze(-2))
    a.diagonal(dim1=-2, dim2=-1).copy_(eigenvalues)
    return a


def _by_qr(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One orthogonal iteration with a factor in its basis, by Householder's reflections.

    Args:
        a: (B, k, k), from `factor_in_basis`.

    Returns:
        q: (B, k, k), Q of Q R = A with R's diagonal positive; the identity in bad blocks.
        diagonal: (B, k), of Q^T A Q.
        good: bool (B,), false where something is not finite.
    """
    # LAPACK works by columns, and so are bases stored: in memory, row by row, lie Q^T, R^T and U^T, and a pass over
    # tensors of one layout is five times as fast
    good = finite_blocks(a)
    a = replace_bad_blocks(a, good)
    q, r = (x.mT for x in safe_qr(a))
    del a
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(r.dtype)  # no vector changes its direction
    q.mul_(signs.unsqueeze(-1))
    r.mul_(signs.unsqueeze(-2))
    good &= finite_blocks(q, r)
    q = replace_bad_blocks(q, good)
    # diag(Q^T A Q) = diag(R Q)
    return q.mT, transposed(r).mul_(q).sum(-1).clamp_min(0.0), good


def _by_cholesky(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by Cholesky factors, a whole stack at once and without waiting for the device; `a` is lost."""
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.amax(-1, keepdim=True)
    # over the largest, so that gradients of no size underflow or overflow when they are squared again
    a.div_(torch.where(largest > 0, largest, 1.0).unsqueeze(-1))
    diagonal.clamp_min_(LEAST)
    q, eigenvalues, good = orthogonal_iteration(a)  # good ones are finite
    eigenvalues.mul_(largest)
    good &= eigenvalues.amax(-1) < torch.inf
    return replace_bad_blocks(q, good), eigenvalues, good
