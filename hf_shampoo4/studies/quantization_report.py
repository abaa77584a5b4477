"""The report of `hf-shampoo4 errors`: its table, its JSON and its picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_shampoo4.studies.quantization_matrices import BLOCK, Matrix, Scheme
from hf_shampoo4.utils.plots import picture, style

Found = dict[str, dict[Scheme, tuple[float, float]]]


def print_table(matrix: Matrix, found: Mapping[Scheme, tuple[float, float]]) -> None:
    """One matrix, the paper's values beside ours."""
    from rich.console import Console
    from rich.table import Table

    table = Table("quantised", "codebook", "bits", "Björck", "NRE", "paper", "AE", "paper", title=matrix.name)
    for column in table.columns[2:]:
        column.justify = "right"
    for s, (nre, ae) in found.items():
        paper = [f"{x:.{d}f}" for x, d in zip(matrix.paper[s], (4, 2), strict=True)] if s in matrix.paper else ["", ""]
        steps = str(s.bjorck) if s.quantised == "U" else ""
        table.add_row(s.quantised, s.codebook, str(s.bits), steps, f"{nre:.4f}", paper[0], f"{ae:.2f}", paper[1])
    Console().print(table)


def summary(matrices: Sequence[Matrix], found: Found) -> dict[str, Any]:
    """Everything as JSON."""
    return {
        matrix.name: {
            "order": len(matrix.a),
            "condition": float(f"{_condition(matrix.a):.3e}"),
            "damping": matrix.damping,
            "rows": [
                {
                    **dataclasses.asdict(s),
                    "block": BLOCK[s.bits],
                    "nre": round(nre, 5),
                    "ae_degrees": round(ae, 3),
                    "paper": [round(x, 4) for x in matrix.paper[s]] if s in matrix.paper else None,
                }
                for s, (nre, ae) in found[matrix.name].items()
            ],
        }
        for matrix in matrices
    }


def _condition(a: Tensor) -> float:
    eigenvalues = torch.linalg.eigvalsh(a)
    return float(eigenvalues[-1] / eigenvalues[0].clamp_min(1e-300))


LOOKS = {kind: style(i) for i, kind in enumerate(("A", "U", "C", "C+EF", "C+EF mean"))}
MEANINGS = (
    "What is rounded of a preconditioner A: A itself, its eigenvectors U, its Cholesky factor C, without or with error "
    "feedback (EF; mean: over many stores).\nNRE: |f(A) - f(rounded A)| / |f(A)| in the Frobenius norm, for "
    "f(A) = $A^{-1/4}$.  Left is better."
)


def draw(told: Mapping[str, Any], path: Path) -> None:
    """A panel for each matrix: a filled mark for our NRE, an empty diamond for the paper's.

    Args:
        told: what `summary` gives.
        path: the PNG file.
    """
    size = (3.1 + 2.9 * len(told), 6.2)
    with picture(path, size, (1, len(told)), grid="x", font=10, sharey=True, sharex=True) as (figure, axes):
        panels = list(axes[0])
        for panel, (name, matrix) in zip(panels, told.items(), strict=True):
            _draw_panel(panel, name, matrix["rows"])
        rows = next(iter(told.values()))["rows"]
        panels[0].set_yticks(range(len(rows)), [_scheme(row).label for row in rows])
        panels[0].invert_yaxis()
        _legend(figure)
        order = next(iter(told.values()))["order"]
        figure.suptitle(f"Error of the inverse fourth root after rounding a preconditioner of order {order:,}")
        figure.supxlabel(MEANINGS, fontsize=8.5)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    published = {"marker": "D", "color": "#111827", "fillstyle": "none", "markersize": 8, "label": "published"}
    ours = {"marker": "o", "color": "#6b7280", "label": "ours (a mark for each kind of row)"}
    marks = [Line2D([], [], linestyle="", **look) for look in (ours, published)]
    figure.legend(handles=marks, loc="outside upper right", ncols=2, frameon=False, fontsize=9)


def _scheme(row: Mapping[str, Any]) -> Scheme:
    return Scheme(row["quantised"], row["codebook"], row["bits"], row["bjorck"])


def _draw_panel(axes: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    for y, row in enumerate(rows):
        look = LOOKS[row["quantised"]]
        axes.plot([1e-4, row["nre"]], [y, y], color=look["color"], alpha=0.25, linewidth=2)
        axes.plot(row["nre"], y, look["marker"], color=look["color"], markersize=7)
        if row["paper"]:
            axes.plot(row["paper"][0], y, "D", markersize=9, fillstyle="none", color="#111827")
    axes.set(xscale="log", xlim=(1.5e-3, 1.2), title=name.replace(", ", ",\n"), xlabel="NRE of $A^{-1/4}$")
