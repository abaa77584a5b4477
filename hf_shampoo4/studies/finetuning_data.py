"""What a fine-tuning study teaches: instructions about functions of the standard library, and another corpus.

Both are made from what every machine with these packages has, and are the same on all of them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_shampoo4.training.arguments import DataArguments
from hf_shampoo4.training.documents import load_documents
from hf_shampoo4.utils.files import write_text

Example = dict[str, str]
LONGEST = 300  # characters of a prompt or an answer


class Examples(NamedTuple):
    """Files of one JSON object a line, as `hf-shampoo4 finetune` reads them."""

    train: Path
    held_out: Path


@functools.cache
def write_task(task: str, folder: Path, train: int, held_out: int) -> Examples:
    """Write the examples of a task.

    Args:
        task: "instructions" (columns `prompt` and `completion`), or a corpus by its name (column `text`).
        folder: for the two files.
        train: number of examples to learn from, fewer if there are no more.
        held_out: of those to validate on.
    """
    found = []
    for name, documents, count in zip(Examples._fields, load_documents(DataArguments(dataset=_source(task))),
                                      (train, held_out), strict=True):  # fmt: skip
        rows: Sequence[Example] = [dict(row) for row in documents]
        if task == "instructions":
            rows = [example for row in rows for example in instructions(row["path"], row["text"])]
        path = folder / f"{task}-{name}.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in _drawn(rows, count)))
        found.append(path)
    return Examples(*found)


def _source(task: str) -> str:
    """The corpus that a task is made of; what is held out of it nobody has been trained on."""
    return "stdlib" if task == "instructions" else task


def _drawn(rows: Sequence[Any], count: int) -> list[Any]:
    """So many of them, drawn by their hash."""
    return sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())[:count]


def instructions(path: str, source: str) -> Iterator[Example]:
    """One instruction and its answer for every documented function in a file, by turns of three kinds: to say what it
    does, to write its signature, to name its arguments; none of a test, which is documented for other reasons."""
    if {"test", "tests", "idlelib"} & set(Path(path).parts):
        return
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)]
    for kind, function in enumerate(functions):
        signature = f"def {function.name}({ast.unparse(function.args)}):"
        purpose = (ast.get_docstring(function) or "").splitlines()[0]
        names = [node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)]
        prompt, answer = (
            (f"Say what this function does.\n{signature}", purpose),
            (f"Write the signature of a function.\n{purpose}", signature),
            (f"Name the arguments of this function.\n{signature}", ", ".join(names) or "none"),
        )[kind % 3]
        if max(len(prompt), len(answer)) <= LONGEST:
            yield {"prompt": f"{prompt}\nAnswer:", "completion": f" {answer}"}
