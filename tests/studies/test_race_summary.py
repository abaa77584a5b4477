"""One look over all races of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_shampoo4.studies.race_summary import BEST, comparisons, write_summary

CLOSED = {"learning_rate": True, "head": True}


def row(label: str, losses: list[float], last: float = 100.0, **more: Any) -> dict[str, Any]:
    """A contestant that comes down from 8 on a straight line in 10 steps and `last` seconds."""
    mean = sum(losses) / len(losses)
    curve = [[0.0, 8.0], [10.0, mean]]
    told = {"label": label, "losses": {str(seed): loss for seed, loss in enumerate(losses)}, "mean": mean,
            "curve": curve, "seconds": [0.0, last], "closed": CLOSED}  # fmt: skip
    return {**told, **more}


def report(**contestants: dict[str, Any]) -> dict[str, Any]:
    common = {"max_steps": 1200, "per_device_train_batch_size": 16, "seq_len": 256}
    return {"title": "Title", "target": None, "common": common, "contestants": contestants}


def test_a_comparison_is_over_common_seeds_and_counts_steps_and_seconds_to_the_others_loss() -> None:
    ours = row("ours", [3.0, 3.2], 120.0)
    found = comparisons("tiny_long", report(adamw=row("AdamW", [4.0, 4.4, 9.9]), shampoo4bit=ours))
    (adamw,) = found
    assert (adamw.role, adamw.seeds, adamw.difference) == ("AdamW", 2, pytest.approx(-1.1))
    assert adamw.spread == pytest.approx(0.1 * 2**0.5)
    assert adamw.steps == pytest.approx((8 - 18.3 / 3) / (8 - 3.1))
    assert adamw.seconds == pytest.approx(1.2 * adamw.steps)
    assert adamw.ahead
    assert adamw.faster
    assert adamw.open == ()


def test_the_best_of_the_others_is_nobody_of_ours() -> None:
    told = report(
        adamw=row("AdamW", [4.0]), adamw_one=row("one", [1.0]), soap_peer=row("SOAP", [3.8]),
        soap4=row("ours too", [2.0]), adamw_bnb=row("8-bit", [3.9], closed={"learning_rate": False}),
        shampoo4bit=row("ours", [3.7], closed={}),
    )  # fmt: skip
    found = {each.role: each for each in comparisons("tiny_stdlib", told)}
    assert {role: each.label for role, each in found.items()} == {"AdamW": "AdamW", BEST: "SOAP"}
    assert found["AdamW"].open == ("ours (one point)",)


def test_who_is_behind_is_named(tmp_path: Path) -> None:
    write_summary(tmp_path)
    assert not list(tmp_path.iterdir()), "there is no report"
    fast, slow = row("ours", [3.0]), row("ours", [3.0], 1000.0, closed={"head": False})
    for name, ours in (("tiny_stdlib", fast), ("tiny_kjv", slow), ("tiny_long", row("ours", [4.5]))):
        told = report(adamw=row("AdamW", [4.0]), shampoo4bit=ours)
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    (tmp_path / "seeds.json").write_text(json.dumps({**report(), "target": "shampoo32"}))
    (tmp_path / "notes.json").write_text("1")
    write_summary(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert (
        "* Against AdamW: a lower loss on 2 of 3 grids (not: tiny_long), at its loss in less time on 1 "
        "(not: tiny_kjv, tiny_long); both sweeps closed on 2 (not: tiny_kjv)." in text
    )
    assert "| [Title](tiny_stdlib.md) | 1,200, 4,096 | AdamW | 1 | 4.0000 | -1.0000 | 80% | 80% | closed |" in text
    assert "| -1.0000 | 80% | **800%** | open: ours (head) |" in text
    assert "| **+0.5000** | **never** | **never** | closed |" in text
