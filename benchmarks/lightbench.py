"""LightBench's tasks on a CPU by AdamW, Muon, SOAP and ours: how many of the same draws of learning rate and betas win.

git clone https://github.com/HomebrewML/LightBench
python -m benchmarks.lightbench LightBench            15 minutes of one core; goes on where it was cut off
python -m benchmarks.lightbench LightBench --record   write docs/results/lightbench.json and .md

Models, losses, what counts as won and the ranges of the draws are LightBench's, and so are seeds before a model and
before a draw.  Its sampler, which goes on from what an optimizer has done, and its early stopping are not used: each
optimizer has the same draws, and each draw all its steps.  HeavyBall, which LightBench's modules import for that, need
not be installed.  An optimizer gets the parameters without their names, as LightBench gives them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import io
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.studies import muon
from hf_shampoo4.studies.code_version import commit, versions
from hf_shampoo4.studies.machine import machine
from hf_shampoo4.studies.muon import Joined, Muon
from hf_shampoo4.studies.peers import code_of
from hf_shampoo4.studies.race_report import write_markdown
from hf_shampoo4.studies.runner import Runs, Settings
from hf_shampoo4.utils.files import write_json

RECORDED = Path(__file__).resolve().parents[1] / "docs" / "results" / "lightbench.json"
DRAWS, STEPS, DIFFICULTIES = 12, 200, ("trivial", "easy")
RANGES = ((1e-7, 100.0), (1e-5, 1.0), (1e-7, 1.0), (1e-7, 1.0))
"""Of the learning rate and of 1 - beta for the betas and for the factors' beta; draws are even in the logarithm."""
STAND_INS = ("heavyball", "heavyball.chainable", "heavyball.helpers", "heavyball.utils", "optuna")
LEFT_OUT = {
    **dict.fromkeys(("CIFAR100", "CIFAR10_wide", "MNIST", "SVHN", "Tolstoi_RNN"), "data to download"),
    **dict.fromkeys(("grokking", "memory_constrained"), "needs a GPU"),
    **dict.fromkeys(("noisy_matmul", "xor_digit", "xor_digit_rnn", "xor_sequence", "xor_sequence_rnn", "xor_spot",
                     "xor_spot_rnn"), "1.5 ms a gradient and more"),
}  # fmt: skip


class Draw(NamedTuple):
    """Where an optimizer is run."""

    lr: float
    betas: tuple[float, float]
    factor_beta: float


class Task(NamedTuple):
    """What a module of LightBench hands to its `trial`."""

    model: nn.Module
    data: Callable[[], tuple[Any, Any]]
    loss_of: Callable[[Any, Any], Tensor] | None
    won: Callable[[nn.Module, float], tuple[bool, Any]]


class Contestant(NamedTuple):
    """An optimizer with its other settings as they are by default."""

    label: str
    make: Callable[[list[nn.Parameter], Draw], torch.optim.Optimizer]
    code: Callable[[], Mapping[str, str]]


def _adamw(params: list[nn.Parameter], draw: Draw) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=draw.lr, betas=draw.betas, weight_decay=0.0)


def _muon(params: list[nn.Parameter], draw: Draw) -> torch.optim.Optimizer:
    groups = [
        {"params": some, "lr": draw.lr, "weight_decay": 0.0, "use_muon": matrices}
        for matrices in (True, False)
        if (some := [p for p in params if (p.ndim == 2) is matrices])
    ]
    rest = (torch.optim.AdamW, {"betas": draw.betas})
    return Joined(groups, draw.lr, (Muon, {"momentum": draw.betas[0]}), rest)


def _soap(params: list[nn.Parameter], draw: Draw) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(params, lr=draw.lr, betas=draw.betas, shampoo_beta=draw.factor_beta, weight_decay=0.0)


