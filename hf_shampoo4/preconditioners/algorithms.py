"""How a block's gradient becomes a direction: Shampoo (two factors, graft, moments), the eigenbasis family (moments in
the factors' eigenbasis) or the base alone.

An algorithm is a frozen description of one block shape; equal descriptions are computed as one stack.  Its state is
{tensor name: buffers}; `directions` runs the stacks of a wave together, as the graft goes over whole parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..numerics.linalg import between, transpose, within
from ..numerics.rounding import Noise
from ..numerics.storage import Buffers, Dense, Index, Storage, index_of, put_back, taken
from ..options import Options
from ..utils.stopwatch import Stopwatch
from .bases import SHORTEST_MEMORY, TINY, OpenSide, Side, make_sides, statistic
from .factors import Factor, make_factor
from .moments import PLAIN, Coordinates, Moments, make_moments, same
from .operations import Work, product, total

State = dict[str, Buffers]

FLOOR = 1e-7  # of a side's largest eigenvalue: the least that KL's whitening and stored moments are divided by
LARGEST = 1e30  # of a whitened moment, which grows while no gradient comes and eigenvalues are forgotten faster
LIMIT = 32.0  # of an entry of SOAP's direction: Adam's own is at most 1 / sqrt(1 - b2), which is this with b2 = 0.999


@dataclass(frozen=True)
class Context:
    """What a step knows beside gradients and state."""

    options: Options
    step: int
    betas: tuple[float, float]
    eps: float
    stopwatch: Stopwatch
    """Times the refreshes."""
    coupled_decay: float = 0.0
    """L2: this times the parameter is added to what goes through the base, as torch.optim.SGD does."""
    probe: Probe | None = None
    """Looks at the state before and after, if this is a step to look at."""
    total: Callable[[Tensor], Tensor] = lambda sums: sums
    """Sums over the blocks of each parameter here, float64 (k, parameters) -> over its blocks on all ranks."""
    due: Due = field(default_factory=dict)
    """Of the stack's blocks."""


Due = Mapping[str, Mapping[int, list[int]]]
"""Refresh -> steps between two of a block's -> positions of the blocks whose turn it is."""


def refreshed(
    algorithm: Algorithm, options: Options, updates: Sequence[int], places: Sequence[float]
) -> dict[str, set[int]]:
    """Tensors that a step changes in some blocks only, and the positions of these; all other tensors change in all."""
    turns = due(options, updates, places)
    rows = {refresh: {i for some in of_refresh.values() for i in some} for refresh, of_refresh in turns.items()}
    return {name: rows.get(refresh, set()) for refresh, names in algorithm.refreshes().items() for name in names}


def due(options: Options, updates: Sequence[int], places: Sequence[float]) -> Due:
    """Whose turn it is: of every block once in a period, as its own updates are counted.

    A parameter may have no gradient on many steps, and on just those on which its turn by the optimizer's would fall.

    Args:
        updates: how many each block has had, this one included.
        places: in [0, 1), what share of a period earlier than all together each is refreshed, if they are staggered.
    """
    found: dict[str, dict[int, list[int]]] = {}
    periods = {n: intervals(options, n) for n in set(updates)}
    for i, (n, place) in enumerate(zip(updates, places, strict=True)):
        for refresh, every in periods[n].items():
            if (n + int(place * every * options.stagger)) % every == 0:
                found.setdefault(refresh, {}).setdefault(every, []).append(i)
    return found


def intervals(options: Options, updates: int | None = None) -> dict[str, int]:
    """Refresh -> steps between two of a block's, after so many updates, or (None) in the long run."""
    if options.algorithm == "elementwise":
        return {}
    if options.algorithm == "shampoo":
        return {"stats": options.stats_every, "roots": options.roots_every}
    return {"turn": options.stats_every if updates is None else options.turn_interval(updates)}


class Probe(Protocol):
    """What a step tells a `diagnostics.Probe`."""

    def before(self, stacks: Sequence[Stack]) -> None:
        """The step begins."""

    def moment(self, stack: Stack, exact: Tensor) -> None:
        """The first moment before it was stored, (B, *shape) float32."""

    def after(self, stacks: Sequence[Stack]) -> None:
        """The step is over."""


@dataclass(frozen=True)
class Preconditioned:
    """What an algorithm makes of a gradient."""

    value: Tensor
    """(B, *shape) float32: what goes through the base in the gradient's place."""
    coordinates: Coordinates = PLAIN
    """In which the base's first moment was and will be stored."""
    back: Callable[[Tensor], Tensor] = same
    """The base's direction -> the parameter's coordinates."""
    grafted: bool = False
    """Whether it is to have the gradient's norm."""


