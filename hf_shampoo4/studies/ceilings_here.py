"""What this machine reaches, measured now: a card of one's own for predictions, in the form of utils/cards.yaml."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from hf_shampoo4.numerics.precision import exact_float32, lacks, rotate
from hf_shampoo4.studies.bench_contestants import CLOCKS
from hf_shampoo4.studies.machine import machine
from hf_shampoo4.utils.ceilings import DECOMPOSITIONS, Ceilings


@dataclass(frozen=True)
class Timer:
    """A device and the clock that is read once it has finished."""

    device: torch.device
    clock: str = "wall"

    def now(self) -> float:
        """Seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return CLOCKS[self.clock]()

    def seconds(self, run: Callable[[], Any], times: int = 5, inner: int = 1) -> float:
        """Of one of `inner` calls in a row: the median of some times, after one that does not count."""
        run()
        taken = []
        for _ in range(times):
            began = self.now()
            for _ in range(inner):
                run()
            taken.append((self.now() - began) / inner)
        return statistics.median(taken)


def measured_ceilings(timer: Timer, orders: Iterable[int] = (256, 512, 1024), product: int = 2048) -> dict[str, Any]:
    """A row of ceilings, as JSON: seconds, bytes and operations a second.

    Args:
        timer: of the device.
        orders: of the matrices that are decomposed.
        product: order of the products.

    Returns:
        `products` by precision, `memory` (bytes of a copy, read and written), on a CPU `in_place` (of what is
        changed in place), `fresh` (bytes of new memory) and `one_by_one` (operation -> numbers a second),
        `launch` (seconds), `decompositions` (operation -> order -> seconds for one matrix).
    """
    cuda = timer.device.type == "cuda"
    return {
        "name": machine()["accelerator"] if cuda else machine()["processor"],
        "products": {name: _product_rate(timer, name, product) for name in _precisions(timer.device)},
        **_memory(timer, 1 << (28 if cuda else 25)),
        **({"one_by_one": _one_by_one(timer)} if timer.device.type == "cpu" else {}),
        "launch": _launch(timer),
        "decompositions": decompositions(timer, orders, 1),
    }


def as_ceilings(row: Mapping[str, Any]) -> Ceilings:
    """Of a row of `measured_ceilings`, which may have been JSON."""
    by_operation = {
        operation: {int(order): found for order, found in row["decompositions"][key].items()}
        for key, operations in DECOMPOSITIONS.items()
        for operation in operations
        if key in row["decompositions"]
    }
    return Ceilings(
        name=row["name"], products=row["products"], memory=row["memory"], launch=row["launch"],
        peak=max(row["products"].values()), decompositions=by_operation, fresh=row.get("fresh", float("inf")),
        in_place=row.get("in_place", 0.0), one_by_one=row.get("one_by_one", {}),
        sources={"all": "measured on this machine"},
    )  # fmt: skip


def _precisions(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return ["float32", "bfloat16"]
    return [name for name in ("float32", "tf32", "bfloat16") if not lacks(name, device)]


def _product_rate(timer: Timer, precision: str, order: int) -> float:
    a = torch.randn(order, order, device=timer.device, dtype=torch.bfloat16 if precision == "bfloat16" else None)
    inner = 20 if timer.device.type == "cuda" else 1
    with exact_float32(timer.device.type):
        if precision == "tf32":
            stack = a[None]
            taken = timer.seconds(lambda: rotate(None, stack, stack, "tf32"), inner=inner)
        else:
            taken = timer.seconds(lambda: a @ a, inner=inner)
    return 2 * order**3 / taken


def _memory(timer: Timer, numbers: int) -> dict[str, float]:
    given = torch.randn(numbers, device=timer.device)
    target = torch.empty_like(given)
    moved = 2 * given.numel() * given.element_size()
    found = {"memory": moved / timer.seconds(lambda: target.copy_(given), inner=5)}
    if timer.device.type == "cpu":  # what a page costs when it is written first, beside the copy itself
        beyond = timer.seconds(given.clone, 3) - moved / found["memory"]
        found["fresh"] = moved / 2 / max(beyond, 1e-9)
        found["in_place"] = moved / timer.seconds(lambda: target.mul_(1.0), inner=5)
    return found


def _one_by_one(timer: Timer, numbers: int = 1 << 20) -> dict[str, float]:
    """Operation of `launches.ONE_BY_ONE` -> numbers a second; bitsandbytes' if it is installed."""
    places = torch.randint(256, (numbers,), device=timer.device, dtype=torch.int32)
    table = torch.arange(256, device=timer.device)
    runs: dict[str, Callable[[], Any]] = {"index_select": lambda: torch.index_select(table, 0, places)}
    if find_spec("bitsandbytes") is not None:
        from bitsandbytes.functional import create_dynamic_map

        code, operations = create_dynamic_map().to(timer.device), torch.ops.bitsandbytes
        x = torch.randn(numbers, device=timer.device)
        codes, scales = operations.quantize_blockwise(x, code, 256)
        runs["bitsandbytes::quantize_blockwise"] = lambda: operations.quantize_blockwise(x, code, 256)
        runs["bitsandbytes::dequantize_blockwise"] = lambda: operations.dequantize_blockwise(
            codes, scales, code, 256, torch.float32
        )
    return {name: numbers / timer.seconds(run) for name, run in runs.items()}


def _launch(timer: Timer) -> float:
    small = torch.zeros(16, device=timer.device)
    return timer.seconds(lambda: small.add_(1.0), inner=1000)


def decompositions(timer: Timer, orders: Iterable[int], stack: int) -> dict[str, dict[int, float]]:
    """Key of `utils.ceilings.DECOMPOSITIONS` -> order -> seconds for one matrix of a stack."""
    found: dict[str, dict[int, float]] = {}
    for k in orders:
        a = torch.randn(stack, k, k, device=timer.device)
        a = a @ a.mT / k + torch.eye(k, device=timer.device)
        lower = torch.linalg.cholesky(a)
        runs: dict[str, Callable[[], Any]] = {
            "linalg_qr_ms": lambda a=a: torch.linalg.qr(a),  # type: ignore[misc]
            "cholesky_ms": lambda a=a: torch.linalg.cholesky_ex(a),  # type: ignore[misc]
            "triangular_ms": lambda a=a, lower=lower: torch.linalg.solve_triangular(  # type: ignore[misc]
                lower.mT, a, upper=True, left=False
            ),
            "eigh_ms": lambda a=a: torch.linalg.eigh(a),  # type: ignore[misc]
        }
        for key, run in runs.items():
            times = 1 if key == "eigh_ms" else 3
            found.setdefault(key, {})[k] = timer.seconds(run, times) / stack
    return found
