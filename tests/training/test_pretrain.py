"""Configurations and runs of `hf_shampoo4.training.pretrain`, on a tiny model and a few lines of text."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from hf_shampoo4.exceptions import ConfigError, OptionError
from hf_shampoo4.training.arguments import ModelArguments
from hf_shampoo4.training.commands import train as main
from hf_shampoo4.training.config import config_root, read_config
from hf_shampoo4.training.model import build_model, load_model_config
from hf_shampoo4.training.output_dir import prepare_output
from hf_shampoo4.training.pretrain import length, parse, run
from tests.support.tiny import python


@pytest.fixture
def settings(tmp_path):
    """A run of seconds."""
    text = tmp_path / "texts.jsonl"
    if not text.exists():
        rows = ({"text": " ".join(f"word{(i * j) % 37}" for j in range(60))} for i in range(60))
        text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": "llama_tiny",
        "model_overrides": "hidden_size=64,intermediate_size=96,num_hidden_layers=1",
        "dataset": str(text),
        "cache_dir": str(tmp_path / "cache"),
        "vocab_size": 300,
        "seq_len": 16,
        "max_validation_sequences": 8,
        "output_dir": str(tmp_path / "out"),
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
    }


def losses(result):
    return [entry["loss"] for entry in result.trainer.state.log_history if "loss" in entry]


def weights(folder):
    return LlamaForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("optim", ["adamw_torch", "shampoo4bit", "adamw4bit"])
def test_a_run_writes_model_checkpoints_and_metrics(optim, settings, tmp_path):
    result = run(parse({**settings, "optim": optim}))
    written = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert written["eval_loss"] == result.metrics["eval_loss"]
    assert written["perplexity"] == pytest.approx(torch.tensor(written["eval_loss"]).exp().item(), rel=1e-4)
    assert {"train_loss", "train_runtime"} <= set(written)
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    assert len(weights(tmp_path / "out")["model.embed_tokens.weight"]) == len(result.trainer.processing_class)


def test_what_will_be_trained_and_how_long_is_said_before(settings, capsys):
    run(parse({**settings, "max_steps": 1, "gradient_accumulation_steps": 3}))
    said = capsys.readouterr().out
    assert "parameters by adamw_torch, 1 steps of 6 sequences, into " in said
    assert said.index("text: ") < said.index("training: ") < said.index("train_runtime")


def test_optimizers_start_from_the_same_weights_and_batches(settings, tmp_path):
    first = [
        losses(run(parse({**settings, "optim": optim, "max_steps": 1, "output_dir": str(tmp_path / optim)})))
        for optim in ("adamw_torch", "shampoo4bit")
    ]
    assert first[0] == first[1]
    other = run(parse({**settings, "max_steps": 1, "seed": 1, "output_dir": str(tmp_path / "other")}))
    assert losses(other) != first[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_equals_an_unbroken_one(streaming, settings, tmp_path, capsys):
    settings |= {
        "optim": "shampoo4bit",
        "optim_args": "algorithm=shampoo,stats_every=1,roots_every=2",
        "streaming": streaming,
    }
    whole = run(parse(settings))
    broken = {**settings, "output_dir": str(tmp_path / "broken")}
    run(parse(broken))
    for name in ("checkpoint-4", "model.safetensors"):
        subprocess.run(["rm", "-r", str(tmp_path / "broken" / name)], check=True)
    resumed = run(parse(broken, ["--resume_from_checkpoint", "auto"]))
    assert f", resumed from {tmp_path / 'broken'}/checkpoint-" in capsys.readouterr().out
    assert losses(resumed) == losses(whole)
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(value, weights(tmp_path / "broken")[name]), name


def test_a_stream_that_begins_anew_gives_whole_steps(settings, tmp_path):
    """Of passes that end, the Trainer left the micro-batches of an unfinished step in the next gradient."""
    same, held_out = tmp_path / "same.jsonl", tmp_path / "held_out.jsonl"
    same.write_text((json.dumps({"text": "word " * 200}) + "\n") * 5)
    held_out.write_text(same.read_text())
    settings |= {"dataset": str(same), "validation_dataset": str(held_out), "streaming": True, "seq_len": 8}
    settings |= {"gradient_accumulation_steps": 4, "learning_rate": 0.0, "max_steps": 60}
    log = run(parse(settings)).trainer.state.log_history
    norms = [entry["grad_norm"] for entry in log if "grad_norm" in entry]
    assert len(norms) == 60
    assert max(norms) < 1.2 * min(norms)


def test_a_stream_resumes_in_its_second_pass(settings, tmp_path):
    settings |= {"streaming": True, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 3}
    settings |= {"lr_scheduler_type": "constant", "save_steps": 3}
    whole = run(parse(settings))
    broken = {**settings, "output_dir": str(tmp_path / "broken")}
    run(parse(broken, ["--max_steps", "3"]))
    assert losses(run(parse(broken, ["--resume_from_checkpoint", "auto"]))) == losses(whole)


def test_a_folder_with_content_is_not_overwritten(settings, tmp_path):
    old = tmp_path / "out" / "checkpoint-900"
    old.mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not empty: choose another, or --overwrite_output_dir"):
        run(parse(settings))
    run(parse(settings, ["--overwrite_output_dir"]))
    assert not old.exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [("true", "there is no complete checkpoint in"), ("/nowhere", r"'/nowhere' does not exist; allowed: true, auto")],
)
def test_a_missing_checkpoint_is_named(asked, message, settings):
    with pytest.raises(ConfigError, match=message):
        run(parse(settings, ["--resume_from_checkpoint", asked]))


@pytest.mark.parametrize("change", ["hidden_size=32", "hidden_size=64,vocab_size=400"])
def test_a_checkpoint_of_another_model_is_told_in_one_line(change, settings):
    settings |= {"max_steps": 2, "model_overrides": "hidden_size=64,num_hidden_layers=1"}
    run(parse(settings))
    settings |= {"model_overrides": f"num_hidden_layers=1,{change}", "resume_from_checkpoint": "auto", "max_steps": 3}
    with pytest.raises(ConfigError, match=r"checkpoint-2' do not fit the model \(.*weight: .*\): give the settings"):
        run(parse(settings))


def test_missing_data_is_told_before_a_model_is_built(settings, monkeypatch):
    monkeypatch.setattr("hf_shampoo4.training.pretrain.build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(ConfigError, match=r"dataset file 'nowhere.txt' does not exist .* allowed: 'stdlib'"):
        run(parse({**settings, "dataset": "nowhere.txt"}))


# ---------------------------------------------------------------------------------------------------- tokenizers


def vocabulary(folder):
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def more_text(settings):
    """Rows of other words, of which a BPE would make other tokens."""
    with open(settings["dataset"], "a") as file:
        file.writelines(json.dumps({"text": f"quick brown zebras {i} hum over foxes"}) + "\n" for i in range(60))


def test_a_resumed_run_keeps_its_tokenizer(settings, tmp_path, capsys):
    """Text has come to the file: a new BPE would number tokens otherwise than the embedding knows them."""
    out = tmp_path / "out"
    run(parse(settings))
    before = vocabulary(out)
    more_text(settings)
    again = parse({**settings, "max_steps": 6, "vocab_size": 310}, ["--resume_from_checkpoint", "auto"])
    assert len(run(again).trainer.processing_class) == 288  # all that this text gives
    assert vocabulary(out) == vocabulary(out / "checkpoint-6") == before
    said = f"tokenizer: that of {out}/checkpoint-4, 288 tokens, not vocab_size=310, which is for a new one\n"
    assert said in capsys.readouterr().out
    fresh = run(parse({**settings, "max_steps": 1, "output_dir": str(tmp_path / "fresh")}))
    assert fresh.trainer.processing_class.get_vocab() != before


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(settings, tmp_path):
    out = tmp_path / "out"
    run(parse({**settings, "max_steps": 2}))
    resumed = {**settings, "resume_from_checkpoint": "auto"}
    with pytest.raises(ConfigError, match=r"vocab_size=280, but the tokenizer of .*checkpoint-2'.* has 288 tokens"):
        run(parse({**resumed, "vocab_size": 280}))
    more_text(settings)
    run(parse({**settings, "max_steps": 1, "output_dir": str(tmp_path / "other")}))
    with pytest.raises(ConfigError, match=r"other' numbers tokens otherwise than that of .*checkpoint-2', with which"):
        run(parse({**resumed, "tokenizer": str(tmp_path / "other")}))
    (out / "checkpoint-2" / "tokenizer.json").unlink()  # as where weights are sharded: its run's is taken
    assert run(parse({**resumed, "tokenizer": str(out)})).trainer.processing_class.get_vocab() == vocabulary(out)
    for folder in (out, out / "checkpoint-4"):
        (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer.json in .*checkpoint-4' or its run's folder: name the tokeni"):
        run(parse(resumed))


def test_a_checkpoint_without_whole_weights_gets_its_tokenizer(settings, tmp_path, monkeypatch):
    """The Trainer writes it beside whole weights alone."""
    monkeypatch.setattr(
        "transformers.Trainer.save_model", lambda _, folder=tmp_path, **__: os.makedirs(folder, exist_ok=True)
    )
    run(parse({**settings, "max_steps": 2, "save_steps": 2}))
    assert (tmp_path / "out" / "checkpoint-2" / "tokenizer.json").is_file()


def test_weights_that_are_there_keep_their_tokenizer(settings, tmp_path, capsys):
    run(parse({**settings, "max_steps": 1}))
    more_text(settings)
    begun = {**settings, "model": str(tmp_path / "out"), "model_overrides": "", "init_from_pretrained": True}
    begun |= {"max_steps": 1, "output_dir": str(tmp_path / "begun")}
    run(parse(begun))
    assert vocabulary(tmp_path / "begun") == vocabulary(tmp_path / "out")
    assert f"tokenizer: that of {tmp_path / 'out'}, 288 tokens, not vocab_size=300, " in capsys.readouterr().out
    begun |= {"overwrite_output_dir": True}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(ConfigError, match=r"out' comes without a tokenizer .*: name the one that it was trained with"):
        run(parse(begun))
    assert len(run(parse({**begun, "tokenizer": str(tmp_path / "begun")})).trainer.processing_class) == 288


# ---------------------------------------------------------------------------------------------------- configuration


def test_yaml_then_overrides(settings, tmp_path):
    path = tmp_path / "run.yaml"
    text = yaml.safe_dump({**settings, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "streaming": False, "dtype": None})
    path.write_text(text + "adam_epsilon: 1e-6\nlabel_names: [labels]\n")  # YAML reads 1e-6 as text
    config = parse(path, ["--max_steps", "9", "--weight-decay=0.5", "--streaming"])
    assert config.training.adam_epsilon == 1e-6
    assert config.training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert config.training.label_names == ["labels"]
    assert (config.training.max_steps, config.training.weight_decay) == (9, 0.5)
    assert config.data.streaming
    assert config.model.dtype == "float32"


def test_total_batch_size_sets_accumulation(settings):
    assert parse({**settings, "total_batch_size": 12}).training.gradient_accumulation_steps == 6
    with pytest.raises(ConfigError, match="total_batch_size=13 is not a multiple of per_device_train_batch_size"):
        parse({**settings, "total_batch_size": 13})
    with pytest.raises(ConfigError, match="total_batch_size=12 would not be kept by auto_find_batch_size"):
        parse({**settings, "total_batch_size": 12, "auto_find_batch_size": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--learning_rat", "1"], r"unknown setting 'learning_rat': did you mean learning_rate"),
        (["--zzz", "1"], r"unknown setting 'zzz': ours are model, .*seq_len.*TrainingArguments"),
        (["--max_steps", "many"], r"argument --max_steps.*invalid int value: 'many'"),
        (["--optim", "shampoo5bit"], r"argument --optim: invalid choice: .*shampoo5bit"),
        (["--dtype", "int8"], r"dtype='int8' is not allowed: it must be one of float32, bfloat16"),
        (["stray"], r"stray"),
        (["--warmup_steps", "-1"], r"warmup_steps"),
        (["--max_steps", "0"], r"max_steps=0 is not allowed: it must be >= 1, or -1: num_train_epochs decide"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], r"num_train_epochs=0.0 is not allowed"),
        (["--per_device_train_batch_size", "0"], r"per_device_train_batch_size=0 is not allowed: it must be >= 1"),
        (["--per_device_eval_batch_size", "-1"], r"per_device_eval_batch_size=-1 is not allowed"),
        (["--gradient_accumulation_steps", "0"], r"gradient_accumulation_steps=0 is not allowed"),
        (["--seed", "-1"], r"seed=-1 is not allowed: it must be 0 to 4,294,967,295"),
        (["--data_seed", "4294967296"], r"data_seed=4294967296 is not allowed"),
        (["--total_batch_size", "0"], r"total_batch_size=0 is not allowed: it must be >= 1, or left out"),
        (["--max_train_documents", "0"], r"max_train_documents=0 is not allowed"),
        (["--max_validation_sequences", "-1"], r"max_validation_sequences=-1 is not allowed"),
        (["--preprocessing_workers", "0"], r"preprocessing_workers=0 is not allowed"),
    ],
)
def test_a_bad_setting_is_named(change, message, settings):
    with pytest.raises(ConfigError, match=message):
        parse(settings, change)


def test_a_bad_option_of_the_optimizer_is_told_at_once(settings):
    with pytest.raises(OptionError, match=r"unknown option 'block_sise' \(did you mean 'block_size'"):
        parse({**settings, "optim": "shampoo4bit", "optim_args": "block_sise=3"})


def test_bad_config_files(tmp_path):
    with pytest.raises(ConfigError, match=r"'nowhere' does not exist; allowed: a YAML file, or one of .*stdlib_tiny"):
        read_config("nowhere")
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1, 2\nb: 3")
    with pytest.raises(ConfigError, match=r"bad.yaml' is not valid YAML: .*line 2"):
        read_config(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="must map settings to values, not list"):
        read_config(path)


# ---------------------------------------------------------------------------------------------------- models


def test_model_overrides_and_types():
    arguments = ModelArguments(model_overrides="hidden_size=64, num_hidden_layers=1,hidden_act=gelu")
    config = load_model_config(arguments)
    assert (config.hidden_size, config.num_hidden_layers, config.hidden_act) == (64, 1, "gelu")
    model = build_model(ModelArguments(dtype="bfloat16", tie_word_embeddings=True), 300)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_model_config(ModelArguments(model="", model_type="gpt2")).n_layer == 12


@pytest.mark.parametrize("source", [{"model": "llama_tiny"}, {"model": "", "model_type": "llama"}])
def test_what_follows_from_an_overridden_value_follows(source):
    """The preset's own heads have 32 entries; those of a hidden size of 256 in four heads have 64."""
    changes = "hidden_size=256,num_attention_heads=4,num_key_value_heads=4"
    assert load_model_config(ModelArguments(**source, model_overrides=changes)).head_dim == 64
    assert load_model_config(ModelArguments(**source, model_overrides=f"{changes},head_dim=32")).head_dim == 32


