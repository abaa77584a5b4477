"""The documentation: its code runs, its configurations parse, its links lead somewhere, the site builds."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from transformers import Trainer, TrainingArguments

from benchmarks import options_page
from hf_shampoo4.cli import main
from tests.support.tiny import ROOT, Tokens, llama

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?P<mark><!--[^\n]*-->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
# A comment before a block says why it is not run, or which other test runs it.
NOT_RUN = re.compile(r"<!-- (?:not run|command): .+ -->")


class Block(NamedTuple):
    language: str
    code: str
    skipped: bool


def blocks(page: Path) -> Iterator[Block]:
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield Block(found["language"], found["code"], bool(NOT_RUN.match(found["mark"] or "")))


def of_language(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(b.language in languages and not b.skipped for b in blocks(page))]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take for granted: a model, data, arguments, a folder."""
    monkeypatch.chdir(tmp_path)
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, max_steps=1, report_to="none", disable_tqdm=True)
    data = Tokens()
    batches = [{key: value[None] for key, value in data[i].items()} for i in range(2)]
    model = llama()
    given = {"model": model, "params": list(model.parameters()), "args": args, "data": data}
    return {**given, "batches": batches, "output_dir": tmp_path, "Trainer": Trainer}


@pytest.mark.parametrize("page", of_language("python"), ids=lambda page: page.stem)
def test_python_blocks_run_one_after_the_other(page: Path, names: dict[str, Any], monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for block in blocks(page):
        if block.language == "python" and not block.skipped:
            exec(compile(block.code, str(page), "exec"), names)


@pytest.mark.parametrize("page", of_language("bash"), ids=lambda page: page.stem)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("adamw_torch_fused", "shampoo4bit"):  # the demo's, as far as a report needs them
        (tmp_path / "runs" / "demo" / run).mkdir(parents=True)
        (tmp_path / "runs" / "demo" / run / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}'
        )
    for block in blocks(page):
        for line in block.code.splitlines() if block.language == "bash" and not block.skipped else ():
            command, *words = shlex.split(line, comments=True)
            assert command == "hf-shampoo4", f"{page.name}: mark the block '<!-- not run: why -->': {line}"
            assert main(words) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_of_the_repository_that_commands_and_marks_name_are_there(page: Path) -> None:
    """Also of the blocks that are not run here."""
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        for path in re.findall(r"(?<![\w/.])(?:configs|scripts|tests)/[\w/.]+\.\w+", found[0]):
            assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", of_language("yaml", "json"), ids=lambda page: page.stem)
def test_data_blocks_parse(page: Path) -> None:
    for block in blocks(page):
        if block.language in ("yaml", "json"):
            assert {"yaml": yaml.safe_load, "json": json.loads}[block.language](block.code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_its_language(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "bash", "yaml", "json", ""}
    assert set(fences[1::2]) <= {""}


def test_options_of_the_page_are_options() -> None:
    """docs/index.md's options.yaml and my.yaml, by the parsers that would read them."""
    from hf_shampoo4.options import resolve
    from hf_shampoo4.training.pretrain import parse

    mine, options = [yaml.safe_load(b.code) for b in blocks(ROOT / "docs" / "index.md") if b.language == "yaml"]
    assert parse(mine).training.max_steps == 10000
    assert resolve(options)["block_size"] == 2048


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]  # --quiet hides
    done = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in ("Shampoo4bit", "param_groups", "trainer_kwargs", "stats_every", "hf_shampoo4.training.pretrain.run"):
        assert name in api


def test_the_tables_of_options_are_what_the_options_say() -> None:
    written = options_page.TABLES.findall(options_page.PAGE.read_text(encoding="utf-8"))
    assert written == [options_page.tables()], "run python -m benchmarks.options_page --write"
