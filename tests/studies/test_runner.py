"""Runs are made once, kept whole, and told apart by settings and code."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from hf_shampoo4.studies import code_version
from hf_shampoo4.studies.code_version import PACKAGE, STEP, _digest, same, step_digest, versions
from hf_shampoo4.studies.fingerprint import _fingerprint, fingerprint
from hf_shampoo4.studies.runner import Runs

SETTINGS = {"optim": "a", "learning_rate": 1e-3, "seed": 0}
CODE = {"torch": "2"}


def test_a_finished_run_is_kept_at_once_and_never_made_again(tmp_path: Path) -> None:
    runs, made = Runs(tmp_path / "runs"), []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"final_loss": 3.0}

    first = runs.once(SETTINGS, CODE, make)
    assert runs.once(dict(reversed(SETTINGS.items())), CODE, make) == first
    assert len(made) == 1
    assert (first["settings"], first["code"], first["final_loss"]) == (SETTINGS, CODE, 3.0)
    assert {"machine", "commit", "finished"} <= set(first)
    (path,) = runs.folder.iterdir()
    assert json.loads(path.read_text()) == first


def test_other_settings_or_other_code_are_another_run(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    for settings, code in ((SETTINGS, CODE), ({**SETTINGS, "seed": 1}, CODE), (SETTINGS, {"torch": "3"})):
        runs.once(settings, code, lambda: {"final_loss": 1.0})
    assert len(list(tmp_path.iterdir())) == 3
    assert [run["settings"]["seed"] for run in runs.of(lambda settings: CODE)] in ([0, 1], [1, 0])
    assert len(runs.of(lambda settings: {"torch": "4"})) == 0
    assert len(runs.of(None)) == 3


def test_equal_source_or_equal_bits_are_the_same_code() -> None:
    here = {"torch": "2", "ours": "s1/b1"}
    for there, expected in (("s1/b1", True), ("s2/b1", True), ("s1/b2", True), ("s2/b2", False), ("b1/s1", False)):
        assert same({"torch": "2", "ours": there}, here) is expected
    assert not same({"torch": "3", "ours": "s1/b1"}, here)
    assert not same({"torch": "2"}, here)


def test_equal_bits_have_one_fingerprint_and_other_options_another() -> None:
    told = {"optim": "adamw4bit", "adam_beta2": 0.99}
    found = fingerprint(told)
    _fingerprint.cache_clear()
    assert fingerprint({**told, "learning_rate": 5, "optim_args": "maximize=false"}) == found
    assert fingerprint({**told, "optim_args": "moments=fp32"}) != found
    assert fingerprint({"optim": "adamw4bit"}) != found


def test_the_fingerprint_sees_the_late_schedule() -> None:
    found = fingerprint({"optim": "shampoo4bit"})
    assert fingerprint({"optim": "shampoo4bit", "optim_args": "stats_every=5"}) != found


def test_a_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Runs(tmp_path).once(SETTINGS, CODE, fail)
    assert not list(tmp_path.iterdir())


def test_words_do_not_change_the_code_and_statements_do() -> None:
    plain = 'class A:\n    """Doc."""\n    x: int = 1\n    """What x is."""\n    def f(self):\n        """Doc."""\n'
    other = "class A:\n\n    x: int = 1  # comment\n    def f(self):\n        'said otherwise'\n"
    assert _digest(ast.parse(plain)) != _digest(ast.parse(other.replace("= 1", "= 2")))
    assert _digest(ast.parse('x = 1\n"""a"""\n')) == _digest(ast.parse('x = 1  # b\n"""c"""\n'))


def test_the_digest_is_of_everything_that_a_step_is_made_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert all((PACKAGE / name).exists() for name in STEP)
    here = step_digest()
    assert versions(["hf_shampoo4"])["hf_shampoo4"] == here
    for name in STEP:
        source = PACKAGE / name
        files = [source] if source.is_file() else source.rglob("*.py")
        for path in files:
            target = tmp_path / path.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path.read_text())
    monkeypatch.setattr(code_version, "PACKAGE", tmp_path)
    step_digest.cache_clear()
    assert step_digest() == here
    (tmp_path / "numerics" / "linalg.py").write_text("x = 1\n")
    step_digest.cache_clear()
    assert step_digest() != here
    step_digest.cache_clear()


def test_a_package_that_is_not_there_and_a_function_have_versions_too() -> None:
    found = versions(["nosuchpackage"], test_a_run_that_fails_leaves_nothing)
    assert found["nosuchpackage"] == "not installed"
    assert len(found["test_a_run_that_fails_leaves_nothing"]) == 12
    assert {"python", "torch", "transformers"} <= set(found)
