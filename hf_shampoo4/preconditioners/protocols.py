"""What a step knows, what it needs of a stack of equal blocks, and what every algorithm offers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from ..numerics.blocks import Index, State, index_of
from ..numerics.rounding import Noise
from ..numerics.storage import Dense, Storage
from ..options import ALGORITHMS, Options
from ..utils.stopwatch import Stopwatch
from .moments import Moments, MomentStep
from .operations import Work
from .schedule import due

if TYPE_CHECKING:
    from .diagnostics import Probe


class Stack(Protocol):
    """All blocks of one algorithm that are computed together."""

    algorithm: Algorithm
    membership: Tensor
    """float32 (parameters of the wave, B): 1 where the block belongs to the parameter."""
    seed_offsets: Tensor
    """int32 (B,): the same number for a block in every run and on every rank."""
    phases: list[float]
    """What share of the parameter group's blocks comes before each."""
    updates: list[int]
    """How many each block has had, this one included."""

    @property
    def state(self) -> State:
        """Tensor -> buffer of it -> (B, ...)."""
        ...


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
    counts: Tensor | None = None
    """bool of no dimension, on the device: whether anything is to change; None: it is."""

    def due(self, stack: Stack, refresh: str) -> list[tuple[Index, int]]:
        """Positions in a stack of the blocks that are due, and how many steps lie between two of theirs.

        All that are due at once have one interval, unless their parameters have had other numbers of updates.
        """
        found = due(stack.algorithm, self.options, stack.updates, stack.phases).get(refresh, {})
        return [(index_of(blocks, stack.seed_offsets.device), every) for every, blocks in found.items()]

    def number_due(self, stack: Stack, refresh: str) -> int:
        """How many blocks of a stack are due."""
        found = due(stack.algorithm, self.options, stack.updates, stack.phases).get(refresh, {})
        return sum(map(len, found.values()))

    def moment_step(self, stack: Stack) -> MomentStep:
        """One more step of a stack's blocks, as their moments see it."""
        o, probe = self.options, self.probe
        return MomentStep(
            betas=self.betas,
            eps=self.eps,
            steps=stack.state["steps"]["dense"].add_(1),
            noise=Noise(stack.seed_offsets, self.step, o.seed),
            stochastic_first=0 < o.stochastic_from <= self.step,
            watch=None if probe is None else lambda exact: probe.moment(stack, exact),
        )


STRIP = 1 << 20  # entries of a small strip: as many as a block of 1024 x 1024


def strip(width: int) -> int:
    """Rows of a small strip of so many columns, for matrices that are cut into whole rows."""
    return STRIP // width


@dataclass(frozen=True)
class Algorithm(ABC):
    """One algorithm on blocks of one shape: a description, whose tensors are passed in as {tensor name: buffers}.

    Everything that the rest of the package asks of an algorithm is asked here.  Equal descriptions are computed as one
    stack.
    """

    shape: tuple[int, ...]
    """Of one block."""
    moments: Moments
    """How the first and, if there is one, the second moment are kept."""

    preconditions: ClassVar[bool] = True
    """False: it works entry by entry, so that any cut of a parameter will do, and none has to be a matrix."""
    grafted: ClassVar[bool] = False
    """Whether what `precondition` returns is given a norm, which may go over all blocks of a parameter (`graft`)."""
    every: ClassVar[Mapping[str, str]] = {}
    """Refresh -> the option that says how many steps lie between two of a block's."""

    @classmethod
    @abstractmethod
    def make(cls, shape: tuple[int, ...], options: Options, quantise: bool, whole: tuple[int, int]) -> Algorithm:
        """For blocks of `shape`.

        Args:
            shape: of a block.
            options: of the group.
            quantise: whether the moments are large enough for few bits, see `moments.make_base`.
            whole: rows and columns of the matrix that the blocks are cut from.
        """

    @classmethod
    def largest_block(cls, rows: int, columns: int, options: Options) -> tuple[int, int]:
        """The most rows and columns of a block of a matrix."""
        return options.block_size, options.block_size

    @classmethod
    def intervals(cls, options: Options, updates: int | None = None) -> dict[str, int]:
        """Refresh -> steps between two of a block's, after so many updates, or (None) in the long run."""
        return {refresh: getattr(options, option) for refresh, option in cls.every.items()}

    def label(self, options: Options, moments: str) -> str:
        """What the report calls it, with the storage of its moments."""
        return f"{ALGORITHMS[options.algorithm].label}, {moments} moments"

    def storages(self) -> dict[str, Storage]:
        """Name -> storage of every tensor of a block's state; `steps`: updates so far."""
        return {"steps": Dense(()), **self.moments.storages()}

    def initialise(self, state: State) -> None:  # noqa: B027  (zeros are right)
        """Write the state before the first step (buffers come zeroed)."""

    def work(self) -> dict[str, Work]:
        """A block's operations: of every "step", and of each refresh of `every` beyond these."""
        return {"step": Work()}

    def workspace(self, blocks: int) -> dict[str, int]:
        """float32 numbers that a step of so many blocks takes at once ("step"), and one with a refresh, in all."""
        return {"step": self.moments.workspace(blocks * math.prod(self.shape))}

    def refreshes(self) -> dict[str, list[str]]:
        """Tensors that only a refresh of `every` changes; all others change at every step."""
        return {}

    def precondition(self, stack: Stack, g: Tensor, context: Context) -> Tensor:
        """What is grafted, (B, *shape) float32, from the gradient; asked where `grafted` says so."""
        return g

    @abstractmethod
    def update(self, stack: Stack, g: Tensor, context: Context) -> Tensor:
        """Bring the state up to date, and give the step without learning rate and weight decay.

        Args:
            stack: of B blocks; its state is changed in place.
            g: (B, *shape) float32, the gradient (where `grafted`: what `precondition` and the graft have made of it);
                not changed.
            context: of the step.

        Returns:
            (B, *shape) float32, not to be written to.
        """


def blocks_that_change(
    algorithm: Algorithm, options: Options, updates: Sequence[int], phases: Sequence[float]
) -> dict[str, set[int]]:
    """Tensors that a step changes in some blocks only, and the positions of these; all other tensors change in all."""
    refreshed = due(algorithm, options, updates, phases)
    blocks = {refresh: {i for some in of_refresh.values() for i in some} for refresh, of_refresh in refreshed.items()}
    return {name: blocks.get(refresh, set()) for refresh, names in algorithm.refreshes().items() for name in names}
