"""Files and settings of somebody else's cannot run code, read what they should not, or reach for the network."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.checkpointing.convert import read
from hf_shampoo4.checkpointing.formats import check_metadata
from hf_shampoo4.exceptions import CheckpointError, ConfigError, OptionError
from hf_shampoo4.options import resolve
from hf_shampoo4.training.config import read_config
from hf_shampoo4.training.run_page import page, read_run
from tests.support.tiny import python

PACKAGE = Path(__file__).resolve().parents[2] / "hf_shampoo4"
SOURCES = sorted(PACKAGE.rglob("*.py")) + sorted((PACKAGE.parent / "scripts").glob("*.py"))


class Owned:
    """What unpickling would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_nothing_loads_a_pickle(file: Path) -> None:
    tree = ast.parse(file.read_text())
    for call in calls(tree):
        name = ast.unparse(call.func)
        if name == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("weights_only") == "True", f"{file.name}:{call.lineno}"
        if name == "np.load":
            assert "allow_pickle=False" in ast.unparse(call)
        assert not re.search(r"^(pickle|dill|joblib|shelve|marshal)\.load|^eval$|^exec$", name), (
            f"{file.name}:{call.lineno}: {name}"
        )
        assert name not in ("os.system", "yaml.unsafe_load", "yaml.full_load"), f"{file.name}:{call.lineno}"
        if name == "yaml.load":
            assert any(keyword.arg == "Loader" for keyword in call.keywords)
        assert not any(k.arg == "shell" or k.arg == "trust_remote_code" for k in call.keywords), (
            f"{file.name}:{call.lineno}"
        )
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert "pickle" not in imported or file.name == "formats.py"  # whose unpickler builds torch's descriptions only


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin"])
def test_a_checkpoint_cannot_run_code(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "owned"
    torch.save({"state": {}, "param_groups": [Owned(mark)]}, tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path)
    assert not mark.exists()


def test_a_packed_state_cannot_run_code(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    torch.save({0: Owned(mark)}, tmp_path / "state")
    optimizer = Shampoo4bit([nn.Parameter(torch.ones(4, 4))])
    group = {**optimizer.state_dict()["param_groups"][0], "packed_state": (tmp_path / "state").read_bytes()}
    with pytest.raises(CheckpointError, match="packed state cannot be read"):
        optimizer.load_state_dict({"state": {}, "param_groups": [group]})
    assert not mark.exists()


def test_deepspeeds_files_cannot_run_code(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    (tmp_path / "global_step1").mkdir()
    (tmp_path / "latest").write_text("global_step1")
    file = tmp_path / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Owned(mark)}, file)
    for latest in ("global_step1", str(tmp_path / "elsewhere" / ".." / "global_step1")):  # its last part only
        (tmp_path / "latest").write_text(latest)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read(tmp_path)
    assert not mark.exists()


def test_a_sharded_checkpoints_table_of_contents_cannot_run_code(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    folder = tmp_path / "optimizer_0"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Owned(mark)))
    with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir"):
        read(tmp_path)
    (folder / ".metadata").write_bytes(b"\x80\x04\x8c.torch.distributed.checkpoint.filesystem\x8c\tos.system\x93.")
    with pytest.raises(CheckpointError):
        check_metadata(folder)
    (folder / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_metadata(folder)
    assert not mark.exists()


def test_what_torch_writes_is_let_through(tmp_path: Path) -> None:
    from torch.distributed import checkpoint

    state = {"a": torch.ones(3, 4), "b": torch.ones(2, dtype=torch.uint8), "c": [1, "x", (2.0, None)]}
    checkpoint.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    check_metadata(tmp_path / "dcp")


# -------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [{0}]",
        "bits: !!python/object/apply:os.mkdir [{0}]",
        "!!python/name:os.system ''",
    ],
)
def test_yaml_cannot_run_code(tmp_path: Path, text: str) -> None:
    mark = tmp_path / "owned"
    file = tmp_path / "options.yaml"
    file.write_text(text.format(mark))
    with pytest.raises(OptionError, match="is not valid YAML"):
        resolve({"config": str(file)})
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_config(file)
    assert not mark.exists()


def test_a_small_yaml_file_cannot_fill_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    file.write_text("\n".join([*lines, "bits: *a29"]))
    with pytest.raises(OptionError, match=r"references .* are not allowed"):
        resolve({"config": str(file)})


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/", "~nobody-of-that-name/x", "a\x00b", "/etc/hostname"])
def test_config_reads_small_yaml_files_only(path: str) -> None:
    """And says nothing of what a file of another kind holds but its type."""
    with pytest.raises(OptionError) as caught:
        resolve({"config": path})
    secret = Path("/etc/hostname").read_text().strip() if path == "/etc/hostname" else "\x00never"
    assert len(secret) < 3 or secret not in str(caught.value)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("# " + "x" * (1 << 20))
    with pytest.raises(OptionError, match="is larger than"):
        resolve({"config": str(file)})


# --------------------------------------------------------------------------------------------------------- reports


def test_a_runs_page_has_no_code_of_the_run(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>$\\alpha$"
    folder = tmp_path / evil.replace("/", "-")
    folder.mkdir()
    log = [{"step": i, "loss": 1.0 / i, evil: evil, "eval_loss": 1.0} for i in range(1, 4)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
    html = page([read_run(folder), read_run(other)])
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize(
    "entry", [{"step": "<script>", "loss": 1.0}, {"step": 1, "loss": "<script>alert(1)</script>"}, ["x"], 3, None]
)
def test_what_is_no_log_is_refused(tmp_path: Path, entry: object) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(entry))
    with pytest.raises(ConfigError, match="cannot be read"):
        page([read_run(tmp_path)])


# --------------------------------------------------------------------------------------------------------- network

OFFLINE = """
import socket, sys
def refuse(*a, **k): raise AssertionError("network")
def connect(self, address):
    if self.family != socket.AF_UNIX: refuse()
    return real(self, address)
real = socket.socket.connect
socket.socket.connect, socket.getaddrinfo, socket.create_connection = connect, refuse, refuse
from hf_shampoo4.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "llama_1b", "--world-size", "8"],
        ["train", "stdlib_tiny", "--max_steps", "1", "--max_train_documents", "40", "--vocab_size", "300",
         "--model_overrides", "hidden_size=32,intermediate_size=64,num_hidden_layers=1,num_attention_heads=2,"
         "num_key_value_heads=2", "--max_validation_sequences", "2", "--report_to", "none", "--eval_strategy", "no",
         "--seq_len", "32", "--per_device_train_batch_size", "1"],
    ],
    ids=["plan", "train"],
)  # fmt: skip
def test_no_network_without_a_name_that_asks_for_it(tmp_path: Path, words: list[str]) -> None:
    output = ["--output_dir", str(tmp_path / "run")] if words[0] == "train" else []
    done = python("-c", OFFLINE, *words, *output, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="0")
    assert done.returncode == 0, done.stderr[-2000:]
