"""The fields of the libraries' dataclasses, read from their source: importing them takes seconds."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

TRAINER = ("transformers/training_args.py:TrainingArguments",)
SFT = (*TRAINER, "trl/trainer/base_config.py:_BaseConfig", "trl/trainer/sft_config.py:SFTConfig",
       "trl/trainer/model_config.py:ModelConfig")  # fmt: skip


def library_fields(classes: tuple[str, ...]) -> set[str] | None:
    """The settings of dataclasses.

    Args:
        classes: `package/path/file.py:Class`, each after those that it is made from.

    Returns:
        Their names; None: this version of a library has it otherwise, only an import can tell.
    """
    found: set[str] = set()
    try:
        for place in classes:
            file, _, name = place.partition(":")
            package, _, path = file.partition("/")
            spec = find_spec(package)  # of a top-level package: nothing is run
            folder = Path(next(iter((spec and spec.submodule_search_locations) or ())))
            body = ast.parse((folder / path).read_text(encoding="utf-8")).body
            (made,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
            bases = {ast.unparse(base).rpartition(".")[2] for base in made.bases}
            if not bases <= {other.partition(":")[2] for other in classes}:
                return None
            found.update(node.target.id for node in made.body if _is_setting(node))  # type: ignore[attr-defined]
    except (OSError, StopIteration, SyntaxError, ValueError):
        return None
    return found


def _is_setting(node: ast.stmt) -> bool:
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
        return False
    if "ClassVar" in ast.unparse(node.annotation):
        return False
    keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
    return not any(k.arg == "init" and getattr(k.value, "value", True) is False for k in keywords)
