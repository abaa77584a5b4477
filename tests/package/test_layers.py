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
ROOT = Path(__file__).resolve().parents[2] / PACKAGE

# A room (a folder, or a module beside them) imports from the lines above its own only.  A new room gets a place.
LAYERS = (
    {"exceptions"},
    {"utils"},
    {"numerics", "sharding"},
    {"options"},
    {"preconditioners"},
    {"execution"},
    {"checkpointing", "groups", "state_report"},
    {"optimizer"},
    {"integrations"},
    {"training"},
    {"planning"},
    {"studies"},
    {"__init__"},
    {"cli", "__main__", "_site"},
)
LEVELS = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
CORE = {room for room, level in LEVELS.items() if level <= LEVELS["optimizer"]}
MATHEMATICS = {"numerics", "preconditioners"}  # knows no ranks: sharding is what it never imports

# What the optimizer itself may need; everything else (transformers, datasets, ...) belongs to the top level.
CORE_DEPENDENCIES = {"torch", "numpy", "yaml", "bitsandbytes", "triton"}
PICTURES = ("plots.py",)  # in utils for planning and studies; the core draws nothing
WITHOUT_TORCH = (
    "options",
    "exceptions",
    "numerics.codebooks",
    "sharding.geometry",
    "utils.files",
    "utils.extras",
    "utils.numbers",
    "utils.yaml",
)


def _rooms() -> dict[str, list[Path]]:
    """Room -> its files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.setdefault(parts[0], []).append(path)
    return found


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _walk(child)


def _imported_names(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, wherever in the file the import stands."""
    package = [PACKAGE, *path.relative_to(ROOT).parent.parts]
    for node in _walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def _own_imports(paths: list[Path]) -> set[str]:
    """Modules of this package that the files import; a name that is no module counts as `__init__`'s."""
    known = set(_rooms())
    own: set[str] = set()
    for name in (name for path in paths for name in _imported_names(path)):
        parts = name.split(".")
        if parts[0] == PACKAGE:
            own.add(parts[1] if len(parts) > 1 and parts[1] in known else "__init__")
    return own


def _foreign_imports(paths: list[Path]) -> set[str]:
    roots = {name.split(".")[0] for path in paths for name in _imported_names(path)}
    return roots - {PACKAGE} - set(sys.stdlib_module_names)


ROOMS = _rooms()


def test_every_room_has_a_place() -> None:
    assert set(ROOMS) == set(LEVELS), "tests/package/test_layers.py LAYERS and the rooms of hf_shampoo4/ differ"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_point_up(room: str) -> None:
    own = _own_imports(ROOMS[room]) - {room}
    wrong = {other for other in own if LEVELS[other] >= LEVELS[room]}
    assert not wrong, f"{room} imports {sorted(wrong)}, which are not above it in LAYERS"


@pytest.mark.parametrize("room", sorted(MATHEMATICS))
def test_mathematics_knows_no_ranks(room: str) -> None:
    assert "sharding" not in _own_imports(ROOMS[room])


@pytest.mark.parametrize("room", sorted(CORE))
def test_the_core_needs_only_its_dependencies(room: str) -> None:
    foreign = _foreign_imports([path for path in ROOMS[room] if path.name not in PICTURES]) - CORE_DEPENDENCIES
    assert not foreign, f"{room} imports {sorted(foreign)}"


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


@pytest.mark.parametrize("module", ["", *(f".{name}" for name in WITHOUT_TORCH)])
def test_import_is_cheap(module: str) -> None:
    """Neither torch nor the HF stack is imported until something needs it."""
    heavy = {"torch", "transformers", "accelerate", "datasets", "numpy", "yaml", "bitsandbytes", "matplotlib"}
    code = f"import json, sys, {PACKAGE}{module}; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(json.loads(done.stdout))
