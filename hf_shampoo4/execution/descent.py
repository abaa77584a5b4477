"""The last line of a step: p <- (1 - lr wd) p - lr u on what this rank has of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..numerics.blocks import on_device
from ..numerics.quantize import has_kernels, kernels
from ..numerics.rounding import noise_at, to_bfloat16
from ..preconditioners.protocols import Context
from ..sharding.route import Piece
from .waves import Wave


@dataclass(frozen=True)
class Descent:
    """Writes to the weights of a wave's members in one step."""

    wave: Wave
    context: Context
    lr: float
    weight_decay: float
    """Decoupled."""

    def write(self, pieces: list[Piece], results: list[Tensor], new_weights: bool) -> None:
        """Change pieces of the weights.

        Args:
            pieces: of this rank's flat tensors.
            results: of each piece (rows, columns), its update or its new weights.
            new_weights: which of the two.
        """
        found: dict[int, list[tuple[Piece, Tensor]]] = {}
        for piece, result in zip(pieces, results, strict=True):
            found.setdefault(piece.member, []).append((piece, result))
        for flats, copied in self._in_order(found):
            changed, values = zip(*(change for m in flats for change in found[m]), strict=True)
            targets = [p.of_flat(flats[p.member]) for p in changed]
            if new_weights:
                torch._foreach_copy_(targets, values)
            elif self.in_one_pass:
                self._descend_in_one_pass(changed, targets, values)
            else:
                self.descend(changed, targets, values)
            for m, flat in flats.items() if copied else ():
                self.wave.members[m].local.write_back(flat)

    @cached_property
    def in_one_pass(self) -> bool:
        """Whether a Triton kernel does it, which leaves everything as it is in a step that does not count."""
        if not has_kernels(self.wave.device, 2):
            return False
        found = [member.local for member in self.wave.members]
        return all(local.is_flat and local.buffer.dtype in kernels("descent").DTYPES for local in found)

    def _in_order(self, members: Iterable[int]) -> Iterator[tuple[dict[int, Tensor], bool]]:
        """Weights that are changed together, and whether they are a copy: it may lie in another one's memory."""
        views = {m: self.wave.members[m].local.flat_view() for m in members}
        flats = {m: view for m, view in views.items() if view is not None}
        copied = [m for m in views if m not in flats]
        if self.wave.sharing:  # what is changed together must not lie in the same memory
            for m in [m for m in flats if self.wave.members[m].name in self.wave.sharing]:
                yield {m: flats.pop(m)}, False
        if flats:
            yield flats, False
        for m in copied:
            yield {m: self.wave.members[m].local.weights()}, True

    def descend(self, pieces: Sequence[Piece], targets: list[Tensor], updates: Sequence[Tensor]) -> None:
        """p <- (1 - lr wd) p - lr u, in float32 or better, rounded to p's dtype (bfloat16 stochastically, if asked)."""
        dtype, options, keep = targets[0].dtype, self.context.options, self._keep(targets[0])
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
                seed_offsets = on_device(
                    tuple(self.wave.seed_offsets[pieces[i].block] for i in found), torch.int32, self.wave.device
                )
                at = _positions(row, column, rows, columns, width, self.wave.device)
                noise = noise_at(seed_offsets, self.context.step, options.seed, at)
                exact = to_bfloat16(exact, noise.view_as(exact))
            torch._foreach_copy_([targets[i] for i in found], list(exact.unbind(0)))

    def _descend_in_one_pass(
        self, pieces: Sequence[Piece], targets: Sequence[Tensor], updates: Sequence[Tensor]
    ) -> None:
        """As `descend`, up to the rounding of its sum: a launch for all pieces of one shape."""
        options, device, dtype = self.context.options, self.wave.device, targets[0].dtype
        stochastic = options.stochastic_rounding and dtype == torch.bfloat16
        alike: dict[tuple[int, tuple[int, ...], tuple[int, int], tuple[int, int, int]], list[int]] = {}
        for i, (piece, target, update) in enumerate(zip(pieces, targets, updates, strict=True)):
            memory = update.untyped_storage()._cdata
            strides = (target.stride(0), update.stride(0))
            at = (piece.row, piece.column, self.wave.rects[piece.block].shape[1]) if stochastic else (0, 0, 0)
            alike.setdefault((memory, tuple(update.shape), strides, at), []).append(i)
        for (_, shape, strides, at), found in alike.items():
            update = updates[found[0]]
            memory = torch.empty(0, dtype=update.dtype, device=device).set_(update.untyped_storage())
            addresses = tuple(targets[i].data_ptr() for i in found)  # fixed, as are places in a stack: tables are kept
            places = tuple(updates[i].storage_offset() for i in found)
            seeds = tuple(self.wave.seed_offsets[pieces[i].block] for i in found)
            noise = (on_device(seeds, torch.int32, device), self.context.step, options.seed) if stochastic else None
            kernels("descent").descend(
                on_device(addresses, torch.int64, device), dtype, memory, on_device(places, torch.int64, device), shape,
                strides, 1 - self.lr * self.weight_decay, self.lr, self.context.counts, noise, at,
            )  # fmt: skip

    def _keep(self, target: Tensor) -> float | Tensor:
        """1 - lr wd, or 1 in a step that does not count (its updates are 0)."""
        keep = 1 - self.lr * self.weight_decay
        if self.context.counts is None or keep == 1:
            return keep
        wide = target.dtype if target.dtype == torch.float64 else torch.float32
        full = torch.full((), keep, dtype=wide, device=target.device)
        return torch.where(self.context.counts, full, torch.ones_like(full))


def _positions(row: int, column: int, rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """int32: where in a block of `width` columns, row-major, the entries of a piece are."""
    down = torch.arange(row, row + rows, dtype=torch.int32, device=device).unsqueeze(1)
    return (down * width + torch.arange(column, column + columns, dtype=torch.int32, device=device)).flatten()
