"""SOAP (2409.11321), KL-Shampoo (2509.03378) and KL-SOAP: first moments in the factors' eigenbases; see bases.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..numerics.blocks import add_to_blocks
from ..numerics.linalg import clamp_rms_, transpose
from ..numerics.precision import rotate, rotation_precision
from ..numerics.quantize import DENSE_BLOCK, has_kernels, kernels
from ..numerics.storage import Blockwise, Dense
from ..options import ALGORITHMS, Options
from .bases import (
    MIN_DECAY,
    MOST_EXCESS,
    TINY,
    BasisStep,
    DecodedSide,
    Jump,
    Side,
    balance,
    make_sides,
    rotated_sides,
    statistic,
)
from .moments import Adam, Momentum, make_moments
from .operations import Work, coding_workspace, product, total
from .protocols import Context, Stack, strip
from .together import BasisResult, Steps, alone
from .two_sided import TwoSided, side_state
from .whitened import BasisUpdate, FusedMoment, WhitenedMoment, can_fuse, carried

FLOOR = 1e-7  # of a side's largest eigenvalue, about float32's epsilon: the least that is divided by
TALL, SHORTEST = 8, 2  # how long a strip is, in orders of its basis (that takes 1/14 byte an entry), and at least
LONGEST = 1 << 24  # entries of a strip, unless it has to have more: what a wave holds (execution/blocking.py)
BALANCED_EVERY = 64  # steps, in which the sides drift apart by three decades at the most
LIMIT = 32.0  # of an entry of SOAP's direction: Adam's own is at most 1 / sqrt(1 - b2), which is this with b2 = 0.999


@dataclass(frozen=True)
class Eigenbasis(TwoSided):
    """A block of m x n with two Kronecker factors, of which one may be diagonal."""

    moments: Adam | Momentum
    """`Momentum`: KL-Shampoo, the eigenvalues take the second moment's place."""
    left: Side
    right: Side
    whitened: bool
    """KL: each factor is whitened by the other one."""

    every: ClassVar[Mapping[str, str]] = {"basis": "stats_every"}

    @classmethod
    def make(cls, shape: tuple[int, ...], options: Options, quantise: bool, whole: tuple[int, int]) -> Eigenbasis:
        moments = make_moments(shape, options, quantise, second=options.algorithm != "kl_shampoo")
        sides = make_sides(shape, options, rotated_sides(*whole, options))
        return cls(shape, moments, *sides, whitened=options.algorithm != "soap")

    @classmethod
    def largest_block(cls, rows: int, columns: int, options: Options) -> tuple[int, int]:
        """With two bases both sides are cut to `block_size`.  With one, its side is cut to `basis_order`, and the other
        into strips: as many times as long as the basis that its bytes do not count, but within what a wave holds."""
        rotated = rotated_sides(rows, columns, options)
        if all(rotated):
            return options.block_size, options.block_size
        short = columns if rotated[1] else rows
        order = -(-short // -(-short // options.basis_order))
        length = max(SHORTEST * order, min(TALL * order, LONGEST // order), strip(order))
        return (length, order) if rotated[1] else (order, length)

    @classmethod
    def intervals(cls, options: Options, updates: int | None = None) -> dict[str, int]:
        """Bases change fast at first, and slowly later."""
        if updates is None or not options.refresh_warmup:
            return {"basis": options.stats_every}
        return {"basis": min(options.stats_every, max(1, updates // options.refresh_warmup))}

    def label(self, options: Options, moments: str) -> str:
        sides = "two-sided" if self.is_two_sided else "one-sided"
        if isinstance(self.moments.first, Blockwise) and self.moments.first.bits == 8:  # a vocabulary's, its only one
            moments = "8bit"
        return f"{ALGORITHMS[options.algorithm].label} {sides} {options.bits}-bit, {moments} moments"

    @property
    def is_two_sided(self) -> bool:
        """Whether both sides are rotated."""
        return self.left.basis is not None and self.right.basis is not None

    def work(self) -> dict[str, Work]:
        m, n = self.shape
        sides = [side for side in (self.left, self.right) if side.basis]
        rotation = total(product(side.order, side.order, m * n // side.order) for side in sides)
        # into the bases and back;  the squares' weighted means, of which two sides with bases share one
        step = rotation * 2 + product(1, m, n) * (1 if self.is_two_sided else 2)
        # the statistics;  what is carried over: G' goes apart where the second moment needs it;  the bases themselves
        carried = rotation if isinstance(self.moments, Momentum) else rotation * 2
        return {"step": step, "basis": rotation + carried + total(side.update_work() for side in sides)}

    def workspace(self, blocks: int) -> dict[str, int]:
        entries = blocks * math.prod(self.shape)
        sides = [side for side in (self.left, self.right) if side.basis]
        squares = [blocks * side.order**2 for side in sides]
        decoded = sum(k for k, side in zip(squares, sides, strict=True) if not isinstance(side.basis, Dense))
        base = self.moments.workspace(entries)
        # m', G' and its squares, or u;  SOAP: G', and m' unless the base has it decoded, beside the base
        own = 2 if self.moments.first == Dense(self.shape) else 1
        step = decoded + (
            max(3 * entries, 2 * entries + base) if isinstance(self.moments, Momentum) else own * entries + base
        )
        # one side is updated while the other one's statistic, or Q, is kept; the Qs until m' is carried over
        coder = coding_workspace(max(squares)) if decoded else 0
        updating = decoded + 2 * entries + max(3 * max(squares), 2 * max(squares) + coder) + sum(squares)
        return {"step": step, "basis": max(step + sum(squares), updating)}

    def refreshes(self) -> dict[str, list[str]]:
        return {"basis": [name for name in self.storages() if name.endswith(".basis")]}

    def update(self, stack: Stack, g: Tensor, context: Context) -> Tensor:
        """The whole update of SOAP, KL-Shampoo or KL-SOAP; (B, m, n) float32."""
        return alone(self.steps(stack, g, context), context, g.device)

    def steps(self, stack: Stack, g: Tensor, context: Context) -> Steps:
        """`update`, in the order of docs/design.md; pauses where bases are to be updated.

        Args:
            stack: of B blocks; its state is changed in place.
            g: (B, m, n) float32, the gradient; not changed.
            context: of the step.

        Yields:
            Steps of bases, for `together` to take.

        Returns:
            (B, m, n) float32.
        """
        o, state, b1 = context.options, stack.state, context.betas[0]
        decays = decays_of(o, b1)
        kl_shampoo = isinstance(self.moments, Momentum)
        at = context.moment_step(stack)
        left, right = (
            DecodedSide(self.left, side_state(state, "left")),
            DecodedSide(self.right, side_state(state, "right")),
        )
        # m', stored over sqrt(lambda_L lambda_R^T): few bits serve all directions alike
        fused = kl_shampoo and can_fuse(self.moments.first, at, g.device)
        m = (FusedMoment if fused else WhitenedMoment)(self.moments.first, state["first"], _scales(left, right, o))
        # G' = U_L^T G U_R
        precision = rotation_precision(o.rotation_precision, g.device)
        g = rotate(left.vectors, g, right.vectors, precision)
        # lambda_L <- beta lambda_L + (1 - beta) mean_j G'_ij^2 / lambda_Rj, lambda_R likewise (SOAP: / 1)
        state["failures"]["dense"] += self._update_eigenvalues(left, right, g, decays)
        if self.whitened and context.step % BALANCED_EVERY == 0:
            balance(left, right)
        # m' <- b1 m' + (1 - b1) G', before the basis update if nothing but m' sees G': both are rotated as one sum
        if kl_shampoo:
            m.add(g, 1 - b1)
        # when due (`Eigenbasis.intervals`): Q R = A', U <- U Q, lambda <- diag(Q^T A' Q), m' <- Q_L^T m' Q_R
        updates = yield from self._update_bases(stack, left, right, g, context)
        m.carry(updates)
        # KL-Shampoo: u = m' / sqrt(lambda_L lambda_R^T);  SOAP: v' <- b2 v' + (1 - b2) G'^2, u = m' / (sqrt(v') + eps)
        if isinstance(self.moments, Adam) and isinstance(m, WhitenedMoment):
            g = carried(g, updates)
            m.add(g, 1 - b1)
            u = self.moments.over_second(state, m.exact, g, at)
            m.store(_scales(left, right, o), at)
        else:
            u = m.step(_scales(left, right, o), at)
        del m, g  # a copy of the wave each
        # U_L u U_R^T
        back = [transpose(left.vectors), transpose(right.vectors)]
        if kl_shampoo and has_kernels(u.device, DENSE_BLOCK):
            back = self._bounding(u, back[0], back[1], decays)
        else:
            u = self._bounded(u, decays, context.betas[1])
        return rotate(back[0], u, back[1], precision)

    def held(self, blocks: int) -> int:
        """See `together.Pausing`: m', G' and the decoded bases."""
        return blocks * (2 * math.prod(self.shape) + self._squares)

    def basis_entries(self, stack: Stack, context: Context) -> int:
        """See `together.Pausing`."""
        return self._squares * context.number_due(stack, "basis")

    @property
    def _squares(self) -> int:
        return sum(side.order**2 for side in (self.left, self.right) if side.basis)

    def _update_eigenvalues(self, left: DecodedSide, right: DecodedSide, g: Tensor, decays: Decays) -> Tensor:
        """Eigenvalues follow the squares of the rotated gradient at every step.

        Of a side without a basis first, then the other's, whitened by the new ones: worth .02 to .03 of loss.

        Returns:
            bool (B,): blocks whose squares are not finite, or their sum is not; their gradient becomes zero, and their
                eigenvalues stay.
        """
        if has_kernels(g.device, DENSE_BLOCK):
            return self._update_eigenvalues_in_passes(left, right, g, decays)
        squares = g.square()
        level = squares.mean((-2, -1))
        bad = (level < torch.inf).logical_not_()
        if g.device.type != "cpu" or bool(bad.any()):  # a pass over g, and a CPU's host waits for nobody
            g.masked_fill_(bad[:, None, None], 0.0)
        level = level.masked_fill_(bad, 0.0)  # what eigenvalues start from
        level = level.sqrt() if self.whitened else level  # KL: lambda_L lambda_R^T is the mean square
        left.start_eigenvalues(level)
        right.start_eigenvalues(level)
        if left.vectors is None:
            self._follow_in_turn(left, right, squares, decays, bad)
        elif right.vectors is None:
            self._follow_in_turn(right, left, squares.mT, decays, bad)
        else:
            self._follow_both(left, right, squares, decays, bad)
        return bad

    def _follow_both(self, left: DecodedSide, right: DecodedSide, squares: Tensor, decays: Decays, bad: Tensor) -> None:
        """Two sides with bases; `squares` (B, m, n) are lost."""
        rows, columns, weight = self._whitening(left), self._whitening(right), 1 - decays.rotated
        of_right = _weighted_mean(squares, rows)
        of_left = squares.div_(columns.unsqueeze(-2)).mean(-1)
        if self.whitened and may_exceed(grown := of_left / rows, weight):
            of_left_share, of_right_share = Jump.of(grown, of_right / columns, weight).shares()
            of_left, of_right = of_left.mul_(of_left_share), of_right.mul_(of_right_share)
        left.update_eigenvalues(of_left, decays.rotated, bad)
        right.update_eigenvalues(of_right, decays.rotated, bad)

    def _follow_in_turn(
        self, diagonal: DecodedSide, rotated: DecodedSide, squares: Tensor, decays: Decays, bad: Tensor
    ) -> None:
        """One basis: `squares` (B, k, n), k of the side without it."""
        rows, columns, weight = self._whitening(diagonal), self._whitening(rotated), 1 - decays.diagonal
        of_diagonal = _weighted_mean(squares.mT, columns)
        if self.whitened and may_exceed(grown := of_diagonal / rows, weight):
            of_rotated = _weighted_mean(squares, rows)
            of_diagonal = of_diagonal.mul_(Jump.of(grown, of_rotated / columns, weight).of_rows_alone())
        diagonal.update_eigenvalues(of_diagonal, decays.diagonal, bad)
        rotated.update_eigenvalues(_weighted_mean(squares, self._whitening(diagonal)), decays.rotated, bad)

    def _update_eigenvalues_in_passes(self, left: DecodedSide, right: DecodedSide, g: Tensor, decays: Decays) -> Tensor:
        """As `_update_eigenvalues`, by kernels that sum squares and keep none: one pass over g, or two."""
        passes, vectors = kernels("whitened"), kernels("eigenvalues")
        bounds = vectors.Bounds(FLOOR, TINY, MOST_EXCESS)
        sides, (m, n) = (left.eigenvalues, right.eigenvalues), self.shape
        flip = not right.has_basis  # of one basis: the left one
        follows = (True, True) if self.is_two_sided else (not flip, flip)
        beta = decays.rotated if self.is_two_sided else decays.diagonal
        # blocks without eigenvalues as yet are summed with weights of 1, which `follow` knows
        weights = vectors.weights(*sides, bounds, self.whitened)
        rows, columns = (True, True) if self.whitened else follows  # both tell of a jump
        sums = passes.square_sums(g, *weights, rows=rows, columns=columns, whole=True)
        good = vectors.follow(sides, weights, sums, follows, 1 - beta, bounds, self.whitened)
        passes.clear(g, good)
        if not self.is_two_sided:
            weights = vectors.weights(*sides, bounds, self.whitened)
            sums = passes.square_sums(g, *weights, rows=flip, columns=not flip)
            of_rotated = (sides[0], sums.rows, n) if flip else (sides[1], sums.columns, m)
            vectors.follow_alone(*of_rotated, 1 - decays.rotated)
        left.changed()
        right.changed()
        return good.logical_not_()

    def _update_bases(
        self, stack: Stack, left: DecodedSide, right: DecodedSide, g: Tensor, context: Context
    ) -> Generator[list[BasisStep], list[BasisResult], list[BasisUpdate]]:
        """Bring the bases of the blocks that are due closer to the eigenvectors of their factors.

        Args:
            stack: of B blocks.
            left: its rows' side.
            right: its columns' side.
            g: (B, m, n), the gradient in the bases as they are.
            context: of the step.

        Yields:
            Steps of bases, as `steps` does; takes their results.

        Returns:
            The blocks whose bases were updated, with the rotations.
        """
        found = []
        for blocks, every in context.due(stack, "basis"):
            some, decay = g[blocks], max(context.options.factor_beta**every, MIN_DECAY)
            with context.stopwatch.on(g.device):
                # both from the eigenvalues before either is updated; a side without a basis needs no statistic
                wanted = [
                    BasisStep(side, blocks, [statistic(x, self._whitening(other)[blocks])], decay)
                    for side, other, x in ((left, right, some), (right, left, some.mT))
                    if side.has_basis
                ]
            sides = [step.side for step in wanted]
            updated = dict(zip(sides, (yield wanted), strict=True))
            failed = functools.reduce(torch.logical_or, (failed for _, failed in updated.values()))
            add_to_blocks(stack.state["failures"]["dense"], blocks, failed)
            rotations = (updated.get(side, (None,))[0] for side in (left, right))
            found.append(BasisUpdate(blocks, *rotations))
        return found

    def _whitening(self, side: DecodedSide) -> Tensor:
        """What the other side's sample is divided by, (B, k): the eigenvalues from below bounded, or ones (SOAP)."""
        if not self.whitened:
            return torch.ones_like(side.eigenvalues)
        # directions without any gradient for long have decayed to 0: the first one there must not overflow
        return torch.maximum(side.eigenvalues, (FLOOR * side.largest).clamp_min_(TINY))

    def _bounding(self, u: Tensor, left: Tensor | None, right: Tensor | None, decays: Decays) -> list[Tensor | None]:
        """As `_bounded` of KL-Shampoo, on the bases: u is read once and not written.

        Args:
            u: (B, m, n).
            left: U_L^T, or None.
            right: U_R^T, or None.
            decays: of eigenvalues.

        Returns:
            Both, each row times what the row or column of u is to be scaled by.
        """
        sums = kernels("whitened").square_sums(u, rows=left is not None, columns=right is not None)
        most = (1 - decays.rotated) ** -0.5
        found = ((left, sums.rows, u.shape[-1]), (right, sums.columns, u.shape[-2]))
        return [
            None if basis is None else basis * of.rsqrt_().mul_(most * count**0.5).clamp_max_(1.0).unsqueeze(-1)
            for basis, of, count in found
        ]

    def _bounded(self, u: Tensor, decays: Decays, beta2: float) -> Tensor:
        """u, in place, no larger than gradients can make it as long as the bases rest; without a spike it seldom is.

        After a basis update the first moment may be large where the second moment, or eigenvalue, is tiny as yet.
        """
        if isinstance(self.moments, Adam):
            limit = max(LIMIT, (1 - beta2) ** -0.5)
            return u.clamp_(-limit, limit)
        # (1 - beta) mean_j G'_ij^2 / lambda_Rj is a part of lambda_Li: what bounds a gradient's rows bounds a mean's
        most = (1 - decays.rotated) ** -0.5
        return clamp_rms_(u, most, rows=self.left.basis is not None, columns=self.right.basis is not None)


def _weighted_mean(squares: Tensor, whitening: Tensor) -> Tensor:
    """mean_i squares_ij / whitening_i, (B, n).

    From the left: a matrix times a column is summed otherwise on a CPU in a stack of one than in one of several.
    """
    return ((whitening.reciprocal() / squares.shape[-2]).unsqueeze(-2) @ squares).squeeze(-2)


def may_exceed(rows: Tensor, weight: float) -> bool:
    """Whether a `Jump` may have an excess: a CPU looks, and another device is not waited for."""
    return rows.device.type != "cpu" or bool((rows.mean(-1) * weight > 1).any())


class Decays(NamedTuple):
    """Of eigenvalues, a step."""

    rotated: float
    """Of a side with a basis, and of both where both have one."""
    diagonal: float
    """Of a side without."""


@functools.lru_cache(maxsize=64)
def decays_of(options: Options, b1: float) -> Decays:
    """No eigenvalue is forgotten faster than the first moment.

    Where gradients end (a dead unit), m' falls by b1 a step and the root that it is divided by, by that of the decay:
    below b1^2 a row would be moved for ever, and faster and faster.
    """
    beta = max(options.factor_beta, b1)
    return Decays(beta, max(options.vocabulary_beta, b1) if options.vocabulary else beta)


def _scales(left: DecodedSide, right: DecodedSide, o: Options) -> tuple[Tensor, Tensor]:
    """lambda_L^1/2 and lambda_R^1/2, damped: (B, m, 1) and (B, 1, n)."""
    if has_kernels(left.eigenvalues.device, DENSE_BLOCK):
        rows, columns = kernels("eigenvalues").roots(left.eigenvalues, right.eigenvalues, max(o.damping, FLOOR), TINY)
        return rows.unsqueeze(-1), columns.unsqueeze(-2)
    sides = (left, right)
    least = torch._foreach_mul([side.largest for side in sides], max(o.damping, FLOOR))
    damped = [side.eigenvalues + of_side for side, of_side in zip(sides, least, strict=True)]
    torch._foreach_clamp_min_(damped, TINY)
    torch._foreach_sqrt_(damped)
    return damped[0].unsqueeze(-1), damped[1].unsqueeze(-2)
