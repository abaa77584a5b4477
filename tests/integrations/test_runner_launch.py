"""python -m hf_shampoo4: unmodified scripts, modules and commands, in one process and in two."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from hf_shampoo4.integrations.launch import SITE, main
from tests.support.tiny import python

TRAIN = '''
"""Knows nothing of hf_shampoo4."""
import json, sys
from dataclasses import dataclass
import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

@dataclass
class ScriptArguments:
    result: str

def main():
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(0)
    torch.set_num_threads(1)
    rows = torch.randint(256, (16, 16))
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64)

    def train(checkpoint):
        set_seed(0)
        model = LlamaForCausalLM(config)
        trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "parameters": [p.double().sum().item() for p in model.parameters()],
        }

    trainer, found = train(None)
    found["resumed"] = train(f"{args.output_dir}/checkpoint-3")[1]
    found["optimizer"] = type(trainer.optimizer.optimizer).__name__
    found["bytes"] = trainer.state.log_history[-1].get("train_optimizer_state_mb")
    found["argv"], found["world"] = sys.argv[0], args.world_size
    with open(f"{script.result}.{args.process_index}", "w") as file:
        json.dump(found, file)

if __name__ == "__main__":
    main()
'''

PARSE = '''
"""Knows nothing of hf_shampoo4, and starts no training."""
import os, sys
os.environ["SET_BEFORE_IMPORT"] = str("transformers" in sys.modules)
from transformers import HfArgumentParser, TrainingArguments
words = sys.argv[2:]
args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)
with open(sys.argv[1], "w") as file:
    print(args.optim.value, __name__, os.environ["SET_BEFORE_IMPORT"], file=file)
'''

FLAGS = [
    "--use_cpu", "--optim", "shampoo4bit", "--optim_args", "algorithm=shampoo,stats_every=2,roots_every=2",
    "--learning_rate", "1e-2",
    "--max_steps", "5", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--report_to", "none",
    "--save_steps", "3", "--disable_tqdm", "true",
]  # fmt: skip


@pytest.fixture
def train(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)

    def run(*before: str, processes: int = 1) -> list[dict]:
        words = [*before, tmp_path / "train.py", "--result", tmp_path / "result", "--output_dir", tmp_path, *FLAGS]
        child = python(*words)
        files = [tmp_path / f"result.{rank}" for rank in range(processes)]
        assert all(file.exists() for file in files), child.stdout[-2000:] + child.stderr[-4000:]
        assert child.stdout.count("Shampoo4bit state") == 2, "one table a training, from the main process"
        return [json.loads(file.read_text()) for file in files]

    return run


def check(results: list[dict], script: Path) -> None:
    assert all(result["optimizer"] == "Shampoo4bit" for result in results)
    assert all(result["world"] == len(results) for result in results)
    assert all(result["parameters"] == results[0]["parameters"] for result in results), "the ranks drifted apart"
    assert all(result["resumed"] == {key: result[key] for key in ("losses", "parameters")} for result in results)
    assert all(result["bytes"] > 0 for result in results)
    assert results[0]["losses"][-1] < results[0]["losses"][0]
    assert Path(results[0]["argv"]) == script


def test_a_script(train, tmp_path):
    check(train("-m", "hf_shampoo4"), tmp_path / "train.py")


@pytest.mark.slow
def test_two_processes_of_accelerate_launch(train, tmp_path):
    """By the launch file for plain data parallelism; it says bf16, which a Trainer takes from there."""
    file = Path(__file__).resolve().parents[2] / "configs" / "accelerate" / "ddp.yaml"
    launch = [
        "-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2",
        "--main_process_port", "0", "-m", "hf_shampoo4",
    ]  # fmt: skip
    check(train(*launch, processes=2), tmp_path / "train.py")


@pytest.mark.slow
def test_two_processes_below_exec_torchrun(train, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    check(train("-m", "hf_shampoo4", "--exec", *torchrun, processes=2), tmp_path / "train.py")


def test_a_module_and_nothing_is_imported_before_it_runs(tmp_path):
    (tmp_path / "parse.py").write_text(PARSE)
    words = ["parse", tmp_path / "result", "--output_dir", tmp_path, "--use_cpu", "--optim", "adamw4bit"]
    path = f"{Path(__file__).resolve().parents[2]}:{tmp_path}"
    child = python("-m", "hf_shampoo4", "-m", *words, PYTHONPATH=path)
    assert (tmp_path / "result").exists(), child.stderr
    assert (tmp_path / "result").read_text().split() == ["adamw4bit", "__main__", "False"]


def test_what_a_script_spawns_knows_the_optimizers(tmp_path):
    """torch.multiprocessing.spawn and DataLoader workers are new interpreters, in which nobody has registered."""
    (tmp_path / "script.py").write_text("""
import multiprocessing, sys

def waits():
    print(any(type(finder).__module__ == "hf_shampoo4.integrations.hooks" for finder in sys.meta_path), __name__)

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=waits)
    child.start()
    child.join()
""")
    child = python("-m", "hf_shampoo4", tmp_path / "script.py")
    assert child.stdout.strip() == "True __mp_main__", child.stderr


def test_exec_runs_the_sitecustomize_that_it_hides(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('the hidden one ran')")
    code = "import hf_shampoo4, sys; print(hf_shampoo4.__file__); print('transformers' in sys.modules)"
    child = python("-c", code, PYTHONPATH=f"{SITE}:{tmp_path}")
    hidden, package, heavy = child.stdout.splitlines()
    assert hidden == "the hidden one ran", child.stderr
    assert Path(package) == SITE.parent / "__init__.py"
    assert heavy == "False"


def test_exec_stops_no_interpreter(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("raise RuntimeError('broken')")
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").touch()
    (tmp_path / "transformers" / "training_args.py").touch()  # a transformers that we do not know
    code = "import transformers.training_args; print('went on')"
    child = python("-c", code, PYTHONPATH=f"{SITE}:{tmp_path}")
    assert child.stdout.strip() == "went on"
    assert "RuntimeError: broken" in child.stderr
    assert "could not extend transformers.training_args" in child.stderr


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "--exec COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a script, -m MODULE or --exec COMMAND is required"),
        (["nowhere.py"], "there is no script 'nowhere.py'"),
        (["-m"], "-m needs the name of a module"),
        (["-m", "no.such.module"], "there is no module 'no.such.module'"),
        (["--exec"], "--exec needs a command"),
        (["--exec", "no-such-command"], "cannot run 'no-such-command'"),
        (["--optim", "shampoo4bit"], "unknown option '--optim'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(capsys, words, message):
    before = dict(os.environ)
    assert main(words) == 2
    assert dict(os.environ) == before  # a PYTHONPATH left behind registers in whatever is started next
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_exit_code_of_the_script_is_kept(tmp_path):
    (tmp_path / "script.py").write_text("import sys; print(sys.argv[1:], __name__, sys.path[0]); sys.exit(3)")
    child = python("-m", "hf_shampoo4", tmp_path / "script.py", "--flag", "a b")
    assert child.returncode == 3
    assert child.stdout.strip() == f"['--flag', 'a b'] __main__ {tmp_path.resolve()}"
