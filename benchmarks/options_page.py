"""The tables of docs/options.md from `Options`, its docstrings and the algorithms' entries: `--write` makes them anew.

python -m benchmarks.options_page [--write]
"""

import argparse
import ast
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from hf_shampoo4.options import ALGORITHMS, TYPES, Options, fields, users_of

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
MARK = "<!-- options: made by python -m benchmarks.options_page --write -->\n"
TABLES = re.compile(rf"(?<={re.escape(MARK)}).*(?=<!-- end -->)", re.DOTALL)
KINDS = {bool: "`true`, `false`", int: "an integer", float: "a number"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="change the page")
    if not parser.parse_args().write:
        print(tables())
        return
    PAGE.write_text(TABLES.sub(lambda _: tables(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def tables() -> str:
    """One for each set of algorithms that use the same options."""
    meanings, found = dict(docstrings()), []
    for users, names in groupby(vars(Options()), key=users_of):
        rows = [f"| `{name}` | {default(name)} | {allowed(name)} | {meanings[name]} |" for name in names]
        whose = "all algorithms" if users == tuple(ALGORITHMS) else _listed([f"`{user}`" for user in users])
        head = "<!-- numbers by hand: made from Options -->\n| option | default | allowed | |\n|---|---|---|---|\n"
        found.append(f"\nOf {whose}:\n\n{head}" + "\n".join(rows) + "\n")
    return "".join(found) + "\n"


def docstrings() -> Iterator[tuple[str, str]]:
    """Option -> what stands below its field."""
    source = ast.parse(Path(fields.__file__).read_text(encoding="utf-8"))
    body = next(node.body for node in source.body if isinstance(node, ast.ClassDef) and node.name == Options.__name__)
    for field, below in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield ast.unparse(field.target), re.sub(r"([|*])", r"\\\1", " ".join(str(below.value.value).split()))


def default(name: str) -> str:
    """The value, and those of algorithms that have another one."""
    others = [f"`{a}`: {_value(entry.defaults[name])}" for a, entry in ALGORITHMS.items() if name in entry.defaults]
    return ", ".join([_value(getattr(Options, name)), *others])


def allowed(name: str) -> str:
    """The values, or of what kind they are; ranges are in the meaning."""
    if name == "algorithm":
        return ", ".join(f"`{a}`" for a in ALGORITHMS)
    if get_origin(TYPES[name]) is Literal:
        return ", ".join(_value(choice) for choice in get_args(TYPES[name]))
    return KINDS.get(TYPES[name], "see right")


def _value(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if value != () else ""


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


if __name__ == "__main__":
    main()
