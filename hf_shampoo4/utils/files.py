"""Results on disk: a reader sees the old file or the new one, never a half."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well; folders are made.

    Args:
        path: the file.

    Yields:
        Where to write instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make a folder and write to it, before the work whose results it shall take.

    Raises:
        OSError: no permission, a full disk, or a file of that name.
    """
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: name a folder")
    with replacing(folder / ".writable") as probe:
        probe.write_bytes(b" ")
    (folder / ".writable").unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write what `json` can write."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure, in the format of the path's suffix."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."))
