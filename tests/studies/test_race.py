"""A race: which runs it makes, the arithmetic on made-up losses, and a quick one from end to end."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hf_shampoo4 import cli
from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.integrations.trainer import OPTIMS
from hf_shampoo4.options import parse_optim_args
from hf_shampoo4.studies import race
from hf_shampoo4.studies.peers import PEERS
from hf_shampoo4.studies.race import (
    REMARKS,
    Contestant,
    Grid,
    as_markdown,
    best_rate,
    carry_out,
    draw_curves,
    draw_shares,
    read_grid,
    rows_of,
    share_of_way,
    some_of,
    write_markdown,
)
from hf_shampoo4.training.config import config_root, read_config

COMMON = {
    "model": "llama_tiny", "dataset": "stdlib", "max_steps": 10, "per_device_train_batch_size": 4, "seq_len": 8,
    "max_validation_sequences": 2,
}  # fmt: skip
GRID = Grid(
    name="share",
    title="Share",
    zero="a",
    one="b",
    seeds=(0, 1, 2),
    common=COMMON,
    contestants=(
        Contestant("a", "A", (1.0, 2.0, 3.0), {"optim": "x"}, None),
        Contestant("b", "B", (1.0,), {"optim": "y"}, None),
        Contestant("c", "C", (1.0,), {"optim": "z"}, (0.48, 0.67)),
    ),
)


def finished_run(settings, loss):
    return {
        "settings": settings, "final_loss": loss, "bytes_per_parameter": 8.0, "optimizer_step_ms": 5.0,
        "validation": [[0, 8.0], [10, loss]], "validation_seconds": [0.0, 20.0],
    }  # fmt: skip


def results(losses, rate=1.0):
    """Finished runs of GRID: contestant -> loss by seed."""
    named = {contestant.name: contestant for contestant in GRID.contestants}
    return [
        finished_run(named[name].run(rate, seed), loss)
        for name, by_seed in losses.items()
        for seed, loss in by_seed.items()
    ]


def test_the_best_rate_of_the_first_seed():
    a = GRID.contestants[0]
    assert best_rate(a, 0, []) is None
    finished = [finished_run(a.run(rate, 0), loss) for rate, loss in ((1.0, 4.0), (2.0, 3.9), (3.0, math.nan))]
    finished.append(finished_run(a.run(3.0, 1), 1.0))  # another seed's
    assert best_rate(a, 0, finished) == 2.0


def test_a_rate_at_the_edge_of_its_sweep_is_marked():
    a = GRID.contestants[0]
    finished = [finished_run(a.run(rate, 0), 4.0 + rate) for rate in a.learning_rates]
    row = rows_of(GRID, finished)[0]
    assert row.at_the_edge
    assert "| A * | 1: 5.0000, 2: 6.0000, 3: 7.0000 |" in as_markdown(GRID, [row, replace(row, name="b")])


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
    assert rows[1].steps_to_zero == pytest.approx(10 * (8 - 4.1) / (8 - 3.9))
    text = as_markdown(GRID, rows)
    assert "From A to B: 0.2000" in text
    assert "0.1000, 2.0 times that" in text
    assert "| C | 1 | 1 | 3.9000 ± ? | 10 (95%) | 8.00 | 5 | 50% | 48% to 67% |" in text


def test_remarks_of_the_report_survive(tmp_path):
    path = tmp_path / "seeds.md"
    write_markdown(path, "one")
    first = path.read_text()
    path.write_text(first + "\nRead this.\n\nAnd this.\n")
    for _ in range(2):
        write_markdown(path, "two")
    assert path.read_text() == f"two\n{REMARKS}\n\nRead this.\n\nAnd this.\n"


@pytest.mark.parametrize("draw", ["shares", "curves"])
def test_pictures(tmp_path, draw):
    rows = rows_of(GRID, results({"a": {0: 4.0, 1: 4.2}, "b": {0: 3.8, 1: 4.0}, "c": {0: 3.9}}))
    path = tmp_path / "a.png"
    for shown in (rows, rows[:2]):
        if draw == "shares":
            draw_shares("Share", shown, path)
        else:
            draw_curves(GRID, shown, path)
        with Image.open(path) as picture:
            assert picture.width > 1000
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_race_in_which_all_diverged_is_drawn(tmp_path):
    draw_curves(GRID, rows_of(GRID, results({"a": {0: math.nan}, "b": {0: math.nan}})), tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", read_config(config_root() / "race.yaml")["grids"])
def test_shipped_grids_are_allowed_and_measure_against_their_own_contestants(name):
    grid = read_grid(name)
    assert {grid.zero, grid.one or grid.zero} <= {contestant.name for contestant in grid.contestants}
    for contestant in grid.contestants:
        assert contestant.settings.get("peer", "muon") in PEERS
        if (optim := contestant.settings.get("optim")) in OPTIMS:
            parse_optim_args(contestant.settings.get("optim_args"), beneath=OPTIMS[optim])


def test_processes_share_the_runs_and_repeat_none(tmp_path, monkeypatch):
    def trained(label, settings):
        done.append(settings)
        return finished_run(settings, 10 - settings["learning_rate"])

    monkeypatch.setattr(race, "train", trained)
    done: list[dict] = []
    carry_out(GRID, tmp_path, (1, 2))
    assert [settings["optim"] for settings in done] == ["y"] * 3
    carry_out(GRID, tmp_path, (0, 2))
    swept = [(settings["learning_rate"], settings["seed"]) for settings in done if settings["optim"] == "x"]
    assert swept == [(1.0, 0), (2.0, 0), (3.0, 0), (3.0, 1), (3.0, 2)]
    count = len(done)
    carry_out(GRID, tmp_path)
    assert len(done) == count == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.0.json", "runs.1.json"]


@pytest.mark.parametrize("arguments", [["seeds", "--shard", "2/2"], ["seeds", "--shard", "half"]])
def test_bad_shard_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(["race", *arguments])
    assert "is not I/N" in capsys.readouterr().err


def test_unknown_grid_and_empty_report_are_refused(tmp_path, capsys):
    assert cli.main(["race", "sedes", "--output_dir", str(tmp_path)]) == 2
    assert "it has: " in capsys.readouterr().err
    assert cli.main(["race", "seeds", "--report_only", "--output_dir", str(tmp_path)]) == 2
    assert "nothing to report yet: adamw and shampoo32" in capsys.readouterr().err


def test_quick_race(tmp_path: Path, monkeypatch, capsys):
    """Real runs, three of them, their report, and a second call that runs nothing."""
    grid = read_grid("moments", quick=True)
    kept = tuple(c for c in grid.contestants if c.name in ("adamw", "torchao", "4bit"))
    monkeypatch.setattr(race, "read_grid", lambda *_: replace(grid, contestants=kept))
    arguments = ["race", "moments", "--quick", "--output_dir", str(tmp_path)]
    assert cli.main(arguments) == 0
    contestants = json.loads((tmp_path / "moments.json").read_text())["contestants"]
    assert set(contestants) == {"adamw", "torchao", "4bit"}
    assert contestants["adamw"]["bytes_per_parameter"] == pytest.approx(8.0, rel=1e-2)
    assert contestants["adamw"]["share"] == 1.0
    assert len(contestants["4bit"]["seconds"]) == len(contestants["4bit"]["curve"]) > 1
    assert "| 4bit | 0.0028 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "moments.png").stat().st_size > 10_000
    monkeypatch.setattr(race, "train", None)
    assert cli.main(arguments) == 0


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_trains(peer, tmp_path):
    grid = read_grid("tiny_stdlib", quick=True)
    settings = {**grid.common, "peer": peer, "learning_rate": 1e-2, "seed": 0}
    result = race.train("peer", settings)
    assert result["settings"] == settings
    assert result["final_loss"] < result["validation"][0][1]
    assert 3.9 < result["bytes_per_parameter"]


def test_a_grid_like_another_one_has_its_contestants_and_its_settings_where_it_says_nothing_else() -> None:
    there, here = read_grid("small_stdlib"), read_grid("small_kjv")
    assert [c.name for c in here.contestants] == [c.name for c in read_grid("tiny_stdlib").contestants]
    assert here.common == {**there.common, "dataset": "kjv"}
    assert here.seeds == there.seeds != read_grid("tiny_stdlib").seeds
    assert here.title != there.title


def test_some_contestants_alone() -> None:
    grid = read_grid("tiny_stdlib")
    assert [c.name for c in some_of(grid, ["muon", " adamw"]).contestants] == ["muon", "adamw"]
    assert some_of(grid, [""]).contestants == grid.contestants
    with pytest.raises(ConfigError, match="has no contestant 'moon'; it has: adamw"):
        some_of(grid, ["moon"])
