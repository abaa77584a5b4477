"""The picture of `hf-shampoo4 plan --output_dir`."""

from __future__ import annotations

from pathlib import Path

from ..utils.plots import COLOURS, picture
from .figures import Plan, bytes_text, ranks_text


def draw(p: Plan, path: Path) -> None:
    """Optimizer memory of the fullest rank, beside other optimizers' state, as a picture."""
    loads = {"Shampoo4bit": p.state, **p.others}
    sizes = [load.largest / 1e9 for load in loads.values()]
    ends = [p.peak / 1e9, *sizes[1:]]
    with picture(path, (9, 3.6), grid="x", dpi=160) as (_, panels):
        axes = panels[0][0]
        axes.barh(list(loads), sizes, color=[COLOURS[1], *["#adb5bd"] * len(p.others)])
        start = sizes[0]
        for part, colour, label in (
            (p.working.largest, "#ffc9a3", "working memory of a step"),
            (p.exchange.largest, "#ffe8d6", "exchange buffers"),
        ):
            if part:
                axes.barh(0, part / 1e9, left=start, color=colour, label=label)
            start += part / 1e9
        for row, (end, load) in enumerate(zip(ends, loads.values(), strict=True)):
            text = f"{bytes_text(load.largest)}, {p.bytes_per_parameter(load):.1f} bytes/param"
            axes.annotate(text, (end, row), xytext=(6, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.45 * max(ends)), xlabel="GB on the fullest rank")
        axes.set_title(f"Optimizer state of {p.model}, {ranks_text(p)}")
        axes.legend(frameon=False, loc="lower right")
