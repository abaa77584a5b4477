"""CONTRIBUTING's word on a new algorithm: one class and its entry, here a diagonal Shampoo, and everything knows it."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import hf_shampoo4 as s4
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.numerics.storage import Dense, Storage
from hf_shampoo4.options import ALGORITHMS, Entry, Options, parse_optim_args, register, resolve
from hf_shampoo4.preconditioners.moments import ENDED, make_moments, write_first
from hf_shampoo4.preconditioners.protocols import Algorithm, Context, Stack
from hf_shampoo4.state_report import rows, table

ROOT, BUILT_IN = Path(s4.__file__).parent, dict(ALGORITHMS)


@dataclass(frozen=True)
class Diagonal(Algorithm):
    """m <- b1 m + (1 - b1) L^-1/4 G R^-1/4, of whose factors the diagonals alone are kept, and summed as in Adagrad."""

    every: ClassVar[Mapping[str, str]] = {"factors": "stats_every"}

    @classmethod
    def make(cls, shape: tuple[int, ...], options: Options, quantise: bool, whole: tuple[int, int]) -> Diagonal:
        return cls(shape, make_moments(shape, options, quantise, second=False))

    def storages(self) -> dict[str, Storage]:
        m, n = self.shape
        return {**super().storages(), "left": Dense((m,)), "right": Dense((n,))}

    def refreshes(self) -> dict[str, list[str]]:
        return {"factors": ["left", "right"]}

    def update(self, stack: Stack, g: Tensor, context: Context) -> Tensor:
        at, (left, right) = context.moment_step(stack), (stack.state[side]["dense"] for side in ("left", "right"))
        for blocks, _ in context.due(stack, "factors"):
            left[blocks] += g[blocks].square().sum(-1)
            right[blocks] += g[blocks].square().sum(-2)
        scale = (left.unsqueeze(-1) * right.unsqueeze(-2)).pow(0.25).clamp_min(context.eps)
        scaled = g / scale
        m = self.moments.first.read(stack.state["first"]).lerp_(scaled, 1 - context.betas[0])
        write_first(self.moments.first, stack.state, m, at, scaled, ENDED)
        return m


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    entry = Entry("Diagonal Shampoo", Diagonal, uses=("block_size", "stats_every"), defaults={"stats_every": 1})
    register("diagonal", entry)
    yield
    del ALGORITHMS["diagonal"]


DATA = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 80), nn.Tanh(), nn.Linear(80, 4))


def optimizer_of(model: nn.Module, **options: Any) -> s4.Shampoo4bit:
    return s4.Shampoo4bit(s4.param_groups(model), lr=0.02, algorithm="diagonal", **options)


def trained(model: nn.Module, optimizer: s4.Shampoo4bit, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = (model(DATA) - DATA[:, :4].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [{}, {"block_size": 32, "stats_every": 2, "moments": "fp32"}], ids=str)
def test_it_trains(options: dict[str, Any]) -> None:
    model = model_of()
    losses = trained(model, optimizer_of(model, **options), 30)
    assert losses[-1] < 0.5 * losses[0]


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    model = model_of()
    optimizer = optimizer_of(model, block_size=50)
    trained(model, optimizer, 5)
    other = copy.deepcopy(model)
    again = optimizer_of(other, block_size=50)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert trained(model, optimizer, 5) == trained(other, again, 5)


def test_report_and_plan_know_what_it_keeps() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    trained(model, optimizer, 1)
    assert "Diagonal Shampoo, 4bit moments: linear layer" in table(optimizer)
    kept = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values())
    assert sum(row.bytes for row in rows(optimizer)) == kept
    planned = s4.plan(model, algorithm="diagonal")
    assert (planned.state.total, planned.preconditioned_tensors) == (kept, 2)


def test_its_options_are_the_ones_that_it_names() -> None:
    assert Options(**parse_optim_args("algorithm=diagonal,block_size=64")).stats_every == 1
    assert resolve({"stats_every": 5}, beneath={"algorithm": "diagonal"}) == {"stats_every": 5}
    with pytest.raises(OptionError, match="option bits has no effect with algorithm=diagonal: remove it, or add"):
        resolve({"algorithm": "diagonal", "bits": 8})
    with pytest.raises(OptionError, match="algorithm='diagonal' is there already"):
        register("diagonal", ALGORITHMS["diagonal"])


def test_every_entry_names_options_that_there_are() -> None:
    known = vars(Options())
    for entry in ALGORITHMS.values():
        assert {*entry.uses, *entry.auto} <= known.keys()
        assert entry.defaults.keys() <= {*entry.uses}
        assert entry.vocabulary in ALGORITHMS


def test_no_module_but_its_own_asks_which_algorithm_it_has() -> None:
    """By name or by class: what has to be known of an algorithm is asked of it."""
    files = {cls: module for module, cls in (str(entry.implementation).split(":") for entry in BUILT_IN.values())}
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and "algorithm" in ast.unparse(node):
                asked = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & BUILT_IN.keys()
                assert not asked or module in files.values(), f"{module}:{node.lineno}: {ast.unparse(node)}"
            if isinstance(node, ast.Name) and node.id in files:
                assert module == files[node.id], f"{module}:{node.lineno}: {node.id}"
