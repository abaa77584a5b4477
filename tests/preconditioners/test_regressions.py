"""Losses of short trainings beside the recorded ones: a change of the numerics cannot pass unseen."""

from __future__ import annotations

import json

import pytest

from tests.stress import regressions, soak

RECORDED = json.loads(regressions.RECORDED.read_text())["loss"]


@pytest.mark.parametrize("name", RECORDED)
def test_the_loss_is_the_recorded_one(name: str) -> None:
    found = {name: regressions.losses(soak.of_width(regressions.ALGORITHMS[name], "4-bit"))}
    off = regressions.drift(RECORDED, found)[name]
    assert off <= regressions.BAND, (
        f"{name}: off by {off:.1%}; if that is meant: python -m tests.stress.regressions loss --record"
    )


def test_a_changed_curve_is_noticed() -> None:
    name, curve = next(iter(RECORDED.items()))
    assert regressions.drift({name: curve}, {name: [*curve[:-1], 1.03 * curve[-1]]})[name] > regressions.BAND
