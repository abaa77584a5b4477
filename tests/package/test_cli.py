"""The command line: overview, dispatch, and one line for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_shampoo4 import cli
from hf_shampoo4.planning.sharding_names import SHARDINGS
from hf_shampoo4.training.config import field_names
from hf_shampoo4.training.library_fields import SFT, TRAINER, library_fields
from hf_shampoo4.utils import hub

ROOT = Path(__file__).resolve().parents[2]


IMPORTED = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None  # whoever imports them would fail
from hf_shampoo4.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as error:
    status = error.code
print(f"status {status}, {len(sys.modules)} modules")
"""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "\n    train "),
        *(([name, "--help"], 0, f"hf-shampoo4 {name}") for name in cli.COMMANDS),
        (["drive"], 2, "invalid choice: 'drive' (choose from"),
        (["train", "--max_step", "1"], 2, "unknown setting 'max_step': did you mean max_steps"),
        (["train", "--max_steps", "2", "stdlib_tiny"], 2, "CONFIG comes first"),
        (["train", "my"], 2, "config 'my' does not exist"),
        (["train", "stdlib_tiny", "gpt_stdlib_tiny"], 2, "CONFIG comes first, and there is one"),
        (["finetune", "lora", "--lora_rank", "3"], 2, "unknown setting 'lora_rank': did you mean local_rank or lora_r"),
        (["train", "--output_dir", "docs"], 2, "output_dir 'docs' is not empty: choose another"),
        (["plan", "llama_1b", "--sharding", "fsdp3"], 2, "invalid choice: 'fsdp3' (choose from"),
        (["race", "tiny", "--shard", "3/2"], 2, "'3/2' is not I/N with I < N"),
        (["checkpoint", "look", "."], 2, "invalid choice: 'look'"),
        (["bench", "--contestants", "adam"], 2, "unknown contestants adam; known: "),
    ],
    ids=str,
)
def test_help_and_a_typo_are_answered_before_anything_heavy_is_imported(words, status, said):
    """300 modules take a tenth of a second; torch alone has 1,000 and takes one."""
    done = subprocess.run([sys.executable, "-c", IMPORTED, *words], capture_output=True, text=True, cwd=ROOT)
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"status {status}, "), done.stderr
    assert int(last.split()[2]) < 300
    assert said in done.stdout + done.stderr


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n    {name}" in said for name in cli.COMMANDS)


def test_settings_read_from_the_libraries_source_are_those_of_their_dataclasses():
    from transformers import TrainingArguments
    from trl import ModelConfig, SFTConfig

    assert library_fields(TRAINER) == field_names(TrainingArguments)
    assert library_fields(SFT) == field_names(SFTConfig) | field_names(ModelConfig)
    assert library_fields(("transformers/training_args.py:Nothing",)) is None
    assert library_fields(("no_such_package/x.py:X",)) is None
    assert library_fields(("trl/trainer/sft_config.py:SFTConfig",)) is None  # made from a class that is not named


def test_shardings_are_those_that_plan_takes():
    from hf_shampoo4.planning.shardings import sharding_of

    assert all(sharding_of(name, 8, None).name == name for name in SHARDINGS)


