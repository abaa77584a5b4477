"""Gradients and linear algebra gone wrong, every algorithm with every storage: `python -m tests.stress.faults`.

A *fault* is a stream of gradients, or something broken underneath for a while.  Whatever it is, training must go on:
parameters and state stay finite, what was skipped or failed is counted, and the optimizer moves on when all is well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]

from hf_shampoo4 import Shampoo4bit  # noqa: E402
from hf_shampoo4.exceptions import OptionError  # noqa: E402
from hf_shampoo4.options import Options  # noqa: E402
from hf_shampoo4.preconditioners.eigenbasis import LIMIT  # noqa: E402
from hf_shampoo4.state_report import metrics  # noqa: E402
from hf_shampoo4.utils.files import write_json  # noqa: E402
from tests.support import used  # noqa: E402

ALGORITHMS: dict[str, dict[str, Any]] = {
    **{factor: {"algorithm": "shampoo", "factor": factor} for factor in ("eigen", "direct", "cholesky", "cholesky_ef")},
    **{name: {"algorithm": name} for name in ("soap", "kl_shampoo", "kl_soap", "elementwise")},
    "newton": {"algorithm": "shampoo", "factor": "cholesky", "root": "newton"},
    "newton_db": {
        "algorithm": "shampoo",
        "factor": "direct",
        "root": "newton_db",
        "bits": 32,
    },  # quantised, it is often indefinite
    "sgdm": {"algorithm": "shampoo", "base": "sgdm"},
    "elementwise_sgdm": {"algorithm": "elementwise", "base": "sgdm"},
}
MOMENTS = ("fp32", "bf16", "8bit", "4bit", "4bit_factored", "4bit_eden", "4bit_zipsr")
SHAPES = [(64, 128), (130, 40), (9,), (4096,)]  # two blocks, one with a basis that is not quantised, vectors


def options_of(algorithm: str, moments: str) -> dict[str, Any] | None:
    """None: these two do not go together."""
    options = {**ALGORITHMS[algorithm], "moments": moments, "block_size": 64, "stats_every": 2}
    options = used({**options, "roots_every": 3, "refresh_warmup": 3})
    try:
        Options(**options)
    except OptionError:
        return None
    return options


PAIRS = [(a, m) for a in ALGORITHMS for m in MOMENTS if options_of(a, m)]


def make(algorithm: str, moments: str, dtype: torch.dtype = torch.float32) -> Shampoo4bit:
    generator = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    options = options_of(algorithm, moments)
    assert options is not None
    return Shampoo4bit([(f"p{i}", p) for i, p in enumerate(ps)], lr=1e-3, weight_decay=0.1, **options)


def owners(optimizer: Shampoo4bit) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: Shampoo4bit, gradient: Callable[[Tensor], Tensor]) -> None:
    for p in owners(optimizer):
        p.grad = gradient(p.detach().float()).to(p.dtype)
    optimizer.step()


def sick(optimizer: Shampoo4bit) -> list[str]:
    """What of parameters and state is not finite."""
    found = [f"p{i}" for i, p in enumerate(owners(optimizer)) if not torch.isfinite(p).all()]
    for i, p in enumerate(owners(optimizer)):
        found += [
            f"p{i} {key}" for key, t in optimizer.state[p].items()
            if t.is_floating_point() and not torch.isfinite(t).all()
        ]  # fmt: skip
    return found


def normal(t: int) -> Callable[[Tensor], Tensor]:
    """Towards zero, with noise."""
    generator = torch.Generator().manual_seed(t)
    return lambda p: 0.1 * p + 0.1 * torch.randn(p.shape, generator=generator)


# ---------------------------------------------------------------------------------------------- streams of gradients


def _rank1(t: int) -> Callable[[Tensor], Tensor]:
    def gradient(p: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(p.shape[0], *[1] * (p.dim() - 1), generator=generator)
        return (rows * torch.randn(1, *p.shape[1:], generator=generator)).expand_as(p)

    return gradient


def _one_entry(p: Tensor) -> Tensor:
    g = torch.zeros_like(p)
    g.view(-1)[-1] = 1.0
    return g


def _scaled(factor: float) -> Callable[[int], Callable[[Tensor], Tensor]]:
    return lambda t: lambda p: factor * normal(t)(torch.zeros_like(p))


STREAMS: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
    "zero": lambda t: torch.zeros_like,
    "rank1": _rank1,
    "constant": lambda t: torch.ones_like,
    "one_entry": lambda t: _one_entry,
    "tiny": _scaled(1e-20),
    "denormal": _scaled(1e-39),
    "huge": _scaled(1e8),
    "spikes": lambda t: _scaled(1e8 if t % 7 == 3 else 1.0)(t),
    "spikes_down": lambda t: _scaled(1e-20 if t % 7 == 3 else 1e8 if t % 7 == 5 else 1.0)(t),
    "silenced": lambda t: _scaled(1.0 if t < 6 else 0.0)(t),
    "alternating": lambda t: lambda p: torch.full_like(p, (-1.0) ** t),
}


def stream(algorithm: str, moments: str, name: str, steps: int, dtype: torch.dtype = torch.float32) -> list[str]:
    """What goes wrong in `steps` steps of a stream and 12 normal ones after it; nothing, if all is well."""
    optimizer = make(algorithm, moments, dtype)
    for t in range(steps):
        step(optimizer, STREAMS[name](t))
        if t in (0, 10, steps - 1) and (wrong := sick(optimizer)):
            return [f"not finite after step {t}: {wrong[:4]}"]
    return after(optimizer, skipped=0)


def _farthest(optimizer: Shampoo4bit) -> float:
    """How far 12 normal steps at lr 1e-3 may go, whatever was before."""
    options = optimizer.defaults
    if options["base"] == "sgdm":  # its steps are as large as what the momentum remembers
        return float("inf")
    if options["algorithm"] in ("soap", "kl_soap"):
        # entries may be at the limit after a basis update, and some may meet in one of the parameter's coordinates
        return 12 * 1e-3 * 2 * LIMIT
    return 0.1


def _least(optimizer: Shampoo4bit) -> float:
    """How far, as a root mean square, 12 normal steps at lr 1e-3 must take each parameter, whatever was before."""
    return 0.0 if optimizer.defaults["base"] == "sgdm" else 5e-4


def after(optimizer: Shampoo4bit, skipped: int, failed: bool | None = None) -> list[str]:
    """Go on with normal gradients: what is wrong with the state, the counts, and the progress."""
    wrong = [f"not finite: {found[:4]}"] if (found := sick(optimizer)) else []
    counts = metrics(optimizer)
    if counts["optim/skipped_steps"] != skipped:
        wrong.append(f"{counts['optim/skipped_steps']} steps counted as skipped, not {skipped}")
    if failed is not None and (counts["optim/failed_refreshes"] > 0) != failed:
        wrong.append(f"{counts['optim/failed_refreshes']} failed refreshes counted")
    before = [p.detach().clone() for p in owners(optimizer)]
    for t in range(1000, 1012):
        step(optimizer, normal(t))
    if found := sick(optimizer):
        wrong.append(f"not finite 12 normal steps later: {found[:4]}")
    moves = [p.float() - q.float() for p, q in zip(owners(optimizer), before, strict=True)]
    if any(not move.any() for move in moves):
        wrong.append("does not move any more")
    if (least := min(move.square().mean().sqrt() for move in moves)) < _least(optimizer):
        wrong.append(f"12 normal steps move a parameter by no more than {least:.3g}")
    if (moved := max(move.abs().max() for move in moves)) > _farthest(optimizer):
        wrong.append(f"12 normal steps move as far as {moved:.3g}")
    return wrong


# ------------------------------------------------------------------------------------------------ broken for a while


def skip(algorithm: str, moments: str, value: float, which: int) -> list[str]:
    """A NaN, an infinity, or what has no finite square, in one block of one parameter, on steps 4 to 6."""
    optimizer = make(algorithm, moments)
    for t in range(9):

        def gradient(p: Tensor, t: int = t) -> Tensor:
            g = normal(t)(p)
            if 4 <= t < 7 and p.shape == SHAPES[which]:
                g.view(-1)[-1] = value
            return g

        step(optimizer, gradient)
    return after(optimizer, skipped=3, failed=False)


def _raise(*arguments: Any, **keywords: Any) -> Any:
    raise torch.linalg.LinAlgError("injected: the algorithm failed to converge")


def _nan(real: Callable[..., Any]) -> Callable[..., Any]:
    def broken(*arguments: Any, **keywords: Any) -> Any:
        out = real(*arguments, **keywords)
        for t in out if isinstance(out, tuple) else (out,):
            if t.is_floating_point():
                t.fill_(torch.nan)
        return out

    return broken


LAPACK = ("eigh", "qr", "cholesky_ex")


@contextlib.contextmanager
def broken(function: str, how: str) -> Iterator[list[int]]:
    """torch.linalg.`function` raises, or gives NaN; yields how often it was called, in a list."""
    real, calls = getattr(torch.linalg, function), [0]
    substitute = _raise if how == "raises" else _nan(real)

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        return substitute(*arguments, **keywords)

    with mock.patch.object(torch.linalg, function, counted):
        yield calls


def injected(algorithm: str, moments: str, function: str, how: str) -> list[str]:
    """One of LAPACK's functions fails on steps 4 to 9."""
    optimizer = make(algorithm, moments)
    for t in range(4):
        step(optimizer, normal(t))
    with broken(function, how) as calls:
        for t in range(4, 10):
            step(optimizer, normal(t))
    return after(optimizer, skipped=0, failed=calls[0] > 0)


