"""Step times measured side by side: what follows from them, and a quick measurement."""

from __future__ import annotations

import json

import pytest
import torch

from hf_shampoo4 import cli
from hf_shampoo4.options import Options
from hf_shampoo4.studies import race_times
from hf_shampoo4.studies.grid import Contestant, Point, read_grid, tokens_a_step
from hf_shampoo4.studies.peers import code_of
from hf_shampoo4.studies.race_peaks import peaks_of
from hf_shampoo4.studies.race_times import StepTime, Times, pace_of
from hf_shampoo4.studies.runner import Runs

OURS = {"optim": "shampoo4bit", "optim_args": "stats_every=4,refresh_warmup=10"}


def times(early: float, late: float) -> Times:
    return Times(100.0, {"a": StepTime(early, late, 50.0)}, {}, "abc")


def test_peaks_are_measured_once_for_all_grids_of_one_model(tmp_path, capsys) -> None:
    arguments = ["--quick", "--peaks", "--contestants", "adamw,shampoo4bit", "--output_dir", str(tmp_path)]
    assert cli.main(["race", "tiny_stdlib", *arguments]) == 0
    assert capsys.readouterr().out.count("at the peak") == 2
    kept = Runs(tmp_path / "peaks")
    adamw, ours = sorted(kept.of(code_of), key=lambda run: -run["bytes_per_parameter"])
    assert adamw["bytes_per_parameter"] == pytest.approx(8, rel=0.01)
    assert ours["bytes_per_parameter"] < 3
    found = peaks_of(read_grid("tiny_kjv", quick=True).contestants, kept.of(code_of))
    assert found["shampoo4bit"] == ours["peak_bytes_per_parameter"] > ours["bytes_per_parameter"]
    assert found["adamw"] == adamw["peak_bytes_per_parameter"] >= adamw["bytes_per_parameter"]
    assert "soap_peer" not in found
    assert cli.main(["race", "tiny_kjv", *arguments]) == 0
    assert len(kept.of(None)) == 2


def test_bases_turn_ever_more_rarely_and_others_have_one_pace() -> None:
    pace = pace_of(OURS)
    assert [pace(n) for n in (1, 19, 20, 30, 40, 1000)] == [1, 1, 1 / 2, 1 / 3, 1 / 4, 1 / 4]
    for other in ({"optim": "adamw_torch"}, {"peer": "soap"}, {**OURS, "optim_args": "refresh_warmup=0"}):
        assert pace_of(other)(1000) == 1
    assert pace_of({"optim": "shampoo4bit"})(10**9) == 1 / Options().stats_every


def test_seconds_follow_the_schedule_between_the_two_paces() -> None:
    measured = times(early=50.0, late=20.0)  # 10 for the update and 40 for a turn of all bases
    at_1, at_19, at_20, at_140 = measured.seconds("a", OURS, [1, 19, 20, 140])
    assert at_1 == pytest.approx(0.150)
    assert at_19 == pytest.approx(19 * 0.150)
    assert at_20 - at_19 == pytest.approx(0.130)
    assert measured.seconds("a", OURS, [40, 140])[1] - measured.seconds("a", OURS, [40])[0] == pytest.approx(12.0)
    assert at_140 > at_20
    assert times(5.0, 5.0).seconds("a", {"optim": "adamw_torch"}, [0, 100]) == pytest.approx([0.0, 10.5])


class Clockwork:
    """A racer whose forward and backward take 10 ms and whose optimizer takes 2."""

    def __init__(self, settings: dict) -> None:
        self.model_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

    def gradients(self, tokens: torch.Tensor) -> None:
        self.model_seconds.append(0.010)

    def update(self) -> None:
        self.optimizer_seconds.append(0.002)


@pytest.mark.parametrize("batch", [{"gradient_accumulation_steps": 8}, {"total_batch_size": 32}])
def test_a_step_has_all_pieces_of_its_batch(tmp_path, monkeypatch, batch: dict) -> None:
    monkeypatch.setattr(race_times, "Racer", Clockwork)
    settings = {"optim": "adamw_torch", "vocab_size": 8, "seq_len": 16, "per_device_train_batch_size": 4, **batch}
    assert tokens_a_step(settings) == 4 * 8 * 16
    contestant = Contestant("adamw", "AdamW", (Point(1e-3, ()),), (), settings)
    told = race_times.measure_times([contestant], tmp_path / "times.json")
    assert told.model_ms == pytest.approx(8 * 10)
    assert told.steps["adamw"].optimizer_ms == pytest.approx(2)
    assert told.seconds("adamw", settings, [100]) == pytest.approx([8.2])


def test_a_quick_measurement_and_its_file(tmp_path, capsys) -> None:
    arguments = ["race", "tiny_stdlib", "--quick", "--time", "--contestants", "adamw,shampoo4bit"]
    assert cli.main([*arguments, "--output_dir", str(tmp_path)]) == 0
    told = Times.read(tmp_path / "times" / "tiny_stdlib.json")
    assert told is not None
    assert told == Times.read(tmp_path / "times" / "tiny_stdlib.json")
    adamw, ours = told.steps["adamw"], told.steps["shampoo4bit"]
    assert told.model_ms > 0
    assert adamw.optimizer_ms == adamw.late_ms > 0
    assert ours.first_ms > 0
    assert set(json.loads((tmp_path / "times" / "tiny_stdlib.json").read_text())) >= {"machine", "commit"}
    assert Times.read(tmp_path / "nowhere.json") is None
