"""How large the updates of a training's matrices are, in root mean square and in spectral norm: AdamW and the default.

python -m benchmarks.update_size            a LLaMA of width 64 and one of 128, 120 steps each: two minutes of one core
python -m benchmarks.update_size --record   write docs/results/update_size.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_shampoo4.studies.code_version import commit
from hf_shampoo4.studies.machine import machine
from hf_shampoo4.training.pretrain import parse, run
from hf_shampoo4.utils.files import write_json

RECORDED = Path(__file__).resolve().parents[1] / "docs" / "results" / "update_size.json"
WIDTHS, FIRST, EVERY = (64, 128), 40, 8
OPTIMIZERS = {"shampoo4bit": {"learning_rate": 5e-3, "adam_beta2": 0.95},
              "adamw_torch": {"learning_rate": 2e-3, "adam_beta2": 0.99}}  # fmt: skip
COMMON: dict[str, Any] = {
    "model": "llama_tiny", "dataset": "stdlib", "vocab_size": 4096, "seq_len": 128, "max_validation_sequences": 8,
    "max_steps": 120, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20,
    "weight_decay": 0.1, "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


class UpdateSizes(TrainerCallback):
    """(root mean square, spectral norm) of every matrix's update over its learning rate, without weight decay."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[float, float]]] = {}
        self.before: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Keep the weights of every `EVERY`-th step."""
        step = state.global_step + 1
        looks = step >= FIRST and step % EVERY == 0
        matrices = ((name, p) for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name)
        self.before = {name: p.detach().clone() for name, p in matrices} if looks else {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """What the step made of them."""
        optimizer = others["optimizer"]
        groups = [(p, group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
        rates = {id(p): (lr, decay) for p, lr, decay in groups}
        for name, p in model.named_parameters():
            if name in self.before:
                lr, decay = rates[id(p)]
                update = (self.before[name] * (1 - lr * decay) - p.detach()) / lr
                sizes = update.square().mean().sqrt().item(), torch.linalg.matrix_norm(update, 2).item()
                self.found.setdefault(name.split(".")[-2], []).append(sizes)

    def means(self) -> dict[str, dict[str, float]]:
        """By kind of matrix, over layers and steps."""
        return {
            name: {"rms": round(statistics.mean(r for r, _ in sizes), 3),
                   "spectral": round(statistics.mean(s for _, s in sizes), 2)}
            for name, sizes in self.found.items()
        }  # fmt: skip


def measure(width: int, optim: str) -> dict[str, dict[str, float]]:
    """One training."""
    heads = width // 32
    shape = f"hidden_size={width},intermediate_size={width * 43 // 16},num_hidden_layers=3"
    overrides = f"{shape},num_attention_heads={heads},num_key_value_heads={heads}"
    sizes = UpdateSizes()
    with tempfile.TemporaryDirectory() as folder:
        settings = {**COMMON, **OPTIMIZERS[optim], "optim": optim, "model_overrides": overrides, "output_dir": folder}
        run(parse(settings), [sizes])
    return sizes.means()


def main() -> None:
    """Print, and keep if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = {str(width): {optim: measure(width, optim) for optim in OPTIMIZERS} for width in WIDTHS}
    print(json.dumps(found, indent=1))
    if chosen.record:
        write_json(RECORDED, {"commit": commit(), "machine": machine(), "settings": COMMON, "widths": found})


if __name__ == "__main__":
    main()
