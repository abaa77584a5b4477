"""The fine-tuning study: its examples, its grids, a run from end to end, the report on made-up runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hf_shampoo4.studies import finetuning
from hf_shampoo4.studies.finetuning import OURS, Base, base_model, read_grids, train
from hf_shampoo4.studies.finetuning_data import instructions, write_task
from hf_shampoo4.studies.finetuning_report import report
from hf_shampoo4.studies.grid import Grid
from hf_shampoo4.studies.peers import train_settings
from hf_shampoo4.studies.race import Study, carry_out
from hf_shampoo4.studies.runner import Runs
from hf_shampoo4.training.finetune import parse

SOURCE = '''
def first(a, *, b=1): "Add a to b."
def second(): """Stop the loop.

At once."""
class C:
    def third(self, *args, **rest): "Write all."
def undocumented(): pass
'''
CODE = {"torch": "2"}


def grids() -> dict[str, Grid]:
    return {grid.name: grid for grid in read_grids()}


def test_every_documented_function_makes_an_instruction_of_one_of_three_kinds() -> None:
    first, second, third = instructions("a.py", SOURCE)
    assert first["prompt"] == "Say what this function does.\ndef first(a, *, b=1):\nAnswer:"
    assert first["completion"] == " Add a to b."
    assert second["prompt"] == "Write the signature of a function.\nStop the loop.\nAnswer:"
    assert second["completion"] == " def second():"
    assert third["completion"] == " self, args, rest"
    assert not list(instructions("test/a.py", SOURCE))
    assert not list(instructions("a.py", "no python"))


def test_examples_are_the_same_every_time_and_none_is_held_out_and_learnt_from(tmp_path: Path) -> None:
    found = write_task("kjv", tmp_path, 5, 3)
    again = write_task.__wrapped__("kjv", tmp_path / "again", 5, 3)
    for a, b in zip(found, again, strict=True):
        assert a.read_text() == b.read_text()
    train, held_out = ([json.loads(line)["text"] for line in path.read_text().splitlines()] for path in found)
    assert (len(train), len(held_out)) == (5, 3)
    assert not set(train) & set(held_out)


def test_there_is_a_grid_for_every_task_and_way_with_the_same_optimizers() -> None:
    assert list(grids()) == [f"{task}_{way}" for way in ("full", "lora8", "lora64") for task in ("kjv", "instructions")]
    for grid in grids().values():
        assert [contestant.name for contestant in grid.contestants] == ["adamw", "muon", "shampoo4bit"]
        assert grid.common["pretraining"]["dataset"] == "stdlib"


@pytest.mark.parametrize("name", grids())
def test_settings_of_a_run_are_those_of_finetune(name: str) -> None:
    for contestant in grids()[name].contestants:
        settings = contestant.run(contestant.points[0], 1)
        given = {key: value for key, value in train_settings(settings).items() if key not in OURS}
        paths = {"model_name_or_path": "x", "dataset": "y.jsonl", "output_dir": "z"}
        config = parse({**given, **paths})
        assert config.training.seed == 1
        assert config.model.use_peft == ("lora" in name)
        assert not config.model.use_peft or f"lora{config.model.lora_r}" in name


def outcome(settings: dict[str, Any]) -> dict[str, Any]:
    """Lowest at a rate of 8e-3; the more is forgotten the higher it is."""
    loss = 3 + 0.1 * abs(math.log2(settings["learning_rate"] / 8e-3)) + 0.01 * settings["seed"]
    return {
        "final_loss": loss, "base_loss": 3.5 + 10 * settings["learning_rate"], "bytes_per_parameter": 2.0,
        "step_ms": 300.0, "optimizer_step_ms": 100.0, "validation": [[0, 5.0], [60, loss]],
        "validation_seconds": [0.0, 18.0],
    }  # fmt: skip


def test_a_sweep_goes_on_by_factors_of_two_and_the_best_rate_serves_all_seeds(tmp_path: Path) -> None:
    runs, made = Runs(tmp_path / "runs"), Study(lambda _, settings, __: outcome(settings), lambda _: CODE)
    grid = grids()["kjv_full"]
    carry_out(replace(grid, seeds=(0, 1)), runs, sweep=True, study=made)
    tried = [run["settings"] for run in runs.of(made.code_of)]
    adamw = [settings for settings in tried if settings.get("optim") == "adamw_torch_fused"]
    assert sorted(a["learning_rate"] for a in adamw if a["seed"] == 0) == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert [a["learning_rate"] for a in adamw if a["seed"] == 1] == [8e-3]


def test_the_report_has_every_grid_that_has_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, made = Runs(tmp_path / "runs"), Study(lambda _, settings, __: outcome(settings), lambda _: CODE)
    for name in ("kjv_full", "kjv_lora8", "instructions_full"):
        carry_out(replace(grids()[name], seeds=(0, 1)), runs, sweep=True, study=made)
    pretraining = {"settings": grids()["kjv_full"].common["pretraining"], "parameters": 4_700_000,
                   "validation": [[0, 8.0], [500, 3.4]], "commit": "abc"}  # fmt: skip
    report(read_grids(), runs.of(made.code_of), Base(tmp_path, pretraining), tmp_path)
    found = json.loads((tmp_path / "finetuning.json").read_text())
    assert list(found["grids"]) == ["kjv_full", "instructions_full", "kjv_lora8"]
    ours = found["grids"]["kjv_full"]["contestants"]["shampoo4bit"]
    assert ours["learning_rate"] == 8e-3
    assert ours["closed"]
    assert ours["mean"] == pytest.approx(3.005)
    assert ours["forgetting"] == pytest.approx(0.18)
    assert ours["loss_at_baselines_forgetting"] == pytest.approx(3.0)
    assert (
        "| the King James Bible, all parameters | shampoo4bit | 0.008 | closed: rate | 2 |" in capsys.readouterr().out
    )
    with Image.open(tmp_path / "finetuning.png") as drawn:
        assert min(drawn.size) > 400
    report(read_grids("small"), [], Base(tmp_path, pretraining), tmp_path, "small")
    told = (tmp_path / "finetuning_small.md").read_text()
    assert "`python -m benchmarks.finetuning FOLDER --size small` (" in told
    assert "all numbers: `finetuning_small.json`" in told


def test_a_run_by_an_optimizer_without_a_name_of_the_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    small = next(grid for grid in read_grids(quick=True) if grid.name == "kjv_lora8")
    muon = next(contestant for contestant in small.contestants if contestant.name == "muon")
    settings = muon.run(muon.points[0], 0)
    settings["pretraining"] = {**settings["pretraining"], "dataset": str(text), "vocab_size": 300}
    base = base_model(settings["pretraining"], tmp_path)
    monkeypatch.setattr(finetuning, "run_one", None)  # the model is there
    found = train("Muon", settings, tmp_path)
    assert base_model(settings["pretraining"], tmp_path).folder == base.folder
    assert found["bytes_per_parameter"] == 4.0  # Muon's momentum of the adapters, and nothing of the rest
    assert found["final_loss"] < found["validation"][0][1]
    assert found["base_loss"] == pytest.approx(base.run["validation"][-1][1], abs=0.1)