def half(algorithm: str, moments: str) -> list[str]:
    """float16 parameters: gradients beyond 65504 overflow to infinity, as under a loss scaler that is too large."""
    optimizer = make(algorithm, moments, torch.float16)
    for t in range(8):
        step(optimizer, _scaled(1e6 if t % 4 == 2 else 1.0)(t))
    return after(optimizer, skipped=2)


def each_fault() -> Iterator[tuple[str, Callable[[str, str, int], list[str]]]]:
    """Name, and what tries it: (algorithm, moments, steps) -> what is wrong."""
    for name in STREAMS:
        yield name, lambda a, m, steps, name=name: stream(a, m, name, steps)
    for value in (torch.nan, torch.inf, -torch.inf, 1e25):
        for which in (0, 2):
            yield f"{value} in p{which}", lambda a, m, _, value=value, which=which: skip(a, m, value, which)
    for function in LAPACK:
        for how in ("raises", "nan"):
            yield f"{function} {how}", lambda a, m, _, f=function, how=how: injected(a, m, f, how)
    yield "float16 overflow", lambda a, m, _: half(a, m)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="of each stream of gradients")
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS))
    parser.add_argument("--moments", default=",".join(MOMENTS))
    parser.add_argument("--faults", help="names, such as zero,rank1,constant (default: all)")
    parser.add_argument("--output", type=Path, help="a JSON file, such as docs/results/faults.json; adds to it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    faults = {name: attempt for name, attempt in each_fault() if name in (given.faults or name).split(",")}
    pairs = [(a, m) for a, m in PAIRS if a in given.algorithms.split(",") and m in given.moments.split(",")]
    began, wrong = time.monotonic(), {}
    for algorithm, moments in pairs:
        for name, attempt in faults.items():
            try:
                found = attempt(algorithm, moments, given.steps)
            except Exception as error:
                found = [f"{type(error).__name__}: {error}"]
            if found:
                wrong[f"{algorithm} {moments} {name}"] = found
                print(f"{algorithm} {moments} {name}: {'; '.join(found)}", flush=True)
    tried, seconds = len(pairs) * len(faults), time.monotonic() - began
    print(f"{tried} faults tried with --steps {given.steps}, {len(wrong)} of them not survived, {seconds:.0f} s")
    if given.output:
        said = {name: value for name, value in vars(given).items() if name != "output" and value}
        said = {name: value for name, value in said.items() if name == "steps" or value != parser.get_default(name)}
        command = " ".join(["python -m tests.stress.faults", *(f"--{name} {value}" for name, value in said.items())])
        runs = json.loads(given.output.read_text()) if given.output.exists() else {}
        runs[command] = {
            "torch": torch.__version__, "pairs": [" ".join(pair) for pair in pairs], "faults": list(faults),
            "tried": tried, "not_survived": wrong,
        }  # fmt: skip
        write_json(given.output, runs)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
