"""A sample of `python -m tests.stress.fuzz --cases 10000`, the same cases every time."""

from __future__ import annotations

import pytest

from tests.stress import fuzz


@pytest.mark.filterwarnings("ignore")  # torch warns of much that is tried here
@pytest.mark.parametrize("name", fuzz.PROPERTIES)
def test_a_right_answer_or_a_clear_error(name: str) -> None:
    fuzz.attempt(name, round(300 * fuzz.PROPERTIES[name][1]), repeat=True)
