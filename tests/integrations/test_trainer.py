"""Training through the Trainer: the report, the trackers, TRL, and the way without patching."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
import torch
from transformers import Trainer
from transformers.trainer import DEFAULT_CALLBACKS

import hf_shampoo4 as s4
from hf_shampoo4.checkpointing.completeness import noted
from hf_shampoo4.integrations.callback import _name
from hf_shampoo4.integrations.trainer import optim_options
from tests.support.tiny import Tokens, arguments, llama

KEYS = {"optim/state_bytes", "optim/skipped_steps", "optim/failed_refreshes", "optim/refresh_seconds"}


def train(args, **kwargs) -> Trainer:
    trainer = Trainer(kwargs.pop("model", None) or llama(), args, train_dataset=Tokens(), **kwargs)
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("optim", ["shampoo4bit", "adamw4bit"])
def test_the_flag_trains_and_reports(tmp_path, capsys, optim):
    trainer = train(arguments(tmp_path, optim=optim, bf16=True, gradient_accumulation_steps=2))
    assert isinstance(trainer.optimizer.optimizer, s4.Shampoo4bit)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    printed = capsys.readouterr().out
    assert "128x64" in printed, printed
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry.keys() >= KEYS for entry in logged)
    assert logged[-1]["optim/state_bytes"] > 0
    assert logged[-1]["optim/skipped_steps"] == 0
    assert trainer.state.log_history[-1]["train_optimizer_state_mb"] == logged[-1]["optim/state_bytes"] / 1e6


def test_the_results_of_a_run_hold_the_bytes(tmp_path):
    trainer = Trainer(llama(), arguments(tmp_path, max_steps=1), train_dataset=Tokens())
    metrics = trainer.train().metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    saved = json.loads((tmp_path / "train_results.json").read_text())["train_optimizer_state_mb"]
    assert 0 < saved < 1, "megabytes"


def test_tensorboard_receives_the_numbers(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    train(arguments(tmp_path, report_to="tensorboard", max_steps=2))
    (event_file,) = tmp_path.rglob("events.out.tfevents.*")
    events = event_accumulator.EventAccumulator(str(event_file))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {f"train/{key}" for key in KEYS} | {"train/train_optimizer_state_mb"}
    assert events.Scalars("train/optim/state_bytes")[-1].value > 0


def test_trackio_receives_the_numbers(tmp_path):
    trackio = pytest.importorskip("trackio")
    train(arguments(tmp_path, report_to="trackio", run_name="run", project="shampoo4", max_steps=2))
    (database,) = Path(trackio.utils.TRACKIO_DIR).glob("shampoo4*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row) for (row,) in connection.execute("select metrics from metrics order by step")]
    assert any(row.keys() >= {f"train/{key}" for key in KEYS} for row in rows), rows


def test_wandb_receives_the_numbers(tmp_path, monkeypatch):
    """Offline: its own process keeps what it would send in a file, and answers with the summary."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = train(arguments(tmp_path / "run", report_to="wandb", max_steps=2))
    kept = dict(wandb.run.summary)
    wandb.finish()
    assert kept.keys() >= {f"train/{key}" for key in KEYS}
    assert kept["train/optim/state_bytes"] / 1e6 == trainer.state.log_history[-1]["train_optimizer_state_mb"]
    assert list(tmp_path.rglob("run-*.wandb"))


def test_without_patching(tmp_path, capsys):
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None)
    model, own = llama(), s4.Shampoo4bitCallback()
    trainer = Trainer(
        model, args, train_dataset=Tokens(), callbacks=[s4.Shampoo4bitCallback, own],
        **s4.trainer_kwargs(model, args, stats_every=2, roots_every=2, preset="paper_eigen"),
    )  # fmt: skip
    trainer.train()
    callbacks = trainer.callback_handler.callbacks
    assert [callback for callback in callbacks if isinstance(callback, s4.Shampoo4bitCallback)] == [own]
    assert callbacks.index(own) == DEFAULT_CALLBACKS.index(s4.Shampoo4bitCallback), "before the trackers"
    assert capsys.readouterr().out.count("Shampoo4bit state") == 1
    group = trainer.optimizer.optimizer.param_groups[0]
    assert (group["stats_every"], group["block_size"], group["lr"] >= 0) == (2, 1200, True)
    assert noted(trainer.state.stateful_callbacks)["optimizer"].startswith(
        "shampoo4bit algorithm=shampoo,moments=bf16,"
    )
    assert losses(trainer)[-1] < losses(trainer)[0]


def moved(trainer: Trainer, start: torch.nn.Module) -> bool:
    pairs = zip(trainer.model.parameters(), start.parameters(), strict=True)
    return any(not torch.equal(p.detach(), q.detach()) for p, q in pairs)


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("shampoo4bit", ""), ("soap4bit", "bits=8"), ("adamw4bit", "moments=4bit_eden"),
        ("shampoo4bit", "algorithm=shampoo,rates=embedding:6.0;head:2.0,stats_every=2"),
        ("shampoo4bit", "row_splits=64;32;32,stochastic_last=0.5,bits=32,stagger=false"),
    ],
)  # fmt: skip
def test_an_optimizer_is_named_by_what_it_has(tmp_path, optim, optim_args):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(128, 8))], "kind": "matrix"}]
    has = s4.Shampoo4bit(groups, **optim_options(optim, optim_args))
    args, named = arguments(tmp_path, optim=optim, optim_args="preset=paper_eigen"), f"{optim} {optim_args}".strip()
    assert _name(args, None, has) == named
    args.optim = "adamw_torch"
    assert _name(args, None, has).split(" ")[0] == "shampoo4bit"
    assert has.defaults.items() >= optim_options(*_name(args, None, has).partition(" ")[::2]).items()


