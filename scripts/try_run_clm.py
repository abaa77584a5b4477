"""transformers' own run_clm.py, unmodified, with every optimizer, in one process and in two, and resumed.

    python scripts/try_run_clm.py path/to/transformers/examples/pytorch/language-modeling/run_clm.py

The script is not part of this repository: it comes with a checkout of transformers.  A tiny LLaMA is trained in
bfloat16 on some of the standard library's source, with gradient checkpointing and accumulation; then again from the
checkpoint in the middle.  Both must end with the same losses and the same weights, byte for byte.  Flags that are not
known here are the script's: `--torch_compile`, for one.
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

from hf_shampoo4.data import stdlib_files, stdlib_version, train_bpe
from hf_shampoo4.files import write_json
from hf_shampoo4.integrations.trainer import OPTIMS

STEPS = 6
MODEL = "hidden_size=64,intermediate_size=128,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2"
FLAGS = [
    "--model_type", "llama", "--config_overrides", MODEL, "--block_size", "64", "--do_train", "--use_cpu",
    "--bf16", "--gradient_checkpointing", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2",
    "--max_steps", str(STEPS), "--logging_steps", "1", "--save_steps", str(STEPS // 2), "--learning_rate", "1e-2",
    "--report_to", "none",
]  # fmt: skip


def prepare(folder: Path) -> list[str]:
    """A text and a tokenizer on disk, and the flags that name them."""
    texts = [path.read_text(encoding="utf-8") for path in stdlib_files(Path(stdlib_version()["root"]))[:8]]
    (folder / "train.txt").write_text("\n".join(texts), encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=train_bpe(texts, 512), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "tokenizer")
    return ["--train_file", str(folder / "train.txt"), "--tokenizer_name", str(folder / "tokenizer")]


def launched(script: Path, processes: int, flags: list[str]) -> list[str]:
    """The command that a user would type."""
    runner = [sys.executable, "-m", "hf_shampoo4"]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        runner = [sys.executable, *torchrun, "-m", "hf_shampoo4"]
    return [*runner, str(script), *flags]


def train(command: list[str], folder: Path) -> dict[str, Any]:
    """Losses and the digest of the weights that a command ends with."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--output_dir", str(folder)], capture_output=True, text=True, env=environment)
    if done.returncode or "Shampoo4bit state" not in done.stdout:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    weights = (folder / "model.safetensors").read_bytes()
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "state_bytes": history[-1]["train_mem_optimizer_state"],
        "weights": hashlib.sha256(weights).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="run_clm.py of a transformers checkout")
    parser.add_argument("--output", type=Path, help="write the outcome there as JSON")
    chosen, more = parser.parse_known_args()
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = prepare(folder)
        for optim in OPTIMS:
            for processes in (1, 2):
                name = f"{optim}, {processes} process{'es' if processes > 1 else ''}"
                often = (
                    "stats_every=2,roots_every=2" if optim == "shampoo4bit" else "stats_every=2"
                )  # the papers' Shampoo
                flags = [*FLAGS, *data, *more, "--optim", optim, "--optim_args", often]
                whole = train(launched(chosen.script, processes, flags), folder / name / "whole")
                middle = folder / name / "whole" / f"checkpoint-{STEPS // 2}"
                again = [*flags, "--resume_from_checkpoint", str(middle)]
                resumed = train(launched(chosen.script, processes, again), folder / name / "resumed")
                runs[name] = {**whole, "resumed": resumed == whole}
                print(f"{name}: losses {whole['losses']}, resumed: {'the same' if resumed == whole else resumed}")
    words = ["python -m hf_shampoo4 run_clm.py", *FLAGS, *more, "--optim NAME --optim_args stats_every=2,..."]
    found = {
        "command": " ".join(words),
        "script_sha256": hashlib.sha256(chosen.script.read_bytes()).hexdigest(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "runs": runs,
    }
    if chosen.output:
        write_json(chosen.output, found)
    sys.exit(0 if all(run["resumed"] for run in runs.values()) else 1)


if __name__ == "__main__":
    main()
