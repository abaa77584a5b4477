"""What training costs and where its loss goes, for each algorithm, beside what was recorded.

    python -m tests.stress.regressions loss            the recorded curves, and how far today's are from them
    python -m tests.stress.regressions loss --record   write them anew, after a change that is meant to change them
    python -m tests.stress.regressions time            CPU time of a step in multiples of AdamW's, beside those recorded
    python -m tests.stress.regressions time --record

`tests/preconditioners/test_regressions.py` holds the losses to 2%.  Times decide nothing by themselves: the job says
which ratio grew by more than half, and ends with 1 then, for somebody to look at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

import torch  # noqa: E402
from torch import nn  # noqa: E402

from hf_shampoo4 import Shampoo4bit  # noqa: E402
from hf_shampoo4.options import users_of  # noqa: E402
from hf_shampoo4.utils.files import write_json  # noqa: E402
from tests.stress import soak  # noqa: E402
from tests.stress.soak import Problem, of_width  # noqa: E402

ALGORITHMS = {
    **soak.ALGORITHMS,
    "kl_shampoo_short": {"algorithm": "kl_shampoo", "sides": "short"},
    "kl_shampoo_cholesky_qr": {"algorithm": "kl_shampoo", "orthogonalise": "cholesky_qr"},
}

RECORDED = ROOT / "docs" / "results" / "regressions.json"
STEPS, POINTS = 80, 8
BAND = 0.02
SLOWER = 1.5


def losses(options: dict[str, Any]) -> list[float]:
    """Mean loss of each tenth step or so of a short training of the soak's problem."""
    problem = Problem()
    optimizer = Shampoo4bit(problem.weights, lr=3e-3, betas=(0.9, 0.99), **options)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = problem.loss(problem.batch())
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    size = STEPS // POINTS
    return [round(statistics.fmean(found[i * size : (i + 1) * size]), 6) for i in range(POINTS)]


def curves() -> dict[str, list[float]]:
    """Of every algorithm in 4 bits."""
    return {name: losses(of_width(options, "4-bit")) for name, options in ALGORITHMS.items()}


def drift(recorded: dict[str, list[float]], found: dict[str, list[float]]) -> dict[str, float]:
    """Largest relative difference of each curve."""
    return {
        name: max(abs(b / a - 1) for a, b in zip(recorded[name], curve, strict=True)) for name, curve in found.items()
    }


def _warm(options: dict[str, Any]) -> dict[str, Any]:
    """Without the refreshes at every step that a training begins with."""
    return {"refresh_warmup": 0} if options["algorithm"] in users_of("refresh_warmup") else {}


def ratios(rounds: int = 5, steps: int = 20) -> dict[str, float]:
    """CPU time of `steps` steps on four 256 x 256 matrices over AdamW's, in one process, the least of some rounds."""
    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        name: lambda ps, options=options: Shampoo4bit(ps, **options, **_warm(options))
        for name, options in soak.ALGORITHMS.items()
    }
    makers["adamw"] = lambda ps: torch.optim.AdamW(ps, foreach=True)
    optimizers = {}
    for name, maker in makers.items():
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(256, 256)) for _ in range(4)]
        for p in ps:
            p.grad = torch.randn_like(p)
        optimizers[name] = maker(ps)
        optimizers[name].step()
    least = dict.fromkeys(makers, float("inf"))
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            began = time.process_time()
            for _ in range(steps):
                optimizer.step()
            least[name] = min(least[name], time.process_time() - began)
    return {name: round(least[name] / least["adamw"], 1) for name in soak.ALGORITHMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["loss", "time"])
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.relative_to(ROOT)}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    found: dict[str, Any] = curves() if given.what == "loss" else ratios()
    if given.record:
        write_json(RECORDED, {**recorded, given.what: found, "torch": torch.__version__})
        return
    before = recorded[given.what]
    if given.what == "loss":
        worse = {name: off for name, off in drift(before, found).items() if off > BAND}
    else:
        worse = {name: ratio / before[name] for name, ratio in found.items() if ratio > SLOWER * before[name]}
    for name, value in found.items():
        print(
            f"{name}: {value}, recorded {before[name]}{'   <-- ' + format(worse[name], '.3f') if name in worse else ''}"
        )
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