def test_overrides_that_do_not_fit_each_other_are_named():
    with pytest.raises(ConfigError, match="model_overrides 'hidden_size=130' do not fit the llama configuration"):
        load_model_config(ModelArguments(model_overrides="hidden_size=130"))


def test_special_tokens_of_another_tokenizer_are_left_out(tmp_path):
    config = load_model_config(ModelArguments(model_overrides="pad_token_id=4000,bos_token_id=3999"))
    config.save_pretrained(tmp_path)
    model = build_model(ModelArguments(model=str(tmp_path), model_overrides="hidden_size=64"), 300, 7)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (None, None, 7)
    assert build_model(ModelArguments(model_overrides="vocab_size = 512"), 300).config.vocab_size == 512


def test_lists_and_mappings_in_a_file(settings):
    mapped = {
        "optim": "shampoo4bit",
        "optim_args": {
            "block_size": 512,
            "row_splits": [32, 32],
            "shard_state": True,
            "rates": {"head": 2, "vector": 0.5},
        },
    }
    overrides = {"model_overrides": {"hidden_size": 64, "hidden_act": "gelu"}}
    lists = {"report_to": ["tensorboard"], "optim_target_modules": ["q_proj", "v_proj"], "lr_scheduler_kwargs": {}}
    config = parse({**settings, **mapped, **overrides, **lists})
    assert config.training.optim_args == "block_size=512,row_splits=32;32,shard_state=true,rates=head:2;vector:0.5"
    assert config.model.model_overrides == "hidden_size=64,hidden_act=gelu"
    assert (config.training.report_to, config.training.optim_target_modules) == (["tensorboard"], ["q_proj", "v_proj"])
    assert parse({**settings, "report_to": []}).training.report_to == []
    overridden = parse({**settings, **lists}, ["--optim_target_modules", "k_proj", "--report_to", "none"])
    assert (overridden.training.optim_target_modules, overridden.training.report_to) == ("k_proj", [])
    with pytest.raises(ConfigError, match="unknown setting 'reports'"):
        parse({**settings, "reports": ["x"]})


