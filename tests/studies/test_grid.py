"""Points, sweeps and the grids that are shipped."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.integrations.trainer import OPTIMS
from hf_shampoo4.options import parse_optim_args
from hf_shampoo4.studies.grid import Contestant, Point, read_grid, some_of, tokens_a_step
from hf_shampoo4.studies.peers import PEERS
from hf_shampoo4.training.config import config_root, read_config
from hf_shampoo4.training.model import build_model
from hf_shampoo4.training.pretrain import parse

START = Point(2e-3, (("embedding", 4.0),))


def contestant(*sweep: str) -> Contestant:
    return Contestant("a", "A", (START,), sweep, {"optim": "x"})


def finished(of: Contestant, point: Point, loss: float, seed: int = 0) -> dict:
    return {"settings": of.run(point, seed), "final_loss": loss}


def swept(of: Contestant, loss) -> list[Point]:
    """The points of a whole sweep, in their order."""
    runs = [finished(of, point, loss(point)) for point in of.points]
    while (point := of.next_point(0, runs)) is not None:
        runs.append(finished(of, point, loss(point)))
        assert len(runs) < 100
    assert of.edges(0, runs) == []
    return [Point.of(run["settings"]) for run in runs]


def bowl(point: Point) -> float:
    """Lowest at a rate of 8e-3, embeddings at 16 times it, the head at half."""
    aims = {"learning_rate": 8e-3, "embedding": 16, "head": 0.5, "matrix": 1, "vector": 1}
    return sum(abs(math.log2(point.get(c) / aim)) for c, aim in aims.items())


def test_a_sweep_ends_at_the_lowest_point_with_a_worse_one_on_either_side() -> None:
    points = swept(contestant("embedding", "head", "learning_rate", "vector"), bowl)
    best = min(points, key=bowl)
    assert best == Point(8e-3, (("embedding", 16.0), ("head", 0.5)))
    for coordinate in ("embedding", "head", "learning_rate", "vector"):
        assert {best.moved(coordinate, True), best.moved(coordinate, False)} <= set(points)
    assert len(points) == len(set(points))


def test_only_the_coordinates_of_the_sweep_are_moved() -> None:
    points = swept(contestant("learning_rate"), bowl)
    assert {point.rates for point in points} == {START.rates}
    assert min(points, key=bowl).learning_rate == 8e-3


def test_a_sweep_in_which_all_diverge_ends() -> None:
    of = contestant("learning_rate", "head")
    assert of.next_point(0, [finished(of, START, math.nan)]) is None
    assert of.next_point(0, []) is None


def test_another_contestants_points_are_not_this_ones() -> None:
    of, one_rate = contestant("embedding"), Contestant("b", "B", (Point(1e-3),), ("learning_rate",), {"optim": "x"})
    runs = [finished(of, START, 3.0), finished(one_rate, Point(1e-3), 4.0), finished(one_rate, Point(4e-3), 2.0)]
    assert of.best(0, runs) == START
    assert one_rate.best(0, runs) == Point(4e-3)
    assert one_rate.edges(0, runs) == ["learning_rate"]
    assert of.best(1, runs) is None


@pytest.mark.parametrize(("rate", "up"), [(1e-3, 1.4e-3), (2e-3, 2.8e-3), (8e-3, 1.1e-2), (7e-4, 1e-3), (5e-4, 7e-4)])
def test_rates_of_a_sweep_are_the_familiar_ones(rate: float, up: float) -> None:
    assert Point(rate).moved("learning_rate", True) == Point(up)
    assert Point(up).moved("learning_rate", False) == Point(rate)


def test_a_point_is_its_settings_and_factors_of_1_are_none() -> None:
    assert Point.of(START.settings()) == START
    assert Point.of({"learning_rate": 1, "rates": {"head": 1}}).settings() == {"learning_rate": 1.0}
    assert START.moved("embedding", False).moved("embedding", False) == Point(2e-3)


@pytest.mark.parametrize("name", read_config(config_root() / "race.yaml")["grids"])
def test_shipped_grids_are_allowed_and_measure_against_their_own_contestants(name: str) -> None:
    grid = read_grid(name)
    assert {grid.baseline, grid.target or grid.baseline} <= {contestant.name for contestant in grid.contestants}
    assert set(grid.curves) <= {c.name for c in read_grid("tiny_stdlib").contestants}
    for contestant in grid.contestants:
        assert contestant.settings.get("peer", "muon") in PEERS
        if (optim := contestant.settings.get("optim")) in OPTIMS:
            parse_optim_args(contestant.settings.get("optim_args"), beneath=OPTIMS[optim])


def test_a_grid_like_another_one_has_its_contestants_and_its_settings_where_it_says_nothing_else() -> None:
    there, here = read_grid("small_stdlib"), read_grid("small_kjv")
    assert [c.name for c in here.contestants] == [c.name for c in read_grid("tiny_stdlib").contestants]
    assert here.common == {**there.common, "dataset": "kjv"}
    assert here.seeds == there.seeds != read_grid("medium_stdlib").seeds == (0,)
    assert here.title != there.title


def test_a_grid_with_some_of_anothers_contestants_changes_a_part_of_each() -> None:
    tiny, long = read_grid("tiny_stdlib"), read_grid("tiny_long")
    assert {c.name for c in long.contestants} < {c.name for c in tiny.contestants}
    there, here = tiny.contestants[0], long.contestants[0]
    assert here.points[0].learning_rate == there.points[0].learning_rate
    assert here.points != there.points
    assert (here.label, here.sweep) == (there.label, there.sweep)
    tokens = long.common["max_steps"] * long.common["per_device_train_batch_size"] * long.common["seq_len"]
    assert tokens / 1_840_256 > 2.6


def test_a_contestant_like_another_one_differs_in_what_it_says_alone(monkeypatch) -> None:
    small = {c.name: c for c in read_grid("small_options").contestants}
    medium = {c.name: c for c in read_grid("medium_options").contestants}
    for of, rate in ((small, 4e-3), (medium, 2.8e-3)):
        for name, contestant in of.items():
            assert contestant.points == of["shampoo4bit"].points, name
            assert contestant.points[0].learning_rate == rate
            assert {**contestant.settings, "optim_args": ""} == {**of["shampoo4bit"].settings, "optim_args": ""}
    assert len({(c.label, c.settings.get("optim_args")) for c in small.values()}) == len(small)
    for wrong in ("nobody", "second"):
        entries = {"first": {"label": "1", "learning_rate": 1e-3}, "second": {"like": wrong, "label": "2"}}
        grid = {"title": "", "baseline": "first", "seeds": [0], "contestants": entries}
        plans = {"race.yaml": {"common": {}, "grids": {"g": grid}}, "demo.yaml": {"common": {}}}
        monkeypatch.setattr("hf_shampoo4.studies.grid.read_config", lambda path, plans=plans: plans[path.name])
        with pytest.raises(ConfigError, match=f"'second' is like '{wrong}'; it can be like: first"):
            read_grid("g")


@pytest.mark.parametrize(
    ("name", "parameters"), [("tiny_20", 1_840_256), ("nano_20", 279_744), ("nano_20_wsd", 279_744)]
)
def test_the_long_grids_see_20_tokens_a_parameter(name: str, parameters: int, tmp_path) -> None:
    common = read_grid(name).common
    assert 20 <= common["max_steps"] * tokens_a_step(common) / parameters < 21
    model = parse({**common, "output_dir": str(tmp_path)}).model
    assert build_model(model, common["vocab_size"]).num_parameters() == parameters


def test_the_schedule_of_warmup_and_decay_has_a_long_even_part_and_ends_at_zero(tmp_path) -> None:
    args = parse({**read_grid("nano_20_wsd").common, "output_dir": str(tmp_path)}).training
    steps = args.max_steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
    )
    factors = [scheduler.lr_lambdas[0](step) for step in range(steps + 1)]
    assert factors[0] == factors[-1] == 0
    assert factors.count(1.0) / steps == pytest.approx(0.7, abs=0.01)


def test_some_contestants_alone() -> None:
    grid = read_grid("tiny_stdlib")
    assert [c.name for c in some_of(grid, ["muon", " adamw"]).contestants] == ["muon", "adamw"]
    assert some_of(grid, [""]).contestants == grid.contestants
    with pytest.raises(ConfigError, match="has no contestant 'moon'; it has: adamw"):
        some_of(grid, ["moon"])


def test_a_grid_adds_contestants_of_its_own_and_names_no_others(monkeypatch) -> None:
    base = {"title": "A", "baseline": "a", "seeds": [0], "contestants": {"a": {"label": "A", "learning_rate": 1e-3}}}
    over = {"like": "base", "contestants": {"b": {"label": "B", "learning_rate": 2e-3}}}
    grids = {"base": base, "more": over, "strange": {**over, "only": ["c"]},
             "nameless": {"like": "base", "contestants": {"b": {"learning_rate": 2e-3}}}}  # fmt: skip
    plan = {"common": {}, "quick": {}, "grids": grids}
    monkeypatch.setattr("hf_shampoo4.studies.grid.read_config", lambda _: plan)
    monkeypatch.setattr("hf_shampoo4.studies.grid.read_plan", lambda: {"common": {}, "quick": {}})
    assert [contestant.name for contestant in read_grid("more").contestants] == ["a", "b"]
    with pytest.raises(ConfigError, match="'strange' has no contestant 'c'; it may have: a, b"):
        read_grid("strange")
    with pytest.raises(ConfigError, match="'b' needs a label"):
        read_grid("nameless")
