"""Train a tiny problem for very long, in 4 bits beside 32: what must not drift is looked at all the way.

    python -m tests.stress.soak --steps 20000 --output docs/results/soak.json

Two matrices that are large enough to be quantised learn a noisy linear map between badly scaled, rotated inputs and
outputs, by one algorithm after the other.  Looked at in each of ten parts of the training: bytes of the state, the
process's memory, milliseconds a step, failed refreshes, how far the bases are from orthogonal, and the loss.  Then the
first part is trained again, and must give the same bits.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.update(OMP_NUM_THREADS="1", MKL_CBWR="COMPATIBLE")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hf_shampoo4 import Shampoo4bit  # noqa: E402
from hf_shampoo4.state_report import metrics  # noqa: E402
from hf_shampoo4.utils.files import write_json, write_text  # noqa: E402
from tests.support import used  # noqa: E402

ALGORITHMS: dict[str, dict[str, Any]] = {
    "eigen": {"algorithm": "shampoo", "factor": "eigen", "stats_every": 10, "roots_every": 20},
    "cholesky_ef": {"algorithm": "shampoo", "factor": "cholesky_ef", "stats_every": 10, "roots_every": 20},
    "soap": {"algorithm": "soap"},
    "kl_shampoo": {"algorithm": "kl_shampoo"},
    "kl_soap": {"algorithm": "kl_soap"},
    "elementwise": {"algorithm": "elementwise"},
}
WIDTHS = {"4-bit": {"bits": 4, "moments": "4bit"}, "32-bit": {"bits": 32, "moments": "fp32"}}


def of_width(options: dict[str, Any], width: str) -> dict[str, Any]:
    """Options of an algorithm with those of `WIDTHS` that it uses."""
    return used({**options, **WIDTHS[width]})


PARTS = 10
MEMORY_BAND = 8.0  # MB that the process may grow by from the second part on: the allocator's pages
TIME_BAND = 1.5  # the median step of the last parts over that of the first ones
LOSS_BAND = 1.15  # 4-bit over 32-bit at the end
BASIS_BOUND = 0.25  # of |U^T U - I|_F / sqrt(k), U as it is decoded from 4 bits


class Problem:
    """y = V tanh(U x) with noise, the inputs' scales over two decades, and what it takes to learn it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.mixing = torch.linalg.qr(normal(64, 64)).Q * torch.logspace(0, -2, 64)
        self.truth = (normal(64, 64) / 4, normal(64, 64) / 8)
        self.weights = [nn.Parameter(normal(64, 64) / 16), nn.Parameter(normal(64, 64) / 16)]
        self.generator = generator

    def batch(self, size: int = 32) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 64, generator=self.generator) @ self.mixing.T
        y = torch.tanh(x @ self.truth[0].T) @ self.truth[1].T
        return x, y + 0.1 * torch.randn(y.shape, generator=self.generator)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (torch.tanh(x @ self.weights[0].T) @ self.weights[1].T - y).square().mean()


