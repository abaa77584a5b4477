"""The command lines of the studies: `hf-shampoo4 bench`, `demo`, `errors`, `race` and `sweep`.

What they take is checked before anything heavy is imported, so that `--help` and a mistake are answered at once, and a
folder that cannot be written before any work is done.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

from hf_shampoo4.exceptions import ConfigError, OptionError
from hf_shampoo4.options import KINDS
from hf_shampoo4.studies.bench_contestants import CONTESTANTS, Settings, models
from hf_shampoo4.utils.files import check_writable, write_text
from hf_shampoo4.utils.numbers import SEEDS, number, require_with, whole

MINUTES = 8


def bench(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 bench`: what a step of a whole model costs, beside other optimizers, and beside what is predicted.

    Embeddings and head are included.  Late steps, the average of the first 1,000 and steps that update all bases are
    told apart; cost is time, operations, bytes moved and launches.  First this machine's ceilings are measured, from
    which `plan` would predict.  A finished contestant is kept: a second call goes on where the first was stopped.
    """
    chosen = _bench_parser().parse_args(arguments)
    if chosen.gpu_check is not None:
        _gpu_check(chosen)
        return
    require_with("--gpu-check DIR", False, minutes=chosen.minutes, cpu=chosen.cpu)
    settings = _bench_settings(chosen)
    names = [name for name in chosen.contestants.split(",") if name] or list(CONTESTANTS)
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise OptionError(f"unknown contestants {', '.join(unknown)}; known: {', '.join(CONTESTANTS)}")
    folder = chosen.output_dir
    check_writable(folder)
    import torch

    from hf_shampoo4.studies.bench import write_report

    torch.set_num_threads(settings.threads)
    print(f"{len(names)} optimizers of {settings.title()} on {settings.device}", flush=True)
    print(write_report(names, settings, folder) + f"\n{folder}/bench.json, bench.md, bench.png")


def _gpu_check(chosen: argparse.Namespace) -> None:
    check_writable(chosen.gpu_check)
    from hf_shampoo4.studies.gpu_check import check

    check(chosen.gpu_check, chosen.cpu, MINUTES if chosen.minutes is None else chosen.minutes)
    print((chosen.gpu_check / "gpu_check.md").read_text(encoding="utf-8"))
    print(f"{chosen.gpu_check}/gpu_check.json, gpu_check.md, gpu_check.png")


def _bench_settings(chosen: argparse.Namespace) -> Settings:
    names = get_type_hints(Settings)
    given = {name: found for name in names if (found := getattr(chosen, name, None)) is not None}
    quick = {"model": "llama_tiny", "layers": 1, "steps": 2, "turning": 1} if chosen.quick else {}
    return Settings(**{**quick, **given})


def _bench_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 bench", description=bench.__doc__)
    add, default = parser.add_argument, Settings()
    add("--model", help=f"{', '.join(models())}; default {default.model}")
    add("--layers", type=whole(1), help="how many of its layers; default all")
    add("--steps", type=whole(1), help=f"late steps that are timed; default {default.steps}")
    add("--turning", type=whole(1), help=f"timed steps that update all bases; default {default.turning}")
    add("--seconds", type=number(0), help="after which no further step of a contestant begins; default none")
    add("--threads", type=whole(1), help=f"default {default.threads}")
    add("--clock", help=f"wall, or cpu: the process's own time, on a busy machine; default {default.clock}")
    add("--device", help=f"default {default.device}")
    add("--contestants", default="", help=f"comma-separated; default all: {','.join(CONTESTANTS)}")
    add("--output_dir", type=Path, default=Path("runs/bench"), help="default: runs/bench")
    add("--quick", action="store_true", help="a tiny model: does it work here?")
    add("--gpu-check", "--gpu_check", type=Path, metavar="DIR", help="instead: all about one GPU, offline, resumable")
    add("--minutes", type=number(0), help=f"that --gpu-check may take; default {MINUTES}")
    add("--cpu", action="store_true", help="a small form of --gpu-check on the CPU: would it work there?")
    return parser


