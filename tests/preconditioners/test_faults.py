"""A sample of `python -m tests.stress.faults`: every algorithm with every storage, each with a fault of the list."""

from __future__ import annotations

import pytest
import torch

from hf_shampoo4 import Shampoo4bit
from tests.stress import faults
from tests.support import used

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


@pytest.mark.parametrize("algorithm", ["kl_shampoo", "kl_soap", "soap", "shampoo", "elementwise"])
def test_without_an_epsilon_what_has_no_gradient_is_not_moved(algorithm: str) -> None:
    """0 over 0 is no direction: a dead unit's weights and bias, or a step on zeros."""
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(48, 80)), torch.nn.Parameter(torch.randn(80))
    start = vector.detach().clone()
    ours = Shampoo4bit([matrix, vector], lr=0.01, eps=0.0, weight_decay=0.0, algorithm=algorithm)
    for t in range(8):
        for p in (matrix, vector):
            p.grad = torch.randn_like(p) * (t != 5)
            p.grad[..., :8] = 0.0
        ours.step()
    assert matrix.isfinite().all()
    assert torch.equal(vector[:8], start[:8])
    assert (vector[8:] != start[8:]).all()


def test_zeros_are_no_statistic_where_the_processor_flushes_denormals() -> None:
    """What a library that was built for speed does to a whole process."""

    def moved() -> float:
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(32, 32))
        ours = Shampoo4bit([p], lr=1.0, weight_decay=0.0, **used({"algorithm": "kl_shampoo"}))
        for t in range(200):
            p.grad = torch.randn(p.shape, generator=generator) * (t < 20)
            if t == 20:
                start = p.detach().clone()
            ours.step()
        return float((p.detach() - start).square().mean().sqrt())

    expected = moved()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        assert moved() == pytest.approx(expected, rel=0.01)
    finally:
        torch.set_flush_denormal(False)
