"""The report of `hf-shampoo4 bench --gpu-check`: gpu_check.json, a table and pictures, of whatever has been found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_shampoo4.studies import bench_report
from hf_shampoo4.studies.gpu_check import MISSING, STAGES, Scale
from hf_shampoo4.studies.machine import machine
from hf_shampoo4.utils.files import write_json, write_text
from hf_shampoo4.utils.plots import picture, style

WAYS = {"qr": "QR", "cholesky_qr2": "CholeskyQR2", "newton_schulz": "Newton-Schulz, 5 steps"}


def write_report(folder: Path, scale: Scale) -> dict[str, Any]:
    """Gather the stages' notes; write gpu_check.json, gpu_check.md and gpu_check.png.

    Returns:
        What is in the JSON file.
    """
    stages = {name: _read(folder / "stages" / f"{name}.json") for name in STAGES}
    steps = {model: _read(folder / "steps" / model / "bench.json") for model, _ in scale.models}
    told = {
        "machine": machine(),
        "scale": asdict(scale),
        "stages": stages,
        "steps": {model: found for model, found in steps.items() if found},
    }
    write_json(folder / "gpu_check.json", told)
    write_text(folder / "gpu_check.md", as_markdown(told))
    draw(told, folder / "gpu_check.png")
    return told


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def as_markdown(told: Mapping[str, Any]) -> str:
    """Everything that was found, and what was left out."""
    m, stages = told["machine"], told["stages"]
    lines = [f"# GPU check: {m['accelerator'] or m['processor']}", "", f"torch {m['torch']}, Python {m['python']}.", ""]
    lines += ["| stage | | seconds |", "|---|---|---:|"]
    for name, found in stages.items():
        state = "done" if "done" in found else found.get("ended", "not begun")
        lines.append(f"| {name} | {state} | {found.get('seconds', '')} |")
    lines += ["", *(f"Left out: {what}: {why}." for found in stages.values() for what, why in _missing(found))]
    for part in (_tests, _ceilings, _decompositions, _kernels, _race):
        lines += [*part(stages), ""]
    for model, found in told["steps"].items():
        lines += [f"## A step of {model}", "", bench_report.as_markdown(found)]
    return "\n".join(lines) + "\n"


def _missing(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from found.get(MISSING, {}).items()
    for key, value in found.items():
        if isinstance(value, dict) and "failed" in value:
            yield key, value["failed"]


def _tests(stages: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in ("tests", "sanitizer"):
        if result := stages[name].get("result"):
            lines += ["", f"## {name}: exit code {result['exit_code']}", "", "```", result["tail"], "```"]
    return lines


def _ceilings(stages: Mapping[str, Any]) -> list[str]:
    row = stages["ceilings"].get("row", {})
    return ["", "## Ceilings", "", bench_report.ceilings_line(row)] if "products" in row else []


def _of_stacks(stages: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in stages["decompositions"].values() if isinstance(row, dict) and "qr" in row]


def _decompositions(stages: Mapping[str, Any]) -> list[str]:
    rows = _of_stacks(stages)
    if not rows:
        return []
    lines = ["", "## Orthogonal factors, ms a matrix (largest row sum of Q^T Q - I)", ""]
    lines += [f"| order x stack | {' | '.join(WAYS.values())} |", "|---|" + "---:|" * len(WAYS)]
    for row in rows:
        cells = [f"{row[way]['ms']:.3g} ({row[way]['off']:.0e})" for way in WAYS]
        lines.append(f"| {row['order']} x {row['stack']} | {' | '.join(cells)} |")
    return lines


def _rates(stages: Mapping[str, Any]) -> dict[str, float]:
    """Pass -> 10^9 bytes a second."""
    found = stages["kernels"].items()
    return {name: of["bytes_per_second"] / 1e9 for name, of in found if isinstance(of, dict) and "ms" in of}


def _kernels(stages: Mapping[str, Any]) -> list[str]:
    if not (rates := _rates(stages)):
        return []
    lines = ["", "## Kernels", "", "| pass | GB/s of what it must move |", "|---|---:|"]
    lines += [f"| {name} | {rate:,.1f} |" for name, rate in rates.items()]
    if (waits := stages["kernels"].get("waits")) is not None:
        lines += ["", f"A late step waits for the device: {waits or 'nowhere'}."]
    return lines


def _runs(stages: Mapping[str, Any]) -> dict[str, Any]:
    return {name: run for name, run in stages["race"].items() if isinstance(run, dict) and "curve" in run}


def _race(stages: Mapping[str, Any]) -> list[str]:
    runs = _runs(stages)
    if not runs:
        return []
    some = next(iter(runs.values()))
    lines = [
        "", f"## Race: {some['parameters'] / 1e6:.1f}M parameters, {some['tokens_per_step']:,} tokens a step", "",
        "Rates are the best of a smaller model's grid, not swept here.", "",
        "| | seconds | steps | ms a step | validation loss |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, run in runs.items():
        lines.append(f"| {name} | {run['curve'][-1][0]:.0f} | {run['steps']} | {run['ms']:.1f} | {run['loss']:.4f} |")
    return lines


def draw(told: Mapping[str, Any], path: Path) -> None:
    """Decompositions by order, rates of kernels, late steps, and the race, as a PNG."""
    stages = told["stages"]
    with picture(path, (13, 9), (2, 2)) as (figure, panels):
        _draw_decompositions(panels[0][0], stages)
        rates = _rates(stages)
        panels[0][1].barh(list(rates), list(rates.values()), color="#1971c2")
        panels[0][1].set(title="Passes over quantised numbers", xlabel="10^9 bytes a second")
        _draw_steps(panels[1][0], told["steps"])
        for i, (name, run) in enumerate(_runs(stages).items()):
            curve = run["curve"]
            panels[1][1].plot([x for x, _, _ in curve], [loss for _, _, loss in curve], label=name, **style(i))
        panels[1][1].set(title="Race against the clock", xlabel="seconds", ylabel="validation loss")
        for panel in panels.flat:
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=9)
        figure.suptitle(f"GPU check: {told['machine']['accelerator'] or 'a CPU'}")


def _draw_decompositions(panel: Any, stages: Mapping[str, Any]) -> None:
    largest: dict[int, Mapping[str, Any]] = {row["order"]: row for row in _of_stacks(stages)}
    for i, (way, label) in enumerate(WAYS.items() if largest else ()):
        panel.plot(list(largest), [row[way]["ms"] for row in largest.values()], label=label, **style(i))
    panel.set(title="Orthogonal factor of a stack", xlabel="order", ylabel="ms a matrix")
    if largest:
        panel.set(xscale="log", yscale="log")


def _draw_steps(panel: Any, steps: Mapping[str, Any]) -> None:
    names = list(dict.fromkeys(r["name"] for found in steps.values() for r in found["results"] if not r["missing"]))
    for i, (model, found) in enumerate(steps.items()):
        late = {r["name"]: r["measured_ms"]["late"] for r in found["results"] if not r["missing"]}
        panel.plot([late.get(name) for name in names], names, label=model, **{**style(i), "linestyle": ""})
    panel.set(title="A late step", xlabel="ms")
    if names:
        panel.set(xscale="log")
        panel.invert_yaxis()
