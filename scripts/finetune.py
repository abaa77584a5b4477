"""Fine-tune a model on conversations: `python scripts/finetune.py CONFIG [--key value ...]`.

CONFIG is a YAML file or a name in configs/finetune.  The same path as `hf-shampoo4 finetune`;
also under `torchrun` and `accelerate launch`.
"""

import sys

from hf_shampoo4.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
