"""The report of `hf-shampoo4 errors`: its table, its JSON and its picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_shampoo4.studies.quantization_matrices import BLOCK, Matrix, Scheme
from hf_shampoo4.utils.plots import picture

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


COLOURS = {"A": "#d9480f", "U": "#1971c2", "C": "#2f9e44", "C+EF": "#862e9c", "C+EF mean": "#862e9c"}


def draw(matrices: Sequence[Matrix], found: Found, path: Path) -> None:
    """A panel for each matrix: a dot for our NRE, a diamond for the paper's.

    Args:
        matrices: what was measured.
        found: name -> scheme -> (NRE, AE).
        path: the PNG file.
    """
    from matplotlib.lines import Line2D

    size = (3.1 + 2.9 * len(matrices), 5.8)
    with picture(path, size, (1, len(matrices)), grid="x", font=10, sharey=True, sharex=True) as (figure, axes):
        panels, schemes = list(axes[0]), list(found[matrices[0].name])
        for panel, matrix in zip(panels, matrices, strict=True):
            _draw_panel(panel, matrix, found[matrix.name])
        panels[0].set_yticks(range(len(schemes)), [scheme.label for scheme in schemes])
        panels[0].invert_yaxis()
        marks = [
            Line2D([], [], marker="o", color="#495057", linestyle="", label="ours"),
            Line2D([], [], marker="D", color="#212529", fillstyle="none", linestyle="", label="published"),
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
        order = len(matrices[0].a)
        figure.suptitle(f"Error of the inverse fourth root after quantising a preconditioner of order {order}")


def _draw_panel(axes: Any, matrix: Matrix, found: Mapping[Scheme, tuple[float, float]]) -> None:
    for y, (scheme, (nre, _)) in enumerate(found.items()):
        colour = COLOURS[scheme.quantised]
        axes.plot([1e-4, nre], [y, y], color=colour, alpha=0.25, linewidth=2)
        axes.plot(nre, y, "o", color=colour, markersize=7)
        if scheme in matrix.paper:
            axes.plot(matrix.paper[scheme][0], y, "D", markersize=8, fillstyle="none", color="#212529")
    title = matrix.name.replace(", ", ",\n")
    axes.set(xscale="log", xlim=(1.5e-3, 1.2), title=title, xlabel="NRE of $A^{-1/4}$")