def test_an_optimizer_of_others_is_named_by_the_arguments_that_make_it_or_its_class(tmp_path):
    args, weights = arguments(tmp_path, optim="adamw_torch", optim_args=None), llama(num_hidden_layers=1).parameters()
    assert _name(args, None, torch.optim.AdamW(weights)) == "adamw_torch"
    assert _name(args, None, torch.optim.SGD(llama(num_hidden_layers=1).parameters())) == "SGD"
    args.optim = "galore_adamw"  # which needs a package, or optim_target_modules
    assert _name(args, None, torch.optim.SGD(llama(num_hidden_layers=1).parameters())) == "SGD"


def test_without_patching_the_model_that_model_init_makes_is_trained(tmp_path):
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None, max_steps=2, lr_scheduler_type="constant")
    trainer = Trainer(
        None, args, train_dataset=Tokens(), model_init=lambda: llama(num_hidden_layers=1),
        **s4.trainer_kwargs(None, args, stats_every=2),
    )  # fmt: skip
    for rate in (1e-2, 3e-3):  # as a hyperparameter search does: another model, another rate
        args.learning_rate = rate
        trainer.train()
        assert trainer.optimizer.optimizer.param_groups[0]["lr"] == rate
        assert trainer.optimizer.optimizer.names(0)[0].startswith("model.layers.0")
        assert moved(trainer, llama(num_hidden_layers=1))


def test_a_trainer_before_5_2_gives_groups_and_trains_the_model_that_was_given_or_is_refused(tmp_path):
    args, model = arguments(tmp_path), llama(num_hidden_layers=1)
    factory, kwargs = s4.trainer_kwargs(model, args)["optimizer_cls_and_kwargs"]
    assert factory([{"params": list(model.parameters())}], **kwargs).names(0)[0].startswith("model.layers.0")
    with pytest.raises(ValueError, match=r"trains another model than trainer_kwargs was given .*transformers 5\.2"):
        factory([{"params": list(llama().parameters())}], **kwargs)


@pytest.mark.parametrize("steps", [2, 6])
def test_a_training_of_nothing_is_stopped(tmp_path, steps):
    """The optimizer has the parameters of another model."""
    optimizer = s4.Shampoo4bit(llama(num_hidden_layers=1).parameters(), lr=1e-2)
    trainer = Trainer(llama(num_hidden_layers=1), arguments(tmp_path, max_steps=steps), train_dataset=Tokens(),
                      optimizers=(optimizer, None))  # fmt: skip
    nothing = pytest.raises(RuntimeError, match=rf"nothing is trained: in {min(steps, 3)} steps no parameter")
    with nothing:
        trainer.train()
    optimizer.has_seen_gradients = True  # in a training before, of a model whose adapters were replaced since
    with nothing:
        trainer.train()


class Renames(Trainer):
    """As SetFit's, whose losses have names of their own."""

    def log(self, logs, *rest, **more):
        super().log({("embedding_loss" if k == "loss" else k): v for k, v in logs.items()}, *rest, **more)


def test_figures_come_with_a_loss_of_another_name_and_not_with_an_evaluation(tmp_path):
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = Renames(llama(num_hidden_layers=1), args, train_dataset=Tokens(), eval_dataset=Tokens())
    trainer.train()
    history = trainer.state.log_history
    assert [entry.keys() >= KEYS for entry in history if "embedding_loss" in entry] == [True, True]
    assert not any(key in KEYS for entry in history if "eval_loss" in entry for key in entry)


def test_nothing_is_said_about_another_optimizer(tmp_path, capsys):
    trainer = train(arguments(tmp_path, optim="adamw_torch", optim_args=None, max_steps=1))
    assert not any(key.startswith("optim/") for entry in trainer.state.log_history for key in entry)
    assert "train_optimizer_state_mb" not in trainer.state.log_history[-1]


def test_sft_trainer_with_lora(tmp_path):
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    tokens = [{"input_ids": row.tolist()} for row in Tokens().tokens]
    args = trl.SFTConfig(
        output_dir=str(tmp_path), optim="shampoo4bit",
        optim_args="algorithm=shampoo,stats_every=2,roots_every=2", use_cpu=True,
        bf16=False, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        logging_steps=1, disable_tqdm=True, max_length=16, save_strategy="no", gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        llama(), args, train_dataset=datasets.Dataset.from_list(tokens), processing_class=tokenizer(),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, s4.Shampoo4bit)
    after = dict(trainer.model.named_parameters())
    assert len(before) == 8
    assert all(not torch.equal(before[name], after[name]) for name in before)


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")
