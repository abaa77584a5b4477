"""`python -m hf_shampoo4 script.py ARGS`: run a script with `--optim shampoo4bit` available."""

import sys

from .integrations.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
