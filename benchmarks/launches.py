"""What a step launches, by model, with and without Triton's kernels.

Written are docs/results/launches.json and the table in docs/gpu.md.

python -m benchmarks.launches            count this checkout ("after"), a minute of one core
python -m benchmarks.launches --table    only write the table again

"before" stays: commit dc47a37, by the same counter copied into it, at its steps 1,234 (late) and 50 (all).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_shampoo4.planning.launches import steps_of
from hf_shampoo4.studies.bench import model_of
from hf_shampoo4.studies.bench_contestants import Settings
from hf_shampoo4.studies.code_version import commit
from hf_shampoo4.utils.files import write_json, write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
COUNTS, PAGE = DOCS / "results" / "launches.json", DOCS / "gpu.md"
MODELS = ("llama_130m", "llama_350m", "llama_1b")
MARK = "<!-- numbers: launches.json */models/*/*/*/launches */models/*/*/*/bytes_a_parameter -->"
BEGIN, END = "<!-- launches: begin -->\n", "<!-- launches: end -->\n"


def counted() -> dict[str, Any]:
    """Of this checkout, as `planning.launches.Counted.summary`."""
    found: dict[str, Any] = {}
    for name in MODELS:
        model = model_of(Settings(model=name), "meta")
        found[name] = {"parameters": sum(p.numel() for p in model.parameters())}
        for kind, triton in (("triton", True), ("plain", False)):
            steps = steps_of(model, {}, triton)
            found[name][kind] = {of: step.summary() for of, step in steps.items()}
            for told in found[name][kind].values():
                told["bytes_a_parameter"] = told["bytes"] / found[name]["parameters"]
            print(name, kind, {of: step["launches"] for of, step in found[name][kind].items()}, flush=True)
    return found


def table(told: Mapping[str, Any]) -> str:
    """Markdown: launches and bytes a parameter, before -> after."""
    lines = [
        f"Before: {told['before']['commit']}; after: {told['after']['commit']}. Default options.",
        "",
        MARK,
        "| launches, bytes a parameter | with Triton, late | all bases | without, late | all bases |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in MODELS:
        cells = []
        for kind in ("triton", "plain"):
            for of in ("late", "all"):
                pair = [told[when]["models"][name][kind][of] for when in ("before", "after")]
                launches = " -> ".join(f"{one['launches']:,}" for one in pair)
                moved = " -> ".join(f"{one['bytes_a_parameter']:.0f}" for one in pair)
                cells.append(f"{launches}, {moved}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="count nothing")
    told = json.loads(COUNTS.read_text(encoding="utf-8"))
    if not parser.parse_args().table:
        told["after"] = {"commit": commit(), "models": counted()}
        write_json(COUNTS, told)
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    write_text(PAGE, head + BEGIN + table(told) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
