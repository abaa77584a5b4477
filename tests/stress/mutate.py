"""Mutation testing of the numerical core: change one operator or number at a time, and see that a test notices.

    python -m tests.stress.mutate --sample 40 --seed 0 --output docs/results/mutants.json

A mutant is killed if the fast tests of its module fail, do not end, or cannot be collected.  Each is tried in a process
forked from this one, which has imported all but this package; the files of the checkout are not touched.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def _of(file: str, *tests: str) -> list[str]:
    return [f"{file}::test_{test}" for test in tests]


# module -> its fast tests, the quickest to fail first; whole files, or some of a file's tests
TESTS: dict[str, list[str]] = {
    "numerics.codebooks": ["numerics/test_codebooks.py"],
    "numerics.rounding": [
        "numerics/test_rounding.py",
        *_of(
            "preconditioners/test_moment_recipes.py",
            "stochastic_rounding_is_unbiased",
            "zip_sr_keeps_the_preconditioner_on_average",
            "zip_sr_seldom_takes_the_zero_and_does_so_by_the_odds_of_the_paper",
            "noise_of_tensors_steps_blocks_and_seeds_is_independent",
            "noise_does_not_depend_on_what_a_block_is_computed_with",
        ),
    ],
    "numerics.quantize": [
        "numerics/test_quantize.py",
        *_of("preconditioners/test_moment_recipes.py", "stochastic_rounding_is_unbiased"),
    ],
    "numerics.linalg": ["numerics/test_linalg.py", "numerics/test_roots.py"],
    "preconditioners.factors": [
        "preconditioners/test_factors.py",
        *_of("preconditioners/test_regressions.py", "the_loss_is_the_recorded_one[eigen]"),
    ],
    "preconditioners.bases": [
        *_of(
            "preconditioners/test_eigenbasis.py",
            "32_bit_whole_run_agrees_with_the_literal_one",
            "soap_in_the_first_basis_is_adamw",
            "the_momentum_is_rotated_at_every_basis_update",
            "factor_in_basis_is_semidefinite_and_keeps_its_diagonal",
            "gradients_of_rank_one_and_of_any_size",
            "no_gradient_no_step",
            "a_failed_basis_update_keeps_the_basis_and_is_counted",
            "an_oblong_matrix_has_a_basis_on_its_short_side_alone",
            "a_vocabulary_has_a_diagonal_factor_and_one_moment_in_8_bits",
            "rounding_does_not_add_up_over_basis_updates",
            "which_sides_have_a_basis",
        ),
        *_of("preconditioners/test_stagger.py", "a_block_does_not_depend_on_those_beside_it"),
        *_of(
            "preconditioners/test_regressions.py",
            "the_loss_is_the_recorded_one[soap]",
            "the_loss_is_the_recorded_one[kl_shampoo]",
        ),
    ],
    "preconditioners.eigenbasis": [
        *_of(
            "preconditioners/test_eigenbasis.py",
            "32_bit_whole_run_agrees_with_the_literal_one",
            "the_momentum_is_rotated_at_every_basis_update",
            "a_4_bit_moment_serves_small_directions_as_well_as_large_ones",
            "no_gradient_no_step",
            "gradients_of_rank_one_and_of_any_size",
            "long_silence_is_survived",
        ),
        *_of("preconditioners/test_stagger.py", "a_block_does_not_depend_on_those_beside_it"),
        "preconditioners/test_operations.py",
    ],
    "preconditioners.operations": ["preconditioners/test_operations.py"],
    "preconditioners.schedule": ["preconditioners/test_stagger.py"],
    "preconditioners.moments": [
        "preconditioners/test_moments.py",
        *_of(
            "preconditioners/test_moment_recipes.py",
            "each_step_as_a_float64_reference",
            "radial_bias",
            "unmoved_counts_codes",
            "auto_codebooks_and_overrides",
            "bytes_a_parameter_of_live_state",
        ),
        *_of("preconditioners/test_base_optimizers.py", "sgdm_as_torch"),
        *_of(
            "preconditioners/test_eigenbasis.py",
            "32_bit_whole_run_agrees_with_the_literal_one",
            "a_vocabulary_has_a_diagonal_factor_and_one_moment_in_8_bits",
        ),
    ],
}
PEERS = ("bitsandbytes.optim", "torchao.optim")  # imported before the forks, as most tests compare with them
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Mod: ast.Mult,
    ast.RShift: ast.LShift, ast.LShift: ast.RShift, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def places(tree: ast.Module) -> list[tuple[int, str]]:
    """Everything that can be changed: which node of `ast.walk` it is, and what becomes of it."""
    found = []
    for n, node in enumerate(ast.walk(tree)):
        if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign, ast.Compare, ast.Constant, ast.UnaryOp)):
            changed = copy.deepcopy(node)
            if _change(changed):
                found.append((n, f"line {node.lineno}: {ast.unparse(node)} -> {ast.unparse(changed)}"))
    return found


def mutant(tree: ast.Module, n: int) -> ast.Module:
    """The module with its nth node changed."""
    tree = copy.deepcopy(tree)
    _change(next(node for i, node in enumerate(ast.walk(tree)) if i == n))
    return ast.fix_missing_locations(tree)


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


def _path(module: str) -> Path:
    return ROOT / "hf_shampoo4" / f"{module.replace('.', '/')}.py"


def survives(module: str, tree: ast.Module, seconds: int) -> tuple[str, float]:
    """("killed", "timed out" (killed too) or "survived"; CPU seconds), the tests given `seconds` of CPU time."""
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        code = 1
        try:
            import pytest

            sys.meta_path.insert(0, Changed(f"hf_shampoo4.{module}", _path(module), tree))
            files = [str(ROOT / "tests" / test) for test in TESTS[module]]
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]))
        finally:
            os._exit(code)
    _, status, used = os.wait4(pid, 0)
    took = used.ru_utime + used.ru_stime
    if status == 0:
        return "survived", took
    return "timed out" if os.WIFSIGNALED(status) and took > seconds - 1 else "killed", took


def attempt(module: str, sample: int, seed: int, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Try a sample of a module's mutants (0: all), or those again that survived `before`."""
    tree = ast.parse((_path(module)).read_text(encoding="utf-8"))
    result, unchanged = survives(module, tree, 600)
    if result != "survived":
        raise RuntimeError(f"the tests of {module} fail without any change: {TESTS[module]}")
    every = places(tree)
    chosen = random.Random(f"{seed} {module}").sample(every, min(sample or len(every), len(every)))
    if before:
        chosen = [one for one in every if one[1] in before["survivors"]]
    results, seconds = {}, 0.0
    for n, what in chosen:
        results[what], took = survives(module, mutant(tree, n), int(20 + 3 * unchanged))
        seconds += took
        print(f"{module} {len(results)}/{len(chosen)} {results[what]}: {what}", flush=True)
    left = sorted(what for what, result in results.items() if result == "survived")
    if before:
        return {
            **before,
            "killed": before["killed"] + before["survived"] - len(left),  # places alike in a line count as one
            "survived": len(left),
            "survivors": left,
        }
    about = {"seed": seed, "mutants": len(every), "tried": len(chosen), "cpu_seconds": round(seconds)}
    return {**about, **Counter(results.values()), "survivors": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modules", default=",".join(TESTS))
    parser.add_argument("--sample", type=int, default=0, help="how many mutants of each module; 0: every one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file; other modules in it are kept")
    parser.add_argument("--again", action="store_true", help="only the survivors in that file, after a new test")
    given = parser.parse_args()
    for name in ("hypothesis", "numpy", "pytest", "scipy.linalg", "torch", "transformers", *PEERS):
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    for module in given.modules.split(","):
        before = json.loads(given.output.read_text())["modules"] if given.output and given.output.exists() else {}
        found = {module: attempt(module, given.sample, given.seed, before[module] if given.again else None)}
        print(found, flush=True)
        if given.output:
            from hf_shampoo4.utils.files import write_json

            command = f"python -m tests.stress.mutate --sample {given.sample} --seed {given.seed}"
            write_json(given.output, {"command": command, "modules": {**before, **found}})


if __name__ == "__main__":
    main()
