"""LoRA with AdamW and with preconditioned adapters: `python -m benchmarks.lora FOLDER [--quick]`.

Pretrains configs/train/stdlib_tiny for a few hundred steps, then teaches it to answer a signature of the standard
library with the first line of its documentation: every optimizer over its grid of learning rates, from the same
weights and batches.  Finished runs are kept in FOLDER/runs and not run again; FOLDER/lora.json has all of them.
"""

import argparse
import ast
import json
from functools import partial
from pathlib import Path

from hf_shampoo4.studies.code_version import versions
from hf_shampoo4.studies.runner import Runs
from hf_shampoo4.training.finetune import parse, run
from hf_shampoo4.training.pretrain import parse as parse_pretraining
from hf_shampoo4.training.pretrain import run as pretrain
from hf_shampoo4.training.sources import stdlib_files, stdlib_version
from hf_shampoo4.utils.files import write_json, write_text

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ message.content + '\n# ' }}{% endif %}{% endfor %}"
)
RATES = [2e-3, 5e-3, 1.2e-2]
GRID = {
    "AdamW": ("adamw_torch", "", RATES),
    "KL-Shampoo, the rank side alone": ("shampoo4bit", "", [*RATES, 3e-2]),
    "SOAP, the rank side alone": ("soap4bit", "", [*RATES, 3e-2]),
    "Shampoo, long side in blocks of 64": ("shampoo4bit", "algorithm=shampoo,block_size=64", RATES),
    "Shampoo, whole sides": ("shampoo4bit", "algorithm=shampoo", RATES),
}
COMMON = {
    "use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": "all-linear", "max_length": 128,
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 32, "max_steps": 100, "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine", "assistant_only_loss": True, "bf16": False, "gradient_checkpointing": False,
    "logging_steps": 50, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
    "overwrite_output_dir": True, "validation_fraction": 0.05,
}  # fmt: skip


STEPS = {False: 150, True: 2}  # of pretraining, by --quick


def questions() -> list[dict[str, object]]:
    """One conversation for every documented function of the standard library, without its tests."""
    found = []
    for path in stdlib_files(Path(stdlib_version()["root"])):
        if {"test", "tests", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (documentation := ast.get_docstring(node)):
                signature = f"def {node.name}({ast.unparse(node.args)}):"
                turns = (("user", signature), ("assistant", documentation.splitlines()[0]))
                found.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return found


def prepare(folder: Path, steps: int) -> tuple[Path, Path]:
    """The base model and the conversations."""
    model, data = folder / "model", folder / "chat.jsonl"
    if not (model / "config.json").exists():
        settings = ["--output_dir", str(model), "--max_steps", str(steps), "--overwrite_output_dir", "true"]
        settings += ["--optim", "adamw_torch_fused", "--optim_args", "", "--learning_rate", "2.8e-3"]
        result = pretrain(parse_pretraining("stdlib_tiny", [*settings, "--eval_strategy", "no", "--save_strategy=no"]))
        tokenizer = result.trainer.processing_class
        tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
        tokenizer.save_pretrained(model)
    write_text(data, "".join(json.dumps(line) + "\n" for line in questions()))
    return model, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few steps: does it work here?")
    chosen = parser.parse_args()
    model, data = prepare(chosen.folder, STEPS[chosen.quick])
    told = {**COMMON, **({"max_steps": 2, "max_train_examples": 32} if chosen.quick else {})}
    common = {**told, "model_name_or_path": str(model), "dataset": str(data)}
    runs, code = Runs(chosen.folder / "runs"), versions(["hf_shampoo4", "peft", "trl"])
    finished = []
    for label, (optim, options, rates) in GRID.items():
        for rate in rates[: 1 if chosen.quick else None]:
            settings = {"optim": optim, "learning_rate": rate, **({"optim_args": options} if options else {})}
            described = {**told, "label": label, "pretraining_steps": STEPS[chosen.quick], **settings}
            make = partial(measure, {**common, **settings}, chosen.folder)
            finished.append(runs.once(described, code, make))
            print(label, rate, f"{finished[-1]['eval_loss']:.4f}", flush=True)
    write_json(chosen.folder / "lora.json", {"common": told, "runs": finished})


def measure(settings: dict[str, object], folder: Path) -> dict[str, float]:
    """Train once; loss, seconds and bytes."""
    metrics = run(parse({**settings, "output_dir": str(folder / "run")})).metrics
    return {k: metrics[k] for k in ("eval_loss", "train_runtime", "train_optimizer_state_mb") if k in metrics}


if __name__ == "__main__":
    main()
