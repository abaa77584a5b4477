"""Run an unmodified script, module or command with hf_shampoo4's optimizers registered."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """\
usage: python -m hf_shampoo4 [-h] {SCRIPT.py | -m MODULE | --exec COMMAND} [ARGS ...]

Run a training script, unmodified, with --optim shampoo4bit, soap4bit, kl_shampoo4bit or adamw4bit in its Hugging Face
Trainer.

  SCRIPT.py ARGS       run a script, as `python SCRIPT.py ARGS` does
  -m MODULE ARGS       run a module, as `python -m MODULE ARGS` does
  --exec COMMAND ARGS  run a command that starts Python processes itself (trl, accelerate, torchrun)
  -h, --help           show this message

examples:
  python -m hf_shampoo4 run_clm.py --optim shampoo4bit --optim_args "block_size=512,stats_every=20" ...
  python -m hf_shampoo4 -m trl.scripts.sft --optim shampoo4bit ...
  python -m hf_shampoo4 --exec trl sft --optim shampoo4bit ...
  accelerate launch -m hf_shampoo4 run_clm.py --optim shampoo4bit ...
  torchrun --nproc_per_node 2 -m hf_shampoo4 run_clm.py --optim shampoo4bit ...
"""

SITE = Path(__file__).resolve().parent.parent / "_site"


def main(argv: Sequence[str]) -> int:
    """The command line of `python -m hf_shampoo4`.

    Args:
        argv: the words after `python -m hf_shampoo4`.

    Returns:
        The exit code, 2 for a command line that cannot be run; `--exec` replaces the process and does not return.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if not argv:
        return _refuse("a script, -m MODULE or --exec COMMAND is required")
    if argv[0] == "-m":
        return _run_module(argv[1:])
    if argv[0] == "--exec":
        return _exec(argv[1:])
    if argv[0].startswith("-"):
        return _refuse(f"unknown option {argv[0]!r} (options of the script come after its name)")
    return _run_script(argv)


def _run_script(argv: Sequence[str]) -> int:
    script = argv[0]
    if not Path(script).is_file():
        return _refuse(f"there is no script {script!r} (looked in {Path.cwd()})")
    _register()
    sys.argv = list(argv)
    if not getattr(sys.flags, "safe_path", False):  # as `python SCRIPT.py` does
        sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
    return 0


def _run_module(argv: Sequence[str]) -> int:
    if not argv:
        return _refuse("-m needs the name of a module")
    module = argv[0]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    if not found:
        return _refuse(f"there is no module {module!r}")
    _register()
    sys.argv = list(argv)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _exec(argv: Sequence[str]) -> int:
    """Become the command, with a sitecustomize that registers in every Python process it starts."""
    if not argv:
        return _refuse("--exec needs a command")
    try:
        os.execvpe(argv[0], list(argv), {**os.environ, "PYTHONPATH": _path_of_children()})
    except OSError as error:
        return _refuse(f"cannot run {argv[0]!r}: {error.strerror}")


def _register() -> None:
    from .trainer import register

    register()
    os.environ["PYTHONPATH"] = _path_of_children()  # multiprocessing's spawn starts new interpreters


def _path_of_children() -> str:
    """PYTHONPATH with which every Python process registers at its start, by the sitecustomize in `SITE`."""
    return os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH"))))


def _refuse(problem: str) -> int:
    print(f"python -m hf_shampoo4: error: {problem}; see python -m hf_shampoo4 --help", file=sys.stderr)
    return 2