def demo(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 demo`: one small LLaMA, pretrained with each optimizer from the same weights on the same batches.

    Prints a table and writes `demo.json` and `demo.png`.  The settings are in `configs/demo.yaml`; every run is the one
    that `hf-shampoo4 train` makes.  Learning rates are swept by `hf-shampoo4 race`.
    """
    chosen = _demo_parser().parse_args(arguments)
    common = {"seed": chosen.seed, **({} if chosen.steps is None else {"max_steps": chosen.steps})}
    optims = chosen.optims.split(",") if chosen.optims else ()
    folder = chosen.output_dir
    if folder.is_dir() and any(folder.iterdir()) and not chosen.overwrite_output_dir:
        raise ConfigError(f"output_dir {str(folder)!r} is not empty: choose another, or --overwrite_output_dir")
    check_writable(folder)
    from hf_shampoo4.studies.demo import demo as run

    run(folder, optims, {**common, "overwrite_output_dir": chosen.overwrite_output_dir}, chosen.quick)


def _demo_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 demo", description=demo.__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    add("--overwrite_output_dir", action="store_true", help="replace what is in the folder")
    add("--steps", type=whole(1), help="steps of each run")
    add("--optims", help="names of --optim, comma-separated; the first is the reference")
    add("--seed", type=whole(0, SEEDS), default=0, help="of the weights and of the order of the data")
    add("--quick", action="store_true", help="a few steps of a tiny model: does it work here?")
    return parser


def race(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 race GRID`: every contestant of a grid at its own best learning rates, from several seeds.

    Grids are in `configs/race.yaml`.  A run trains a small model from the seed's weights on the seed's order of the
    data, the same for all contestants.  The first seed runs a contestant's points and, with `--sweep`, goes on from the
    best of them, a factor at a time on the rate of all parameters or of one kind (embedding, head, matrix, vector),
    until the best is worse off in either direction of every coordinate; the best point then serves the other seeds.

    A finished run is kept at once, in a file of its own in DIR/runs, and never run again by the same code; a race can
    be stopped at any time and shared by processes (`--shard I/N`).  A run that was killed goes on, to the same bits,
    from what it has left in DIR/unfinished, at most five minutes earlier.  The report is a table, a JSON with
    everything and pictures; README.md says of all reports in DIR whom `shampoo4bit` is ahead of.  On a quiet machine
    `--time` measures what a step takes, side by side, into DIR/times/GRID.json; a report that finds it there counts its
    seconds by it.  `--peaks` measures, into DIR/peaks, the bytes that a step holds at its peak, for the same table.
    """
    chosen = _race_parser().parse_args(arguments)
    folder = chosen.output_dir
    check_writable(folder)
    from hf_shampoo4.studies.grid import read_grid, some_of
    from hf_shampoo4.studies.peers import code_of
    from hf_shampoo4.studies.race import carry_out
    from hf_shampoo4.studies.race_peaks import measure_peaks, peaks_of
    from hf_shampoo4.studies.race_report import report
    from hf_shampoo4.studies.race_summary import write_summary
    from hf_shampoo4.studies.race_times import STEPS, Times, measure_times
    from hf_shampoo4.studies.runner import Runs

    changes = {} if chosen.steps is None else {"max_steps": chosen.steps}
    grid = read_grid(chosen.grid, chosen.quick, changes)
    grid = replace(grid, seeds=grid.seeds[: chosen.seeds])
    wanted = some_of(grid, chosen.contestants.split(","))
    runs, peaks, timed = Runs(folder / "runs"), Runs(folder / "peaks"), folder / "times" / f"{grid.name}.json"
    if chosen.time:
        measure_times(wanted.contestants, timed, 2 if chosen.quick else STEPS)
    if chosen.peaks:
        measure_peaks(wanted.contestants, peaks)
    if chosen.time or chosen.peaks:
        return
    if not chosen.report_only:
        carry_out(wanted, runs, chosen.shard, chosen.sweep)
    if chosen.shard[1] == 1:
        code = None if chosen.any_code else code_of
        report(grid, runs.of(code), folder, Times.read(timed), peaks_of(grid.contestants, peaks.of(code)))
        write_summary(folder)


def _race_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 race", description=race.__doc__)
    add = parser.add_argument
    add("grid", help="a grid of configs/race.yaml")
    add("--output_dir", type=Path, default=Path("runs/race"), help="default: runs/race")
    add("--sweep", action="store_true", help="go on from the best point until it is at no edge")
    add("--seeds", type=whole(1), metavar="N", help="the first N seeds of the grid alone")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="take every N-th contestant from the I-th")
    add("--contestants", default="", help="run these alone, comma-separated; the report is of all that have finished")
    add("--steps", type=whole(1), help="steps of each run")
    add("--report_only", action="store_true", help="no runs: put together what is finished, of all processes")
    add("--time", action="store_true", help="no runs: time 30 steps of each contestant side by side, for the report")
    add("--peaks", action="store_true", help="no runs: measure the bytes of a step at its peak, for the report")
    add("--any_code", action="store_true", help="report runs of other versions of the code too, the last first")
    add("--quick", action="store_true", help="a few steps of a tiny model: does it work here?")
    return parser


def _shard(text: str) -> tuple[int, int]:
    index, _, processes = text.partition("/")
    if not (index.isdecimal() and processes.isdecimal() and int(index) < int(processes)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I < N, such as 0/2")
    return int(index), int(processes)


def sweep(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 sweep CONFIG [--key value ...]`: a learning rate for a training of your own, by short runs.

    CONFIG and settings are those of `hf-shampoo4 train` or `finetune`.  Three runs of a few steps at the training's
    rate, twice it and half of it, with its schedule in proportion; while the best is the highest or the lowest, another
    one beyond it.  With `--kinds embedding,head` the factors of these kinds of parameter (`rates` in optim_args) are
    sought instead, and with `--rates` too, both.  Finished runs are kept in DIR/runs and not made again.  Prints a
    table of validation losses and the lines for the configuration.
    """
    chosen, overrides = _sweep_parser().parse_known_args(arguments)
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"a sweep trains in one process, not in WORLD_SIZE={os.environ['WORLD_SIZE']}: "
                          "without torchrun or accelerate launch, or train at each rate by hand")  # fmt: skip
    from hf_shampoo4.training.commands import checked_settings

    kind, given = checked_settings(chosen.config, overrides)
    folder = chosen.output_dir or Path("runs/sweep") / Path(chosen.config).stem
    from hf_shampoo4.integrations.trainer import register
    from hf_shampoo4.studies.runner import Runs
    from hf_shampoo4.studies.sweep import as_markdown, as_settings, carry_out, search_of, shortened, trainer_of

    settings = as_settings(given)
    search = search_of(settings, chosen.rates, chosen.kinds, chosen.factor)
    short = shortened(settings, chosen.steps)
    check_writable(folder)
    register()
    losses = carry_out(short, search, chosen.max_runs, Runs(folder / "runs"), trainer_of(kind, folder))
    told = as_markdown(losses, search)
    write_text(folder / "sweep.md", told)
    print(f"{short['max_steps']} steps each\n\n{told}{folder}/sweep.md")