class Algorithm(Protocol):
    """What every algorithm offers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one block."""

    @property
    def moments(self) -> Moments:
        """The base's moments."""

    @property
    def grafted(self) -> bool:
        """Whether its direction is given a norm, which may go over all blocks of a parameter."""

    def storages(self) -> dict[str, Storage]:
        """Name -> storage of every tensor of a block's state."""

    def initialise(self, state: State) -> None:
        """Write the state before the first step (buffers come zeroed)."""

    def work(self) -> dict[str, Work]:
        """A block's operations: of every "step", and of each refresh of `intervals` beyond these."""

    def refreshes(self) -> dict[str, list[str]]:
        """Tensors that only a refresh of `intervals` changes; all others change at every step."""

    def precondition(self, state: State, g: Tensor, context: Context) -> Preconditioned:
        """Bring the state up to date with a gradient, (B, *shape) float32, and precondition it; `g` is not changed."""


@dataclass(frozen=True)
class Elementwise:
    """No preconditioner: embeddings, output head, norms, biases."""

    shape: tuple[int, ...]
    moments: Moments

    grafted: ClassVar[bool] = False

    def storages(self) -> dict[str, Storage]:
        return {"steps": Dense(()), **self.moments.storages()}

    def initialise(self, state: State) -> None:
        """Zeros are right."""

    def work(self) -> dict[str, Work]:
        return {"step": Work()}

    def refreshes(self) -> dict[str, list[str]]:
        return {}

    def precondition(self, state: State, g: Tensor, context: Context) -> Preconditioned:
        return Preconditioned(g)


@dataclass(frozen=True)
class Shampoo:
    """P = L^-1/4 G R^-1/4 (1802.09568), L and R kept as `factors` says."""

    shape: tuple[int, ...]
    moments: Moments
    left: Factor
    right: Factor

    grafted: ClassVar[bool] = True

    def storages(self) -> dict[str, Storage]:
        return {
            "steps": Dense(()),
            "failures": Dense((), torch.int32),
            **{f"left.{name}": storage for name, storage in self.left.storages().items()},
            **{f"right.{name}": storage for name, storage in self.right.storages().items()},
            **self.moments.storages(),
        }

    def initialise(self, state: State) -> None:
        self.left.initialise(_side(state, "left"))
        self.right.initialise(_side(state, "right"))

    def work(self) -> dict[str, Work]:
        m, n = self.shape
        (left_update, left_root), (right_update, right_root) = self.left.work(), self.right.work()
        # L^-1/4 G R^-1/4;  G G^T and G^T G
        step = statistics = product(m, m, n) + product(m, n, n)
        return {"step": step, "stats": statistics + left_update + right_update, "roots": left_root + right_root}

    def refreshes(self) -> dict[str, list[str]]:
        of_sides = [name for name in self.storages() if name.startswith(("left.", "right."))]
        roots = [name for name in of_sides if name.endswith(".root")]
        return {"stats": [name for name in of_sides if name not in roots], "roots": roots}

    def precondition(self, state: State, g: Tensor, context: Context) -> Preconditioned:
        for refresh, work in (("stats", self._update), ("roots", self._refresh)):
            for rows in context.due.get(refresh, {}).values():
                with context.stopwatch.on(g.device), _part(state, g, _some(rows, g)) as (part, some):
                    part["failures"]["dense"] += work(part, some)
        # P = L^-1/4 G R^-1/4
        return Preconditioned(
            self.left.root(_side(state, "left")) @ g @ self.right.root(_side(state, "right")), grafted=True
        )

    def _update(self, state: State, g: Tensor) -> Tensor:
        # L <- beta L + (1 - beta) G G^T;  R <- beta R + (1 - beta) G^T G
        failed = self.left.update(_side(state, "left"), g @ g.mT).int()
        return failed + self.right.update(_side(state, "right"), g.mT @ g)

    def _refresh(self, state: State, g: Tensor) -> Tensor:
        # L^-1/4, R^-1/4
        failed = self.left.refresh(_side(state, "left")).int()
        return failed + self.right.refresh(_side(state, "right"))


