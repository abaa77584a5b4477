"""The folder of a run: what may be trained into it, and which checkpoint it goes on from."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpointing.completeness import incomplete, last_complete, step_of, steps_made
from ..exceptions import ConfigError
from ..utils.files import check_writable

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .arguments import RunArguments

FINISHED = ("all_results.json", "model.safetensors", "adapter_model.safetensors")  # what a training leaves at its end
LEFT = (*FINISHED, "train_results.json", "eval_results.json", "trainer_state.json", "training_args.bin",
        "adapter_config.json", "model.safetensors.index.json")  # fmt: skip


def prepare_output(run: RunArguments, training: TrainingArguments) -> str | None:
    """The checkpoint to resume from, if any; refuses a folder with other content unless told to overwrite it."""
    folder = Path(training.output_dir)
    checkpoint = _checkpoint(training)
    if training.process_index == 0:
        check_writable(folder)
    if training.process_index != 0 or not folder.is_dir() or not any(folder.iterdir()):
        return checkpoint
    if checkpoint and Path(checkpoint).resolve().parent == folder.resolve():
        if not _is(training.resume_from_checkpoint, "true", "auto"):
            _leave_what_came_later(folder, checkpoint)
        return checkpoint
    began = _is(training.resume_from_checkpoint, "auto") and not any((folder / name).exists() for name in FINISHED)
    if not run.overwrite_output_dir and not began:
        refuse_content(folder)
    for old in folder.glob("checkpoint-*"):  # the Trainer's rotation would take them for newer ones of this run
        if run.overwrite_output_dir:
            shutil.rmtree(old)
        else:
            _set_aside(old, "incomplete")
    for name in LEFT if run.overwrite_output_dir else ():  # the Trainer merges its figures into those of the file
        (folder / name).unlink(missing_ok=True)
    return checkpoint


def refuse_content(folder: Path) -> None:
    """Raises a ConfigError, with the ways out, for a folder that holds something."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"output_dir {str(folder)!r} is not empty: choose another, or --overwrite_output_dir, "
                          "or continue with --resume_from_checkpoint auto")  # fmt: skip


def _leave_what_came_later(folder: Path, checkpoint: str) -> None:
    """Who goes back to a checkpoint leaves a branch, which `auto` would take for this one's newest."""
    step = steps_made(Path(checkpoint))
    later = [path for path in folder.glob("checkpoint-*") if step_of(path) > step]
    for path in later:
        _set_aside(path, "left")


def _set_aside(checkpoint: Path, why: str) -> None:
    """Rename what is not to be resumed from; it may hold weights that somebody wants."""
    free = (f"{why}-{checkpoint.name}{f'-{i}' * (i > 1)}" for i in itertools.count(1))
    checkpoint.rename(next(path for path in map(checkpoint.with_name, free) if not path.exists()))


def _checkpoint(training: TrainingArguments) -> str | None:
    """`true`: the newest complete checkpoint, which must exist; `auto`: the newest, if there is one; else a folder."""
    asked = training.resume_from_checkpoint
    if asked is None or _is(asked, "", "false", "none"):
        return None
    if not _is(asked, "true", "auto"):
        if not Path(asked).is_dir():
            raise ConfigError(f"resume_from_checkpoint {asked!r} does not exist; allowed: true, auto, or a folder")
        if reason := incomplete(Path(asked)):
            raise ConfigError(f"resume_from_checkpoint {asked!r} is not a complete checkpoint: {reason}")
        return str(asked)
    newest, passed_over = last_complete(Path(training.output_dir))
    for name, reason in passed_over.items():
        print(f"passed over {name}, which is not complete: {reason}", flush=True)
    if newest is None and _is(asked, "true"):
        raise ConfigError(f"resume_from_checkpoint=true: there is no complete checkpoint in {training.output_dir!r}")
    return None if newest is None else str(newest)


def _is(asked: Any, *words: str) -> bool:
    return str(asked).lower() in words
