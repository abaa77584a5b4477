"""`hf-shampoo4 train CONFIG` as a launch file starts it, on a CPU; called with `CONFIG RESULT`.

The first rank writes into RESULT the weights that the training has ended with, of all ranks.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from tests.support.launched import on_a_cpu


def main() -> None:
    from hf_shampoo4.training.pretrain import parse, run

    trainer = run(parse(sys.argv[1])).trainer
    weights = {name: _full(tensor) for name, tensor in trainer.model.state_dict().items()}
    if trainer.is_world_process_zero():
        torch.save(weights, sys.argv[2])
    trainer.accelerator.wait_for_everyone()


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    on_a_cpu()
    main()
    sys.stdout.flush()
    os._exit(0)  # gloo may abort when a process ends, after all was said
