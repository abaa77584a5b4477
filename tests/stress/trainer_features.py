"""Features of the Hugging Face Trainer with every optimizer, in one process and in two: tiny LLaMAs on a CPU.

    python -m tests.stress.trainer_features --output docs/results/trainer.json

A case trains, and trains again from the checkpoint in the middle: both must end with the same losses, weights and
optimizer state, and the ranks with the same as each other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments  # noqa: E402

from hf_shampoo4.utils.files import write_json  # noqa: E402
from tests.support.tiny import Tokens, arguments, llama, often  # noqa: E402

OPTIMS = ("shampoo4bit", "soap4bit", "kl_shampoo4bit")
SAVED = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}

# name -> arguments of a training that is resumed
RESUMED: dict[str, dict[str, Any]] = {
    "bf16, gradient checkpointing, gradient accumulation": {
        "bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2,
    },
    "fp16 with a loss scaler": {"fp16": True},
    "torch_compile (backend eager)": {"torch_compile": True, "torch_compile_backend": "eager"},
    "LoRA": {},
    "QLoRA": {},
}  # fmt: skip


def model(case: str, args: TrainingArguments, folder: Path) -> Any:
    if case == "QLoRA":
        with args.main_process_first():  # the others wait for what it writes
            if not (folder / "base").exists():
                llama(hidden_size=128).save_pretrained(folder / "base")
        quantisation = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        made = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=quantisation)
    else:
        made = llama()
    return get_peft_model(made, LoraConfig(r=4, target_modules="all-linear")) if "LoRA" in case else made


def summary(trainer: Trainer) -> dict[str, Any]:
    """Losses, and a digest of trained weights and optimizer state."""
    optimizer = trainer.optimizer.optimizer
    found = hashlib.sha256()
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    for tensor in [*state, *(p for group in optimizer.param_groups for p in group["params"])]:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "digest": found.hexdigest(), "skipped": optimizer.param_groups[0]["skipped_steps"]}


def resumed(case: str, optim: str, folder: Path) -> dict[str, Any]:
    runs = []
    for checkpoint in (None, str(folder / "run" / "checkpoint-3")):
        args = arguments(folder / "run", optim=optim, optim_args=often(optim), **SAVED, **RESUMED[case])
        trainer = Trainer(model(case, args, folder), args, train_dataset=Tokens(48))
        if args.fp16:  # Accelerate has none on a CPU
            trainer.accelerator.native_amp = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=100)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(summary(trainer))
        torch._dynamo.reset()
    return {**runs[0], "same": runs[0] == runs[1]}


def stopped_early(optim: str, folder: Path) -> dict[str, Any]:
    """An improvement smaller than ten does not count, so it stops at the second evaluation."""
    args = arguments(
        folder / "run", optim=optim, optim_args=often(optim), max_steps=8, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    stop = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    trainer = Trainer(llama(), args, train_dataset=Tokens(64), eval_dataset=Tokens(), callbacks=[stop])
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    stopped = trainer.state.global_step
    return {**summary(trainer), "same": stopped == 4 and abs(trainer.evaluate()["eval_loss"] - best) < 1e-5}


def searched(optim: str, folder: Path) -> dict[str, Any]:
    args = arguments(folder / "run", optim=optim, optim_args=often(optim), max_steps=2, eval_strategy="epoch")
    trainer = Trainer(None, args, train_dataset=Tokens(), eval_dataset=Tokens(), model_init=lambda trial: llama())
    space = {"learning_rate": [1e-3, 1e-2], "optim_args": ["block_size=32", "block_size=64"]}
    best = trainer.hyperparameter_search(
        lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
        backend="optuna", n_trials=2,
    )  # fmt: skip
    return {**summary(trainer), "same": best is None or set(best.hyperparameters) == set(space)}


CASES: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    **{case: partial(resumed, case) for case in RESUMED},
    "load_best_model_at_end, early stopping": stopped_early,
    "hyper-parameter search (Optuna)": searched,
}


def worker(folder: Path) -> None:
    """Every case with every optimizer in this process, and how it ended."""
    found: dict[str, Any] = {}
    for case, run in CASES.items():
        for optim in OPTIMS:
            place = folder / f"{list(CASES).index(case)}-{optim}"
            try:
                place.mkdir(exist_ok=True)
                found[f"{case}: {optim}"] = run(optim, place)
            except Exception:
                found[f"{case}: {optim}"] = {"error": traceback.format_exc()[-2000:]}
    (folder / f"result.{os.environ.get('RANK', '0')}").write_text(json.dumps(found))


def launch(processes: int, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "log", "w") as log:
        subprocess.run(
            [*command, "-m", "tests.stress.trainer_features", "--worker", str(folder)],
            env=environment,
            stdout=log,
            stderr=log,
        )
    return [json.loads((folder / f"result.{rank}").read_text()) for rank in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the outcome there as JSON")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen.worker)
        return
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    found: dict[str, Any] = {"command": "python -m tests.stress.trainer_features", "versions": versions}
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            ranks = launch(processes, Path(folder))
        for name, first in ranks[0].items():
            errors = [rank[name]["error"] for rank in ranks if "error" in rank[name]]
            equal = not errors and len({rank[name]["digest"] for rank in ranks}) == 1 and first["same"]
            outcome = {"error": errors[0]} if errors else {"losses": first["losses"], "skipped": first["skipped"]}
            found[f"{name}, {processes}"] = {"passed": equal, **outcome}
            print(f"{name}, {processes}: {'passed' if equal else errors or first}", flush=True)
    if chosen.output:
        write_json(chosen.output, found)


if __name__ == "__main__":
    main()
