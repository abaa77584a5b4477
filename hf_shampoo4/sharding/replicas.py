"""Plain tensors are taken for replicas, each of them whole on every rank: how it is told that they are not.

Where every rank trains a model of its own, or its gradients have not been averaged, owners would overwrite what is
another rank's.  So a few sums of each parameter and gradient are compared over ranks.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .exchange import Ranks
from .local_parameter import LocalParameter

TOLERANCE = 0.02  # of a norm.  A clip factor with another last bit may round a bfloat16 number to its neighbour (.008)


def compare(ranks: Ranks, local: Sequence[LocalParameter]) -> list[bool]:
    """Make sure that parameters and gradients are replicas; every rank must call it with the same parameters.

    Returns:
        For each whether it could be told: whether its gradient is not zero.

    Raises:
        RuntimeError: they are no replicas; the message says which and on which ranks.
    """
    if not local:
        return []
    sums = torch.stack([_sums(one) for one in local])  # (n, 2, 2): of weights and gradient; sum and norm
    bounds = ranks.reduce(torch.stack([sums, -sums]), largest=True)
    largest, least = bounds[0], -bounds[1]
    scale = torch.maximum(largest.abs(), least.abs()).amax(-1, keepdim=True)
    differs = (largest - least > TOLERANCE * scale).any(-1)  # false where it is not a number
    if differs.any():
        first = int(differs.any(-1).nonzero()[0])
        which = 0 if differs[first, 0] else 1
        _refuse(local[first].name, ("values", "gradients")[which], ranks.gather(sums[first, which].tolist()), ranks)
    return (largest[:, 1, 1] > 0).tolist()


def _sums(local: LocalParameter) -> Tensor:
    """float64 (2, 2): sum and norm of the weights and of the gradient.  The sum is that of what differs too."""
    weights, gradient = local.weights(), local.gradient()
    both = [weights, torch.zeros_like(weights) if gradient is None else gradient]
    return torch.stack([torch.stack([x.sum(dtype=torch.float64), torch.linalg.vector_norm(x.double())]) for x in both])


def _refuse(name: str, what: str, by_rank: list[list[float]], ranks: Ranks) -> None:
    first = by_rank[0]
    scale = max(abs(x) for of_rank in by_rank for x in of_rank)
    rank, other = max(
        enumerate(by_rank), key=lambda found: max(abs(a - b) for a, b in zip(first, found[1], strict=True))
    )
    others = [
        r
        for r, of_rank in enumerate(by_rank)
        if max(abs(a - b) for a, b in zip(first, of_rank, strict=True)) > TOLERANCE * scale
    ]
    raise RuntimeError(
        f"parameter {name!r} is no replica: its {what} differ between rank 0 and ranks {others[:8]} (sum and norm "
        f"{first[0]:.4g}, {first[1]:.4g} on rank 0; {other[0]:.4g}, {other[1]:.4g} on rank {rank}).  All ranks of a "
        f"process group train one model together.  Average the gradients over these {ranks.world} ranks before step(), "
        "as DistributedDataParallel does; or give the optimizer the group of the ranks whose gradients are averaged "
        "(process_group=); or set communicate=False where every process trains a model of its own, or averages models"
    )


def has_gradient(local: Sequence[LocalParameter]) -> bool:
    """Whether any gradient here is not zero."""
    found = [gradient for one in local if (gradient := one.gradient()) is not None and gradient.numel()]
    return any(bool(gradient.any()) for gradient in found)


def wrappers(parameters: Sequence[Tensor]) -> list[weakref.ref[Any]]:
    """The DistributedDataParallel modules that any of the parameters is in; parameters do not say which."""
    known, kinds = {id(p) for p in parameters}, _and_subclasses(DistributedDataParallel)
    found = [o for o in gc.get_objects() if type(o) in kinds]  # `isinstance` of each takes twice as long as all of it
    return [weakref.ref(module) for module in found if any(id(p) in known for p in module.parameters())]


def _and_subclasses(kind: type) -> set[type]:
    below: list[type] = kind.__subclasses__()
    return {kind}.union(*map(_and_subclasses, below))


def refuse_join(modules: Sequence[weakref.ref[Any]]) -> None:
    """Refuse uneven inputs: a rank that has run out of them takes part in DDP's collectives, but not in ours.

    Raises:
        RuntimeError: a module is in the context of `join()`.
    """
    for module in modules:
        config = getattr(module(), "_join_config", None)
        if config is not None and config.enable and not config.throw_on_early_termination:
            raise RuntimeError(
                "DistributedDataParallel.join() lets ranks run out of inputs, and the others would wait for them in "
                "the optimizer: set communicate=False, with which every rank computes all of the update; or use "
                "join(throw_on_early_termination=True), or inputs that are as many on every rank"
            )


class ReplicaChecks:
    """Which replicas were not compared yet.  Each is compared until it could be told, and again ever more rarely."""

    def __init__(self) -> None:
        self._pending: set[int] = set()
        self._wrappers: list[weakref.ref[Any]] = []

    def begin(self, replicas: Sequence[LocalParameter], parameters: Sequence[Tensor]) -> None:
        """A plan was made: compare its replicas.

        Args:
            replicas: see `again`.
            parameters: all that are trained, whose wrappers are looked up.

        Raises:
            RuntimeError: as `refuse_join`.
        """
        self.again(replicas)
        self._wrappers = wrappers(parameters)
        self.refuse_join()

    def again(self, replicas: Sequence[LocalParameter]) -> None:
        """Compare these once more; plain tensors that every rank has."""
        self._pending |= {id(local.parameter) for local in replicas}

    def pending(self, replicas: Sequence[LocalParameter]) -> list[LocalParameter]:
        """Those that have not been compared yet."""
        return [local for local in replicas if id(local.parameter) in self._pending]

    def compare(self, ranks: Ranks, replicas: Sequence[LocalParameter]) -> None:
        """Compare those that are pending; every rank must call it with the same parameters.

        Raises:
            RuntimeError: they are no replicas.
        """
        there = self.pending(replicas)
        told = compare(ranks, there)
        self._pending -= {id(local.parameter) for local, is_told in zip(there, told, strict=True) if is_told}

    def refuse_join(self) -> None:
        """See `refuse_join`."""
        refuse_join(self._wrappers)
