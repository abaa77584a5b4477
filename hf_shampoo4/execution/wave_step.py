"""One step of some blocks of a wave: collect, update, send, apply; and how the steps of waves follow each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..numerics.blocks import changed_if
from ..numerics.precision import exact_float32
from ..numerics.quantize import without_kernels
from ..options import Options
from ..preconditioners.algorithms import compute_updates
from ..preconditioners.protocols import Context
from ..sharding.agreement import Failures, View
from ..sharding.exchange import Form, Pending, Ranks, packed
from ..sharding.route import Piece
from .descent import Descent
from .gradients import dtype_of
from .state_map import Rows, write_rows
from .waves import BlockStack, Part, Wave, changing_rows


def wave_steps(waves: Sequence[Wave], agreed: View, context: Context, lr: float, weight_decay: float) -> list[WaveStep]:
    """A step of each part of some waves that has a gradient on some rank; it counts the parameters' updates.

    Args:
        waves: of one unit.
        agreed: which parameters have a gradient, of which dtype.
        context: of the step.
        lr: the group's, its kind's factor included.
        weight_decay: decoupled.
    """
    steps = []
    for wave in waves:
        dtypes = {}
        for m, member in enumerate(wave.members):
            if width := agreed.present.get(member.local.name):
                dtypes[m] = dtype_of(width)
                member.updates += 1
        for part in wave.parts_of_step(dtypes, context.options, agreed.alike):
            steps.append(WaveStep(wave, part, dtypes, context, lr, weight_decay, agreed.failures))
    return steps


def run(steps: Sequence[WaveStep]) -> None:
    """Do the steps of one unit in order, with or without Triton's kernels, as its plan has it."""
    with nullcontext() if all(step.wave.kernels for step in steps) else without_kernels():
        _run(steps)


def _run(steps: Sequence[WaveStep]) -> None:
    """The next one's gradients and the last one's results travel while one is computed."""
    before: WaveStep | None = None
    for i, step in enumerate(steps):
        if i == 0:
            step.collect()
        if i + 1 < len(steps):
            steps[i + 1].collect()
        step.update()
        step.send()
        if before is not None:
            before.apply()
        before = None if step.route.send.is_local else step
        if before is None:  # nothing travels: do not keep the updates
            step.apply()
    if before is not None:
        before.apply()


