"""Updates of several stacks, which pause where bases are to be updated, so that these are updated at once."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from .bases import BasisStep, update_bases
from .protocols import Algorithm, Context, Stack

ALONE = ("cpu",)  # devices on which stacks do not wait for each other: as fast there, and in less memory
AT_ONCE = 1 << 25  # entries of bases that are updated at once, at most: several copies are made of them
COPIES = 6  # of them

BasisResult = tuple[Tensor, Tensor]
"""See `update_bases`."""
Steps = Generator[list[BasisStep], list[BasisResult], Tensor]
"""Of an update: gives steps of bases, takes their results, and ends with the update."""


def alone(steps: Steps, context: Context, device: torch.device) -> Tensor:
    """Finish an update, one step of bases after the other."""
    answer: list[BasisResult] | None = None
    while True:
        try:
            wanted = next(steps) if answer is None else steps.send(answer)
        except StopIteration as end:
            return end.value
        with context.stopwatch.on(device):
            answer = [update_bases([step])[0] for step in wanted]


def together(running: Sequence[Steps], context: Context, device: torch.device) -> list[Tensor]:
    """Finish some updates; what they want of bases is taken at once as far as it is of one kind."""
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
            kinds.setdefault((step.side.described, step.decay), []).append(at)
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

    def held(self, blocks: int) -> int:
        """float32 numbers that so many blocks keep while it pauses."""

    def basis_entries(self, stack: Stack, context: Context) -> int:
        """Of the bases that the step updates."""


def pauses(algorithm: Algorithm) -> TypeGuard[Pausing]:
    """Whether it is `Pausing`."""
    return _is_pausing(type(algorithm))


@cache
def _is_pausing(kind: type[Algorithm]) -> bool:  # every method is looked up
    return issubclass(kind, Pausing)


def workspace(blocks: Mapping[Algorithm, int]) -> int:
    """float32 numbers that a step of all stacks takes at once while their bases are updated, on a GPU.

    Args:
        blocks: of each algorithm, how many there are in a wave.
    """
    held = sum(a.held(count) for a, count in blocks.items() if pauses(a))
    return held + COPIES * min(held, AT_ONCE)


def updated(stacks: Sequence[Stack], gradients: Sequence[Tensor], context: Context) -> list[Tensor]:
    """`Algorithm.update` of each stack; on a GPU all bases at once, whose updates are many small operations."""
    if not gradients or gradients[0].device.type in ALONE:
        return [stack.algorithm.update(stack, g, context) for stack, g in zip(stacks, gradients, strict=True)]
    found, running = dict[int, Tensor](), dict[int, Steps]()
    pausing = [(s.algorithm, s) for s in stacks if pauses(s.algorithm)]
    few = sum(algorithm.basis_entries(stack, context) for algorithm, stack in pausing) <= AT_ONCE
    for i, (stack, g) in enumerate(zip(stacks, gradients, strict=True)):
        if pauses(stack.algorithm) and few:
            running[i] = stack.algorithm.steps(stack, g, context)
        else:
            found[i] = stack.algorithm.update(stack, g, context)
    if running:
        found |= zip(running, together([*running.values()], context, gradients[0].device), strict=True)
    return [found[i] for i in range(len(stacks))]
