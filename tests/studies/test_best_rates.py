"""`benchmarks.best_rates`: optima and their errors, against numpy's parabola and a known minimum."""

import math

import numpy as np
import pytest

from benchmarks.best_rates import NOISE, estimate, losses_of, lowest, ratio, summary
from hf_shampoo4.studies.grid import Point


def at(rate: float, factor: float) -> Point:
    return Point.of({"learning_rate": rate, "rates": {"embedding": factor, "head": factor}})


@pytest.mark.parametrize("optimum", [2.1e-3, 3.9e-3, 5.5e-3])
def test_the_optimum_of_a_parabola_is_found(optimum):
    losses = {rate: 3 + math.log(rate / optimum) ** 2 for rate in (1e-3, 2e-3, 4e-3, 8e-3)}
    assert lowest(losses) == pytest.approx(optimum, rel=1e-9)


def test_as_numpy_does_it():
    losses = {1e-3: 4.1, 2e-3: 3.9, 4e-3: 3.95}
    square, linear, _ = np.polyfit(np.log(list(losses)), list(losses.values()), 2)
    assert lowest(losses) == pytest.approx(math.exp(-linear / 2 / square), rel=1e-6)


@pytest.mark.parametrize("losses", [{}, {1e-3: 1.0}, {1e-3: 1.0, 2e-3: 2.0}, {1e-3: 2.0, 2e-3: 1.0}])
def test_an_edge_has_no_optimum(losses):
    assert lowest(losses) is None
    assert estimate(losses) is None


def test_the_error_is_the_sharper_parabola_s_smaller_one():
    def width(curvature: float) -> float:
        found = estimate({rate: curvature * math.log(rate / 2e-3) ** 2 for rate in (1e-3, 2e-3, 4e-3)})
        assert found is not None
        assert found["low"] <= 2e-3 <= found["high"]
        return math.log(found["high"] / found["low"])

    assert width(100 * NOISE) < width(5 * NOISE)


def test_points_of_both_entries_are_read_and_other_factors_left_out():
    tried = [
        {"learning_rate": 1e-3, "loss": 4.0, "rates": {"embedding": 4.0, "head": 4.0}},
        {"learning_rate": 1e-3, "loss": 3.0, "rates": {"vector": 2.0}},
        {"learning_rate": 1e-3, "loss": 3.0, "rates": {"embedding": 4.0, "head": 2.0}},
        {"learning_rate": 2e-3, "loss": 3.9, "rates": {"embedding": 4.0}},
    ]
    found = losses_of({"adamw_one": {"sweep": [{"learning_rate": 1e-3, "loss": 4.5}]}, "adamw": {"sweep": tried}})
    assert found["adamw"] == {
        at(1e-3, 1.0): 4.5, at(1e-3, 4.0): 4.0, Point(2e-3, (("embedding", 4.0),)): 3.9
    }  # fmt: skip


def test_ratio_of_two_optima():
    def star(optimum: float) -> dict[Point, float]:
        rates = (optimum / 2, optimum, 2 * optimum)
        return {at(r, f): math.log(r / optimum) ** 2 + math.log(f / 4) ** 2 for r in rates for f in (1, 4, 16)}

    told = summary({"adamw": star(2e-3), "shampoo4bit": star(6e-3)})
    assert told["adamw"]["learning_rate"] == 2e-3
    assert told["adamw"]["factor"] == 4
    assert told["adamw"]["best_factor"]["value"] == pytest.approx(4)
    assert told["ratio"]["value"] == 3
    assert told["ratio"]["low"] <= 3 <= told["ratio"]["high"]
    assert ratio(None, told["adamw"]["best_rate"]) is None
