"""A small ResNet and a small ViT on scikit-learn's digits: `python scripts/train_vision.py [--models resnet,vit]`.

Settings are in configs/vision.yaml; table, picture and numbers land in runs/vision (`--output_dir`).  What was cut
off goes on where it was.
"""

import sys

from hf_shampoo4.options import OptionError
from hf_shampoo4.studies.vision import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        sys.exit(f"error: {error}")