def test_models_from_a_file_and_a_folder(tmp_path):
    model = build_model(ModelArguments(model_overrides="hidden_size=64"), 300)
    model.save_pretrained(tmp_path)
    assert load_model_config(ModelArguments(model=str(tmp_path / "config.json"))).hidden_size == 64
    again = build_model(ModelArguments(model=str(tmp_path), init_from_pretrained=True), 300)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ConfigError, match="vocab_size=300, too small for a tokenizer of 301 tokens"):
        build_model(ModelArguments(model=str(tmp_path), init_from_pretrained=True), 301)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no-one/nothing"}, r"model 'no-one/nothing' cannot be loaded .* one of .*gpt2_124m, .*llama_tiny"),
        ({"model_overrides": "hiden_size=3"}, "'hiden_size=3' is not key=value .* did you mean hidden_size"),
        ({"model": "", "model_type": "no_such"}, "model 'no_such' cannot be loaded"),
    ],
)
def test_a_bad_model_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_model_config(ModelArguments(**changes))


@pytest.mark.parametrize(
    ("examples", "changes", "said"),
    [
        (range(19), {}, "2 epochs (2 steps)"),
        (range(65), {"gradient_accumulation_steps": 2}, "2 epochs (2 steps)"),
        (range(129), {"gradient_accumulation_steps": 2}, "2 epochs (4 steps)"),
        (range(129), {"dataloader_drop_last": True}, "2 epochs (4 steps)"),
        (iter(range(19)), {}, "2 epochs"),
        (range(19), {"max_steps": 1000}, "1,000 steps"),
    ],
)
def test_how_long_a_training_will_be_is_said_in_steps(examples, changes, said):
    args = {"max_steps": -1, "num_train_epochs": 2.0, "train_batch_size": 64, "world_size": 1}
    args |= {"gradient_accumulation_steps": 1, "dataloader_drop_last": False, **changes}
    assert length(SimpleNamespace(args=SimpleNamespace(**args), train_dataset=examples)) == said


