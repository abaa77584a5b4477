"""`hf-shampoo4 sweep`: a learning rate for a training of one's own, bracketed by short runs."""

from __future__ import annotations

import functools
import gc
import glob
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.integrations.trainer import OPTIMS, optim_options
from hf_shampoo4.options import CONFIG_ENV, KINDS, pairs_as_text
from hf_shampoo4.studies.grid import RATE, Point, Settings, best_of, sides
from hf_shampoo4.studies.peers import code_of
from hf_shampoo4.studies.runner import Runs
from hf_shampoo4.training.config import DEFAULT_OPTIM

Losses = Mapping[Point, float]
STEPS = 200
"""Of a run, unless the training itself has fewer."""
AS_EVERY_RUN: Settings = {  # a short run is for its last loss, and leaves nothing
    "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False,
    "push_to_hub": False, "report_to": "none", "overwrite_output_dir": True,
}  # fmt: skip
DROPPED = ("output_dir", "resume_from_checkpoint", "num_train_epochs")


@dataclass(frozen=True)
class Search:
    """What is tried, and when it ends."""

    start: tuple[Point, ...]
    """Tried in any case."""
    coordinates: tuple[str, ...]
    """Along which it goes on: the rate of all parameters, or the factor of one kind."""
    factor: float
    """Between a value and the next."""

    def next_point(self, losses: Losses) -> Point | None:
        """What is missing of `start`, else the next value beyond the best one where that is at an edge; None: done."""
        if missing := [point for point in self.start if point not in losses]:
            return missing[0]
        best = best_of(losses)
        if losses[best] == math.inf:  # all diverged
            lowest = min(losses, key=lambda point: point.learning_rate)
            return self._moved(lowest, RATE, 1 / self.factor) if RATE in self.coordinates else None
        for coordinate in self.coordinates:
            lower, upper = sides(losses, coordinate)
            if not upper:
                return self._moved(best, coordinate, self.factor)
            if not lower:
                return self._moved(best, coordinate, 1 / self.factor)
        return None

    @staticmethod
    def _moved(point: Point, coordinate: str, factor: float) -> Point:
        value = float(f"{point.get(coordinate) * factor:.3g}")
        if coordinate == RATE:
            return replace(point, learning_rate=value)
        return Point.of({RATE: point.learning_rate, "rates": {**dict(point.rates), coordinate: value}})


def search_of(settings: Settings, rates: Sequence[float], kinds: Sequence[str], factor: float) -> Search:
    """Where to begin: the training's own rate and factors, or the rates that are given.

    Args:
        settings: of the training.
        rates: to try first; none: the training's own, or with no kinds also one below and one above it.
        kinds: of parameters whose factors are sought; with `rates`, beside the rate.
        factor: between a value and the next.

    Raises:
        ConfigError: no rate anywhere, or factors for an optimizer that has none.
    """
    optim = settings.get("optim", DEFAULT_OPTIM)
    if kinds and optim not in OPTIMS:
        raise ConfigError(f"--kinds needs an optimizer with a rate for each kind ({', '.join(OPTIMS)}), not {optim!r}")
    given = settings.get(RATE)
    own = math.nan if given is None else _number(RATE, given)
    if not rates and not 0 < own < math.inf:
        said = "the configuration has no learning_rate" if given is None else f"learning_rate={given!r} is no start"
        raise ConfigError(f"{said}: give one with --learning_rate, or some with --rates")
    first = Point.of({RATE: rates[0] if rates else own, "rates": dict(_options(settings).get("rates", ()))})
    start = tuple(replace(first, learning_rate=rate) for rate in dict.fromkeys(rates)) or (first,)
    return Search(start, (*((RATE,) if rates or not kinds else ()), *kinds), factor)