class Run:
    """One algorithm on the problem."""

    def __init__(self, options: dict[str, Any], steps: int) -> None:
        self.problem, self.steps, self.done = Problem(), steps, 0
        self.optimizer = Shampoo4bit(self.problem.weights, lr=3e-3, betas=(0.9, 0.99), **options)

    def part(self) -> dict[str, float]:
        """Train a tenth of the steps, and look."""
        losses, seconds = [], []
        for _ in range(self.steps // PARTS):
            began = time.process_time()
            rate = 3e-3 * max(0.02, 1 - self.done / self.steps)
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.zero_grad()
            loss = self.problem.loss(self.problem.batch())
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            seconds.append(time.process_time() - began)
            self.done += 1
        gc.collect()
        counts = metrics(self.optimizer)
        return {
            "step": self.done,
            "loss": statistics.fmean(losses[-len(losses) // 2 :]),
            "cpu_ms": 1e3 * statistics.median(seconds),
            "state_bytes": counts["optim/state_bytes"],
            "rss_mb": resident(),
            "failed_refreshes": counts["optim/failed_refreshes"],
            "skipped_steps": counts["optim/skipped_steps"],
            "basis_error": self.basis_error(),
        }

    def basis_error(self) -> float:
        """Largest |U^T U - I|_F / sqrt(k) of all bases, as they are stored; 0 where there is none."""
        worst = 0.0
        for wave in self.optimizer.waves(0):
            for stack in wave.stacks:
                for name, storage in stack.algorithm.storages().items():
                    if name.endswith("basis"):
                        u = storage.read(stack.state[name])
                        eye = torch.eye(u.shape[-1])
                        errors = torch.linalg.matrix_norm(u.mT @ u - eye) / u.shape[-1] ** 0.5
                        worst = max(worst, errors.max().item())
        return worst

    def digest(self) -> str:
        found = hashlib.sha256()
        for p in self.problem.weights:
            for t in (p, *(t for _, t in sorted(self.optimizer.state[p].items()))):
                found.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def resident() -> float:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train in parts, look at each, and see that the first one can be repeated."""
    run = Run(options, steps)
    parts = [run.part()]
    first = run.digest()
    parts += [run.part() for _ in range(PARTS - 1)]
    again = Run(options, steps)
    again.part()
    return {"parts": parts, "repeats": again.digest() == first}


def verdicts(found: dict[str, Any]) -> list[str]:
    """What drifted in one training."""
    parts, wrong = found["parts"], []
    if len({part["state_bytes"] for part in parts}) > 1:
        wrong.append("the state's bytes changed")
    if parts[-1]["rss_mb"] - parts[1]["rss_mb"] > MEMORY_BAND:
        wrong.append(f"the process grew from {parts[1]['rss_mb']:.0f} to {parts[-1]['rss_mb']:.0f} MB")
    early, late = (statistics.median(p["cpu_ms"] for p in some) for some in (parts[1:4], parts[-3:]))
    if late > TIME_BAND * early:
        wrong.append(f"a step went from {early:.2f} to {late:.2f} ms")
    if max(part["basis_error"] for part in parts) > BASIS_BOUND:
        wrong.append("a basis is not orthogonal")
    if parts[-1]["failed_refreshes"] or parts[-1]["skipped_steps"]:
        wrong.append("refreshes failed, or steps were skipped")
    if not parts[-1]["loss"] < parts[0]["loss"]:
        wrong.append("the loss did not fall")
    if not found["repeats"]:
        wrong.append("a second run gave other bits")
    return wrong


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = (
        "algorithm", "width", "state, bytes", "MB grown", "ms a step, first and last parts", "basis error, largest",
        "loss, first part", "last part", "last part to 32-bit's", "repeats", "drift",
    )  # fmt: skip
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for algorithm, widths in results.items():
        full = widths["32-bit"]["parts"][-1]["loss"]
        for width, found in widths.items():
            parts = found["parts"]
            early, late = (statistics.median(p["cpu_ms"] for p in some) for some in (parts[1:4], parts[-3:]))
            cells = (
                algorithm, width, f"{parts[-1]['state_bytes']:,}", f"{parts[-1]['rss_mb'] - parts[1]['rss_mb']:.1f}",
                f"{early:.2f}, {late:.2f}", f"{max(p['basis_error'] for p in parts):.3f}", f"{parts[0]['loss']:.4f}",
                f"{parts[-1]['loss']:.4f}", f"{parts[-1]['loss'] / full:.3f}", "yes" if found["repeats"] else "no",
                "; ".join(found["wrong"]) or "none",
            )  # fmt: skip
            lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000, help="of each training, a multiple of 10")
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS))
    parser.add_argument("--output", type=Path, help="a JSON file; a table is written beside it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if given.output and given.output.exists():  # algorithms may be soaked one at a time
        results = json.loads(given.output.read_text())["results"]
    bad = 0
    for algorithm in given.algorithms.split(","):
        found = {width: soak(of_width(ALGORITHMS[algorithm], width), given.steps) for width in WIDTHS}
        for width, one in found.items():
            one["wrong"] = verdicts(one)
            share = one["parts"][-1]["loss"] / found["32-bit"]["parts"][-1]["loss"]
            if share > LOSS_BAND:
                one["wrong"].append(f"the loss is {share:.3f} of 32-bit's")
            bad += len(one["wrong"])
            print(f"{algorithm} {width}: {one['parts'][-1]} {one['wrong'] or 'nothing drifted'}", flush=True)
        results[algorithm] = found
        if given.output:
            about = {"command": f"python -m tests.stress.soak --steps {given.steps}", "torch": torch.__version__}
            bounds = {"memory_mb": MEMORY_BAND, "time": TIME_BAND, "loss": LOSS_BAND, "basis": BASIS_BOUND}
            write_json(given.output, {**about, "bounds": bounds, "results": results})
            heading = f"`{about['command']}`: {given.steps:,} steps of each, betas (0.9, 0.99), one thread.\n\n"
            write_text(given.output.with_suffix(".md"), f"# Soak\n\n{heading}{table(results)}\n")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
