"""A race: which runs it makes, the arithmetic on made-up losses, and a quick one from end to end."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hf_shampoo4 import cli
from hf_shampoo4.studies import race
from hf_shampoo4.studies.grid import Contestant, Grid, Point, read_grid
from hf_shampoo4.studies.race import carry_out
from hf_shampoo4.studies.race_pictures import draw_bytes, draw_curves, draw_shares, frontier
from hf_shampoo4.studies.race_report import REMARKS, as_markdown, sweep_state, write_markdown
from hf_shampoo4.studies.race_results import rows_of, share_of_way
from hf_shampoo4.studies.runner import Runs

COMMON = {
    "model": "llama_tiny", "dataset": "stdlib", "max_steps": 10, "per_device_train_batch_size": 4, "seq_len": 8,
    "max_validation_sequences": 2,
}  # fmt: skip
GRID = Grid(
    name="share",
    title="Share",
    baseline="a",
    target="b",
    seeds=(0, 1, 2),
    common=COMMON,
    contestants=(
        Contestant("a", "A", (Point(1.0), Point(2.0), Point(3.0)), (), {"optim": "x"}),
        Contestant("b", "B", (Point(1.0),), (), {"optim": "y"}),
        Contestant("c", "C", (Point(1.0),), (), {"optim": "z"}, (0.48, 0.67)),
    ),
)


def finished_run(settings, loss):
    return {
        "settings": settings, "final_loss": loss, "bytes_per_parameter": 8.0, "optimizer_step_ms": 5.0,
        "step_ms": 15.0, "commit": "abc",
        "validation": [[0, 8.0], [10, loss]], "validation_seconds": [0.0, 20.0],
    }  # fmt: skip


def results(losses, rate=1.0):
    """Finished runs of GRID: contestant -> loss by seed."""
    named = {contestant.name: contestant for contestant in GRID.contestants}
    return [
        finished_run(named[name].run(Point(rate), seed), loss)
        for name, by_seed in losses.items()
        for seed, loss in by_seed.items()
    ]


def test_a_point_at_the_edge_of_its_sweep_is_marked():
    a = GRID.contestants[0]
    finished = [finished_run(a.run(point, 0), 4.0 + point.learning_rate) for point in a.points]
    row = rows_of(GRID, finished)[0]
    assert row.closed == {"learning_rate": False}
    told = as_markdown(GRID, [row, replace(row, name="b")])
    assert "| A | 1: 5.0000; 2: 6.0000; 3: 7.0000 |" in told
    assert "| A | 1 |  | **open: rate** | 1 |" in told


def test_times_are_in_the_units_of_one_machine_that_is_as_busy_in_every_run():
    """Forward and backward took twice as long in the second run, so all of its times count half."""
    a, b, _ = GRID.contestants
    runs = [finished_run(a.run(a.points[0], 0), 4.0), finished_run(b.run(b.points[0], 0), 4.0)]
    runs[1] |= {"step_ms": 40.0, "optimizer_step_ms": 20.0, "validation_seconds": [0.0, 40.0]}
    grid = replace(GRID, seeds=(0,))
    first, second = rows_of(grid, [*runs, finished_run(a.run(a.points[0], 1), 4.0)])
    assert first.model_step_ms == second.model_step_ms == 15.0
    assert (first.optimizer_step_ms, second.optimizer_step_ms) == (7.5, 15.0)
    assert (first.seconds[-1], second.seconds[-1]) == (30.0, 30.0)


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
    """In simulated races of three seeds."""
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


def test_table_of_an_unfinished_race():
    losses = {"a": {0: 4.0, 1: 4.2, 2: 4.1}, "b": {0: 3.8, 1: 4.0, 2: 3.9}, "c": {0: 3.9}}
    rows = rows_of(GRID, results(losses))
    assert [(row.name, len(row.losses), row.share_error) for row in rows] == [("a", 3, 0), ("b", 3, 0), ("c", 1, None)]
    assert rows[2].share == pytest.approx(0.5)
    assert rows[1].steps_to_baseline == pytest.approx(10 * (8 - 4.1) / (8 - 3.9))
    text = as_markdown(GRID, rows)
    assert "From A to B: 0.2000" in text
    assert "0.1000, 2.0 times that" in text
    assert "| C | 1 |  | one point | 1 | 3.9000 ± ? | 10 (95%) | 19 (95%) | 8.00 | 5 | 50% | 48% to 67% |" in text


def test_remarks_of_the_report_survive(tmp_path):
    path = tmp_path / "seeds.md"
    write_markdown(path, "one")
    first = path.read_text()
    path.write_text(first + "\nRead this.\n\nAnd this.\n")
    for _ in range(2):
        write_markdown(path, "two")
    assert path.read_text() == f"two\n{REMARKS}\n\nRead this.\n\nAnd this.\n"


@pytest.mark.parametrize("draw", ["shares", "curves", "bytes"])
def test_pictures(tmp_path, draw):
    rows = rows_of(GRID, results({"a": {0: 4.0, 1: 4.2}, "b": {0: 3.8, 1: 4.0}, "c": {0: 3.9}}))
    path = tmp_path / "a.png"
    for shown in (rows, rows[:2]):
        if draw == "shares":
            draw_shares("Share", shown, path)
        else:
            (draw_curves if draw == "curves" else draw_bytes)(GRID, shown, path)
        with Image.open(path) as picture:
            assert picture.width > 1000
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_race_in_which_all_diverged_is_drawn(tmp_path):
    rows = rows_of(GRID, results({"a": {0: math.nan}, "b": {0: math.nan}}))
    for draw in (draw_curves, draw_bytes):
        draw(GRID, rows, tmp_path / f"{draw.__name__}.png")
        assert (tmp_path / f"{draw.__name__}.png").exists()


def test_the_frontier_is_those_that_nobody_with_fewer_bytes_is_under():
    row = rows_of(GRID, results({"a": {0: 4.0}}))[0]
    points = {"a": (8.0, 3.5), "b": (1.0, 3.6), "c": (1.0, 3.7), "d": (4.0, 3.65), "e": (0.5, 4.0)}
    rows = [replace(row, name=name, bytes_per_parameter=size, losses={0: y}) for name, (size, y) in points.items()]
    assert [row.name for row in frontier(rows)] == ["e", "b", "a"]


def test_a_sweep_says_in_which_coordinates_it_is_closed():
    row = rows_of(GRID, results({"a": {0: 4.0}}))[0]
    told = {
        "one point": {},
        "closed: rate, head": {"learning_rate": True, "head": True},
        "**open: vector**; closed: rate": {"learning_rate": True, "vector": False},
    }
    assert [sweep_state(replace(row, closed=closed)) for closed in told.values()] == list(told)


def test_a_contestant_of_one_point_or_at_the_edge_of_its_sweep_is_open():
    row = rows_of(GRID, results({"a": {0: 4.0}}))[0]
    assert [replace(row, closed=closed).open for closed in ({}, {"head": False}, {"head": True})] == [True, True, False]


def test_the_spread_of_steps_is_that_of_each_seed_against_its_own_baseline():
    rows = rows_of(GRID, results({"a": {0: 4.0, 1: 4.5}, "b": {0: 3.0, 1: 4.0}, "c": {0: 5.0, 1: 4.0}}))
    steps = [10 * (8 - 4.0) / (8 - 3.0), 10 * (8 - 4.5) / (8 - 4.0)]
    assert rows[1].steps_spread == pytest.approx(abs(steps[0] - steps[1]) / math.sqrt(2))
    assert rows[1].seconds_spread == pytest.approx(2 * rows[1].steps_spread), "a step takes two seconds"
    assert rows[2].steps_spread is rows[2].seconds_spread is None, "one seed never gets there"
    told = as_markdown(replace(GRID, target=None), rows)
    assert "| B | 1 |  | one point | 2 | 3.5000 ± 0.7071 | 8 ± 1 (83%) | 17 ± 1 (83%) | 8.00 | 5 |" in told


def test_bytes_at_the_peak_have_a_column_where_a_contestants_are_known():
    rows = rows_of(GRID, results({"a": {0: 4.0}, "b": {0: 3.0}}))
    assert "at the peak" not in as_markdown(GRID, rows)
    told = as_markdown(GRID, [rows[0], replace(rows[1], peak_bytes_per_parameter=11.5)])
    assert "| state, bytes a parameter | at the peak |" in told
    assert "| 8.00 | ? | 5 |" in told
    assert "| 8.00 | 11.50 | 5 |" in told


def trained(done):
    """In the place of `race.train`: a loss that falls with the rate up to 4."""

    def train(label, settings, folder):
        done.append(settings)
        run = finished_run(settings, 10 + abs(settings["learning_rate"] - 4))
        return {key: value for key, value in run.items() if key not in ("settings", "commit")}

    return train


def test_processes_share_the_runs_and_repeat_none(tmp_path, monkeypatch):
    done: list[dict] = []
    runs = Runs(tmp_path / "runs")
    monkeypatch.setattr(race, "train", trained(done))
    carry_out(GRID, runs, (1, 2))
    assert [settings["optim"] for settings in done] == ["y"] * 3
    carry_out(GRID, runs, (0, 2))
    swept = [(settings["learning_rate"], settings["seed"]) for settings in done if settings["optim"] == "x"]
    assert swept == [(1.0, 0), (2.0, 0), (3.0, 0), (3.0, 1), (3.0, 2)]
    count = len(done)
    carry_out(GRID, runs)
    assert len(done) == count == 11
    assert len(list(runs.folder.iterdir())) == 11
    assert not list((tmp_path / "unfinished").iterdir())


def test_a_sweep_goes_on_where_it_stopped_and_the_best_point_serves_the_other_seeds(tmp_path, monkeypatch):
    done: list[dict] = []
    runs = Runs(tmp_path / "runs")
    monkeypatch.setattr(race, "train", trained(done))
    swept = replace(GRID, contestants=(replace(GRID.contestants[0], sweep=("learning_rate",)),))
    carry_out(replace(swept, seeds=(0,)), runs)
    assert len(done) == 3
    carry_out(swept, runs, sweep=True)
    assert [s["learning_rate"] for s in done if s["seed"] == 0][3:] == pytest.approx([4.0, 5.6, 2.8], rel=0.05)
    assert {s["learning_rate"] for s in done if s["seed"]} == {done[3]["learning_rate"]}
    count = len(done)
    carry_out(swept, runs, sweep=True)
    assert len(done) == count


@pytest.mark.parametrize("arguments", [["seeds", "--shard", "2/2"], ["seeds", "--shard", "half"]])
def test_bad_shard_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(["race", *arguments])
    assert "is not I/N" in capsys.readouterr().err


def test_unknown_grid_and_empty_report_are_refused(tmp_path, capsys):
    assert cli.main(["race", "sedes", "--output_dir", str(tmp_path)]) == 2
    assert "it has: " in capsys.readouterr().err
    assert cli.main(["race", "seeds", "--report_only", "--output_dir", str(tmp_path)]) == 2
    assert (
        "nothing to report yet: adamw and shampoo32 need a finished run each, of this code" in capsys.readouterr().err
    )


def test_quick_race(tmp_path: Path, monkeypatch, capsys):
    """Real runs, three of them, their report, and a second call that runs nothing."""
    grid = read_grid("seeds", quick=True)
    kept = tuple(c for c in grid.contestants if c.name in ("adamw", "shampoo32", "eigen_moments4"))
    monkeypatch.setattr("hf_shampoo4.studies.grid.read_grid", lambda *_: replace(grid, contestants=kept))
    arguments = ["race", "seeds", "--quick", "--output_dir", str(tmp_path)]
    assert cli.main(arguments) == 0
    contestants = json.loads((tmp_path / "seeds.json").read_text())["contestants"]
    assert set(contestants) == {"adamw", "shampoo32", "eigen_moments4"}
    assert contestants["adamw"]["bytes_per_parameter"] == pytest.approx(8.0, rel=1e-2)
    assert contestants["shampoo32"]["share"] == 1.0
    assert len(contestants["adamw"]["seconds"]) == len(contestants["adamw"]["curve"]) > 1
    assert "| eigen, 4-bit moments | 0.004 |  | one point | 1 |" in capsys.readouterr().out
    assert (tmp_path / "seeds.png").stat().st_size > 10_000
    monkeypatch.setattr(race, "train", None)
    assert cli.main(arguments) == 0
