"""A plain loop on Accelerate, as a launch file starts it; `--result FILE` gets a line of JSON from every rank.

On a machine without a GPU, Accelerate would leave the engine out and train plainly, so that is turned off here: the
launch file says what is meant, and the ranks talk by gloo.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import hf_shampoo4 as s4

BATCH, STEPS = 4, 4
OPTIONS = {"algorithm": "shampoo", "stats_every": 2, "roots_every": 2, "block_size": 16}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    _no_split_modules = ["Block"]  # what a launch file's TRANSFORMER_BASED_WRAP wraps  # noqa: RUF012

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(64, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 64, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def on_a_cpu() -> None:
    """Let Accelerate take gloo and a CPU for what FSDP and DeepSpeed are to it: devices."""
    from accelerate import state
    from accelerate.utils import DistributedType

    used = {name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"}
    if used:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        state.PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # plain data parallelism knows CPUs
    if "DEEPSPEED" in used:  # or it compiles C++ for a minute
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train() -> dict[str, object]:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    torch.manual_seed(0)
    accelerator, model = Accelerator(), Model()
    if os.environ.get("FSDP_VERSION") == "1":  # the optimizer must know how it has taken the parameters apart
        model = accelerator.prepare(model)
    optimizer = s4.Shampoo4bit(s4.param_groups(model, weight_decay=0.1), lr=1e-2, **OPTIONS)
    batches = DataLoader(torch.randint(64, (BATCH * STEPS * accelerator.num_processes, 16)), batch_size=BATCH)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    losses = []
    for tokens in [*batches, *batches]:
        loss = nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    inner = optimizer
    while not isinstance(inner, s4.Shampoo4bit):
        inner = inner.optimizer
    found = {
        "losses": losses, "model": type(model).__name__, "world": accelerator.num_processes,
        "precision": accelerator.mixed_precision, "kind": accelerator.distributed_type.value,
        "stage": getattr(model, "zero_optimization_stage", int)(),
        "mesh": list(getattr(next(iter(model.parameters())), "device_mesh", torch.zeros(())).shape),
        "state_bytes": s4.metrics(inner)["optim/state_bytes"], "steps": inner.param_groups[0]["step"],
        "sent": inner.sent,
    }  # fmt: skip
    Path(f"{sys.argv[sys.argv.index('--result') + 1]}.{accelerator.process_index}").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    return found


if __name__ == "__main__":
    on_a_cpu()
    train()
    os._exit(0)  # gloo may abort when a process ends, after all was said
