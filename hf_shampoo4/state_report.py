"""What is preconditioned how, and what it costs: the table before training and the figures during it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from .execution.blocking import Block, blocks_of
from .execution.state_layout import StateKey
from .numerics.storage import SMALL, nbytes
from .options import Options
from .preconditioners.algorithms import algorithm_class
from .sharding.local_parameter import full_shape
from .utils.wrappers import without_wrappers

if TYPE_CHECKING:
    from .optimizer import Shampoo4bit

_NO_MODEL = """no model was given: embeddings, the output head and tables count as matrices;
pass hf_shampoo4.param_groups(model) instead of model.parameters()"""


@dataclass(frozen=True)
class Row:
    """Parameters of one shape and treatment."""

    treatment: str
    why: str
    """What they are for, as far as that decided it."""
    shape: tuple[int, ...]
    parameters: int
    blocks: str
    elements: int
    bytes: int
    kind: str
    rate: float
    """Factor on the learning rate."""
    preconditioned: bool


def rows(optimizer: Shampoo4bit) -> list[Row]:
    """One row for each shape and treatment, the largest state first; from geometry, before any step."""
    found: list[Row] = []
    for index, group in enumerate(optimizer.param_groups):
        options = Options.of(group)
        for p, purpose in zip(optimizer.parameters(index), optimizer.purposes(index), strict=True):
            shape = full_shape(p)
            numel = math.prod(shape)
            trained = p.requires_grad or p.grad is not None or bool(optimizer.state.get(p))
            if trained and numel:
                blocks = blocks_of(shape, options)
                treatment, why = _treatment(blocks, options), _why(blocks, options, purpose)
                row = Row(treatment, why, shape, 1, _cut(blocks), numel, block_bytes(blocks), options.kind,
                          options.rate, blocks[0].algorithm.preconditions)  # fmt: skip
                found.append(row)
    return sorted(map(_sum, Counter(found).items()), key=lambda row: (not row.preconditioned, -row.bytes))


def block_bytes(blocks: list[Block]) -> int:
    """State bytes of a parameter cut into `blocks`."""
    return sum(nbytes(storage) for block in blocks for storage in block.algorithm.storages().values())


def table(optimizer: Shampoo4bit) -> str:
    """The rows as text: what is done to which parameters and why, then their shapes, with totals."""
    found = rows(optimizer)
    header = ("shape", "tensors", "blocks", "M entries", "M bytes", "B/param")
    of_what: dict[str, list[tuple[str, ...]]] = {}
    for row in found:
        of_what.setdefault(_title(row), []).append(
            ("x".join(map(str, row.shape)) or "scalar", str(row.parameters), row.blocks, *_figures([row]))
        )
    total = ("total", str(sum(row.parameters for row in found)), "", *_figures(found))
    cells = [header, total, *(line for lines in of_what.values() for line in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    rule = "-" * (2 + sum(widths) + 2 * len(widths) - 2)
    body = [text for title, lines in of_what.items() for text in [title, *(_line(line, widths) for line in lines)]]
    unknown = [] if any(map(any, map(optimizer.purposes, range(len(optimizer.param_groups))))) else [_NO_MODEL]
    return "\n".join(
        ["Shampoo4bit state", rule, _line(header, widths), rule, *body, rule, _line(total, widths), *unknown]
    )


def metrics(optimizer: Shampoo4bit) -> dict[str, float]:
    """Figures for a tracker: state bytes, skipped steps, failed refreshes, seconds spent on refreshes so far.

    With `diagnose_every`, also the last diagnostics (diagnostics.py) of the first group that has any (the matrices).

    Args:
        optimizer: also as accelerate or DeepSpeed has wrapped it.
    """
    optimizer = without_wrappers(optimizer)
    entries = [entry for p, entry in optimizer.state.items() if isinstance(p, Tensor)]
    tensors = [t for entry in entries for t in entry.values() if isinstance(t, Tensor)]
    failures = [entry[key] for entry in entries for key in entry if StateKey.parse(key).tensor == "failures"]
    return {
        "optim/state_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "optim/skipped_steps": max((group["skipped_steps"] for group in optimizer.param_groups), default=0),
        "optim/failed_refreshes": sum(int(t.sum()) for t in failures),
        "optim/refresh_seconds": round(optimizer.refresh_seconds(), 4),
        **next(iter(optimizer.diagnostics()), {}),
    }


def _sum(counted: tuple[Row, int]) -> Row:
    """Equal rows as one."""
    row, count = counted
    return replace(row, parameters=count, elements=count * row.elements, bytes=count * row.bytes)


def _title(row: Row) -> str:
    rate = "" if row.rate == 1 else f", rate x{row.rate:g}"
    return f"{row.treatment}: {row.why}{rate}"


def _figures(found: list[Row]) -> tuple[str, str, str]:
    elements, size = sum(row.elements for row in found), sum(row.bytes for row in found)
    return f"{elements / 1e6:.3f}", f"{size / 1e6:.3f}", f"{size / max(elements, 1):.2f}"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    """Names to the left, numbers to the right."""
    padded = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
    return "  " + "  ".join(padded)


def _treatment(blocks: list[Block], options: Options) -> str:
    stored = options.moments in ("fp32", "bf16") or sum(block.numel for block in blocks) >= SMALL
    moments = options.moments if stored else "fp32"
    return blocks[0].algorithm.label(options, moments)


def _why(blocks: list[Block], options: Options, purpose: str) -> str:
    """What a parameter is for, and what of its shape keeps a preconditioner away."""
    preconditioned = blocks[0].algorithm.preconditions
    if not purpose:
        return "matrices" if preconditioned else "parameters without a matrix"
    if not preconditioned and algorithm_class(options.algorithm).preconditions:
        return f"{purpose} of {'too few rows' if options.vocabulary else 'one row or column'}"
    return purpose


def _cut(blocks: list[Block]) -> str:
    m, n = max((block.shape for block in blocks), key=math.prod)
    alike = len({block.shape for block in blocks}) == 1
    return f"{len(blocks)} {'of' if alike else 'up to'} {m}x{n}"