def _ours(algorithm: str) -> Callable[[list[nn.Parameter], Draw], torch.optim.Optimizer]:
    return lambda params, draw: Shampoo4bit(
        params, lr=draw.lr, betas=draw.betas, factor_beta=draw.factor_beta, weight_decay=0.0, algorithm=algorithm
    )


CONTESTANTS = {
    "adamw": Contestant("AdamW (torch)", _adamw, lambda: versions([])),
    "muon": Contestant("Muon, AdamW for vectors", _muon, lambda: versions([], muon)),
    "soap": Contestant("SOAP (pytorch_optimizer)", _soap, lambda: versions(["pytorch_optimizer"])),
    "shampoo4bit": Contestant("shampoo4bit", _ours("kl_shampoo"), lambda: code_of({"optim": "shampoo4bit"})),
    "soap4bit": Contestant("soap4bit", _ours("soap"), lambda: code_of({"optim": "soap4bit"})),
}
OF_MATRICES = tuple(CONTESTANTS)
OF_VECTORS = ("adamw", "soap", "shampoo4bit")
"""Where there is no matrix, Muon is AdamW and soap4bit what shampoo4bit is."""

KINDS = {"matrices": "with matrices", "vectors": "of vectors alone"}


class OnCPU(TorchFunctionMode):
    """What asks for CUDA stays on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch."""
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def draws(count: int, seed: int) -> list[Draw]:
    """Points of a scrambled Sobol sequence over `RANGES`."""
    points = torch.quasirandom.SobolEngine(len(RANGES), scramble=True, seed=seed).draw(count, dtype=torch.float64)
    found = []
    for point in points.tolist():
        lr, one, two, factor = (low * (high / low) ** x for x, (low, high) in zip(point, RANGES, strict=True))
        found.append(Draw(lr, (1 - one, 1 - two), 1 - factor))
    return found


@contextlib.contextmanager
def imported(checkout: Path) -> Iterator[ModuleType]:
    """LightBench's package of a checkout, with stand-ins for what its tasks import and do not use."""
    before = dict(sys.modules)
    sys.modules.update({name: MagicMock() for name in STAND_INS})
    sys.path.insert(0, str(checkout))
    try:
        import lightbench  # type: ignore[import-not-found]

        yield lightbench
    finally:
        sys.path.remove(str(checkout))
        for name in [name for name in sys.modules if name in STAND_INS or name.split(".")[0] == "lightbench"]:
            del sys.modules[name]
        sys.modules.update({name: before[name] for name in STAND_INS if name in before})


def task_of(module: Any, difficulty: str, seed: int) -> Task | str:
    """The task of a module of LightBench in float32, as its own runner makes it; or why there is none."""
    handed: list[Task] = []

    def trial(model: nn.Module, data: Any, loss_of: Any, won: Any, *others: Any, **more: Any) -> None:
        handed.append(Task(model.float(), data or (lambda: (None, None)), loss_of, won))

    module.trial = trial
    told = {"dtype": "float32", "steps": STEPS, "opt": "AdamW", "trials": DRAWS, "config": difficulty}
    told |= {"weight_decay": 0, "win_condition_multiplier": 1.0}
    taken = {name: value for name, value in told.items() if name in inspect.signature(module.main).parameters}
    _set_seed(seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()), OnCPU():
            module.main(**taken)
    except Exception as error:
        return f"{type(error).__name__} {error}".strip()
    return handed[0]


def attempt(task: Task, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int) -> Settings:
    """One training; the step at which it won, or None, and its last loss (None: not finite)."""
    _set_seed(0x12312)
    model = copy.deepcopy(task.model)
    optimizer, last = make(list(model.parameters())), math.nan
    for step in range(1, steps + 1):
        with OnCPU():
            given, target = task.data()
            loss = model() if given is None else model(given)
            loss = loss if task.loss_of is None else task.loss_of(loss, target)
        last = loss.item()
        if not math.isfinite(last):
            return {"won_at": None, "loss": None}
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if task.won(model, last)[0]:
            return {"won_at": step, "loss": last}
    return {"won_at": None, "loss": last}


