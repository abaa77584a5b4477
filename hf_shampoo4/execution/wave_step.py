"""Blocks of a wave in one step: gradients to the owners, directions, updates back; and how waves follow each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..numerics.linalg import exact_float32
from ..numerics.rounding import noise_at, to_bfloat16
from ..preconditioners.algorithms import Context, directions
from ..sharding.exchange import Exchange, Pending, Piece, Ranks
from .waves import Part, Stack, Wave


def run(jobs: Sequence[Job]) -> None:
    """Do the jobs in order; the next one's gradients and the last one's updates travel while one is computed."""
    before: Job | None = None
    for i, job in enumerate(jobs):
        if i == 0:
            job.start()
        if i + 1 < len(jobs):
            jobs[i + 1].start()
        job.compute()
        job.deliver()
        if before is not None:
            before.finish()
        before = None if job.route.deliver.local else job
        if before is None:  # nothing travels: do not keep the updates
            job.finish()
    if before is not None:
        before.finish()


@dataclass
class Job:
    """Some blocks of a wave in one step: `start`, `compute`, `deliver`, `finish`, each called by every rank."""

    wave: Wave
    part: Part
    """Of the wave, without parameters that have no gradient on any rank."""
    split: bool
    """Whether owners compute their blocks, or every rank all of them."""
    context: Context
    lr: float
    weight_decay: float
    _sources: list[dict[int, Tensor]] = field(default_factory=list)
    _updates: dict[int, Tensor] = field(default_factory=dict)
    _collecting: Pending | None = None
    _delivering: Pending | None = None

    def __post_init__(self) -> None:
        self.route = self.part.route
        self.wanted = {self.wave.member_of[block] for block in self.part.blocks}
        self.rank = self.wave.ranks.rank if self.split else 0  # who computes everything itself is the only rank

    def start(self) -> None:
        """Send the gradients (and, where the step needs them, the weights) to the owners; nothing waits."""
        members, side = self.wave.members, self.route.collect
        self._sources = [{m: members[m].gradient() for m in self.wanted}]
        if self.context.coupled_decay:
            self._sources.append({m: members[m].held.weights() for m in self.wanted})
        if not side.local:
            out = {r: [p.of_flat(s[p.member]) for s in self._sources for p in there] for r, there in side.out.items()}
            sizes = {r: len(self._sources) * _numel(there) for r, there in side.into.items()}
            like = self._on_wire(members[0].held.weights()[:0], side)
            self._collecting = self.wave.ranks.all_to_all("gradients", out, sizes, like)

    def compute(self) -> None:
        """The directions of the blocks that are computed here.

        Raises:
            RuntimeError: another rank failed to compute its.
        """
        vote = Vote(self.wave.ranks if self.split else Ranks(), len(self.wave.members), self.wave.device)
        try:
            parts = [stack.part(rows) for stack in self.wave.stacks if (rows := self._rows(stack))]
            stacks = [stack for stack, _ in parts]
            gradients, *weights = self._collected(stacks)
            for collected in weights:
                for stack, of_stack in zip(stacks, collected, strict=True):
                    stack.weights = of_stack
            if self.context.options.maximize:
                gradients = list(torch._foreach_neg(gradients))  # not in place: they may be the parameters' own
            with exact_float32(self.wave.device.type):
                updates = directions(stacks, gradients, dataclasses.replace(self.context, total=vote.total))
        except Exception as error:
            vote.close(error)
            raise
        vote.close()
        for stack, put_back in parts:
            stack.weights = None
            put_back()
        # what stays here is rounded as what is sent: replicas must not differ
        self._updates = self._by_block(stacks, [self._on_wire(update, self.route.deliver) for update in updates])
        self._sources, self._collecting = [], None

    def deliver(self) -> None:
        """Send the updates to the holders and, where every rank keeps it, the state that the owners have changed."""
        side = self.route.deliver
        if side.local:
            return
        out = {r: [self._update(p) for p in pieces] for r, pieces in side.out.items() if r != self.rank}
        sizes = {r: _numel(pieces) for r, pieces in side.into.items()}
        like = self._on_wire(torch.empty(0, dtype=torch.float32, device=self.wave.device), side)
        self._delivering = self.wave.ranks.all_to_all("updates", out, sizes, like)
        if self.wave.replicated:
            state = self.wave.state_map
            state.move(
                state.route.deliver.of_blocks(state.of_blocks(self.part.blocks)), "state", state.live, state.live
            )

    def finish(self) -> None:
        """p <- (1 - lr wd) p - lr u on what this rank holds."""
        own = self.route.deliver.into.get(self.rank, [])
        found: dict[int, list[tuple[Piece, Tensor]]] = {m: [] for m in self.wanted}
        for pieces, updates in [
            (own, [self._update(p) for p in own]),
            *self._arrived(self._delivering, self.route.deliver),
        ]:
            for piece, update in zip(pieces, updates, strict=True):
                found[piece.member].append((piece, update))
        for together in self._in_turn():
            flats = {m: self.wave.members[m].held.weights() for m in together}
            changes = [change for m in together for change in found[m]]
            pieces = [piece for piece, _ in changes]
            self._apply(pieces, [p.of_flat(flats[p.member]) for p in pieces], [update for _, update in changes])
            for m, flat in flats.items():
                self.wave.members[m].held.write_back(flat)
        self._updates, self._delivering = {}, None

    def _in_turn(self) -> list[list[int]]:
        """Parameters that are changed together: one of which `weights` is a copy may lie in another one's memory."""
        flat = {m: self.wave.members[m].held.is_flat for m in self.wanted}
        return [[m for m in flat if flat[m]], *([m] for m in flat if not flat[m])]

    def _rows(self, stack: Stack) -> list[int]:
        """The rows of a stack whose blocks are computed here now."""
        return [
            i
            for i, block in enumerate(stack.blocks)
            if block in self.part.blocks and (not self.split or self.wave.owners[block] == self.rank)
        ]

    def _collected(self, stacks: list[Stack]) -> list[list[Tensor]]:
        """For each source (gradients, weights) and stack: float32 (B, *shape)."""
        mine, side = self.route.collect.into.get(self.rank, []), self.route.collect
        if len(stacks) == len(mine) == len(self._sources) == 1 and side.local:  # one block, all here: look, do not copy
            return [[mine[0].of_flat(self._sources[0][mine[0].member]).float().reshape(1, *stacks[0].algorithm.shape)]]
        filled = [
            [
                torch.empty((len(s.blocks), *s.algorithm.shape), dtype=torch.float32, device=self.wave.device)
                for s in stacks
            ]
            for _ in self._sources
        ]
        views = [self._by_block(stacks, tensors) for tensors in filled]
        to = [p.of_block(view[p.block]) for view in views for p in mine]
        values = [self._on_wire(p.of_flat(source[p.member]), side) for source in self._sources for p in mine]
        for theirs, received in self._arrived(self._collecting, side, len(views)):
            to += [p.of_block(view[p.block]) for view in views for p in theirs]
            values += received
        if to:
            torch._foreach_copy_(to, values)
        return filled

    def _arrived(
        self, pending: Pending | None, side: Exchange, times: int = 1
    ) -> Iterator[tuple[list[Piece], list[Tensor]]]:
        """What each other rank sent: its pieces, and their values (rows, columns), the pieces' `times` over."""
        if pending is None:
            return
        for rank, flat in enumerate(pending.wait()):
            pieces = side.into.get(rank, []) if rank != self.rank else []
            if pieces:
                parts = flat.split([p.numel for p in pieces] * times)
                yield pieces, [t.view(p.rows, p.columns) for t, p in zip(parts, pieces * times, strict=True)]

    def _apply(self, pieces: list[Piece], targets: list[Tensor], updates: list[Tensor]) -> None:
        """The update, in float32 or better, rounded to the parameters' dtype (bfloat16 stochastically, if asked)."""
        if not targets:
            return
        dtype, options, keep = targets[0].dtype, self.context.options, 1 - self.lr * self.weight_decay
        if dtype in (torch.float32, torch.float64):
            torch._foreach_mul_(targets, keep)
            torch._foreach_add_(targets, [update.to(dtype) for update in updates], alpha=-self.lr)
            return
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, p in enumerate(pieces):
            alike.setdefault((p.row, p.column, p.rows, p.columns, self.wave.rects[p.block].shape[1]), []).append(i)
        for (row, column, rows, columns, width), found in alike.items():
            exact = torch.stack([targets[i] for i in found]).float().mul_(keep)
            exact.add_(torch.stack([updates[i] for i in found]).float(), alpha=-self.lr)
            if options.stochastic_rounding and dtype == torch.bfloat16:
                salts = torch.tensor([self.wave.salts[pieces[i].block] for i in found], dtype=torch.int32, device="cpu")
                at = _positions(row, column, rows, columns, width, self.wave.device)
                noise = noise_at(salts.to(self.wave.device), self.context.step, options.seed, at)
                exact = to_bfloat16(exact, noise.view_as(exact))
            torch._foreach_copy_([targets[i] for i in found], list(exact.unbind(0)))

    def _update(self, piece: Piece) -> Tensor:
        return piece.of_block(self._updates[piece.block])

    def _on_wire(self, x: Tensor, side: Exchange) -> Tensor:
        """As it is sent, if anything is."""
        return x.to(torch.bfloat16) if self.context.options.wire == "bf16" and not side.local else x

    def _by_block(self, stacks: list[Stack], tensors: list[Tensor]) -> dict[int, Tensor]:
        """Block -> its matrix in the tensor (B, *shape) of its stack."""
        return {
            block: matrix
            for stack, t in zip(stacks, tensors, strict=True)
            for block, matrix in zip(
                stack.blocks, t.reshape(len(t), *self.wave.rects[stack.blocks[0]].shape).unbind(0), strict=True
            )
        }


