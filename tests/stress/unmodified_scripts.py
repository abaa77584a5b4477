"""Unmodified training scripts with every optimizer, in one process and in two, and resumed.

    python -m tests.stress.unmodified_scripts path/to/transformers/examples/pytorch/language-modeling/run_clm.py
    python -m tests.stress.unmodified_scripts trl.scripts.sft

run_clm.py is not part of this repository: it comes with a checkout of transformers.  It trains a tiny LLaMA in bfloat16
on some of the standard library's source, with gradient checkpointing and accumulation; TRL's script fine-tunes one by
LoRA.  Each trains again from the checkpoint in the middle.  Both must end with the same losses and the same weights,
byte for byte.  Flags that are not known here are the script's: `--torch_compile`, for one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_shampoo4.integrations.trainer import OPTIMS
from hf_shampoo4.training.data import train_bpe
from hf_shampoo4.training.sources import stdlib_files, stdlib_version
from hf_shampoo4.utils.files import write_json

STEPS = 6
MODEL = "hidden_size=64,intermediate_size=128,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2"
FLAGS = [
    "--use_cpu", "--bf16", "true", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2",
    "--max_steps", str(STEPS), "--logging_steps", "1", "--save_steps", str(STEPS // 2), "--learning_rate", "1e-2",
    "--report_to", "none", "--gradient_checkpointing", "true",
]  # fmt: skip


def for_run_clm(folder: Path) -> list[str]:
    """Flags for a model from scratch, with a text and a tokenizer on disk."""
    texts = [path.read_text(encoding="utf-8") for path in stdlib_files(Path(stdlib_version()["root"]))[:8]]
    (folder / "train.txt").write_text("\n".join(texts), encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=train_bpe(texts, 512), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "tokenizer")
    model = ["--model_type", "llama", "--config_overrides", MODEL, "--tokenizer_name", str(folder / "tokenizer")]
    return [*model, "--train_file", str(folder / "train.txt"), "--block_size", "64", "--do_train"]


def for_sft(folder: Path) -> list[str]:
    """Flags for LoRA on a model and conversations on disk."""
    from tests.support.tiny import chat_model, conversations

    (folder / "data").mkdir()
    conversations(folder / "data" / "train.jsonl", count=64)
    adapter = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]
    model = ["--model_name_or_path", str(chat_model(folder / "model")), "--max_length", "48"]
    return [*model, "--dataset_name", str(folder / "data"), *adapter]


def launched(script: str, processes: int, flags: list[str]) -> list[str]:
    """The command that a user would type."""
    runner = [sys.executable, "-m", "hf_shampoo4"]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        runner = [sys.executable, *torchrun, "-m", "hf_shampoo4"]
    return [*runner, *([script] if script.endswith(".py") else ["-m", script]), *flags]


def train(command: list[str], folder: Path) -> dict[str, Any]:
    """Losses and the digest of the weights that a command ends with."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run([*command, "--output_dir", str(folder)], capture_output=True, text=True, env=environment)
    if done.returncode or "Shampoo4bit state" not in done.stdout:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    last = folder / f"checkpoint-{STEPS}"
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    weights = b"".join(path.read_bytes() for path in sorted(last.glob("*.safetensors")))
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "state_bytes": [entry["optim/state_bytes"] for entry in history if "optim/state_bytes" in entry][-1],
        "weights": hashlib.sha256(weights).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="run_clm.py of a transformers checkout, or trl.scripts.sft")
    parser.add_argument("--output", type=Path, help="write the outcome there as JSON")
    chosen, more = parser.parse_known_args()
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = for_run_clm(folder) if chosen.script.endswith(".py") else for_sft(folder)
        for optim in OPTIMS:
            for processes in (1, 2):
                name = f"{optim}, {processes} process{'es' if processes > 1 else ''}"
                roots = (
                    ",algorithm=shampoo,roots_every=2" if optim == "shampoo4bit" else ""
                )  # the papers' Shampoo, which has roots
                flags = [*FLAGS, *given, *more, "--optim", optim, "--optim_args", f"stats_every=2{roots}"]
                whole = train(launched(chosen.script, processes, flags), folder / name / "whole")
                middle = folder / name / "whole" / f"checkpoint-{STEPS // 2}"
                again = [*flags, "--resume_from_checkpoint", str(middle)]
                resumed = train(launched(chosen.script, processes, again), folder / name / "resumed")
                runs[name] = {**whole, "resumed": resumed == whole}
                print(f"{name}: losses {whole['losses']}, resumed: {'the same' if resumed == whole else resumed}")
    words = ["python -m hf_shampoo4", Path(chosen.script).name, *FLAGS, *more, "--optim NAME --optim_args ..."]
    found = {
        "command": " ".join(words),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "runs": runs,
    }
    if chosen.output:
        write_json(chosen.output, found)
    sys.exit(0 if all(run["resumed"] for run in runs.values()) else 1)


if __name__ == "__main__":
    main()
