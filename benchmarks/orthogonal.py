"""QR against orthogonal iteration by Cholesky: time at the orders and stacks of a step, and errors on hard factors.

python -m benchmarks.orthogonal            CPU time of one thread, or on a GPU what its events say
python -m benchmarks.orthogonal --record   write docs/results/orthogonal.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_shampoo4.numerics.linalg import safe_qr
from hf_shampoo4.numerics.orthogonal import orthogonal_iteration
from hf_shampoo4.numerics.precision import exact_float32
from hf_shampoo4.utils.files import write_json
from tests.numerics.test_orthogonal import EIGENVALUES, HARD, ORTHOGONAL, RESIDUAL, errors, hard_factors

RECORDED = Path(__file__).resolve().parents[1] / "docs" / "results" / "orthogonal.json"
ORDERS, STACKS, LARGEST = (64, 128, 256, 512, 1024), (1, 4, 16), 4 * 1024**2
OF_ERRORS = (32, 128, 512, 2048)


def milliseconds(call: Callable[[], Any], device: str, tries: int = 3) -> float:
    """The least of some tries, after one that does not count."""
    call()
    found = []
    for _ in range(tries):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        else:
            began = time.thread_time()  # others may work on this machine
            call()
            found.append(1e3 * (time.thread_time() - began))
    return round(min(found), 2)


def times(device: str) -> list[dict[str, Any]]:
    """Of both, for each order and stack."""
    found = []
    for k in ORDERS:
        for stack in STACKS:
            if stack > 1 and stack * k * k > LARGEST:
                continue
            a = hard_factors(k)[:1].repeat(stack, 1, 1).to(device)
            with exact_float32(device):
                row = {
                    "order": k,
                    "stack": stack,
                    "qr_ms": milliseconds(lambda a=a: safe_qr(a), device),
                    "cholesky_qr_ms": milliseconds(lambda a=a: orthogonal_iteration(a), device),
                }
            found.append(row)
            print(row)
    return found


def accuracy() -> list[dict[str, Any]]:
    """Errors on every kind of hard factor, in multiples of k eps."""
    found = []
    for k in OF_ERRORS:
        of_kinds = {
            name: [float(f"{x:.2g}") for x in values.tolist()] for name, values in errors(hard_factors(k)).items()
        }
        found.append({"order": k, **{name: dict(zip(HARD, values, strict=True)) for name, values in of_kinds.items()}})
        print(found[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write docs/results/orthogonal.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread",
        "torch": torch.__version__,
        "times": times(device),
        "errors_in_k_eps": accuracy(),
        "bounds_in_k_eps": {"orthogonality": ORTHOGONAL, "residual": RESIDUAL, "eigenvalues": EIGENVALUES},
    }
    if given.record:
        write_json(RECORDED, found)


if __name__ == "__main__":
    main()