def shortened(settings: Settings, steps: int | None) -> Settings:
    """The training in few steps: the same schedule, its warm-up and other lengths in proportion, and no checkpoints.

    Args:
        settings: of the training, `optim_args` as text.
        steps: of the short run; None: `STEPS`, or the training's own if it has fewer.

    Raises:
        ConfigError: a length in steps that cannot be taken in proportion, or nothing to validate on.
        OptionError: an `optim_args` item that the optimizer refuses.
    """
    validation = [settings.get(name) for name in ("validation_dataset", "validation_split")]
    if not any(validation) and float(settings.get("validation_fraction", 1)) == 0:
        raise ConfigError("a sweep compares validation losses, and there are no validation examples: "
                          "give validation_fraction above 0, or a validation_dataset")  # fmt: skip
    whole = int(_number("max_steps", settings.get("max_steps") or 0))
    taken = steps or min(STEPS, whole if whole > 0 else STEPS)
    kept = {key: value for key, value in settings.items() if key not in DROPPED}
    if _number("warmup_steps", kept.get("warmup_steps") or 0) >= 1:
        kept["warmup_steps"] = _in_proportion("warmup_steps", kept["warmup_steps"], whole, taken)
    if isinstance(others := _mapping(kept.get("lr_scheduler_kwargs")), Mapping):
        kept["lr_scheduler_kwargs"] = {
            name: _in_proportion(name, value, whole, taken) if name.endswith("_steps") else value
            for name, value in others.items()
        }
    if start := _options(settings).get("stochastic_from"):
        told = f"stochastic_from={max(1, _in_proportion('stochastic_from', start, whole, taken))}"  # 0: never
        kept["optim_args"] = ",".join(filter(None, (kept.get("optim_args"), told)))
    return {**kept, **AS_EVERY_RUN, "max_steps": taken}