# ---------------------------------------------------------------------------------------------------- processes


def test_torchrun_gives_the_losses_of_one_process(settings, tmp_path):
    settings |= {"optim": "shampoo4bit", "total_batch_size": 4, "save_strategy": "no"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "ddp_backend": "gloo"}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = python(*launcher, "-m", "hf_shampoo4.cli", "train", path)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "out" / "all_results.json").read_text())
    one = run(parse({**settings, "output_dir": str(tmp_path / "one")}))
    assert two["eval_loss"] == pytest.approx(one.metrics["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_sharded_weights_are_one_model_at_the_end(settings, tmp_path, capsys):
    """By fsdp2.yaml, whose checkpoints are sharded; the evaluation leaves some weights in bfloat16 on all ranks."""
    settings |= {"optim": "shampoo4bit", "eval_strategy": "steps", "eval_steps": 2}
    settings["model_overrides"] += ",tie_word_embeddings=true"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, "use_cpu": False}))
    launch = ["-m", "accelerate.commands.launch", "--config_file", config_root() / "accelerate" / "fsdp2.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "tests.support.trained"]
    done = python(*launch, tmp_path / "run.yaml", tmp_path / "trained.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    trained, written = torch.load(tmp_path / "trained.pt"), weights(tmp_path / "out")
    assert {weight.dtype for weight in written.values()} == {torch.float32}
    assert trained.keys() == written.keys()
    assert all(torch.equal(trained[name], written[name]) for name in trained)
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir()
    assert not (checkpoint / "model.safetensors").exists()
    run(parse({**settings, "resume_from_checkpoint": "auto"}))
    assert "already trained: " in capsys.readouterr().out


def test_help_lists_our_settings(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    assert "--seq_len (256): Tokens of a sequence." in shown
    assert "--total_batch_size" in shown


def test_a_command_of_this_package_trains_with_shampoo4bit(tmp_path):
    assert parse({"output_dir": str(tmp_path)}).training.optim == "shampoo4bit"
    assert parse({"output_dir": str(tmp_path), "optim": "adamw_torch"}).training.optim == "adamw_torch"


def test_overwriting_leaves_no_figure_of_the_run_before(tmp_path):
    (tmp_path / "all_results.json").write_text('{"train_optimizer_state_mb": 1}')
    config = parse({"output_dir": str(tmp_path)}, ["--overwrite_output_dir", "true"])
    assert prepare_output(config.run, config.training) is None
    assert not (tmp_path / "all_results.json").exists()


def test_a_finished_training_that_is_resumed_stays_as_it_is(settings, capsys):
    """A job that is queued again: the Trainer would train one step more, each time."""
    first = run(parse({**settings, "eval_strategy": "no"}))
    out = Path(settings["output_dir"])
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for again in ({}, {"max_steps": 3}):
        result = run(parse({**settings, **again, "resume_from_checkpoint": "auto", "eval_strategy": "no"}))
        assert result.metrics == json.loads((out / "all_results.json").read_text())
        assert "already trained: " in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert first.trainer.state.global_step == 4
    longer = run(parse({**settings, "max_steps": 6, "resume_from_checkpoint": "auto", "eval_strategy": "no"}))
    assert longer.trainer.state.global_step == 6


@pytest.mark.parametrize("max_steps", [4, 3])
def test_a_training_that_was_killed_after_its_last_step_is_brought_to_its_end(settings, capsys, max_steps):
    settings["lr_scheduler_type"] = "constant"
    whole = run(parse(settings))
    out = Path(settings["output_dir"])
    end = weights(out)
    for name in ("model.safetensors", *ENDS, "trainer_state.json"):
        (out / name).unlink()
    again = {**settings, "resume_from_checkpoint": "auto", "max_steps": max_steps}
    ended = run(parse(again))
    assert "only what comes after the last step is done" in capsys.readouterr().out
    assert ended.metrics["eval_loss"] == whole.metrics["eval_loss"]
    assert "train_loss" not in ended.metrics
    state, before = ended.trainer.state, whole.trainer.state
    assert (state.global_step, state.num_train_epochs) == (4, before.num_train_epochs)
    assert [log for log in state.log_history if "eval_loss" not in log] == before.log_history[:4]
    assert weights(out).keys() == end.keys()
    assert all(torch.equal(weight, end[name]) for name, weight in weights(out).items())
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    run(parse(again))
    assert "and nothing is done" in capsys.readouterr().out
    (out / "eval_results.json").unlink()  # as if it had been killed in its evaluation
    assert run(parse(again)).metrics["eval_loss"] == whole.metrics["eval_loss"]
    assert "only what comes after" in capsys.readouterr().out
    os.utime(out / "checkpoint-4" / "trainer_state.json")  # as if those results were of an earlier end
    run(parse(again))
    assert "only what comes after" in capsys.readouterr().out


ENDS = ("all_results.json", "train_results.json", "eval_results.json")


def test_another_optimizers_checkpoint_is_refused_in_a_line(settings):
    run(parse({**settings, "optim": "shampoo4bit"}))
    again = {**settings, "optim": "adamw_torch", "resume_from_checkpoint": "auto", "max_steps": 6}
    with pytest.raises(ConfigError, match=r"optimizer state of .*checkpoint-4' is none of optim=adamw_torch"):
        run(parse(again))


def test_who_goes_back_to_a_checkpoint_leaves_what_came_after_it(settings, tmp_path):
    """Or `auto` would take the branch that was left; nothing is lost."""
    run(parse(settings))
    out, named = Path(settings["output_dir"]), {"resume_from_checkpoint": f"{settings['output_dir']}/checkpoint-2"}
    run(parse({**settings, **named, "max_steps": 3, "save_steps": 1}))
    assert {path.name for path in out.glob("*checkpoint-*")} == {"checkpoint-2", "checkpoint-3", "left-checkpoint-4"}
    again = run(parse({**settings, "resume_from_checkpoint": "auto", "max_steps": 5, "save_steps": 5}))
    assert again.trainer.state.log_history[-2]["step"] == 5
    other = tmp_path / "other"
    other.mkdir()
    (other / "all_results.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not empty: choose another"):
        run(parse({**settings, **named, "output_dir": str(other)}))


def test_a_masked_language_models_loss_is_a_mean_however_its_batch_is_made(settings):
    """BERT takes the mean of its batch and is not told of the others, whatever its signature promises."""
    bert = {"model": "bert_tiny", "mask_fraction": 0.3, "max_steps": 1, "save_strategy": "no"}
    overrides = f"{settings['model_overrides']},hidden_dropout_prob=0,attention_probs_dropout_prob=0"
    found = []
    for batch, accumulated in ((8, 1), (2, 4)):
        given = {**settings, **bert, "model_overrides": overrides, "overwrite_output_dir": True, "seed": 1}
        given |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        log = run(parse(given)).trainer.state.log_history[0]
        found.append((log["loss"], log["grad_norm"]))
    (loss, norm), (as_loss, as_norm) = found
    assert as_loss == pytest.approx(loss, rel=0.05)  # 4 times before
    assert as_norm == pytest.approx(norm, rel=0.5)  # of other tokens that are hidden; 4 times before


def test_a_routers_loss_counts_once_however_a_batch_is_made(settings):
    """That of a mixture of experts is a batch's mean too; here it is nearly all of the loss."""
    found = []
    for batch, accumulated in ((8, 1), (2, 4)):
        given = {**settings, "model": "mixtral_tiny", "max_steps": 1, "save_strategy": "no", "seed": 1}
        given["model_overrides"] += ",output_router_logits=true,router_aux_loss_coef=100"
        given |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        log = run(parse({**given, "overwrite_output_dir": True})).trainer.state.log_history[0]
        found.append(log["loss"])
    assert found[1] == pytest.approx(found[0], rel=0.05)  # 4 times before
    assert found[0] > 100


def test_a_masked_language_model_learns_what_is_hidden(settings):
    """Its evaluation is the same each time, and a model without such a head is refused."""
    bert = {
        "model": "bert_tiny",
        "mask_fraction": 0.3,
        "optim": "shampoo4bit",
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    result = run(parse({**settings, **bert, "learning_rate": 1e-2, "max_steps": 8}))
    model = result.trainer.model
    assert type(model).__name__ == "BertForMaskedLM"
    assert model.config.vocab_size == len(result.trainer.processing_class)
    assert result.trainer.processing_class.mask_token == "<|mask|>"
    evaluated = [entry["eval_loss"] for entry in result.trainer.state.log_history if "eval_loss" in entry]
    assert evaluated[-1] == evaluated[-2] < evaluated[0]
    with pytest.raises(ConfigError, match="'llama_tiny' is of type llama, which is no masked language model"):
        run(parse({**settings, "mask_fraction": 0.3, "overwrite_output_dir": True}))
    with pytest.raises(ConfigError, match="'bert_tiny' is an encoder, which sees the token that it is to predict"):
        run(parse({**settings, **bert, "mask_fraction": 0.0, "overwrite_output_dir": True}))
