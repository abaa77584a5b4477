"""What goes wrong in a step is in the Trainer's log."""

from __future__ import annotations

from transformers import Trainer, TrainerCallback

from tests.stress import faults
from tests.support.tiny import Tokens, arguments, llama


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
