"""The command `hf-shampoo4`: one line per subcommand here, its work in the module that the line names.

Nothing heavy is imported before the subcommand is known, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from hf_shampoo4.exceptions import InputError, MissingPackage
from hf_shampoo4.utils.extras import named

# name -> (module and function of the command line's other words, what it does)
COMMANDS = {
    "bench": (".studies.commands:bench", "what an optimizer step costs in time and memory, beside other optimizers"),
    "checkpoint": (
        ".checkpointing.command:main",
        "inspect a checkpoint's optimizer, or convert it for another mode",
    ),
    "demo": (".studies.commands:demo", "pretrain a small LLaMA with AdamW and with shampoo4bit, and compare them"),
    "errors": (
        ".studies.commands:errors",
        "what quantising preconditioners costs, beside the papers' tables",
    ),
    "race": (".studies.commands:race", "optimizers side by side, each at its best learning rate, over seeds"),
    "finetune": (
        ".training.commands:finetune",
        "fine-tune on conversations, fully or by LoRA: CONFIG [--key value ...]",
    ),
    "plan": (".planning.command:main", "memory and traffic of a training, from geometry: MODEL --world-size N"),
    "report": (".training.run_page:main", "training runs as one HTML page: RUN_DIR..."),
    "sweep": (".studies.commands:sweep", "a learning rate for your training, bracketed by short runs: CONFIG"),
    "train": (".training.commands:train", "pretrain by a YAML configuration: CONFIG [--key value ...]"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: the command line without the program's name; default `sys.argv`.

    Returns:
        The exit status: 0; 2 for bad input, 1 for a disk or network that fails, 130 for Ctrl-C, each with one line
        instead of a traceback.  `HF_SHAMPOO4_DEBUG=1` shows the traceback.
    """
    items = list(sys.argv[1:] if arguments is None else arguments)
    chosen = _overview().parse_args(items[:1] or ["--help"])
    try:
        with named():
            module, _, function = COMMANDS[chosen.command][0].partition(":")
            getattr(importlib.import_module(module, __package__), function)(items[1:])
    except (InputError, MissingPackage, OSError, KeyboardInterrupt) as error:
        if os.environ.get("HF_SHAMPOO4_DEBUG"):
            raise
        return _said(error, chosen.command)
    return 0


def _said(error: BaseException, command: str) -> int:
    """Print what went wrong in one line; the exit status."""
    if isinstance(error, BrokenPipeError):  # `... | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, KeyboardInterrupt):
        print(f"\n{command}: interrupted; what was written is kept", file=sys.stderr)
        return 130
    said = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        said = f"{error.filename}: {error.strerror}"
    print(f"error: {said}", file=sys.stderr)
    return 2 if isinstance(error, (InputError, MissingPackage, FileNotFoundError, FileExistsError)) else 1


def _overview() -> argparse.ArgumentParser:
    from hf_shampoo4 import __version__

    parser = argparse.ArgumentParser(
        prog="hf-shampoo4", description="Shampoo-class optimizers with 4-bit state: training, planning and results."
    )
    parser.add_argument("--version", action="version", version=f"hf-shampoo4 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
