"""`hf-shampoo4 checkpoint inspect|convert|last DIR`: the optimizer's part of a checkpoint folder (convert.py)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..utils.files import check_writable, replacing


def main(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 checkpoint`.

    Raises:
        FileNotFoundError: a folder without an optimizer, or without a complete checkpoint.
        FileExistsError: `convert` would replace a file.
        CheckpointError: the optimizer in it is damaged, or not ours.
    """
    parser = argparse.ArgumentParser(
        prog="hf-shampoo4 checkpoint", description="The optimizer's part of a checkpoint folder, whatever wrote it."
    )
    parser.add_argument("action", choices=["inspect", "convert", "last"])
    parser.add_argument("folder", type=Path, help="a checkpoint of the Trainer or accelerate (last: their folder)")
    parser.add_argument("--output", type=Path, help="convert: the file to write (default: DIR/optimizer.pt)")
    given = parser.parse_args(arguments)
    from .convert import described, newest, read

    if given.action == "last":
        print(newest(given.folder))
    elif given.action == "inspect":
        print("\n".join(described(read(given.folder))))
    else:
        convert(given.folder, given.output or given.folder / "optimizer.pt")


def convert(folder: Path, output: Path) -> None:
    """Write the whole state, by position; a file that is there is never replaced.

    Raises:
        FileExistsError: `output` is there, and is not what was read.
    """
    import torch

    from . import checksums
    from .convert import WHOLE, by_position, is_of_other_modes, read

    state_dict = read(folder)
    if output.exists():
        whole = folder / WHOLE
        if whole.exists() and output.samefile(whole) and not is_of_other_modes(folder):
            print(f"{output} is the whole state already (read and checked): there is nothing to convert")
            return
        raise FileExistsError(f"{output} exists and is kept: choose another --output")
    check_writable(output.parent)
    with replacing(output) as temporary:
        torch.save(checksums.added(by_position(state_dict)), temporary)
    print(f"wrote {output}")
