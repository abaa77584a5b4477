"""`hf-shampoo4 bench`: its counts against theory, its figures against a hand-made list, and that it runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

import hf_shampoo4
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.options import ALGORITHMS
from hf_shampoo4.preconditioners import protocols
from hf_shampoo4.studies import bench, commands
from hf_shampoo4.studies.bench import CONTESTANTS, Racer, Result, Settings, apply_operations, counted

TINY = Settings(model="tiny", layers=1, block=64, every=2, warmup=2, steps=2, threads=1)
CPU = torch.device("cpu")


def test_counts_are_those_of_theory() -> None:
    a, b = torch.randn(3, 40, 50), torch.randn(3, 50, 60)
    operations, peak = counted(lambda: torch.bmm(a, b), CPU)
    assert operations == 2 * 3 * 40 * 50 * 60
    assert 4 * 3 * 40 * 60 <= peak < 4 * 3 * 40 * 60 + 4096


def test_a_steady_step_takes_the_operations_of_its_floor_and_no_more() -> None:
    racer = Racer("ours_shampoo", TINY)
    gradients = [torch.randn(shape) for shape in TINY.shapes()]
    for _ in range(3):
        racer.inspect(gradients)
    steady, refresh = racer.result.products[2], racer.result.products[1]
    assert apply_operations(TINY.shapes(), 64) == steady < refresh
    assert apply_operations([(64, 128)], 64) == 2 * 2 * 64 * 64 * 128


def test_figures_of_a_result() -> None:
    result = Result("x", "X", milliseconds=[float(i) for i in range(1, 11)])
    assert (result.median, result.p90, result.worst, result.amortised) == (5.5, 9.0, 10.0, 5.5)


def test_bytes_of_the_state_are_counted_once_whatever_they_are_nested_in() -> None:
    x = torch.zeros(100)
    cycle: dict[str, object] = {"views": [x[:50], (x[50:],)]}
    cycle["self"] = cycle
    assert len(list(bench.tensors_of(cycle))) == 2
    racer = Racer("adamw_foreach", TINY)
    racer.take([torch.randn(shape) for shape in TINY.shapes()])
    sizes = [m * n for m, n in TINY.shapes()]
    assert bench.held_bytes(racer) == 2 * 4 * sum(sizes) + 4 * len(sizes)  # two moments, and a step counter each


def test_a_steps_transient_memory_does_not_grow_with_the_number_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("hf_shampoo4.execution.blocking")
    monkeypatch.setattr(module, "WAVE_ELEMENTS", 4 * 64 * 64)

    def transient(count: int) -> int:
        parameters = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(count)]
        optimizer = hf_shampoo4.Shampoo4bit(parameters, algorithm="shampoo", stats_every=1, roots_every=1)
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        return counted(lambda: optimizer.step(), CPU)[1]

    assert transient(32) < 1.1 * transient(8)


def test_nor_does_it_with_the_size_of_an_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("hf_shampoo4.execution.blocking")
    monkeypatch.setattr(module, "WAVE_ELEMENTS", 4 * 512 * 64)
    monkeypatch.setattr(protocols, "STRIP", 512 * 64)

    def transient(rows: int) -> int:
        embedding = torch.nn.Parameter(torch.randn(rows, 64))
        matrix = torch.nn.Parameter(torch.randn(64, 64))
        groups = [{"params": [embedding], "vocabulary": True}, {"params": [matrix]}]
        optimizer = hf_shampoo4.Shampoo4bit(groups, refresh_warmup=0, stats_every=1)
        for p in (embedding, matrix):
            p.grad = torch.randn_like(p)
        optimizer.step()
        return counted(lambda: optimizer.step(), CPU)[1]

    assert transient(512 * 32) < 1.1 * transient(512 * 8)


def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTESTANTS, "absent", bench.Contestant("Absent", "no_such_module:X", "no-such-package"))
    monkeypatch.setitem(CONTESTANTS, "broken", bench.Contestant("Broken", "torch.optim:Adam", keywords={"colour": 1}))
    names = "adamw_fused,ours_shampoo,absent,broken"
    quick = ["--quick", "--every", "1", "--warmup", "1", "--steps", "2", "--threads", str(torch.get_num_threads())]
    commands.bench([*quick, "--contestants", names, "--output_dir", str(tmp_path)])
    told = json.loads((tmp_path / "bench.json").read_text())
    adamw, shampoo, absent, broken = told["results"]
    assert len(adamw["milliseconds"]) == len(shampoo["milliseconds"]) == 2
    assert 0 < shampoo["state_bytes"] < adamw["state_bytes"]
    assert absent["missing"] == "not installed: pip install no-such-package"
    assert broken["missing"].startswith("failed: TypeError")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "bench.md").read_text()
    assert "| ours: shampoo, 4-bit |" in table
    assert table in capsys.readouterr().out


def test_every_algorithm_of_ours_is_a_contestant() -> None:
    ours = {c.keywords["algorithm"] for name, c in CONTESTANTS.items() if name.startswith("ours")}
    assert ours == set(ALGORITHMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt5"], "unknown model 'gpt5'; known: gpt2_124m"),
        (["--layers", "13"], "llama_130m has 1 to 12"),
        (["--steps", "15"], "--steps 15 must be whole refresh periods of 10"),
        (["--contestants", "adam"], "unknown contestants adam; known: adamw_fused"),
    ],
)
def test_bad_arguments_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        commands.bench(arguments)