def _mapping(value: Any) -> Any:
    """What the command line has as JSON, as a file has it; TrainingArguments reads no other text."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"lr_scheduler_kwargs={value!r} is not allowed: it must be a mapping, as JSON") from error


def _in_proportion(name: str, length: Any, whole: int, taken: int) -> int:
    if whole <= 0:
        other = {"warmup_steps": ", or warmup_steps below 1", "stochastic_from": ", or stochastic_last, a share"}
        raise ConfigError(f"{name}={length} is in steps, and the training has no max_steps to tell its share: "
                          f"give --max_steps, the length of the whole training{other.get(name, '')}")  # fmt: skip
    return round(_number(name, length) * taken / whole)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}={value!r} is not allowed: it must be a number") from error


def _options(settings: Settings) -> Mapping[str, Any]:
    """Of the optimizer, if it is ours."""
    optim = settings.get("optim", DEFAULT_OPTIM)
    return optim_options(optim, settings.get("optim_args")) if optim in OPTIMS else {}


def at_point(settings: Settings, point: Point, has_factors: bool) -> Settings:
    """The settings of a run: the last `rates` of optim_args holds."""
    told = {**settings, RATE: point.learning_rate}
    if has_factors:
        told["optim_args"] = ",".join(filter(None, (settings.get("optim_args"), factors_as_text(point))))
    return told


def factors_as_text(point: Point) -> str:
    """An item of optim_args with the factors of all kinds."""
    return "rates=" + ";".join(f"{kind}:{point.get(kind):g}" for kind in KINDS)


def carry_out(
    settings: Settings, search: Search, max_runs: int, runs: Runs, train: Callable[[Settings], Settings]
) -> dict[Point, float]:
    """Run until the best point has a worse one on either side; finished runs are not made again.

    Args:
        settings: of every run, from `shortened`.
        search: what to try.
        max_runs: at most so many, finished ones counted.
        runs: where they are kept.
        train: makes one, `{"final_loss": ...}`.

    Returns:
        The validation loss at every point, infinite where it diverged.
    """
    losses: dict[Point, float] = {}
    files = files_of(settings)
    by_kind = any(c != RATE for c in search.coordinates)
    while len(losses) < max_runs and (point := search.next_point(losses)) is not None:
        told = at_point(settings, point, by_kind)
        code = code_of({"optim": DEFAULT_OPTIM, **told})
        loss = runs.once({**told, **files}, code, functools.partial(train, told))["final_loss"]
        losses[point] = loss if loss is not None and math.isfinite(loss) else math.inf
        print(f"run {len(losses)}: {named(point, by_kind)}: {_told(losses[point])}", flush=True)
    return losses


def files_of(settings: Settings) -> Settings:
    """`{"files": ...}` with size and time of the files and folders that settings name, if they name any.

    A run on a text, a model or options that have changed is another run.  A folder of caches or results says nothing.
    """
    options = [item.partition("=")[2] for item in str(settings.get("optim_args") or "").split(",") if "config" in item]
    named = [value for name, value in settings.items() if isinstance(value, str) and not name.endswith("_dir")]
    found: Settings = {}
    for name in (*named, *map(str.strip, options), os.environ.get(CONFIG_ENV, "")):
        for path in map(Path, sorted(glob.glob(os.path.expanduser(name), recursive=True))):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    found[str(file)] = [file.stat().st_size, file.stat().st_mtime_ns]
    return {"files": found} if found else {}


def trainer_of(kind: str, folder: Path) -> Callable[[Settings], Settings]:
    """What makes a run of `hf-shampoo4 train` or `finetune`, and keeps its last validation loss alone.

    Args:
        kind: "train" or "finetune".
        folder: where models are written meanwhile.
    """

    def train(settings: Settings) -> Settings:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".run-") as place:
            loss = _loss_of(kind, {**settings, "output_dir": place})
        gc.collect()
        return {"final_loss": loss}

    return train


def _loss_of(kind: str, settings: Settings) -> float | None:
    try:
        if kind == "finetune":
            from hf_shampoo4.training import finetune

            metrics = finetune.run(finetune.parse(settings)).metrics
        else:
            from hf_shampoo4.training import pretrain

            metrics = pretrain.run(pretrain.parse(settings)).metrics
    except RuntimeError as error:
        if "steps in a row made no update" not in str(error):
            raise
        return None  # diverged
    return float(metrics["eval_loss"]) if math.isfinite(metrics["eval_loss"]) else None


def as_settings(settings: Settings) -> Settings:
    """With `optim_args` as the command line has it, for a file may have a mapping."""
    return {**settings, "optim_args": pairs_as_text(settings.get("optim_args") or "")}


def as_markdown(losses: Losses, search: Search) -> str:
    """A table of the runs, and what to write into the configuration."""
    by_kind = any(c != RATE for c in search.coordinates)
    best = best_of(losses)
    lines = ["| run | validation loss |", "|---|---|"]
    for point in sorted(losses, key=lambda p: (p.learning_rate, p.rates)):
        mark = " (best)" if point == best and losses[best] < math.inf else ""
        lines.append(f"| {named(point, by_kind)} | {_told(losses[point])}{mark} |")
    return "\n".join([*lines, "", *_conclusion(losses, search, by_kind), ""])


def _conclusion(losses: Losses, search: Search, by_kind: bool) -> list[str]:
    best = best_of(losses)
    if losses[best] == math.inf:
        return ["Every run diverged: begin lower, with --rates, or look at the data and max_grad_norm."]
    open_ = [c for c in search.coordinates if not all(sides(losses, c))]
    rest = f"at an edge in {', '.join(open_)}: more runs (--max_runs) may find a better one"
    written = [f"learning_rate: {best.learning_rate:g}"] if RATE in search.coordinates else []
    if by_kind:
        written.append(f'optim_args: "{factors_as_text(best)}"   # beside your other options')
    return [f"Best of {len(losses)}, {rest if open_ else 'with a worse one on either side'}. For the configuration:",
            "", *(f"    {line}" for line in written)]  # fmt: skip


def named(point: Point, by_kind: bool) -> str:
    """Such as `learning_rate 0.004, embedding x8`."""
    factors = "".join(f", {kind} x{factor:g}" for kind, factor in point.rates) if by_kind else ""
    return f"learning_rate {point.learning_rate:g}{factors}"


def _told(loss: float) -> str:
    return "diverged" if loss == math.inf else f"{loss:.4f}"
