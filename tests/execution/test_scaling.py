"""benchmarks/scaling.py: the plan of a rank of a cluster that is not here."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.tiny import ROOT, python


def test_one_rank_of_sixty_four(tmp_path: Path) -> None:
    child = python(
        "-m", "benchmarks.scaling", "--models", "llama_7b", "--worlds", 64, "--output", tmp_path / "scaling.json"
    )
    assert child.returncode == 0, child.stderr
    fsdp2, hsdp = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    parameters = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 65 * 4096
    for row in (fsdp2, hsdp):
        assert row["imbalance"] <= 1.15
        assert 3.0 < row["state_mean"] * 64 / parameters < 3.5
        assert row["state_max"] <= 1.01 * row["state_mean"]
    # a rank has to get rid of what it holds and others own: nearly all of it
    assert 0.8 < fsdp2["sent_gradients"] / (4 * parameters / 64) <= 1.1
    published = json.loads((ROOT / "docs" / "results" / "scaling.json").read_text())["rows"]
    known = {(row["model"], row["ranks"], row["sharding"]): row for row in published}
    for row in (fsdp2, hsdp):
        mine = {**known[row["model"], row["ranks"], row["sharding"]], "plan_seconds": 0}
        assert mine == {**row, "plan_seconds": 0}
