"""What a step knows, what it needs of a stack of equal blocks, and what every algorithm offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..numerics.rounding import Noise
from ..numerics.storage import Index, State, Storage, index_of
from ..options import Options
from ..utils.stopwatch import Stopwatch
from .moments import Moments, MomentStep
from .operations import Work
from .schedule import due

if TYPE_CHECKING:
    from .diagnostics import Probe


class Stack(Protocol):
    """All blocks of one algorithm that are computed together."""

    algorithm: Algorithm
    state: State
    membership: Tensor
    """float32 (parameters of the wave, B): 1 where the block belongs to the parameter."""
    seed_offsets: Tensor
    """int32 (B,): the same number for a block in every run and on every rank."""
    phases: list[float]
    """What share of the parameter group's blocks comes before each."""
    updates: list[int]
    """How many each block has had, this one included."""


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
        """Rows of a stack that are due, and how many steps lie between two of theirs.

        All that are due at once have one interval, unless their parameters have had other numbers of updates.
        """
        found = due(self.options, stack.updates, stack.phases).get(refresh, {})
        return [(index_of(rows, stack.seed_offsets.device), every) for every, rows in found.items()]

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


class Algorithm(Protocol):
    """What every algorithm offers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one block."""

    @property
    def moments(self) -> Moments:
        """How the first and, if there is one, the second moment are kept."""

    @property
    def grafted(self) -> bool:
        """Whether its direction is given a norm, which may go over all blocks of a parameter."""

    def storages(self) -> dict[str, Storage]:
        """Name -> storage of every tensor of a block's state."""

    def initialise(self, state: State) -> None:
        """Write the state before the first step (buffers come zeroed)."""

    def work(self) -> dict[str, Work]:
        """A block's operations: of every "step", and of each refresh of `schedule.intervals` beyond these."""

    def workspace(self, blocks: int) -> dict[str, int]:
        """float32 numbers that a step of so many blocks takes at once ("step"), and one with a refresh, in all."""

    def refreshes(self) -> dict[str, list[str]]:
        """Tensors that only a refresh of `schedule.intervals` changes; all others change at every step."""

    def update(self, stack: Stack, g: Tensor, context: Context) -> Tensor:
        """Bring the state up to date, and give the step without learning rate and weight decay.

        Args:
            g: (B, *shape) float32, the gradient (Shampoo: what `precondition` and the graft have made of it); not
                changed.

        Returns:
            (B, *shape) float32, not to be written to.
        """


def rows_that_change(
    algorithm: Algorithm, options: Options, updates: Sequence[int], phases: Sequence[float]
) -> dict[str, set[int]]:
    """Tensors that a step changes in some blocks only, and the positions of these; all other tensors change in all."""
    refreshed = due(options, updates, phases)
    rows = {refresh: {i for some in of_refresh.values() for i in some} for refresh, of_refresh in refreshed.items()}
    return {name: rows.get(refresh, set()) for refresh, names in algorithm.refreshes().items() for name in names}
