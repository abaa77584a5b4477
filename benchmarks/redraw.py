"""Draw the pictures of docs/results again from their JSON: `python -m benchmarks.redraw [NAME ...]`.

For a new look: no number changes, nothing is measured.  overlap.png is not among them, as its JSON has no spans.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_shampoo4.studies import bench_report, quantization_report, vision
from hf_shampoo4.studies.grid import read_grid
from hf_shampoo4.studies.race_report import draw_curves, draw_shares

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(DRAWN)}")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    given = parser.parse_args()
    for name in given.names or DRAWN:
        told = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        DRAWN[name](told, given.output_dir / f"{name}.png")
        print(given.output_dir / f"{name}.png")


def shares(told: dict[str, Any], path: Path) -> None:
    draw_shares(told["title"], rows(told), path)


def curves(told: dict[str, Any], path: Path) -> None:
    grid = replace(read_grid(path.stem), title=told["title"], baseline=told["baseline"])
    draw_curves(grid, rows(told), path)


def rows(told: dict[str, Any]) -> list[Any]:
    return [SimpleNamespace(**found) for found in told["contestants"].values()]


def by_epoch(told: dict[str, Any], path: Path) -> None:
    results = []
    for c in told["contestants"]:
        by_rate: dict[float, list[Any]] = {}
        for run in c["runs"]:
            by_rate.setdefault(run["learning_rate"], []).append(run)
        results.append((SimpleNamespace(**c), min(by_rate.values(), key=vision._mean_validation_loss)))
    vision.draw(results, path)


DRAWN = {
    "moments": shares, "seeds": shares, "errors": quantization_report.draw, "vision": by_epoch,
    "bench": bench_report.draw, "bench_tiny": bench_report.draw,
    **{f"race/{p.stem}": curves for p in (RESULTS / "race").glob("*.json")},
}  # fmt: skip

if __name__ == "__main__":
    main()
