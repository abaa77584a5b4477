"""From parameters to stacks: blocks -> algorithms -> stacks of equal blocks -> views in `optimizer.state`.

A *stack* is all blocks of a wave that share an algorithm description (hence a shape), as one (B, m, n) tensor; its
state buffers have B rows, and `optimizer.state[p]` holds the rows of parameter p as views, under
"<shape>/<tensor>.<buffer>".  A *wave* is as many whole parameters as fit `WAVE_ELEMENTS`: it bounds the memory that a
step needs at a time, whatever the size of the model.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .algorithms import Algorithm, Elementwise, State, make_algorithm
from .blocks import MatrixView, Rect, matrix_view, partition, strips
from .options import Options
from .placement import Load
from .rounding import noise_bits, to_bfloat16
from .storage import SMALL, allocate, nbytes

WAVE_ELEMENTS = 1 << 24  # 64 MiB of float32 gradient
MOMENT_FLOPS, STATS_CUBES, ROOT_CUBES = 50, 12, 25  # an entry's decode, update, encode; k^3 of a factor of order k
STRIP = 1 << 20  # entries of a block of an embedding: as many as a block of 1024 x 1024


@dataclass(frozen=True)
class Block:
    """One rectangle of a parameter's matrix view, and the algorithm that runs on it."""

    view: MatrixView
    rect: Rect
    algorithm: Algorithm


@dataclass(frozen=True)
class Piece:
    """A block of a live parameter."""

    parameter: Tensor
    block: Block
    salt: int
    """The same number in every run and on every rank, for stochastic rounding."""