@dataclass(frozen=True)
class Eigenbasis:
    """SOAP, KL-Shampoo and KL-SOAP: the base works on G' = U_L^T G U_R; see bases.py."""

    shape: tuple[int, ...]
    moments: Moments
    left: Side
    right: Side
    whitened: bool
    """KL: each factor is whitened by the other one."""
    scaled: bool
    """KL-Shampoo: the eigenvalues take the second moment's place."""

    grafted: ClassVar[bool] = False

    @property
    def is_two_sided(self) -> bool:
        """Whether both sides are rotated."""
        return self.left.basis is not None and self.right.basis is not None

    def storages(self) -> dict[str, Storage]:
        return {
            "steps": Dense(()),
            "failures": Dense((), torch.int32),
            **{f"left.{name}": storage for name, storage in self.left.storages().items()},
            **{f"right.{name}": storage for name, storage in self.right.storages().items()},
            **self.moments.storages(),
        }

    def initialise(self, state: State) -> None:
        self.left.initialise(_side(state, "left"))
        self.right.initialise(_side(state, "right"))

    def work(self) -> dict[str, Work]:
        m, n = self.shape
        sides = [side for side in (self.left, self.right) if side.basis]
        turn = total(product(side.order, side.order, m * n // side.order) for side in sides)
        # into the bases and back;  the squares' weighted means, of which two sides with bases share one
        step = turn * 2 + product(1, m, n) * (1 if self.is_two_sided else 2)
        # the statistics;  what is carried over: G' goes apart where the second moment needs it;  the bases themselves
        carried = turn if self.scaled else turn * 2
        return {"step": step, "turn": turn + carried + total(side.turn_work() for side in sides)}

    def refreshes(self) -> dict[str, list[str]]:
        return {"turn": [name for name in self.storages() if name.endswith(".basis")]}

    def precondition(self, state: State, g: Tensor, context: Context) -> Preconditioned:
        o = context.options
        left, right = self._opened(state)
        damping = max(o.damping, FLOOR)
        before = _scales(left, right, damping)
        # G' = U_L^T G U_R
        rotated = between(left.vectors, g, right.vectors)
        squares = rotated.square()
        level = squares.mean((-2, -1))
        good = level.isfinite()
        rotated.masked_fill_(~good[:, None, None], 0.0)
        state["failures"]["dense"] += ~good
        self._follow(left, right, squares, level.where(good, 0.0), o)
        turn: Callable[[Tensor], Tensor] = same
        for every, rows in context.due.get("turn", {}).items():  # several for parameters of other numbers of updates
            with context.stopwatch.on(g.device):
                turn = _chained(turn, self._turn(state, (left, right), rotated, rows, every, o))
        after = _scales(left, right, damping)

        # stored is m' / sqrt(lambda_L lambda_R^T): few bits serve all directions alike; it is KL-Shampoo's direction
        def opened(x: Tensor) -> Tensor:
            return (x * before[0]).mul_(before[1])

        def closed(m: Tensor) -> Tensor:
            return (m / after[0]).div_(after[1]).clamp_(-LARGEST, LARGEST)

        def back(u: Tensor) -> Tensor:
            # U_L u U_R^T
            u = self._within_reason(u, o.factor_beta, context.betas[1])
            return between(transpose(left.vectors), u, transpose(right.vectors))

        if self.scaled:  # nothing but the first moment sees the gradient: both turn at once, as one sum
            return Preconditioned(rotated, Coordinates(opened, lambda m: closed(turn(m))), back)
        return Preconditioned(turn(rotated), Coordinates(lambda x: turn(opened(x)), closed), back)

    def _within_reason(self, u: Tensor, factor_beta: float, beta2: float) -> Tensor:
        """No larger than gradients can make it as long as the bases rest; without a spike it seldom is.

        A turn brings the first moment into entries whose second moment, or eigenvalue, has not seen the like of it.
        """
        if not self.scaled:
            limit = max(LIMIT, (1 - beta2) ** -0.5)
            return u.clamp(-limit, limit)
        # (1 - beta) mean_j G'_ij^2 / lambda_Rj is a part of lambda_Li: what bounds a gradient's rows bounds a mean's
        most = (1 - factor_beta) ** -0.5
        return within(u, most, rows=self.left.basis is not None, columns=self.right.basis is not None)

    def _opened(self, state: State) -> tuple[OpenSide, OpenSide]:
        return OpenSide(self.left, _side(state, "left")), OpenSide(self.right, _side(state, "right"))

    def _follow(self, left: OpenSide, right: OpenSide, squares: Tensor, level: Tensor, o: Options) -> None:
        """Eigenvalues follow the squares of the rotated gradient, which are used up, at every step.

        Of a side without a basis first, then the other's, whitened by the new ones: both from the old ones, the two
        sides' shares of the scale drift.

        Args:
            level: (B,), the squares' mean: what eigenvalues start from.
        """
        if self.whitened:
            level = level.sqrt()  # lambda_L lambda_R^T is the mean square
        left.start(level)
        right.start(level)
        # lambda_L <- beta lambda_L + (1 - beta) mean_j G'_ij^2 / lambda_Rj, lambda_R likewise (SOAP: / 1)
        if self.is_two_sided:
            of_right = (self._whitening(left).reciprocal() / self.left.order).unsqueeze(-2) @ squares
            of_left = squares.div_(self._whitening(right).unsqueeze(-2)).mean(-1)
            left.follow(of_left, o.factor_beta)
            right.follow(of_right.squeeze(-2), o.factor_beta)
            return
        diagonal, rotated, squares = (left, right, squares) if right.rotates else (right, left, squares.mT)
        beta = o.vocabulary_beta if o.vocabulary else o.factor_beta
        of_diagonal = squares @ (self._whitening(rotated).reciprocal() / squares.shape[-1]).unsqueeze(-1)
        diagonal.follow(of_diagonal.squeeze(-1), beta)
        of_rotated = (self._whitening(diagonal).reciprocal() / squares.shape[-2]).unsqueeze(-2) @ squares
        rotated.follow(of_rotated.squeeze(-2), o.factor_beta)

    def _turn(
        self, state: State, sides: tuple[OpenSide, OpenSide], rotated: Tensor, rows: list[int], every: int, o: Options
    ) -> Callable[[Tensor], Tensor]:
        """Turn the bases of some blocks; what carries (B, m, n) of all blocks over to their new coordinates."""
        index, memory = _some(rows, rotated), max(o.factor_beta**every, SHORTEST_MEMORY)
        with _part(state, rotated, index) as (part, some):
            here = sides if index is None else self._opened(part)
            part["failures"]["dense"] += self._turn_sides(*here, some, memory)
        if index is not None:
            for side, turned in zip(sides, here, strict=True):
                side.adopt(turned, index)
        # m' <- Q_L^T m' Q_R
        return _of_rows(index, lambda x: between(here[0].turned, x, here[1].turned))

    def _turn_sides(self, left: OpenSide, right: OpenSide, rotated: Tensor, memory: float) -> Tensor:
        """Turn both bases; the blocks of which one failed."""
        # both from the eigenvalues before either turns; a side without a basis needs no statistic, rows x rows
        of_right = statistic(rotated.mT, self._whitening(left)) if right.rotates else None
        of_left = statistic(rotated, self._whitening(right)) if left.rotates else None
        failed = torch.zeros(len(rotated), dtype=torch.bool, device=rotated.device)
        for side, sample in ((left, of_left), (right, of_right)):
            if sample is not None:
                failed |= side.turn(sample, memory)
        return failed

    def _whitening(self, side: OpenSide) -> Tensor:
        if not self.whitened:
            return torch.ones_like(side.eigenvalues)
        # directions without any gradient for long have decayed to 0: the first one there must not overflow
        return torch.maximum(side.eigenvalues, FLOOR * side.eigenvalues.amax(-1, keepdim=True)).clamp_min(TINY)


Scales = tuple[Tensor, Tensor]


def _scales(left: OpenSide, right: OpenSide, damping: float) -> Scales:
    """lambda_L^1/2 and lambda_R^1/2, damped, to be multiplied with: (B, m or 1, 1) and (B, 1, n or 1)."""
    of_left, of_right = (
        (side.eigenvalues + damping * side.eigenvalues.amax(-1, keepdim=True)).clamp_min(TINY).sqrt()
        for side in (left, right)
    )
    return of_left.unsqueeze(-1), of_right.unsqueeze(-2)


def _some(rows: list[int], x: Tensor) -> Index | None:
    """Some blocks of a stack; None: all of them."""
    return None if len(rows) == len(x) else index_of(rows, x.device)


def _of_rows(index: Index | None, of_part: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """On all blocks of a stack, what is done to some; None: to all."""
    if index is None:
        return of_part

    def of_all(x: Tensor) -> Tensor:
        y = x.clone()
        y[index] = of_part(x[index])
        return y

    return of_all


def _chained(first: Callable[[Tensor], Tensor], then: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return then if first is same else lambda x: then(first(x))


class Stack(Protocol):
    """What `directions` needs of a stack of equal blocks."""

    algorithm: Algorithm
    state: State
    membership: Tensor
    """float32 (parameters of the wave, B): 1 where the block belongs to the parameter."""
    salts: Tensor
    """int32 (B,): the same number for a block in every run and on every rank."""
    places: list[float]
    """What share of the parameter group's blocks comes before each."""
    updates: list[int]
    """How many each block has had, this one included."""

    def parameters(self) -> Tensor:
        """float32 (B, *shape), a copy."""


def directions(stacks: Sequence[Stack], gradients: Sequence[Tensor], context: Context) -> list[Tensor]:
    """The step of every block of some stacks, without learning rate and weight decay: float32 (B, *shape) a stack."""
    if context.probe:
        context.probe.before(stacks)
    contexts = [replace(context, due=due(context.options, stack.updates, stack.places)) for stack in stacks]
    inputs = zip(stacks, gradients, contexts, strict=True)
    preconditioned = [stack.algorithm.precondition(stack.state, g, its_context) for stack, g, its_context in inputs]
    grafted = graft(stacks, gradients, preconditioned, context)
    steps = [
        through_base(stack, value, p.coordinates, context)
        for stack, value, p in zip(stacks, grafted, preconditioned, strict=True)
    ]
    if context.probe:
        context.probe.after(stacks)
    return [p.back(step) for p, step in zip(preconditioned, steps, strict=True)]


def through_base(stack: Stack, p: Tensor, coordinates: Coordinates, context: Context) -> Tensor:
    """The base's direction for what takes the gradient's place, (B, *shape) float32; counts the blocks' steps."""
    o = context.options
    steps = stack.state["steps"]["dense"].add_(1)
    if context.coupled_decay:
        p = stack.parameters().mul_(context.coupled_decay).add_(p)
    noise = Noise(stack.salts, context.step, o.seed)
    late = 0 < o.stochastic_from <= context.step
    moments = stack.algorithm.moments
    exact = moments.next_first(stack.state, p, context.betas, coordinates) if context.probe else None
    direction = moments.direction(stack.state, p, context.betas, context.eps, steps, noise, late, coordinates)
    if context.probe and exact is not None:
        context.probe.moment(stack, exact)
    return direction


def graft(
    stacks: Sequence[Stack], gradients: Sequence[Tensor], preconditioned: Sequence[Preconditioned], context: Context
) -> list[Tensor]:
    """P <- P |G|_F / |P|_F, the norms over each parameter (`norm`) or each block (`block`); a zero P stays zero.

    A P that is not finite (a gradient whose square overflows) becomes zero.
    """
    values, over = [p.value for p in preconditioned], context.options.graft
    chosen = [i for i, p in enumerate(preconditioned) if p.grafted]
    if not chosen:
        return values
    p2 = [_squared_norms(values[i]) for i in chosen]
    g2 = [_squared_norms(gradients[i]) for i in chosen] if over != "none" else p2
    if over == "norm":
        members = [stacks[i].membership.double() for i in chosen]
        # products with the membership matrices, not a scatter-add, whose order is not fixed on a GPU
        sums = [torch.stack([m @ x for m, x in zip(members, squares, strict=True)]).sum(0) for squares in (g2, p2)]
        g2, p2 = ([m.T @ over_all for m in members] for over_all in context.total(torch.stack(sums)))
    for i, numerator, denominator in zip(chosen, g2, p2, strict=True):
        ratio = torch.nan_to_num((numerator / denominator).sqrt(), nan=0.0, posinf=0.0).float()[:, None, None]
        values[i] = torch.where(ratio > 0, values[i] * ratio, 0.0)
    return values


def make_algorithm(
    shape: tuple[int, ...], options: Options, quantise_moments: bool, rotated: tuple[bool, bool] = (True, True)
) -> Algorithm:
    """The algorithm for blocks of `shape` that the options name.

    Args:
        quantise_moments: see `make_moments`.
        rotated: which sides have a basis, see `rotated_sides`.
    """
    moments = make_moments(shape, options, quantise_moments)
    if options.algorithm == "elementwise":
        return Elementwise(shape, moments)
    if options.algorithm == "shampoo":
        return Shampoo(shape, moments, make_factor(shape[0], options), make_factor(shape[1], options))
    kl_shampoo = options.algorithm == "kl_shampoo"
    return Eigenbasis(shape, moments, *make_sides(shape, options, rotated), options.algorithm != "soap", kl_shampoo)


@contextmanager
def _part(state: State, x: Tensor, index: Index | None) -> Iterator[tuple[State, Tensor]]:
    """Some blocks of a stack's state, to be changed in place, and of x (B, ...)."""
    if index is None:
        yield state, x
        return
    part = taken(state, index)
    yield part, x[index]
    put_back(state, index, part)


def _side(state: State, side: str) -> State:
    return {name.removeprefix(side + "."): buffers for name, buffers in state.items() if name.startswith(side + ".")}


def _squared_norms(x: Tensor) -> Tensor:
    """float64 (B,): the square of a float32 norm overflows float32."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).double().square()
