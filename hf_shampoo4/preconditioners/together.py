"""Updates of several stacks, which pause where bases are to be updated, so that these are updated at once."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .bases import BasisStep, update_bases
from .protocols import Context, Stack

ALONE = ("cpu",)  # devices on which each step of bases is taken alone: as fast there, and in less memory

BasisResult = tuple[Tensor, Tensor]
"""See `update_bases`."""
Steps = Generator[list[BasisStep], list[BasisResult], Tensor]
"""Of an update: gives steps of bases, takes their results, and ends with the update."""


def together(running: Sequence[Steps], context: Context, device: torch.device) -> list[Tensor]:
    """Finish some updates; what they want of bases is taken at once as far as it is of one kind, unless `ALONE`."""
    found: dict[int, Tensor] = {}
    answers: dict[int, list[BasisResult] | None] = dict.fromkeys(range(len(running)))
    while answers:
        wanted: dict[tuple[int, int], BasisStep] = {}
        for i, answer in answers.items():
            try:
                steps = next(running[i]) if answer is None else running[i].send(answer)
                wanted |= {(i, j): step for j, step in enumerate(steps)}
            except StopIteration as end:
                found[i] = end.value
        kinds: dict[Any, list[tuple[int, int]]] = {}
        for at, step in wanted.items():
            kinds.setdefault(at if device.type in ALONE else (step.side.described, step.decay), []).append(at)
        results: dict[tuple[int, int], BasisResult] = {}
        for places in kinds.values():
            with context.stopwatch.on(device):
                of_kind = update_bases([wanted.pop(at) for at in places])
            results |= zip(places, of_kind, strict=True)
        answers = {i: [results[i, j] for j in range(2) if (i, j) in results] for i in {i for i, _ in results}}
    return [found[i] for i in range(len(running))]


@runtime_checkable
class Pausing(Protocol):
    """An algorithm whose update pauses."""

    def steps(self, stack: Stack, g: Tensor, context: Context) -> Steps:
        """As `Algorithm.update`."""


def updated(stacks: Sequence[Stack], gradients: Sequence[Tensor], context: Context) -> list[Tensor]:
    """`Algorithm.update` of each stack; on a GPU all bases at once, whose updates are many small operations."""
    found, running = dict[int, Tensor](), dict[int, Steps]()
    for i, (stack, g) in enumerate(zip(stacks, gradients, strict=True)):
        if isinstance(stack.algorithm, Pausing) and g.device.type not in ALONE:
            running[i] = stack.algorithm.steps(stack, g, context)
        else:
            found[i] = stack.algorithm.update(stack, g, context)
    if running:
        found |= zip(running, together([*running.values()], context, gradients[0].device), strict=True)
    return [found[i] for i in range(len(stacks))]