def blocks_of(shape: tuple[int, ...], options: Options) -> list[Block]:
    """How a parameter of `shape` (the global one) is treated, from geometry alone; empty for one without elements."""
    numel = math.prod(shape)
    if not numel:
        return []
    quantise = numel >= SMALL
    view = matrix_view(shape, options.matrix_view) if options.algorithm != "elementwise" else None
    if view is None:
        rows = shape[0] if len(shape) > 1 else 1
        view, options = MatrixView(1, rows, numel // rows), dataclasses.replace(options, algorithm="elementwise")
        rects = strips(view, STRIP)
    else:
        splits = options.row_splits if sum(options.row_splits) == view.rows else ()
        rects = partition(view, options.block_size, splits)
    of_block = {rect.shape: rect.shape if len(shape) > 1 else (numel,) for rect in rects}
    algorithms = {rect: make_algorithm(block, options, quantise) for rect, block in of_block.items()}
    return [Block(view, rect, algorithms[rect.shape]) for rect in rects]


def loads_of(blocks: Sequence[Block], options: Options) -> list[Load]:
    """What each block asks of its owner, from shapes alone; exact in bytes, in flops good enough to balance by."""
    found: dict[tuple[int, int], Load] = {}
    for block in blocks:
        if block.rect.shape not in found:
            found[block.rect.shape] = _load(block, options)
    return [found[block.rect.shape] for block in blocks]


def _load(block: Block, options: Options) -> Load:
    m, n = block.rect.shape
    flops = MOMENT_FLOPS * m * n
    if not isinstance(block.algorithm, Elementwise):
        products, cubes = 2 * m * n * (m + n), m**3 + n**3
        # P = L^-1/4 G R^-1/4;  G G^T, G^T G, Bjorck and QR of each;  eigh or Newton of each
        flops += products + (products + STATS_CUBES * cubes) // options.stats_every
        flops += ROOT_CUBES * cubes // options.roots_every
    return Load(flops, sum(nbytes(storage) for storage in block.algorithm.storages().values()))


def state_layout(blocks: Sequence[Block]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """State key -> shape and dtype of the tensors that a parameter cut into `blocks` keeps."""
    layout = {}
    for algorithm in dict.fromkeys(block.algorithm for block in blocks):
        count = sum(block.algorithm == algorithm for block in blocks)
        for tensor, storage in algorithm.storages().items():
            for buffer, (shape, dtype) in storage.layout().items():
                layout[state_key(algorithm, tensor, buffer)] = ((count, *shape), dtype)
    return layout


def state_key(algorithm: Algorithm, tensor: str, buffer: str) -> str:
    """Where `optimizer.state[p]` keeps one buffer of the blocks that run `algorithm`."""
    return f"{'x'.join(map(str, algorithm.shape))}/{tensor}.{buffer}"


@dataclass
class Stack:
    """Equal blocks of a wave, and their state."""

    algorithm: Algorithm
    pieces: list[Piece]
    membership: Tensor
    salts: Tensor
    state: State = field(default_factory=dict)

    @property
    def phases(self) -> list[int]:
        """A number for each block, the same in every run and on every rank."""
        return [piece.salt for piece in self.pieces]

    def parameters(self) -> Tensor:
        """float32 (B, *shape), a copy."""
        return torch.stack(_parts(self.pieces, [piece.parameter for piece in self.pieces])[0]).float()

    def gradients(self) -> Tensor:
        """float32 (B, *shape); a view of the gradient itself where there is nothing to gather or convert."""
        gradients = [piece.parameter.grad for piece in self.pieces if piece.parameter.grad is not None]
        parts, _ = _parts(self.pieces, gradients)
        return (parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)).float()

    def rows(self, index: Tensor) -> Stack:
        """A copy that holds only some blocks, for a step on which the others have no gradient."""
        state = {t: {b: buffer[index] for b, buffer in buffers.items()} for t, buffers in self.state.items()}
        pieces = [self.pieces[i] for i in index.tolist()]
        return Stack(self.algorithm, pieces, self.membership[:, index], self.salts[index], state)

    def put_back(self, index: Tensor, part: Stack) -> None:
        """Copy the state of `rows(index)` back."""
        for tensor, buffers in part.state.items():
            for name, buffer in buffers.items():
                self.state[tensor][name][index] = buffer


@dataclass
class Wave:
    """Whole parameters that are computed together."""

    stacks: list[Stack]

    def active(self) -> list[tuple[Stack, Tensor | None]]:
        """Stacks that have a gradient now; with the rows that do, where not all of them do."""
        result: list[tuple[Stack, Tensor | None]] = []
        for stack in self.stacks:
            rows = [i for i, piece in enumerate(stack.pieces) if piece.parameter.grad is not None]
            if len(rows) == len(stack.pieces):
                result.append((stack, None))
            elif rows:
                result.append((stack, torch.tensor(rows, device=stack.membership.device)))
        return result


def deliver(stack: Stack, update: Tensor, lr: float, weight_decay: float, step: int, options: Options) -> None:
    """p <- (1 - lr wd) p - lr u, in float32 or better, rounded to p's dtype (bfloat16 stochastically, if asked)."""
    targets, copies = _parts(stack.pieces, [piece.parameter for piece in stack.pieces])
    dtype = targets[0].dtype
    if dtype in (torch.float32, torch.float64):
        torch._foreach_mul_(targets, 1 - lr * weight_decay)
        torch._foreach_add_(targets, list(update.to(dtype).unbind(0)), alpha=-lr)
    else:
        exact = torch.stack(targets).float().mul_(1 - lr * weight_decay).add_(update, alpha=-lr)
        if options.stochastic_rounding and dtype == torch.bfloat16:
            exact = to_bfloat16(exact, noise_bits(stack.salts, step, options.seed, exact[0].numel()).view_as(exact))
        torch._foreach_copy_(targets, list(exact.unbind(0)))
    for parameter, matrices in copies:
        parameter.copy_(matrices.view(parameter.shape))


def build(parameters: Iterable[tuple[str, Tensor]], options: Options, saved: MutableMapping[Tensor, Any]) -> list[Wave]:
    """Waves over the parameters of one group; `saved[p]` is adopted where present and then holds the live views.

    Args:
        parameters: (name, parameter), the name being the same in every run.
    """
    waves = []
    for members in _in_waves(parameters):
        by_algorithm: dict[Algorithm, list[tuple[int, Piece]]] = {}
        for i, (name, p) in enumerate(members):
            for k, block in enumerate(blocks_of(tuple(p.shape), options)):
                salt = zlib.crc32(f"{name}:{k}".encode()) - (1 << 31)
                by_algorithm.setdefault(block.algorithm, []).append((i, Piece(p, block, salt)))
        stacks = [_stack(algorithm, entries, members, saved) for algorithm, entries in by_algorithm.items()]
        waves.append(Wave(stacks))
    return waves


def _stack(
    algorithm: Algorithm,
    entries: list[tuple[int, Piece]],
    members: list[tuple[str, Tensor]],
    saved: MutableMapping[Tensor, Any],
) -> Stack:
    device = entries[0][1].parameter.device
    membership = torch.zeros(len(members), len(entries))
    membership[[i for i, _ in entries], list(range(len(entries)))] = 1.0
    state = {name: allocate(storage, len(entries), device) for name, storage in algorithm.storages().items()}
    algorithm.initialise(state)
    pieces = [piece for _, piece in entries]
    salts = torch.tensor([piece.salt for piece in pieces], dtype=torch.int32, device=device)
    stack = Stack(algorithm, pieces, membership.to(device), salts, state)
    start = 0
    for i in sorted({i for i, _ in entries}):
        count = sum(j == i for j, _ in entries)
        held = saved[members[i][1]]
        for tensor, buffers in state.items():
            for name, buffer in buffers.items():
                key, mine = state_key(algorithm, tensor, name), buffer[start : start + count]
                if key in held:
                    mine.copy_(held[key])
                held[key] = mine
        start += count
    return stack


def _in_waves(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Parameters of one device and dtype, as many as fit; at least one."""
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, p in parameters:
        alike.setdefault((p.device, p.dtype), []).append((name, p))
    for candidates in alike.values():
        wave: list[tuple[str, Tensor]] = []
        elements = 0
        for name, p in candidates:
            if wave and elements + p.numel() > WAVE_ELEMENTS:
                yield wave
                wave, elements = [], 0
            wave.append((name, p))
            elements += p.numel()
        yield wave


def _parts(pieces: Sequence[Piece], tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Each piece's rectangle of its tensor (the parameter or its gradient).

    Returns:
        parts: views of the tensors, or of a copy where a tensor's memory has no matrix view (channels last).
        copies: (tensor, that copy), to be written back by who changes the parts.
    """
    matrices: dict[int, Tensor] = {}
    copies, parts = [], []
    for piece, tensor in zip(pieces, tensors, strict=True):
        if id(tensor) not in matrices:
            view, whole = piece.block.view, tensor.detach()
            opened = matrices[id(tensor)] = whole.reshape(view.count, view.rows, view.columns)
            if opened.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                copies.append((whole, opened))
        r = piece.block.rect
        part = matrices[id(tensor)][r.matrix, r.r0 : r.r1, r.c0 : r.c1]
        parts.append(part.view(piece.block.algorithm.shape))
    return parts, copies
