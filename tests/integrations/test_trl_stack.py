"""The stack around the optimizer, as users have it: the Trainer's features, Accelerate, PEFT, TRL, Optuna."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import hf_shampoo4 as s4
from hf_shampoo4.integrations.trainer import OPTIMS
from tests.support.tiny import ROOT, Tokens, arguments, chat_model, conversations, llama, often, python

SECOND_ORDER = [name for name in OPTIMS if name != "adamw4bit"]
OFTEN = {"algorithm": "shampoo", "stats_every": 2, "roots_every": 2}  # Shampoo's; the others have no roots

LOOP = '''
"""A loop on Accelerate, with every optimizer: losses and parameters of this rank."""
import json, os, sys
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tests.support import used
from tests.support.tiny import Tokens, llama
from hf_shampoo4 import Shampoo4bit, param_groups
from hf_shampoo4.integrations.trainer import OPTIMS

def main():
    found = {}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    for optim, options in OPTIMS.items():
        model = llama()
        optimizer = Shampoo4bit(param_groups(model, 0.1), lr=1e-2, **used({"stats_every": 2, **options}))
        model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(Tokens(32), batch_size=4))
        losses = []
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        parameters = [p.double().sum().item() for p in model.parameters()]
        found[optim] = {"losses": losses, "parameters": parameters, "world": accelerator.num_processes}
    with open(f"{sys.argv[1]}.{accelerator.process_index}", "w") as file:
        json.dump(found, file)
    accelerator.end_training()

main()
'''


@pytest.mark.parametrize("optim", OPTIMS)
def test_trainer_features_together(tmp_path, optim):
    """bf16, gradient checkpointing and accumulation, the best checkpoint loaded at the end, early stopping."""
    args = arguments(
        tmp_path, optim=optim, optim_args=often(optim), bf16=True, gradient_checkpointing=True, max_steps=8,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2,
        save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=2.0,
    )  # fmt: skip  # nothing improves by a million: it stops at the second evaluation
    trainer = Trainer(
        llama(), args, train_dataset=Tokens(32), eval_dataset=Tokens(),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e6)],
    )  # fmt: skip
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, s4.Shampoo4bit)
    evaluations = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(evaluations, key=evaluations.__getitem__)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.state.global_step < 8, "it did not stop early"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[best], rel=1e-6)


@pytest.mark.parametrize("optim", SECOND_ORDER)
def test_a_compiled_model_and_its_resume(tmp_path, optim):
    """`torch_compile`: parameters are grouped as those of the plain model, and a resumed run is the unbroken one."""
    settings = {"optim": optim, "optim_args": often(optim), "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    settings |= {"torch_compile": True, "torch_compile_backend": "eager"}  # all of it but what needs a C++ compiler
    found = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = Trainer(llama(num_hidden_layers=1), arguments(tmp_path, **settings), train_dataset=Tokens(16))
        trainer.train(resume_from_checkpoint=checkpoint)
        assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
        found.append(digest(trainer.optimizer.optimizer, trainer.model))
        torch._dynamo.reset()
    assert found[0] == found[1]
    names = {name for group in s4.param_groups(llama(num_hidden_layers=1)) for name, _ in group["params"]}
    trained = trainer.optimizer.optimizer
    assert {name for i in range(len(trained.param_groups)) for name in trained.names(i)} == names


def digest(optimizer: s4.Shampoo4bit, model: torch.nn.Module) -> str:
    """Of all state and all parameters."""
    state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
    found = hashlib.sha256(str([group["step"] for group in optimizer.param_groups]).encode())
    for tensor in [*state, *model.parameters()]:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("optim", SECOND_ORDER)
def test_steps_that_the_loss_scaler_leaves_out(tmp_path, optim):
    """fp16: an overflow changes nothing, and the step is counted.  (Accelerate has no scaler on a CPU: it gets one.)"""
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.before = digest(optimizer.optimizer, model)

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen.append((optimizer.step_was_skipped, digest(optimizer.optimizer, model) == self.before))

    args = arguments(tmp_path, optim=optim, optim_args=often(optim), fp16=True, max_steps=8)
    trainer = Trainer(llama(), args, train_dataset=Tokens(48), callbacks=[Watch()])
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19, growth_factor=16.0, growth_interval=2)
    trainer.train()
    skipped = [was_skipped for was_skipped, _ in seen]
    assert skipped == [unchanged for _, unchanged in seen]
    assert not skipped[0], "state was there"
    assert 1 <= skipped.count(True) <= 4
    logged = [entry["optim/skipped_steps"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] == sum(skipped)
    assert trainer.optimizer.optimizer.param_groups[0]["step"] == skipped.count(False)


def test_hyperparameter_search(tmp_path):
    pytest.importorskip("optuna")
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = Trainer(None, args, train_dataset=Tokens(), eval_dataset=Tokens(), model_init=lambda trial: llama())
    best = trainer.hyperparameter_search(
        lambda trial: {
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True),
            "optim_args": trial.suggest_categorical("optim_args", ["block_size=32", "block_size=64"]),
        },
        backend="optuna", n_trials=2,
    )  # fmt: skip
    assert set(best.hyperparameters) == {"learning_rate", "optim_args"}
    group = trainer.optimizer.optimizer.param_groups[0]
    assert f"block_size={group['block_size']}" == trainer.args.optim_args


def test_an_accelerate_loop_goes_on_from_its_saved_state(tmp_path):
    """`save_state` and `load_state`: the next steps are those of the loop that was not interrupted."""

    def prepared():
        accelerator, model = Accelerator(cpu=True), llama()
        optimizer = s4.Shampoo4bit(s4.param_groups(model), lr=1e-2, **OFTEN)
        return accelerator, *accelerator.prepare(model, optimizer, DataLoader(Tokens(16), batch_size=4))

    def losses(accelerator, model, optimizer, batches):
        found = []
        for batch in batches:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    unbroken = prepared()
    losses(*unbroken)
    unbroken[0].save_state(tmp_path)
    resumed = prepared()
    resumed[0].load_state(tmp_path)
    assert losses(*resumed) == losses(*unbroken)


def ranks(folder: Path, processes: int) -> list[dict]:
    """Results of LOOP on every rank."""
    (folder / "loop.py").write_text(LOOP)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    child = python(*torchrun, folder / "loop.py", folder / "result", PYTHONPATH=ROOT)
    files = [folder / f"result.{rank}" for rank in range(processes)]
    assert all(file.exists() for file in files), child.stdout[-2000:] + child.stderr[-4000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.slow
def test_an_accelerate_loop_in_two_processes(tmp_path):
    first, second = ranks(tmp_path, 2)
    assert first.keys() == second.keys() == OPTIMS.keys()
    for optim in OPTIMS:
        assert first[optim]["world"] == 2
        assert first[optim]["parameters"] == second[optim]["parameters"], f"{optim}: the ranks drifted apart"
        assert first[optim]["losses"] != second[optim]["losses"]


def test_lora_plus():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    optimizer = create_loraplus_optimizer(model, s4.Shampoo4bit, lr=1e-2, loraplus_lr_ratio=8.0, **OFTEN)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert {rates[p] for name, p in named.items() if "lora_A" in name} == {1e-2}
    assert {rates[p] for name, p in named.items() if "lora_B" in name} == {8e-2}
    batch, losses = {"input_ids": Tokens().tokens, "labels": Tokens().tokens}, []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_trl_sft_unmodified(tmp_path):
    """The command of TRL's own, below --exec (test_finetune.py resumes)."""
    model, data = chat_model(tmp_path / "model"), tmp_path / "data"
    data.mkdir()
    conversations(data / "train.jsonl")
    command = [
        "-m", "hf_shampoo4", "--exec", Path(sys.executable).parent / "trl", "sft", "--model_name_or_path", model,
        "--dataset_name", data, "--output_dir", tmp_path / "run", "--optim", "shampoo4bit", "--optim_args",
        "algorithm=shampoo,stats_every=2,roots_every=2", "--max_steps", "4", "--logging_steps", "1",
        "--per_device_train_batch_size", "4", "--max_length", "48", "--use_cpu", "--bf16", "false", "--report_to",
        "none", "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj",
    ]  # fmt: skip
    done = python(*command)
    assert "Shampoo4bit state" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 4
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
