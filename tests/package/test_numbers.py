"""Every number in a table of the documentation is in the file that its mark names, or the mark says why it is not.

Before a table or a paragraph stands one of

    <!-- numbers: FILE PATH ...; also A B -->     each number is a value at one of these paths, rounded as it is shown
    <!-- numbers by hand: WHY -->                 history, or a paper's

FILE is a JSON of docs/results, or `plan` (made here).  PATH goes through it by `/`, `*` is every entry; `*1e-6` after
it is a factor.  `also` has numbers that are no results: sizes, say.  Every block of README with a decimal number must
have a mark, and every table with one of the other pages.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import hf_shampoo4 as s4
from tests.support.tiny import ROOT

RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- numbers(?: by hand: (?P<why>.+)|: (?P<sources>.+)) -->\n")
NOT_READ = re.compile(  # code, links, pictures, tags, arXiv numbers, versions, and names with a digit
    r"!\[[^\]]*\]\([^)]*\)|`[^`]*`|\]\([^)]*\)|<[^>]+>|\b\d{4}\.\d{5}\b|"
    r"\b(?:Python|torch|version|Apache)[ -]\d[\d.]*\b|\b\w*[A-Za-z]\d[\w.-]*"
)
NUMBER = re.compile(r"(?<![\w.])\d(?:[\d,]*\d)?(?:\.\d+)?(?:e-?\d+)?|(?<![\w.])\.\d+")
DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.])")


class Block(NamedTuple):
    page: Path
    line: int
    text: str
    mark: re.Match[str] | None

    @property
    def prose(self) -> str:
        return NOT_READ.sub(" ", self.text)


def blocks_of(page: Path) -> Iterator[Block]:
    """Paragraphs and tables, without code."""
    text = re.sub(r"```.*?```", lambda m: "\n" * m[0].count("\n"), page.read_text(encoding="utf-8"), flags=re.DOTALL)
    line = 1
    for part in re.split(r"(\n\s*\n)", text):
        mark = MARK.match(part.lstrip("\n"))
        body = part.lstrip("\n")[mark.end() :] if mark else part
        if part.strip():
            yield Block(page, line, body, mark)
        line += part.count("\n")


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
MARKED = [block for block in BLOCKS if block.mark and block.mark["sources"]]


def called(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


@functools.cache
def file(name: str) -> Any:
    return plans() if name == "plan" else json.loads((RESULTS / name.removeprefix("results/")).read_text())


def plans() -> dict[str, Any]:
    """What `hf-shampoo4 plan` says: bytes of LLaMA-7B, and bytes a parameter of one matrix by optimizer."""
    large, matrix = s4.plan("llama_7b"), torch.nn.Linear(1024, 1024, bias=False, device="meta")
    by_options = {
        "kl_shampoo": {}, "soap": {"algorithm": "soap"},
        "shampoo": {"algorithm": "shampoo"}, "paper": {"preset": "paper_eigen"},
        "adamw4bit": {"algorithm": "elementwise"}, "adamw": {"algorithm": "elementwise", "moments": "fp32"},
        "shampoo32": {"algorithm": "shampoo", "bits": 32, "factor": "direct", "moments": "fp32"},
    }  # fmt: skip
    return {
        "llama_7b": {
            "ours": large.state.largest, "working": large.working.largest,
            "others": {name: load.largest for name, load in large.others.items()},
            "a_parameter": large.state.largest / large.parameters,
        },
        "matrix": {name: s4.plan(matrix, **options).state.largest / 2**20 for name, options in by_options.items()},
    }  # fmt: skip


def values(found: Any, path: list[str]) -> Iterator[float]:
    """Numbers at a path, and below it where it ends early."""
    if isinstance(found, (dict, list)):
        entries = list(found.values()) if isinstance(found, dict) else found
        if not path or path[0] == "*":
            for entry in entries:
                yield from values(entry, path[1:])
        elif isinstance(found, dict) and path[0] in found:
            yield from values(found[path[0]], path[1:])
    elif not path and isinstance(found, (int, float)) and not isinstance(found, bool):
        yield float(found)


def known(sources: str) -> tuple[list[float], set[str]]:
    given, _, also = sources.partition("; also ")
    found: list[float] = []
    name = ""
    for word in given.split():
        if word.endswith(".json") or word == "plan":
            name = word
            continue
        path, _, factor = word.partition("*1e") if "*1e" in word else (word, "", "0")
        here = [value * 10.0 ** int(factor) for value in values(file(name), path.split("/"))]
        assert here, f"nothing at {word!r} in {name}"
        found += here
    return found, set(also.split())


def is_shown(number: str, candidates: list[float]) -> bool:
    """Whether the number is one of these, rounded to as many places as it has."""
    mantissa, _, exponent = number.replace(",", "").partition("e")
    places = len(mantissa.partition(".")[2])
    half = 0.5000001 * 10.0 ** (int(exponent or 0) - places)
    shown = float(mantissa) * 10.0 ** int(exponent or 0)
    return any(abs(abs(c) - shown) <= half for c in candidates if math.isfinite(c))


@pytest.mark.parametrize("block", MARKED, ids=called)
def test_numbers_are_those_of_the_file_that_is_named(block: Block) -> None:
    assert block.mark
    candidates, also = known(block.mark["sources"])
    numbers = NUMBER.findall(block.prose)
    assert numbers
    wrong = [number for number in numbers if number not in also and not is_shown(number, candidates)]
    assert not wrong, f"{called(block)}: {', '.join(wrong)} not in {block.mark['sources']}"
    assert also <= set(numbers), f"{called(block)}: {also - set(numbers)} is not in the text any more"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_table_with_numbers_has_a_mark_and_in_readme_every_paragraph(page: Path) -> None:
    for block in blocks_of(page):
        counts = "|---" in block.text.replace(" ", "") or page.name == "README.md"
        if counts and not block.text.startswith(("#", "<!--")) and DECIMAL.search(block.prose):
            assert block.mark, f"{called(block)}: no <!-- numbers: ... --> before {DECIMAL.findall(block.prose)}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


def test_a_number_that_is_rounded_otherwise_is_found() -> None:
    assert is_shown("6.805", [6.80516])
    assert is_shown("2e-3", [0.002])
    assert is_shown("1,840,256", [1840256.0])
    assert not is_shown("6.806", [6.80516])
    assert not is_shown("6.80", [6.8151])
