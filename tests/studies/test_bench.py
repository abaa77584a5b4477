"""`hf-shampoo4 bench`: its figures against theory and against hand-made lists, and that it runs and resumes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

import hf_shampoo4
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.groups import is_of_matrices, param_groups
from hf_shampoo4.integrations.trainer import OPTIMS
from hf_shampoo4.options import Options
from hf_shampoo4.planning.launches import LaunchCounter, steps_of
from hf_shampoo4.planning.step_time import Seconds
from hf_shampoo4.preconditioners import protocols
from hf_shampoo4.studies import bench, commands
from hf_shampoo4.studies.bench import Bench, peak_beyond
from hf_shampoo4.studies.bench_contestants import CONTESTANTS, Contestant, Settings
from hf_shampoo4.studies.ceilings_here import Timer, as_ceilings, measured_ceilings

TINY = Settings(model="llama_tiny", layers=1, steps=2, turning=1, threads=1)
CPU = torch.device("cpu")


def test_the_peak_is_that_of_theory() -> None:
    a, b = torch.randn(3, 40, 50), torch.randn(3, 50, 60)
    assert 4 * 3 * 40 * 60 <= peak_beyond(lambda: torch.bmm(a, b), CPU) < 4 * 3 * 40 * 60 + 4096


def test_a_late_step_multiplies_here_what_is_counted_on_the_meta_device() -> None:
    racer = Bench(CONTESTANTS["shampoo4bit"], TINY)
    racer.step()
    counter = LaunchCounter("cpu")
    racer.step(counter)
    meta = steps_of(bench.model_of(TINY, "meta"), {}, triton=False, device="cpu")["late"].summary()
    assert counter.found.summary()["products"] == meta["products"]


def test_the_first_steps_follow_from_late_ones_and_those_that_update_all_bases() -> None:
    options = Options(stats_every=10, refresh_warmup=100)
    found = Seconds.over_schedule(late=2.0, worst=11.0, options=options)  # 1 without an update
    paces = sum(1 / min(10, max(1, n // 100)) for n in range(1, 1001)) / 1000
    assert found.first == pytest.approx(1 + 10 * paces)
    assert Seconds.over_schedule(2.0, 2.0, Options(algorithm="elementwise")).first == 2.0


def test_whole_models_are_measured_and_muon_has_the_hidden_matrices_alone() -> None:
    racer = Bench(CONTESTANTS["muon"], TINY)
    names = {name for name, _ in racer.model.named_parameters()}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= names
    hidden = {id(p) for g in param_groups(racer.model) if is_of_matrices(g) for _, p in g["params"]}
    muon = {id(p) for g in racer.optimizer.param_groups if g["use_muon"] for p in g["params"]}
    assert muon == hidden
    assert 0 < len(muon) < len(racer.parameters)


def test_all_bases_can_be_updated_where_there_are_some() -> None:
    racer = Bench(CONTESTANTS["shampoo4bit"], TINY)
    assert racer.update_all_bases()
    racer.step()
    assert {g["stats_every"] for g in racer.optimizer.param_groups if g["algorithm"] != "elementwise"} == {1}
    assert not Bench(CONTESTANTS["adamw4bit"], TINY).update_all_bases()


def test_bytes_of_the_state_are_counted_once_whatever_they_are_nested_in() -> None:
    x = torch.zeros(100)
    cycle: dict[str, object] = {"views": [x[:50], (x[50:],)]}
    cycle["self"] = cycle
    assert len(list(bench.tensors_of(cycle))) == 2
    racer = Bench(CONTESTANTS["adamw_fused"], TINY)
    racer.step()
    sizes = [p.numel() for p in racer.parameters]
    assert bench.held_bytes(racer) == 2 * 4 * sum(sizes) + 4 * len(sizes)  # two moments, and a step counter each


def test_a_measured_row_of_ceilings_is_a_card() -> None:
    row = json.loads(json.dumps(measured_ceilings(Timer(CPU), orders=(8, 16), product=64)))
    found = as_ceilings(row)
    assert min(found.in_place, *found.one_by_one.values()) > 0
    assert 0 < found.products["float32"]
    assert 0 < found.memory < float("inf")
    assert found.decomposition("linalg_qr", 16) == row["decompositions"]["linalg_qr_ms"]["16"]
    assert found.decomposition("_linalg_eigh", 16) is not None


def test_a_steps_transient_memory_does_not_grow_with_the_number_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("hf_shampoo4.execution.blocking")
    monkeypatch.setattr(module, "WAVE_ELEMENTS", 4 * 64 * 64)

    def transient(count: int) -> int:
        parameters = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(count)]
        optimizer = hf_shampoo4.Shampoo4bit(parameters, algorithm="shampoo", stats_every=1, roots_every=1)
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        return peak_beyond(lambda: optimizer.step(), CPU)

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
        return peak_beyond(lambda: optimizer.step(), CPU)

    assert transient(512 * 32) < 1.1 * transient(512 * 8)


def test_it_runs_says_what_is_missing_and_goes_on_where_it_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONTESTANTS, "absent", Contestant("Absent", "no_such_module:X", "no-such-package"))
    monkeypatch.setitem(CONTESTANTS, "broken", Contestant("Broken", "torch.optim:Adam", keywords={"colour": 1}))
    row = measured_ceilings(Timer(CPU), orders=(64,), product=128)
    monkeypatch.setattr(bench, "measured_ceilings", lambda timer, **sizes: row)
    quick = ["--quick", "--threads", str(torch.get_num_threads()), "--output_dir", str(tmp_path)]
    commands.bench([*quick, "--contestants", "adamw_fused,adamw4bit,absent,broken"])
    told = json.loads((tmp_path / "bench.json").read_text())
    adamw, ours, absent, broken = told["results"]
    assert 0 < ours["state_bytes"] < adamw["state_bytes"]
    assert ours["counts"]["late"]["launches"] > adamw["counts"]["late"]["launches"] > 0
    assert ours["predicted_ms"]["late"] > 0
    assert told["off"]["adamw4bit"] == ours["predicted_ms"]["late"] / ours["measured_ms"]["late"] - 1
    assert absent["missing"] == "not installed: pip install no-such-package"
    assert broken["missing"].startswith("failed: TypeError")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "bench.md").read_text()
    assert "| ours: adamw4bit |" in table
    assert table in capsys.readouterr().out

    def again(*_: object) -> None:
        raise AssertionError("a finished contestant is measured again")

    monkeypatch.setattr(bench, "_made", again)
    commands.bench([*quick, "--contestants", "adamw_fused,adamw4bit"])
    assert json.loads((tmp_path / "bench.json").read_text())["results"] == [adamw, ours]


def test_every_name_of_optim_is_a_contestant() -> None:
    ours = {tuple(sorted(c.keywords.items())) for c in CONTESTANTS.values() if c.ours}
    named = {tuple(sorted(options.items())) for name, options in OPTIMS.items() if name != "kl_shampoo4bit"}
    assert named <= ours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt5"], "unknown model 'gpt5'; known: .*gpt2_124m"),
        (["--layers", "13"], "llama_130m has 1 to 12"),
        (["--contestants", "adam"], "unknown contestants adam; known: adamw_fused"),
    ],
)
def test_bad_arguments_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        commands.bench(arguments)