@pytest.mark.parametrize("command", ["train", "demo", "bench", "errors", "plan", "race"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(command, tmp_path, capsys, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    first = {"plan": ["llama_tiny"], "race": ["seeds"]}.get(command, [])
    monkeypatch.setattr("hf_shampoo4.training.pretrain.load_text", lambda *_: pytest.fail("worked"))
    assert cli.main([command, *first, "--output_dir", str(file / "x")]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"error: {file}/x: Not a directory"


def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch, capsys):
    for name in ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    hub.offline_without_network()
    assert os.environ.pop("HF_HUB_OFFLINE") == "1"
    assert capsys.readouterr().err == "hub.invalid cannot be reached: looking for models and data on this disk alone\n"
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:1")
    hub.offline_without_network()
    assert "HF_HUB_OFFLINE" not in os.environ


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["drive"])
    assert caught.value.code == 2
    assert "invalid choice: 'drive' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "error: config 'nowhere.yaml' does not exist; allowed: a YAML file, or one of "),
        (["train", "stdlib_tiny", "--max_step", "1"], "error: unknown setting 'max_step': did you mean max_steps"),
        (["train", "--optim_args", "bits=5"], "error: option bits='5' is not allowed: it must be one of 4, 8, 32"),
        (
            ["train", "--dataset", "no.jsonl", "--output_dir", "{tmp}/x"],
            "error: dataset file 'no.jsonl' does not exist",
        ),
        (["train", "--model", "./no_model"], "cannot be loaded (there is no such file or folder)"),
        (["plan", "no/model.json"], "cannot be loaded (there is no such file or folder)"),
        (["train", "--output_dir", "something"], "error: something is a file: name a folder"),
        (["plan", "llama_tiny", "--output_dir", "something"], "error: something is a file: name a folder"),
        (["train", "."], "error: config '.' is a folder; allowed: a YAML file, or one of "),
        (["demo", "--output_dir", "{tmp}"], "is not empty: choose another, or --overwrite_output_dir"),
        (["demo", "--quick", "--optims", "sgdx", "--output_dir", "{tmp}/y"], "error: argument --optim: invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    assert cli.main([item.format(tmp=tmp_path) for item in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("command", "name", "refused", "allowed"),
    [
        ("race tiny_stdlib", "--seeds", "0 -1 1.5 x", "a whole number, 1 or more"),
        ("race tiny_stdlib", "--steps", "0 -1", "a whole number, 1 or more"),
        *(("bench", f"--{name}", "0 -1 x", "a whole number, 1 or more") for name in ("layers", "steps", "turning")),
        ("bench", "--threads", "0 -1", "a whole number, 1 or more"),
        *(("bench", name, "0 -1 nan inf x", "a number above 0") for name in ("--seconds", "--minutes")),
        ("demo", "--steps", "0 x", "a whole number, 1 or more"),
        ("demo", "--seed", "-1 4294967296", "a whole number, 0 to 4,294,967,295"),
        ("errors", "--order", "1 0 -1 x", "a whole number, 2 or more"),
        ("sweep stdlib_tiny", "--max_runs", "0", "a whole number, 1 or more"),
        ("sweep stdlib_tiny", "--factor", "1 nan inf", "a number above 1.01"),
        *(
            ("plan llama_tiny", f"--{name}", "0 -1 x", "a whole number, 1 or more")
            for name in ("world-size", "shards", "batch", "seq_len", "tokens-per-step")
        ),
        ("plan llama_tiny", "--lora", "-1 x", "a whole number, 0 or more"),
        ("plan llama_tiny", "--utilisation", "0 -1 nan 40", "a number above 0, 1 at most"),
    ],
)
def test_a_number_that_cannot_be_is_told(command, name, refused, allowed, capsys):
    for value in refused.split():
        with pytest.raises(SystemExit) as caught:
            cli.main([*command.split(), f"{name}={value}"])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 2
        assert f"{name}" in said
        assert said.endswith(f": {value!r} is not {allowed}")


def test_a_damaged_checkpoint_is_one_line(tmp_path, capsys):
    (tmp_path / "optimizer.pt").write_bytes(b"no archive")
    assert cli.main(["checkpoint", "inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'optimizer.pt'} cannot be read: ")


def test_unparsable_yaml_is_one_line(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("a: b: c\n")
    assert cli.main(["train", str(path)]) == 2
    assert f"error: config {str(path)!r} is not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["pretrain_llama", "pretrain_gpt"])
def test_the_scripts_train_their_default_with_overrides(script, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    smaller = {"pretrain_llama": "hidden_size=64,num_hidden_layers=1", "pretrain_gpt": "n_embd=64,n_layer=1,n_head=2"}
    options = {
        "dataset": text, "output_dir": tmp_path / "out", "model_overrides": smaller[script], "vocab_size": 280,
        "seq_len": 16, "max_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 2, "optim": "adamw_torch",
        "optim_args": "",
    }  # fmt: skip
    items = [f"--{key}={value}" for key, value in options.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *items]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == {"pretrain_llama": "llama", "pretrain_gpt": "gpt2"}[script]
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_loss"] > 0


def test_the_version(capsys):
    import hf_shampoo4

    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"hf-shampoo4 {hf_shampoo4.__version__}\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (PermissionError(13, "Permission denied", "/root/x"), 1, "error: /root/x: Permission denied\n"),
        (OSError(28, "No space left on device", "runs/a"), 1, "error: runs/a: No space left on device\n"),
        (IsADirectoryError(21, "Is a directory", "runs"), 1, "error: runs: Is a directory\n"),
        (KeyboardInterrupt(), 130, "\nreport: interrupted; what was written is kept\n"),
    ],
)
def test_what_a_disk_or_a_user_ends_is_one_line(error, status, said, capsys, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr("hf_shampoo4.training.run_page.main", fail)
    assert cli.main(["report", "x"]) == status
    assert capsys.readouterr().err == said
