"""What training takes before anything is rented: `hf-shampoo4 plan`, as text, JSON and a picture.

From geometry alone: neither the weights of the model nor a GPU are needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..integrations.trainer import OPTIMS
from ..options import parse_optim_args
from ..utils.files import write_json
from ..utils.plots import COLOURS, picture
from .estimate import plan
from .figures import Plan, bytes_text, ranks_text
from .shardings import SHARDINGS


def main(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 plan`."""
    chosen = _parser().parse_args(arguments)
    named = OPTIMS[chosen.optim]
    options = {**named, **parse_optim_args(chosen.optim_args, beneath=named)}
    made = plan(chosen.model, chosen.world_size, chosen.sharding, chosen.shards, **options)
    print(made)
    if chosen.output_dir:
        write_json(chosen.output_dir / "plan.json", made.to_dict())
        draw(made, chosen.output_dir / "plan.png")
        print(f"\n{chosen.output_dir / 'plan.json'}, {chosen.output_dir / 'plan.png'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 plan", description=__doc__)
    add = parser.add_argument
    add("model", help="a preset of configs/models, a config.json, a folder or a hub name")
    add("--world-size", "--world_size", type=int, default=1, metavar="N", help="ranks (default: 1)")
    add("--sharding", choices=SHARDINGS, default="ddp", help="how the ranks share the model (default: ddp)")
    add("--shards", type=int, metavar="N", help="under hsdp, ranks that share one copy of the model (default: 8)")
    add("--optim", choices=OPTIMS, default="shampoo4bit", help="as in --optim of a training (default: shampoo4bit)")
    add("--optim_args", "--optim-args", help='as in a training: "block_size=512,preset=paper_eigen"')
    add("--output_dir", "--output-dir", type=Path, help="write plan.json and plan.png there")
    return parser


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
