"""The layers of docs/design.md, held by reading the imports of every module."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "hf_shampoo4"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

# A module imports from strictly lower levels only; those of the top level may import each other.
# A sub-package is one module here.  A new module gets a line.
LEVELS = {
    "codebooks": 0,
    "blocks": 0,
    "clock": 0,
    "extras": 0,
    "files": 0,
    "resume": 0,
    "held": 0,
    "options": 1,
    "matrix": 1,
    "placement": 1,
    "rounding": 1,
    "kernels": 1,
    "saved": 2,
    "quantize": 2,
    "exchange": 2,
    "storage": 3,
    "eigenbasis": 4,
    "factors": 4,
    "moments": 4,
    "algorithms": 5,
    "diagnostics": 6,
    "plan": 6,
    "waves": 7,
    "job": 8,
    "optimizer": 9,
    "report": 10,
    "integrations": 11,
    "data": 11,
    "train": 11,
    "demo": 11,
    "errors": 11,
    "vision": 11,
    "peers": 11,
    "race": 11,
    "estimate": 11,
    "finetune": 11,
    "runs": 11,
    "bench": 11,
    "checkpoint": 11,
    "side": 11,
    "cli": 11,
    "_site": 11,
    "__main__": 11,
    "__init__": 11,
}
TOP = 11

MATHEMATICS = {
    "kernels",
    "codebooks",
    "rounding",
    "matrix",
    "quantize",
    "storage",
    "factors",
    "eigenbasis",
    "moments",
    "algorithms",
}
MOVEMENT = {"blocks", "placement", "exchange", "held"}

# What the optimizer itself may need; everything else (transformers, datasets, ...) belongs to the top level.
CORE_DEPENDENCIES = {"torch", "numpy", "yaml", "bitsandbytes", "triton"}
WITHOUT_TORCH = {"options", "codebooks", "blocks", "files", "extras"}


def _modules() -> dict[str, list[Path]]:
    """Module name as in LEVELS -> its files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.setdefault(parts[0], []).append(path)
    return found


def _imported_names(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, wherever in the file the import stands."""
    package = [PACKAGE, *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def _own_imports(paths: list[Path]) -> set[str]:
    """Modules of this package that the files import; a name that is no module counts as `__init__`'s."""
    known = set(_modules())
    own: set[str] = set()
    for name in (name for path in paths for name in _imported_names(path)):
        parts = name.split(".")
        if parts[0] == PACKAGE:
            own.add(parts[1] if len(parts) > 1 and parts[1] in known else "__init__")
    return own


def _foreign_imports(paths: list[Path]) -> set[str]:
    roots = {name.split(".")[0] for path in paths for name in _imported_names(path)}
    return roots - {PACKAGE} - set(sys.stdlib_module_names)


MODULES = _modules()


def test_every_module_has_a_level() -> None:
    assert set(MODULES) == set(LEVELS), "tests/test_layers.py LEVELS and the files of hf_shampoo4/ differ"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    level = LEVELS[module]
    allowed = {name for name, other in LEVELS.items() if other < level or (level == other == TOP)}
    own = _own_imports(MODULES[module]) - {module}
    assert not own - allowed, f"{module} (level {level}) imports {sorted(own - allowed)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_mathematics_and_movement_stay_apart(module: str) -> None:
    for column, other in ((MATHEMATICS, MOVEMENT), (MOVEMENT, MATHEMATICS)):
        if module in column:
            crossed = _own_imports(MODULES[module]) & other
            assert not crossed, f"{module} imports {sorted(crossed)} of the other column"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if LEVELS.get(name, TOP) < TOP))
def test_the_core_needs_only_its_dependencies(module: str) -> None:
    allowed = CORE_DEPENDENCIES - ({"torch"} if module in WITHOUT_TORCH else set())
    foreign = _foreign_imports(MODULES[module]) - allowed
    assert not foreign, f"{module} imports {sorted(foreign)}"


def test_the_parser_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path / PACKAGE)
    sub = tmp_path / PACKAGE / "sub"
    sub.mkdir(parents=True)
    path = sub / "mod.py"
    path.write_text(
        "import hf_shampoo4.a\n"
        "import torch.nn as nn\n"
        "from hf_shampoo4 import b\n"
        "from hf_shampoo4.c import x\n"
        "def late():\n    from ..d import y\n    from .. import e\n    from . import f\n"
    )
    assert set(_imported_names(path)) == {
        "hf_shampoo4.a",
        "torch.nn",
        "hf_shampoo4.b",
        "hf_shampoo4.c.x",
        "hf_shampoo4.d.y",
        "hf_shampoo4.e",
        "hf_shampoo4.sub.f",
    }


@pytest.mark.parametrize("module", ["", *sorted(f".{name}" for name in WITHOUT_TORCH if name in MODULES)])
def test_import_is_cheap(module: str) -> None:
    """Neither torch nor the HF stack is imported until something needs it."""
    heavy = {"torch", "transformers", "accelerate", "datasets", "numpy", "yaml", "bitsandbytes", "matplotlib"}
    code = f"import json, sys, {PACKAGE}{module}; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(json.loads(done.stdout))
