"""How much quality is kept: the arithmetic on made-up losses, and a quick grid from end to end."""

import json
import math
import random

import pytest
from PIL import Image

from hf_shampoo4 import cli, quality
from hf_shampoo4.options import parse_optim_args
from hf_shampoo4.quality import (
    REMARKS,
    Run,
    as_markdown,
    common_settings,
    draw,
    read_grid,
    rows_of,
    runs_of,
    share_of_way,
    write_markdown,
)

GRID = {
    "title": "Share",
    "zero": "a",
    "one": "b",
    "seeds": [0, 1, 2],
    "contestants": {
        "a": {"label": "A", "optim": "x", "learning_rate": 1.0, "also_learning_rates": [2.0]},
        "b": {"label": "B", "optim": "y", "learning_rate": 1.0},
        "c": {"label": "C", "optim": "z", "learning_rate": 1.0, "paper": [48, 67]},
    },
}


def results(losses):
    """Finished runs of GRID: contestant -> loss by seed."""
    found = []
    for run in runs_of(GRID, {}):
        loss = losses.get(run.contestant, {}).get(run.settings["seed"])
        if loss is not None and not run.is_check:
            found.append({"settings": run.settings, "final_loss": loss, "bytes_per_parameter": 8.0})
    return found


def test_share_is_the_ratio_of_the_mean_gains():
    zero, one = {0: 4.0, 1: 4.2}, {0: 3.8, 1: 4.0}
    assert share_of_way(zero, one, one) == pytest.approx((1.0, 0.0))
    assert share_of_way(zero, one, zero) == pytest.approx((0.0, 0.0))
    share, error = share_of_way(zero, one, {0: 3.9, 1: 4.06})
    assert share == pytest.approx((0.1 + 0.14) / 0.4)
    assert error == pytest.approx(0.02 / 0.2)  # residuals -.02 and .02, their deviation .02 sqrt(2), over sqrt(2)


def test_share_uses_common_seeds_only_and_says_when_there_is_none():
    assert share_of_way({0: 4.0, 1: 5.0}, {0: 3.0}, {0: 3.5, 1: 1.0}) == (0.5, None)
    assert share_of_way({0: 4.0}, {1: 3.0}, {0: 3.5}) == (None, None)
    assert share_of_way({0: 4.0}, {0: 4.0}, {0: 3.5}) == (None, None)


def test_standard_error_has_the_size_of_the_deviation():
    """In simulated grids of three seeds."""
    draws = random.Random(0)
    errors, shares = [], []
    for _ in range(2000):
        zero = {seed: 4.0 + draws.gauss(0, 0.01) for seed in range(3)}
        one = {seed: 3.8 + draws.gauss(0, 0.01) for seed in range(3)}
        share, error = share_of_way(zero, one, {seed: 3.9 + draws.gauss(0, 0.01) for seed in range(3)})
        shares.append(share)
        errors.append(error**2)
    deviation = math.sqrt(sum((share - 0.5) ** 2 for share in shares) / len(shares))
    assert math.sqrt(sum(errors) / len(errors)) == pytest.approx(deviation, rel=0.1)


def test_runs_are_in_the_order_of_the_grid_and_all_different():
    runs = runs_of(GRID, {"max_steps": 5})
    assert [(run.contestant, run.settings["seed"], run.is_check) for run in runs[:5]] == [
        ("a", 0, False), ("a", 1, False), ("a", 2, False), ("a", 0, True), ("b", 0, False),
    ]  # fmt: skip
    assert runs[3].settings == {"max_steps": 5, "optim": "x", "learning_rate": 2.0, "seed": 0}
    assert all(run.settings != other.settings for i, run in enumerate(runs) for other in runs[:i])


