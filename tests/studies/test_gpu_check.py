"""`hf-shampoo4 bench --gpu-check`: its small form on the CPU, budgets, kills and what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.studies import commands, gpu_check, gpu_check_race, gpu_check_stages
from hf_shampoo4.studies.gpu_check import CPU, MISSING, Notes, check


def test_without_a_gpu_it_says_how_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"torch sees none.*bench --gpu-check .* --cpu"):
        commands.bench(["--gpu-check", str(tmp_path)])


def test_stages_run_in_processes_within_their_budget_and_a_second_call_resumes(tmp_path: Path) -> None:
    told = check(tmp_path, cpu=True, minutes=60.0, stages=["sanitizer", "decompositions"])
    assert MISSING in told["stages"]["sanitizer"]
    found = told["stages"]["decompositions"]
    assert found["64 x 8"]["cholesky_qr2"]["off"] < 1e-4
    table = (tmp_path / "gpu_check.md").read_text()
    assert "| 64 x 8 |" in table
    assert "Left out: compute-sanitizer: it is not installed" in table
    assert (tmp_path / "gpu_check.png").read_bytes().startswith(b"\x89PNG")
    notes = tmp_path / "stages" / "decompositions.json"
    before = notes.stat().st_mtime_ns
    check(tmp_path, cpu=True, minutes=60.0, stages=["decompositions"])
    assert notes.stat().st_mtime_ns == before


def test_a_stage_that_takes_too_long_is_ended_and_what_it_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.sys, "executable", str(_sleeper(tmp_path)))
    Notes(tmp_path / "stages" / "ceilings.json").put("row", 1)
    gpu_check._carry_out("ceilings", tmp_path, "cpu", 0.5)
    found = json.loads((tmp_path / "stages" / "ceilings.json").read_text())
    assert found["row"] == 1
    assert found["ended"] == "its 0 s were over"
    assert "done" not in found


def _sleeper(folder: Path) -> Path:
    path = folder / "sleeper"
    path.write_text("#!/bin/sh\nsleep 60\n")
    path.chmod(0o755)
    return path


def test_findings_are_kept_one_by_one_and_errors_are_findings(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "stages" / "x.json")
    assert notes.once("a", lambda: 1) == 1
    assert notes.once("b", lambda: 1 / 0) == {"failed": "ZeroDivisionError: division by zero"}
    assert Notes(notes.path).once("a", lambda: 2) == 1


def test_kernels_are_timed_and_trained_models_race(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "stages" / "kernels.json")
    gpu_check_stages.kernels(notes, CPU, 10.0)
    assert {"encode, plain", "decode, plain", "adamw4bit, plain"} <= set(notes.found)
    assert all(found.get("bytes_per_second", 1) > 0 for found in notes.found.values())
    assert "Triton kernels" in notes.found[MISSING]
    notes = Notes(tmp_path / "stages" / "race.json")
    gpu_check_race.race(notes, CPU, 600.0)
    for name in ("shampoo4bit", "adamw", "muon"):
        curve = notes.found[name]["curve"]
        assert curve[-1][2] < curve[0][2], (name, notes.found[name])
