"""What is preconditioned how, and what it costs: the table before training and the figures during it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .execution.blocking import Block, blocks_of
from .numerics.storage import SMALL, Blockwise, nbytes
from .options import Options
from .preconditioners.algorithms import Eigenbasis, Elementwise
from .sharding.local_parameter import full_shape

if TYPE_CHECKING:
    from .optimizer import Shampoo4bit

BASES = {"adamw": "AdamW", "sgdm": "SGDM"}
EIGENBASES = {"soap": "SOAP", "kl_shampoo": "KL-Shampoo", "kl_soap": "KL-SOAP"}


@dataclass(frozen=True)
class Row:
    """Parameters of one shape and treatment."""

    treatment: str
    shape: tuple[int, ...]
    parameters: int
    blocks: str
    elements: int
    bytes: int
    kind: str
    rate: float
    """Factor on the learning rate."""


def rows(optimizer: Shampoo4bit) -> list[Row]:
    """One row for each shape and treatment, the largest state first; from geometry, before any step."""
    grouped: dict[tuple[str, tuple[int, ...], str, int, str, float], int] = Counter()
    for index, group in enumerate(optimizer.param_groups):
        options = Options.of(group)
        for p in optimizer.parameters(index):
            shape = full_shape(p)
            if p.requires_grad and _elements(shape):
                blocks = blocks_of(shape, options)
                size = block_bytes(blocks)
                grouped[_treatment(blocks, options), shape, _cut(blocks), size, options.kind, options.rate] += 1
    table = [
        Row(treatment, shape, count, cut, count * _elements(shape), count * size, kind, rate)
        for (treatment, shape, cut, size, kind, rate), count in grouped.items()
    ]
    return sorted(table, key=lambda row: (row.treatment.startswith(tuple(BASES.values())), -row.bytes))


def block_bytes(blocks: list[Block]) -> int:
    """State bytes of a parameter cut into `blocks`."""
    return sum(nbytes(storage) for block in blocks for storage in block.algorithm.storages().values())


def table(optimizer: Shampoo4bit) -> str:
    """The rows as text, with totals and bytes a parameter."""
    found = rows(optimizer)
    cells = [
        (r.treatment, "x".join(map(str, r.shape)), str(r.parameters), r.blocks, _mega(r.elements), _mega(r.bytes),
         f"{r.bytes / r.elements:.2f}", r.kind, f"x{r.rate:g}")
        for r in found
    ]  # fmt: skip
    elements, size = sum(r.elements for r in found), sum(r.bytes for r in found)
    count = str(sum(r.parameters for r in found))
    cells.append(("total", "", count, "", _mega(elements), _mega(size), f"{size / max(elements, 1):.2f}", "", ""))
    header = ("treatment", "shape", "tensors", "blocks", "M elements", "M bytes", "bytes/param", "kind", "rate")
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    lines = [_line(row, widths) for row in [header, *cells]]
    rule = "-" * len(lines[0])
    return "\n".join(["Shampoo4bit state", rule, lines[0], rule, *lines[1:-1], rule, lines[-1]])


def metrics(optimizer: Shampoo4bit) -> dict[str, float]:
    """Figures for a tracker: state bytes, skipped steps, failed refreshes, seconds spent on refreshes so far.

    With `diagnose_every`, also the last diagnostics (diagnostics.py) of the first group that has any (the matrices).
    """
    entries = [entry for p, entry in optimizer.state.items() if isinstance(p, Tensor)]
    tensors = [t for entry in entries for t in entry.values() if isinstance(t, Tensor)]
    failures = [entry[key] for entry in entries for key in entry if key.endswith("/failures.dense")]
    return {
        "optim/state_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "optim/skipped_steps": max((group["skipped_steps"] for group in optimizer.param_groups), default=0),
        "optim/failed_refreshes": sum(int(t.sum()) for t in failures),
        "optim/refresh_seconds": round(optimizer.refresh_seconds(), 4),
        **next(iter(optimizer.diagnostics()), {}),
    }


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    """Names to the left, numbers to the right."""
    padded = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(padded)


def _treatment(blocks: list[Block], options: Options) -> str:
    stored = options.moments in ("fp32", "bf16") or _elements_of(blocks) >= SMALL
    moments = options.moments if stored else "fp32"
    if isinstance(blocks[0].algorithm, Elementwise):
        return f"{BASES[options.base]} {moments}"
    if isinstance(blocks[0].algorithm, Eigenbasis):
        sides = "" if blocks[0].algorithm.is_two_sided else " one-sided"
        first = blocks[0].algorithm.moments.first
        if isinstance(first, Blockwise) and first.bits == 8:  # a vocabulary's, which is all that it has
            moments = "8bit"
        return f"{EIGENBASES[options.algorithm]}{sides} {options.bits}-bit, {moments} moments"
    over = "" if options.base == "adamw" else f" over {BASES[options.base]}"
    return f"Shampoo {options.factor} {options.bits}-bit{over}, {moments} moments"


def _cut(blocks: list[Block]) -> str:
    shapes = Counter(block.shape for block in blocks)
    return " + ".join(f"{count} of {m}x{n}" for (m, n), count in shapes.items())


def _elements_of(blocks: list[Block]) -> int:
    return sum(block.numel for block in blocks)


def _elements(shape: tuple[int, ...]) -> int:
    n = 1
    for side in shape:
        n *= side
    return n


def _mega(n: int) -> str:
    return f"{n / 1e6:.3f}"
