"""Fine-tuning, optimizers side by side: `python -m benchmarks.finetuning FOLDER [--quick]`.

Pretrains the model of configs/finetuning.yaml and fine-tunes it, one file a run in FOLDER, none made twice: the sweeps
of all grids first, then the other seeds.  Every call writes finetuning.json, .md and .png there from what has finished;
with --size SIZE they are called finetuning_SIZE.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from hf_shampoo4.studies.finetuning import base_model, code_of, read_grids, study
from hf_shampoo4.studies.finetuning_report import report
from hf_shampoo4.studies.race import carry_out
from hf_shampoo4.studies.runner import Runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model: does it work here?")
    parser.add_argument("--size", default="", help="of the model: tiny (1.8M parameters, the default) or small (4.7M)")
    parser.add_argument(
        "--grids", default="", help="these alone, comma-separated, such as kjv_full,instructions_lora8; default: all"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many; default: 3")
    parser.add_argument("--report_only", action="store_true", help="no runs")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    grids = read_grids(chosen.size, chosen.quick)
    runs, names = Runs(chosen.folder / "runs"), chosen.grids.split(",") if chosen.grids else [g.name for g in grids]
    for seeds in (1, chosen.seeds) if not chosen.report_only else ():
        for grid in (grid for grid in grids if grid.name in names):
            carry_out(replace(grid, seeds=grid.seeds[:seeds]), runs, sweep=not chosen.quick, study=study(chosen.folder))
    report(
        [grid for grid in grids if grid.name in names],
        runs.of(code_of),
        base_model(grids[0].common["pretraining"], chosen.folder),
        chosen.folder,
        chosen.size,
    )


if __name__ == "__main__":
    main()