class Vote:
    """The one small reduction of a job: sums over parameters that span ranks, and whether every rank is well."""

    def __init__(self, ranks: Ranks, members: int, device: torch.device) -> None:
        self._ranks, self._members, self._device = ranks, members, device
        self._open = ranks.world > 1

    def total(self, sums: Tensor) -> Tensor:
        """float64 (2, members), summed over ranks.

        Raises:
            RuntimeError: another rank failed.
        """
        return self._reduce(sums) if self._open else sums

    def close(self, error: Exception | None = None) -> None:
        """Take part, if `total` was not called; tell the others about an error."""
        if self._open:
            self._reduce(torch.zeros(2, self._members, dtype=torch.float64, device=self._device), error)

    def _reduce(self, sums: Tensor, error: Exception | None = None) -> Tensor:
        self._open = False
        failed = sums.new_tensor([float(error is not None)])
        total = self._ranks.reduce(torch.cat([sums.flatten(), failed]))
        if total[-1] > 0:
            raise_together(self._ranks, error)
        return total[:-1].view_as(sums)


def raise_together(ranks: Ranks, error: Exception | None) -> None:
    """Raise on every rank, as all of them must call it: each failed rank its own error, the others what it was.

    Raises:
        Exception: `error`.
        RuntimeError: where there is none.
    """
    messages = ranks.gather(f"{type(error).__name__}: {error}" if error is not None else "")
    if error is not None:
        raise error
    rank = next(rank for rank, message in enumerate(messages) if message)
    raise RuntimeError(f"rank {rank} failed, so no rank goes on; there: {messages[rank]}")


def _numel(pieces: Sequence[Piece]) -> int:
    return sum(p.numel for p in pieces)


def _positions(row: int, column: int, rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """int32: where in a block of `width` columns, row-major, the entries of a piece are."""
    down = torch.arange(row, row + rows, dtype=torch.int32, device=device).unsqueeze(1)
    return (down * width + torch.arange(column, column + columns, dtype=torch.int32, device=device)).flatten()