def _set_seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def carry_out(lightbench: Any, runs: Runs, seed: int, names: Sequence[str] = ()) -> Settings:
    """Every task by every contestant: what came of the draws; a harder one only if somebody solved the one before."""
    tasks: list[Settings] = []
    without = dict(LEFT_OUT)
    for name in names or (name for name in lightbench.available() if name not in LEFT_OUT):
        for difficulty in DIFFICULTIES:
            module = lightbench.load(name)
            task = task_of(module, difficulty, seed)
            if isinstance(task, str):
                if not task.startswith("SkipConfig"):  # a difficulty that it does not have
                    without[f"{name}, {difficulty}"] = task
                break
            shapes = [list(p.shape) for p in task.model.parameters()]
            asked = OF_MATRICES if has_matrices(shapes) else OF_VECTORS
            found = {key: _of_draws(key, task, module, difficulty, seed, runs) for key in asked}
            tasks.append({"task": name, "difficulty": difficulty, "shapes": shapes, "optimizers": found})
            print(f"{name}, {difficulty}: {'  '.join(f'{key} {_cell(one)}' for key, one in found.items())}", flush=True)
            if not any(one["won"] for one in found.values()):
                break
    return {"tasks": tasks, "left_out": without, "totals": {kind: totals(of) for kind, of in by_kind(tasks).items()}}


def _of_draws(key: str, task: Task, module: Any, difficulty: str, seed: int, runs: Runs) -> Settings:
    contestant = CONTESTANTS[key]
    settings = {"task": module.__name__, "difficulty": difficulty, "optimizer": key, "seed": seed,
                "draws": DRAWS, "steps": STEPS}  # fmt: skip
    code = {**contestant.code(), **versions([], module, attempt)}

    def make() -> Settings:
        tried = draws(DRAWS, seed)
        return {"draws": [attempt(task, lambda params: contestant.make(params, draw), STEPS) for draw in tried]}  # noqa: B023

    return summed(runs.once(settings, code, make)["draws"])


def summed(tried: Sequence[Settings]) -> Settings:
    """How many draws won, which was the first, the steps of that one and the fewest of any; the least loss."""
    won = [one["won_at"] for one in tried if one["won_at"] is not None]
    losses = [one["loss"] for one in tried if one["loss"] is not None]
    first = next((i for i, one in enumerate(tried, 1) if one["won_at"] is not None), None)
    return {
        "won": len(won), "attempt": first, "steps": won[0] if won else None, "fewest_steps": min(won, default=None),
        "least_loss": min(losses, default=None),
    }  # fmt: skip


def has_matrices(shapes: Sequence[Sequence[int]]) -> bool:
    """Whether an optimizer for matrices finds one to work on."""
    return any(len(shape) == 2 and min(shape) > 1 for shape in shapes)


def by_kind(tasks: Sequence[Settings]) -> dict[str, list[Settings]]:
    """Those of each of `KINDS` that there are."""
    found: dict[str, list[Settings]] = {kind: [] for kind in KINDS}
    for task in tasks:
        found["matrices" if has_matrices(task["shapes"]) else "vectors"].append(task)
    return {kind: of_kind for kind, of_kind in found.items() if of_kind}


def totals(tasks: Sequence[Settings]) -> Settings:
    """By contestant: tasks solved, draws that won, and tasks of which nobody solved more quickly or ended lower."""
    found = {}
    for key in tasks[0]["optimizers"]:
        mine = [task["optimizers"][key] for task in tasks]
        found[key] = {
            "tasks": len(tasks), "solved": sum(one["won"] > 0 for one in mine),
            "draws": DRAWS * len(tasks), "won": sum(one["won"] for one in mine),
            "best": sum(_standing(task["optimizers"][key]) == min(map(_standing, task["optimizers"].values()))
                        for task in tasks),
        }  # fmt: skip
    return found


