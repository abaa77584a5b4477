"""The last line of a step: p <- (1 - lr wd) p - lr u on what this rank has of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.blocks import on_device
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
        for members, copied in self._in_order(found):
            flats = {m: self.wave.members[m].local.weights() for m in members}
            changed, values = zip(*(change for m in members for change in found[m]), strict=True)
            targets = [p.of_flat(flats[p.member]) for p in changed]
            if new_weights:
                torch._foreach_copy_(targets, values)
            else:
                self.descend(changed, targets, values)
            for m, flat in flats.items() if copied else ():
                self.wave.members[m].local.write_back(flat)

    def _in_order(self, members: Iterable[int]) -> list[tuple[list[int], bool]]:
        """Parameters that are changed together, and whether `weights` is a copy: it may lie in another one's memory."""
        flat = {m: self.wave.members[m].local.is_flat for m in members}
        views = [m for m in flat if flat[m]]
        return [*([(views, False)] if views else []), *(([m], True) for m in flat if not flat[m])]

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
