"""The picture of `hf-shampoo4 plan --output_dir`."""

from __future__ import annotations

from pathlib import Path

from ..utils.plots import COLOURS, PALETTE, picture
from .figures import Plan, bytes_text, ranks_text


def draw(p: Plan, path: Path) -> None:
    """Optimizer memory of the fullest rank, beside other optimizers' state, as a picture."""
    names, loads = [p.optimizer, *p.others], [p.state, *p.others.values()]
    with picture(path, (7, 3.6), grid="x") as (figure, panels):
        axes = panels[0][0]
        start = 0.0
        for part, colour, label in (
            (p.state.largest, PALETTE[0], "state"),
            (p.working.largest, PALETTE[4], "working memory of a step"),
            (p.exchange.largest, PALETTE[5], "exchange buffers"),
        ):
            if part:
                axes.barh(p.optimizer, part / 1e9, left=start, color=colour, edgecolor="white", label=label)
            start += part / 1e9
        axes.barh(names[1:], [load.largest / 1e9 for load in loads[1:]], color=COLOURS[0], label="state of others")
        ends = [p.peak, *(load.largest for load in loads[1:])]
        for name, end, load in zip(names, ends, loads, strict=True):
            whose = "state " if load is p.state else ""
            text = f"{whose}{bytes_text(load.largest)}, {p.bytes_per_parameter(load):.1f} bytes/param"
            axes.annotate(text, (end / 1e9, name), xytext=(5, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.7 * max(ends) / 1e9), xlabel="GB on the fullest rank")
        axes.set_title(f"{p.model}, {ranks_text(p)}: memory of the optimizer")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