def test_table_of_an_unfinished_grid():
    losses = {"a": {0: 4.0, 1: 4.2, 2: 4.1}, "b": {0: 3.8, 1: 4.0, 2: 3.9}, "c": {0: 3.9}}
    finished, runs = results(losses), runs_of(GRID, {})
    rows = rows_of(GRID, runs, finished)
    assert [(row.name, len(row.losses), row.share_error) for row in rows] == [
        ("a", 3, 0.0),
        ("b", 3, 0.0),
        ("c", 1, None),
    ]
    assert rows[2].share == pytest.approx(0.5)
    assert rows[2].paper == (0.48, 0.67)
    text = as_markdown("seeds", GRID, rows, quality.checks_of(runs, finished), common_settings(GRID))
    assert "From A to B: 0.2000" in text
    assert "0.1000, 2.0 times that" in text
    assert "| C | 1 | 1 | 3.9000 ± ? | 8.00 | 50% | 48% to 67% |" in text


def test_remarks_of_the_report_survive(tmp_path):
    path = tmp_path / "seeds.md"
    write_markdown(path, "one")
    first = path.read_text()
    path.write_text(first + "\nRead this.\n\nAnd this.\n")
    for _ in range(2):
        write_markdown(path, "two")
    assert path.read_text() == f"two\n{REMARKS}\n\nRead this.\n\nAnd this.\n"


def test_picture_with_and_without_published_shares(tmp_path):
    losses = {"a": {0: 4.0, 1: 4.2}, "b": {0: 3.8, 1: 4.0}, "c": {0: 3.9}}
    rows = rows_of(GRID, runs_of(GRID, {}), results(losses))
    for shown in (rows, rows[:2]):
        draw("Share", shown, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.width > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["seeds", "moments"])
def test_shipped_grids_are_allowed_and_measure_against_their_own_contestants(name):
    grid = read_grid(name)
    assert {grid["zero"], grid["one"]} <= set(grid["contestants"])
    for settings in grid["contestants"].values():
        if settings["optim"] in ("shampoo4bit", "adamw4bit"):
            parse_optim_args(settings["optim_args"])


def test_two_processes_share_the_runs_and_repeat_none(tmp_path, monkeypatch):
    def trained(run: Run):
        done.append(run)
        return {"settings": run.settings, "final_loss": 1.0, "bytes_per_parameter": 8.0}

    monkeypatch.setattr(quality, "train", trained)
    done: list[Run] = []
    runs = runs_of(GRID, {})
    quality.carry_out(runs[:3], tmp_path, (1, 2))
    quality.carry_out(runs, tmp_path, (0, 2))
    quality.carry_out(runs, tmp_path, (1, 2))
    quality.carry_out(runs, tmp_path)
    assert sorted(map(repr, done)) == sorted(map(repr, runs))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.0.json", "runs.1.json"]


@pytest.mark.parametrize("arguments", [["seeds", "--shard", "2/2"], ["seeds", "--shard", "half"]])
def test_bad_shard_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(["quality", *arguments])
    assert "is not I/N" in capsys.readouterr().err


def test_unknown_grid_and_empty_report_are_refused(tmp_path, capsys):
    assert cli.main(["quality", "sedes", "--output_dir", str(tmp_path)]) == 2
    assert "it has: seeds, moments" in capsys.readouterr().err
    assert cli.main(["quality", "seeds", "--report_only", "--output_dir", str(tmp_path)]) == 2
    assert "nothing to report yet: adamw and shampoo32" in capsys.readouterr().err


def test_quick_grid(tmp_path, monkeypatch, capsys):
    """Real runs, two of them, their report, and a second call that runs nothing."""
    grid = read_grid("seeds")
    kept = {name: {**grid["contestants"][name], "also_learning_rates": []} for name in ("adamw", "shampoo32", "eigen")}
    monkeypatch.setattr(quality, "read_grid", lambda name: {**grid, "seeds": [0], "contestants": kept})
    arguments = ["quality", "seeds", "--quick", "--output_dir", str(tmp_path)]
    assert cli.main(arguments) == 0
    summary = json.loads((tmp_path / "seeds.json").read_text())
    assert set(summary["contestants"]) == {"adamw", "shampoo32", "eigen"}
    assert summary["contestants"]["adamw"]["bytes_per_parameter"] == pytest.approx(8.0, rel=1e-2)
    assert summary["contestants"]["shampoo32"]["share"] == 1.0
    assert len(summary["runs"]) == 3
    assert "| eigen | 0.004 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "seeds.png").stat().st_size > 10_000
    monkeypatch.setattr(quality, "train", None)
    assert cli.main(arguments) == 0
