"""The command line: overview, dispatch, and one line for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_shampoo4 import cli

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = "import sys; from hf_shampoo4.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("False\n")
    assert all(f"\n    {name}" in done.stdout for name in cli.COMMANDS)


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
        (["train", "--model", "./no_model"], "error: model './no_model' cannot be loaded"),
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
