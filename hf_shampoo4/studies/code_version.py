"""Which code makes a run: versions of packages, and for this one a digest of what an optimizer step is made of."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
STEP = ("numerics", "sharding", "preconditioners", "execution", "options", "groups.py", "optimizer.py")
"""What decides an update; the rest of the package prepares, reports and stores."""
EVERYWHERE = ("torch", "transformers")


def versions(packages: Iterable[str], *sources: Any) -> dict[str, str]:
    """Name -> version of the packages, of torch, transformers and Python (whose library is a corpus).

    Args:
        packages: distributions; `hf_shampoo4` is told by `step_digest`, one that is not installed is "not installed".
        sources: functions and modules whose text decides too.
    """
    found = {"python": platform.python_version()}
    for name in (*EVERYWHERE, *packages):
        found[name] = step_digest() if name == "hf_shampoo4" else _installed(name)
    found.update({source.__name__: _digest(ast.parse(inspect.getsource(source))) for source in sources})
    return found


def same(there: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Whether two sets of versions mean the same; of a version in parts, `source/bits`, one that agrees is enough."""
    return there.keys() == here.keys() and all(
        any(a == b for a, b in zip(there[name].split("/"), here[name].split("/"), strict=False)) for name in here
    )


@functools.cache
def step_digest() -> str:
    """12 hexadecimal digits of the code in `STEP`, on which comments, docstrings and line breaks have no influence."""
    paths = [path for name in STEP for path in sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / name]]
    return _digest(*(ast.parse(path.read_text(encoding="utf-8")) for path in paths))


@functools.cache
def commit() -> str:
    """The commit of a checkout, with `+` if the package differs from it; "" for an installed package."""
    try:
        found = _git("rev-parse", "--short=12", "HEAD")
        return found + ("+" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=PACKAGE, capture_output=True, text=True, check=True).stdout.strip()


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _digest(*trees: ast.Module) -> str:
    texts = [ast.unparse(_WithoutWords().visit(tree)) for tree in trees]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


class _WithoutWords(ast.NodeTransformer):
    """Takes out docstrings, those of attributes too."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        """A string that is nobody's value."""
        return ast.Pass() if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node
