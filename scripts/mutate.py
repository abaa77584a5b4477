"""Mutation testing of the numerical core: change one operator or number at a time, and see that a test notices.

    python scripts/mutate.py --sample 60 --seed 0 --output docs/results/mutants.json

A mutant is killed if the fast tests of its module fail, do not end, or cannot be collected.  Each is tried in a process
forked from this one, which has imported torch and pytest; the files of the checkout are not touched.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")

# module -> its fast tests, the quickest to fail first
TESTS: dict[str, list[str]] = {
    "codebooks": ["test_codebooks.py"],
    "rounding": ["test_rounding.py", "test_moment_recipes.py"],
    "quantize": ["test_quantize.py"],
    "matrix": ["test_matrix.py", "test_roots.py"],
    "factors": ["test_factors.py", "test_regressions.py"],
    "eigenbasis": ["test_bases.py", "test_regressions.py", "test_eigenbasis.py"],
    "moments": ["test_moments.py", "test_moment_recipes.py"],
}
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Mod: ast.Mult,
    ast.RShift: ast.LShift, ast.LShift: ast.RShift, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def mutants(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """(what was changed, the changed module) for every place that can be changed."""
    for n in range(sum(1 for _ in ast.walk(tree))):
        changed = copy.deepcopy(tree)
        node: Any = next(node for i, node in enumerate(ast.walk(changed)) if i == n)
        before = ast.unparse(node) if isinstance(node, (ast.expr, ast.stmt)) else ""
        if _change(node):
            yield f"line {node.lineno}: {before} -> {ast.unparse(node)}", ast.fix_missing_locations(changed)


def _change(node: Any) -> bool:
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and _is_annotation(node):
            return False
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        node.value = node.value + 1 if isinstance(node.value, int) else node.value * 1.1 + 0.01
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        node.op = ast.UAdd() if isinstance(node.op, (ast.USub, ast.Invert)) else ast.Not()
        if isinstance(node.op, ast.Not):
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
    else:
        return False
    return True


def _is_annotation(node: ast.BinOp) -> bool:
    """`Tensor | None` and the like, which are never evaluated."""
    return any(isinstance(side, ast.Constant) and side.value is None for side in (node.left, node.right))


class Changed(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module from a changed syntax tree."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        super().__init__(name, str(path))
        self.tree = tree

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> Any:
        return compile(self.tree, str(self.path), "exec")


def survives(module: str, tree: ast.Module, seconds: float) -> str:
    """ "killed", "timed out" (killed too) or "survived"."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        code = 1
        try:
            import pytest

            sys.meta_path.insert(0, Changed(f"hf_shampoo4.{module}", ROOT / "hf_shampoo4" / f"{module}.py", tree))
            files = [str(ROOT / "tests" / test) for test in TESTS[module]]
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]))
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return "survived" if status == 0 else "killed"
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timed out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modules", default=",".join(TESTS))
    parser.add_argument("--sample", type=int, default=0, help="mutants in all, spread over the modules; 0: every one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    import hypothesis  # noqa: F401
    import numpy as np  # noqa: F401
    import pytest  # noqa: F401
    import scipy.linalg  # noqa: F401
    import torch

    torch.set_num_threads(1)
    modules = given.modules.split(",")
    found: dict[str, Any] = {}
    for i, module in enumerate(modules):
        tree = ast.parse((ROOT / "hf_shampoo4" / f"{module}.py").read_text(encoding="utf-8"))
        began = time.monotonic()
        if survives(module, tree, 1200) != "survived":
            raise RuntimeError(f"the tests of {module} fail without any change: {TESTS[module]}")
        patience = 60 + 5 * (time.monotonic() - began)
        every = list(mutants(tree))
        share = given.sample // len(modules) + (i < given.sample % len(modules)) if given.sample else len(every)
        chosen = random.Random(f"{given.seed} {module}").sample(every, min(share, len(every)))
        results = {what: survives(module, changed, patience) for what, changed in chosen}
        left = [what for what, result in results.items() if result == "survived"]
        found[module] = {"mutants": len(every), "tried": len(chosen), **Counter(results.values()), "survivors": left}
        print(module, found[module], flush=True)
        if given.output:
            from hf_shampoo4.files import write_json

            command = f"python scripts/mutate.py --sample {given.sample} --seed {given.seed}"
            write_json(given.output, {"command": command, "modules": found})


if __name__ == "__main__":
    main()
