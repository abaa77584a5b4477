"""A sample of `python -m tests.stress.faults`: every algorithm with every storage, each with a fault of the list."""

from __future__ import annotations

import pytest

from tests.stress import faults

FAULTS = list(faults.each_fault())


def test_no_algorithm_is_left_out() -> None:
    assert {algorithm for algorithm, _ in faults.PAIRS} == faults.ALGORITHMS.keys()


@pytest.mark.parametrize("nth", range(len(faults.PAIRS)), ids=["-".join(pair) for pair in faults.PAIRS])
def test_training_goes_on(nth: int) -> None:
    algorithm, moments = faults.PAIRS[nth]
    name, attempt = FAULTS[nth % len(FAULTS)]
    assert attempt(algorithm, moments, 6) == [], f"{algorithm} {moments} {name}"


@pytest.mark.parametrize("algorithm", ["kl_shampoo", "kl_soap", "soap"])
@pytest.mark.parametrize("name", ["rank1", "constant"])
def test_directions_that_were_silent_for_long_may_speak_again(algorithm: str, name: str, monkeypatch) -> None:
    """Eigenvalues decay to exactly 0 in 150 steps here, as in 2,000 with the usual factor_beta and first beta."""
    options = faults.options_of(algorithm, "4bit")
    monkeypatch.setattr(faults, "options_of", lambda a, m: {**options, "factor_beta": 0.5, "betas": (0.5, 0.999)})
    assert faults.stream(algorithm, "4bit", name, 160) == []


@pytest.mark.parametrize("name", ["spikes", "spikes_down"])
@pytest.mark.parametrize("algorithm", ["kl_soap", "soap"])
def test_a_spike_that_nobody_clips_is_followed_by_steps_of_the_usual_size(algorithm: str, name: str) -> None:
    """The last step of the stream is two after a spike, and updates the bases: the direction was 10,000 and more."""
    assert faults.stream(algorithm, "fp32", name, 6) == []


@pytest.mark.parametrize("function", faults.LAPACK)
@pytest.mark.parametrize("algorithm", ["eigen", "direct", "cholesky_ef", "kl_shampoo"])
def test_linear_algebra_that_fails_is_counted(algorithm: str, function: str) -> None:
    assert faults.injected(algorithm, "4bit", function, "raises") == []
