"""`benchmarks.lightbench` on a checkout made up here: the same draws for all, and what it tells of them."""

from pathlib import Path

import pytest
import torch

from benchmarks import lightbench
from hf_shampoo4.studies.runner import Runs

PACKAGE = """
from importlib import import_module
def available():
    return ["bowl", "far", "MNIST"]
def load(name):
    return import_module(f".{name}", __name__)
"""
UTILS = """
import optuna
from heavyball.helpers import AutoSampler
class SkipConfig(ValueError):
    pass
def trial(*given, **others):
    raise AssertionError("LightBench's own")
"""
TASK = """
import torch
from torch import nn
from lightbench.utils import SkipConfig, trial
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.param = nn.Parameter(torch.randn({shape}))
    def forward(self, inp):
        return self.param + 0 * inp.sum()
def main(dtype="float32", steps: int = 100, weight_decay: float = 0, opt=None, trials: int = 3, config=None):
    if config != "trivial":
        raise SkipConfig("no")
    def data():
        return torch.randn(3, device="cuda"), torch.zeros({shape}, device="cuda")
    won = lambda model, loss: (loss <= {target}, {{}})
    trial(Model().cuda().double(), data, torch.nn.functional.mse_loss, won, steps, opt, weight_decay, trials=trials)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "checkout" / "lightbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package / "utils.py").write_text(UTILS)
    (package / "bowl.py").write_text(TASK.format(shape="(8, 8)", target=0.9))
    (package / "far.py").write_text(TASK.format(shape="(8,)", target=-1.0))
    return package.parent


def test_tasks_run_on_a_cpu_without_heavyball_and_are_told_in_tables(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightbench, "DRAWS", 3)
    monkeypatch.setattr(lightbench, "STEPS", 20)
    monkeypatch.setattr(lightbench, "draws", lambda count, seed: [lightbench.Draw(0.05, (0.5, 0.9), 0.9)] * count)
    monkeypatch.setattr(lightbench, "code_of", lambda settings: {"hf_shampoo4": "today"})
    runs = Runs(tmp_path / "runs")
    with lightbench.imported(checkout) as package:
        found = lightbench.carry_out(package, runs, 0)
        again = lightbench.carry_out(package, runs, 0)
    assert found == again
    bowl, far = found["tasks"]
    assert [task["task"] for task in (bowl, far)] == ["bowl", "far"]
    assert set(bowl["optimizers"]) == set(lightbench.OF_MATRICES), "five optimizers on a matrix"
    assert set(far["optimizers"]) == set(lightbench.OF_VECTORS)
    assert all(one["won"] == 3 and one["attempt"] == 1 for one in bowl["optimizers"].values())
    assert all(one["won"] == 0 and one["steps"] is None for one in far["optimizers"].values())
    text = lightbench.markdown({"commit": "c", "lightbench": "l", "draws": 3, "steps": 20, "seed": 0, **found})
    assert "| shampoo4bit | 1 of 1 | 3 of 3 | " in text
    assert lightbench.totals([far])["adamw"] == {"tasks": 1, "solved": 0, "draws": 3, "won": 0, "best": 1}
    assert "| far | trivial | 1" in text or "| far | trivial | 0" in text, "a loss"
    assert "* MNIST: data to download" in text


def test_draws_are_the_same_for_all_and_lie_in_lightbenchs_ranges() -> None:
    found = lightbench.draws(16, 0)
    assert found == lightbench.draws(16, 0) != lightbench.draws(16, 1)
    assert all(1e-7 <= draw.lr <= 100 and 0 <= draw.betas[0] < 1 and 0 <= draw.factor_beta < 1 for draw in found)
    assert min(draw.lr for draw in found) < 1e-4 < 1 < max(draw.lr for draw in found)


def test_a_training_that_is_not_finite_any_more_has_not_won() -> None:
    model = torch.nn.Linear(2, 2)
    task = lightbench.Task(model, lambda: (torch.full((1, 2), 1e38), None), lambda y, _: (y * 1e38).sum(), None)  # type: ignore[arg-type]
    assert lightbench.attempt(task, lambda params: torch.optim.SGD(params, lr=1.0), 3) == {"won_at": None, "loss": None}


def test_what_the_draws_of_a_task_came_to() -> None:
    tried = [{"won_at": None, "loss": None}, {"won_at": 40, "loss": 0.1}, {"won_at": 7, "loss": 0.2}]
    assert lightbench.summed(tried) == {
        "won": 2, "attempt": 2, "steps": 40, "fewest_steps": 7, "least_loss": 0.1
    }  # fmt: skip