def _standing(one: Settings) -> tuple[float, float]:
    """Of a contestant at a task, the less the better; losses to two digits, as they are shown."""
    if one["won"]:
        return one["fewest_steps"], 0.0
    return math.inf, math.inf if one["least_loss"] is None else float(f"{one['least_loss']:.2g}")


def markdown(told: Settings) -> str:
    """The tables."""
    lines = [
        "# LightBench: tasks on a CPU, the same draws for all", "",
        f"`python -m benchmarks.lightbench CHECKOUT --record` (every number: `lightbench.json`; commit "
        f"{told['commit']}, LightBench {told['lightbench']}).", "",
        f"{told['draws']} draws of learning rate, betas and the factors' beta over LightBench's ranges, the same for "
        f"all; {told['steps']} steps each, seed {told['seed']}, float32. A cell: **draws that won** (steps of the "
        "quickest one; the first draw that won, as LightBench counts attempts), or else the least loss at which one "
        "ended.", "",
    ]  # fmt: skip
    for kind, tasks in by_kind(told["tasks"]).items():
        lines += [f"## Tasks {KINDS[kind]}", "", *_totals_table(told["totals"][kind]), "", *_table(tasks), ""]
    return "\n".join([*lines, "## Left out", "", *(f"* {name}: {why}" for name, why in told["left_out"].items()), ""])


def _totals_table(found: Settings) -> list[str]:
    head = "| optimizer | solved | draws that won | best of all, or level with it |"
    rows = [
        f"| {CONTESTANTS[key].label} | {one['solved']} of {one['tasks']} | {one['won']} of {one['draws']} | "
        f"{one['best']} |"
        for key, one in found.items()
    ]
    return [head, "|---|---|---|---|", *rows]


def _table(tasks: Sequence[Settings]) -> list[str]:
    names = list(tasks[0]["optimizers"])
    rows = [
        f"| {task['task']} | {task['difficulty']} | {' | '.join(_cell(task['optimizers'][key]) for key in names)} |"
        for task in tasks
    ]
    head = f"| task | difficulty | {' | '.join(CONTESTANTS[key].label for key in names)} |"
    return [head, "|" + "---|" * (2 + len(names)), *rows]


def _cell(one: Settings) -> str:
    if one["won"]:
        return f"**{one['won']}** ({one['fewest_steps']}; {one['attempt']})"
    return "none finite" if one["least_loss"] is None else f"{one['least_loss']:.2g}"


def main() -> None:
    """Run, print, and keep if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of LightBench")
    parser.add_argument("--tasks", default="", help="of LightBench, comma-separated; default: all but what is left out")
    parser.add_argument("--seed", type=int, default=0, help="of models and draws; default 0")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lightbench"), help="default: %(default)s")
    parser.add_argument("--record", action="store_true")
    chosen = parser.parse_args()
    if not (chosen.checkout / "lightbench" / "utils.py").is_file():
        parser.error(
            f"{chosen.checkout} is no checkout of LightBench: git clone https://github.com/HomebrewML/LightBench"
        )
    torch.set_num_threads(1)
    names = [name for name in chosen.tasks.split(",") if name]
    with imported(chosen.checkout.resolve()) as lightbench:
        found = carry_out(lightbench, Runs(chosen.output_dir / "runs"), chosen.seed, names)
    told = {"commit": commit(), "lightbench": _head(chosen.checkout), "machine": machine(), "seed": chosen.seed,
            "draws": DRAWS, "steps": STEPS, **found}  # fmt: skip
    path = RECORDED if chosen.record else chosen.output_dir / "lightbench.json"
    write_json(path, told)
    write_markdown(path.with_suffix(".md"), markdown(told))
    print(path)


def _head(checkout: Path) -> str:
    asked = ["git", "rev-parse", "--short=7", "HEAD"]
    return (
        subprocess.run(asked, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip() or "not in git"
    )


if __name__ == "__main__":
    main()