def _sweep_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 sweep", description=sweep.__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="of train or finetune: a YAML file or a shipped name")
    add("--rates", type=_rates, default=(), metavar="R,R,...", help="learning rates to begin with; default CONFIG's")
    add("--kinds", type=_kinds, default=(), metavar="K,K,...", help=f"factors to seek, of {', '.join(KINDS)}")
    add("--steps", type=whole(1), help="of each run; default 200, or the training's own if it has fewer")
    add("--factor", type=number(1.01), default=2.0, help="between a value and the next, such as 1.41; default 2")
    add("--max_runs", type=whole(1), default=8, help="at most so many runs, finished ones counted; default 8")
    add("--output_dir", type=Path, help="default: runs/sweep/NAME of CONFIG")
    return parser


def _rates(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(map(number(0), text.split(","))))


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(item.strip() for item in text.split(",")))
    if strange := [kind for kind in kinds if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"{strange[0]!r} is no kind of parameter; kinds are {', '.join(KINDS)}")
    return kinds


def errors(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 errors`: what quantising a preconditioner costs its inverse root, beside the papers' figures."""
    chosen = _errors_parser().parse_args(arguments)
    check_writable(chosen.output_dir)
    from hf_shampoo4.studies.quantization_error import measure_all, time_all

    if chosen.solvers:
        time_all(chosen.output_dir)
    else:
        measure_all(chosen.output_dir, chosen.order, chosen.matrix, chosen.collect)


def _errors_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 errors", description=errors.__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/errors"), help="default: %(default)s")
    add("--order", type=whole(2), default=1200, help="of the synthetic matrices; default: %(default)s")
    add("--matrix", type=Path, nargs="*", help=".npy files; default: those that --collect left")
    add("--collect", action="store_true", help="first train and save real preconditioners (5 minutes)")
    add("--solvers", action="store_true", help="time the inverse-root solvers instead")
    return parser
