"""How long steps are after gradients have grown at once: `python -m benchmarks.growth` writes docs/results/growth.json.

With `PYTHONPATH` set to other code, that code's steps: they are kept beside the others, under its commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.studies.code_version import commit
from hf_shampoo4.utils.files import write_json

RECORDED = Path(__file__).resolve().parents[1] / "docs" / "results" / "growth.json"
SHAPE = (64, 96)
START, STEPS, USUAL = 150, 120, 20

Change = Callable[[int, Tensor], Tensor]
"""Of the gradient of a step, in place."""


def _all(by: float) -> Change:
    return lambda t, g: g.mul_(by if t >= START else 1.0)


def _silent(dim: int, count: int) -> Change:
    return lambda t, g: g.narrow(dim, 0, count).mul_(0.0 if t < START else 1.0)


def _spike(t: int, g: Tensor) -> Tensor:
    return g.mul_(100.0 if t == START else 1.0)


CHANGES: dict[str, Change] = {
    "all grows 10 times": _all(1e1),
    "100 times": _all(1e2),
    "10,000 times": _all(1e4),
    "one step of 100 times": _spike,
    "a column that was silent": _silent(1, 1),
    "a row, the same": _silent(0, 1),
    "half of the columns": _silent(1, SHAPE[1] // 2),
}


def squared_moves(shape: tuple[int, int], change: Change, steps: int, **options: object) -> Tensor:
    """Of a matrix whose gradients are Gaussian until `change`d: the squares of its moves, by entries.

    Args:
        steps: from `START` on.
        options: of the optimizer.

    Returns:
        (USUAL + steps, *shape), the last `USUAL` steps before `START` first.
    """
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Shampoo4bit([p], lr=1.0, weight_decay=0.0, **options)
    found = []
    for t in range(START + steps):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
        change(t, p.grad)
        before = p.detach().clone()
        optimizer.step()
        found.append((p.detach() - before).square())
    return torch.stack(found[START - USUAL :])


def lengths(squares: Tensor) -> list[float]:
    """Root mean squares of the steps from `START` on, over the usual one of those before."""
    means = squares.flatten(1).mean(1)
    return (means[USUAL:] / means[:USUAL].mean()).sqrt().tolist()


def told(found: list[float]) -> dict[str, float]:
    """The first step, the least and the most of the first 60, and after how many steps half is reached for good."""
    first, least, most = (round(x, 2) for x in (found[0], min(found[:60]), max(found[:60])))
    back = 1 + max((t for t, length in enumerate(found) if length < 0.5), default=-1)
    return {"first": first, "least": least, "most": most, "back": back}


def main() -> None:
    torch.set_num_threads(1)
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    of_this = {
        algorithm: {
            name: told(lengths(squared_moves(SHAPE, change, STEPS, algorithm=algorithm)))
            for name, change in CHANGES.items()
        }
        for algorithm in ("kl_shampoo", "soap", "elementwise")
    }
    write_json(RECORDED, {**recorded, commit(): of_this})
    print(json.dumps(of_this["kl_shampoo"], indent=1))


if __name__ == "__main__":
    main()
