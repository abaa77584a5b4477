"""A sample of `python -m tests.stress.faults`: every algorithm with every storage, each with a fault of the list."""

from __future__ import annotations

import pytest
from transformers import Trainer, TrainerCallback

from tests.stress import faults
from tests.support.tiny import Tokens, arguments, llama

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
    """Eigenvalues decay to exactly 0 in 150 steps here, as in 2,000 with the usual factor_beta."""
    options = faults.options_of(algorithm, "4bit")
    monkeypatch.setattr(faults, "options_of", lambda a, m: {**options, "factor_beta": 0.5})
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


class Spoil(TrainerCallback):
    """A NaN in one gradient at step 2, a QR that fails at steps 4 and 5."""

    def __init__(self) -> None:
        self.broken = faults.broken("qr", "raises")

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.model.layers[0].mlp.up_proj.weight.grad[3, 5] = float("nan")
        if state.global_step == 3:
            self.broken.__enter__()
        if state.global_step == 5:
            self.broken.__exit__(None, None, None)


def test_the_trainer_logs_what_went_wrong(tmp_path) -> None:
    trainer = Trainer(
        llama(), arguments(tmp_path, max_steps=8, max_grad_norm=0), train_dataset=Tokens(), callbacks=[Spoil()]
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["optim/skipped_steps"] for entry in logged] == [0] + 7 * [1]
    failed = [entry["optim/failed_refreshes"] for entry in logged]
    assert failed[3] == 0 < failed[5] == failed[-1]
    assert logged[-1]["loss"] < logged[0]["loss"]
