"""tests/stress/mutate.py names modules and tests: one that is not there would count every mutant as killed."""

from __future__ import annotations

import ast
import re

import pytest

from tests.preconditioners.test_regressions import RECORDED
from tests.stress import mutate


@pytest.mark.parametrize("module", mutate.TESTS)
def test_what_mutants_are_tried_by_is_there(module: str) -> None:
    assert mutate._path(module).exists()
    for named in mutate.TESTS[module]:
        file, _, test = named.partition("::")
        source = ast.parse((mutate.ROOT / "tests" / file).read_text(encoding="utf-8"))
        defined = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
        name, case = re.match(r"(\w*)\[?(\w*)", test).groups()
        assert not name or name in defined, named
        assert not case or case in RECORDED, named