@dataclass
class WaveStep:
    """Some blocks of a wave in one step: `collect`, `update`, `send`, `apply`, each called by every rank."""

    wave: Wave
    part: Part
    """Of the wave, without parameters that have no gradient on any rank."""
    gradient_dtypes: Mapping[int, torch.dtype]
    """Member -> of its gradient, the same on every rank."""
    context: Context
    lr: float
    weight_decay: float
    failures: Failures
    """What fails in a part of the work here leaves it undone; the exchanges take place all the same."""
    _sources: list[dict[int, Tensor]] = field(default_factory=list)
    _updates: dict[int, Tensor] = field(default_factory=dict)
    _changes: dict[int, list[Rows]] = field(default_factory=dict)
    _collecting: Pending | None = None
    _sending: Pending | None = None

    def __post_init__(self) -> None:
        self.route, self.ranks, self.rank = self.part.route, self.part.ranks, self.part.ranks.rank
        self.descent = Descent(self.wave, self.context, self.lr, self.weight_decay)
        dtype = self.wave.members[0].local.buffer.dtype
        half = self.context.options.wire == "bf16"
        wanted = {self.wave.member_of[block] for block in self.part.blocks}
        self._source_dtypes = [{m: self.gradient_dtypes[m] for m in wanted}]
        if self.context.coupled_decay:
            self._source_dtypes.append(dict.fromkeys(wanted, dtype))
        if half and not self.route.collect.is_local:
            self._source_dtypes = [dict.fromkeys(wanted, torch.bfloat16) for _ in self._source_dtypes]
        self.update_dtype = torch.bfloat16 if half and not self.route.send.is_local else torch.float32
        self.sends_weights = not self.route.send.is_local and self.wave.sends_weights
        """Owners send the new ones: replicas are equal on processors that round differently."""
        self.result_dtype = dtype if self.sends_weights else self.update_dtype

    def collect(self) -> None:
        """Send the gradients (and, where the step needs them, the weights) to the owners; nothing waits."""
        transfer, device = self.route.collect, self.wave.device
        out: dict[int, Tensor] = {}
        with self.failures.kept():
            self._sources = self._sources_here()
            for rank in self.ranks.others if not transfer.is_local else ():
                pieces = transfer.out.get(rank, [])
                out[rank] = packed([p.of_flat(source[p.member]) for source in self._sources for p in pieces], device)
        if not transfer.is_local:
            sizes = {rank: _nbytes(self._source_forms(pieces)) for rank, pieces in transfer.out.items()}
            into = {rank: self._source_forms(pieces) for rank, pieces in transfer.into.items()}
            self._collecting = self.ranks.all_to_all("gradients", out, sizes, into, device)

    def update(self) -> None:
        """Bring the state of this rank's blocks up to date, and compute their updates."""
        sums = _Sums(self.wave, self.ranks, self.context.options)
        with self.failures.kept():
            parts = [stack.select(rows) for stack in self.wave.stacks if (rows := self._own_rows(stack))]
            stacks = [stack for stack, _ in parts]
            for stack in stacks:
                stack.updates = self.wave.updates(stack)
            gradients, *weights = self._collected(stacks)
            if self.context.options.maximize:
                gradients = [-g for g in gradients]  # not in place: they may be the parameters' own
            counts = self.context.counts
            with exact_float32(self.wave.device.type), self._undone(stacks) if counts is not None else nullcontext():
                updates = compute_updates(stacks, gradients, self.context, next(iter(weights), None), sums.total)
            if counts is not None and not self.descent.in_one_pass:
                updates = [torch.where(counts, update, 0.0) for update in updates]
            for _, write_back in parts:
                write_back()
            if not self.sends_weights:  # what stays here is rounded as what is sent: replicas must not differ
                updates = [update.to(self.update_dtype) for update in updates]
            self._updates = self._by_block(stacks, updates)
        sums.close()
        self._sources, self._collecting = [], None

    def _undone(self, stacks: list[BlockStack]) -> AbstractContextManager[None]:
        """State that changes inside is as before if the step does not count."""
        changing = [rows for stack in stacks for rows in changing_rows(stack, self.context.options)]
        return changed_if(self.context.counts, changing)

    def send(self) -> None:
        """Send what became of this rank's blocks to all that hold them: the new weights or, to others, the updates.

        Where every rank keeps all state, what has changed of it goes along.
        """
        wave, transfer = self.wave, self.route.send
        if transfer.is_local:
            return
        if wave.replicated:
            self._changes = wave.changed_rows(self.part.blocks, self.context.options)
        mine, out = transfer.into.get(self.rank, []), {}
        with self.failures.kept():
            if self.sends_weights:
                self.descent.write(*self._updated(mine), new_weights=False)
        with self.failures.kept():
            if wave.whole:  # all others get the same
                state = [rows.read() for rows in self._changes.get(self.rank, ())]
                everything = packed([*self.results(mine), *state], wave.device)
                out = dict.fromkeys(self.ranks.others, everything)
            else:
                pieces = {rank: transfer.out.get(rank, []) for rank in self.ranks.others}
                out = {rank: packed(self.results(found), wave.device) for rank, found in pieces.items()}
        sizes = {rank: _nbytes(self._forms_of(self.rank, transfer.out.get(rank, []))) for rank in self.ranks.others}
        into = {rank: self._forms_of(rank, transfer.into.get(rank, [])) for rank in self.ranks.others}
        lost = 255 if self.sends_weights else 0  # weights of a rank without memory to send them: not a number
        self._sending = self.ranks.all_to_all("updates", out, sizes, into, wave.device, lost)

    def apply(self) -> None:
        """p <- (1 - lr wd) p - lr u on what this rank holds, or the new p that came from its owner."""
        transfer, changed = self.route.send, list[tuple[Rows, Tensor]]()
        with self.failures.kept():
            pieces, results = ([], []) if self.sends_weights else self._updated(transfer.into.get(self.rank, []))
            for rank, received in self._sending.wait().items() if self._sending else ():
                theirs = transfer.into.get(rank, [])
                pieces += theirs
                results += received[: len(theirs)]
                changed += zip(self._changes.get(rank, ()), received[len(theirs) :], strict=True)
            write_rows(changed)
            self.descent.write(pieces, results, new_weights=self.sends_weights)
        self._updates, self._changes, self._sending = {}, {}, None

    def _sources_here(self) -> list[dict[int, Tensor]]:
        """Member -> its gradient and, where the step needs it, its weights, flat and as they are sent."""
        members = self.wave.members
        sources = [{m: members[m].gradient() for m in self._source_dtypes[0]}]
        if self.context.coupled_decay:
            sources.append({m: members[m].local.weights() for m in self._source_dtypes[1]})
        return [
            {m: flat.to(dtypes[m]) for m, flat in source.items()}
            for source, dtypes in zip(sources, self._source_dtypes, strict=True)
        ]

    def _source_forms(self, pieces: Sequence[Piece]) -> list[Form]:
        return [Form((p.rows, p.columns), dtypes[p.member]) for dtypes in self._source_dtypes for p in pieces]

    def _own_rows(self, stack: BlockStack) -> list[int]:
        """The rows of a stack whose blocks are this rank's."""
        return [i for i, b in enumerate(stack.blocks) if b in self.part.blocks and self.part.owners[b] == self.rank]

    def _collected(self, stacks: list[BlockStack]) -> list[list[Tensor]]:
        """For each source (gradients, weights) and stack: float32 (B, *shape)."""
        mine, transfer = self.route.collect.into.get(self.rank, []), self.route.collect
        if transfer.is_local and len(stacks) == len(mine) == len(self._sources) == 1:  # one block: look, do not copy
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
        values = [p.of_flat(source[p.member]) for source in self._sources for p in mine]
        for rank, received in self._collecting.wait().items() if self._collecting else ():
            to += [p.of_block(view[p.block]) for view in views for p in transfer.into.get(rank, ())]
            values += received
        if to:
            torch._foreach_copy_(to, values)
        return filled

    def _updated(self, pieces: Sequence[Piece]) -> tuple[list[Piece], list[Tensor]]:
        """This rank's pieces that have an update, as all have unless `update` failed; these, each (rows, columns)."""
        there = [p for p in pieces if p.block in self._updates]
        return there, [p.of_block(self._updates[p.block]) for p in there]

    def results(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """What is sent of pieces of this rank's blocks, each (rows, columns): updates, or new weights."""
        if not self.sends_weights:
            return [p.of_block(self._updates[p.block]) for p in pieces]
        flats = {m: self.wave.members[m].local.weights() for m in {p.member for p in pieces}}
        return [p.of_flat(flats[p.member]) for p in pieces]

    def _forms_of(self, owner: int, pieces: Sequence[Piece]) -> list[Form]:
        """What is sent of some pieces of a rank's blocks, and of the state that it has changed."""
        return _forms(pieces, self.result_dtype) + [rows.form for rows in self._changes.get(owner, ())]

    def _by_block(self, stacks: list[BlockStack], tensors: list[Tensor]) -> dict[int, Tensor]:
        """Block -> its matrix in the tensor (B, *shape) of its stack."""
        return {
            block: matrix
            for stack, t in zip(stacks, tensors, strict=True)
            for block, matrix in zip(
                stack.blocks, t.reshape(len(t), *self.wave.rects[stack.blocks[0]].shape).unbind(0), strict=True
            )
        }


class _Sums:
    """The small reduction of a wave whose norms go over whole parameters: each rank takes part, also one that fails."""

    def __init__(self, wave: Wave, ranks: Ranks, options: Options) -> None:
        self._wave, self._ranks = wave, ranks
        self._open = ranks.world > 1 and wave.grafted and options.graft == "norm"

    def total(self, sums: Tensor) -> Tensor:
        """float64 (2, members), summed over ranks."""
        if not self._open:
            return sums
        self._open = False
        return self._ranks.reduce(sums)

    def close(self) -> None:
        """Take part, if `total` was not called."""
        if self._open:
            self.total(torch.zeros(2, len(self._wave.members), dtype=torch.float64, device=self._wave.device))


def _forms(pieces: Sequence[Piece], dtype: torch.dtype) -> list[Form]:
    return [Form((p.rows, p.columns), dtype) for p in pieces]


def _nbytes(forms: Sequence[Form]) -> int:
    return sum(form.nbytes for form in forms)
