"""Pretrain a LLaMA: `python scripts/pretrain_llama.py [CONFIG] [--key value ...]`.

CONFIG is configs/train/stdlib_tiny.yaml unless named.  The same path as `hf-shampoo4 train`;
also under `torchrun` and `accelerate launch`.
"""

import sys

from hf_shampoo4.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("--"):
        arguments.insert(0, "stdlib_tiny")
    sys.exit(main(["train", *arguments]))
