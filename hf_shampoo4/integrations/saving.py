"""The Trainer's checkpoints: what every rank must do before rank 0 alone asks the optimizer for its state, and whether
one is whole before it is loaded.

A save may be asked for at any time, by the Trainer, a callback or a signal, and a folder to resume from be named to
`Trainer.train` alone, so neither is foreseen but met where every rank passes: in the methods of `transformers.Trainer`
that write a checkpoint and read one.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..checkpointing.completeness import STATE, incomplete
from ..exceptions import CheckpointError
from ..utils.wrappers import without_wrappers
from .hooks import after_import, wrap_once

if TYPE_CHECKING:
    from ..optimizer import Shampoo4bit


def follow_saves() -> None:
    """Prepare every Trainer's checkpoints, from now on or once transformers is imported; again it changes nothing.

    Touched are the methods `_save_checkpoint`, `_save_optimizer_and_scheduler`, `_tune_save_checkpoint` and
    `_load_optimizer_and_scheduler`.
    """
    after_import("transformers.trainer", _wrap_saves)


def shampoo_in(optimizer: Any) -> Shampoo4bit | None:
    """The `Shampoo4bit` of a Trainer, without what wraps it; None if it has another one."""
    from ..optimizer import Shampoo4bit

    optimizer = without_wrappers(optimizer)
    return optimizer if isinstance(optimizer, Shampoo4bit) else None


def _wrap_saves(module: ModuleType) -> None:
    for name, before in (
        ("_save_checkpoint", _no_longer_whole),
        ("_save_optimizer_and_scheduler", _bring_together),
        ("_tune_save_checkpoint", _bring_together),
        ("_load_optimizer_and_scheduler", _refuse_half),
    ):
        wrap_once(module.Trainer, name, functools.partial(_preceded, before))


def _preceded(before: Any, original: Any) -> Any:
    def method(trainer: Any, *arguments: Any, **named: Any) -> Any:
        before(trainer, *arguments, **named)
        return original(trainer, *arguments, **named)

    return method


def _bring_together(trainer: Any, *arguments: Any, **named: Any) -> None:
    """The state that `shard_state` has spread: the Trainer asks rank 0 only for it."""
    optimizer = shampoo_in(trainer.optimizer)
    if optimizer is not None:
        optimizer.consolidate()


def _no_longer_whole(trainer: Any, model: Any = None, trial: Any = None) -> None:
    """A checkpoint of this step that is there already is about to be replaced, file by file."""
    if shampoo_in(trainer.optimizer) is not None and trainer.args.should_save:
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        (folder / STATE).unlink(missing_ok=True)


def _refuse_half(trainer: Any, checkpoint: Any = None) -> None:
    """The Trainer passes over what a checkpoint lacks (a rank's random state, an optimizer) and goes on otherwise, and
    torch compares no checksums.

    Raises:
        CheckpointError: the checkpoint to resume from is not whole, or its optimizer damaged.
    """
    if checkpoint is None or shampoo_in(trainer.optimizer) is None:
        return
    from ..checkpointing.checksums import check_archive

    folder = Path(checkpoint)
    if reason := incomplete(folder):
        raise CheckpointError(
            f"checkpoint {str(folder)!r} is not complete, as when a training is stopped while it writes: {reason}.  "
            f"`hf-shampoo4 checkpoint last {folder.parent}` finds the last one that is."
        )
    for name in ("optimizer.pt", "optimizer.bin"):
        check_archive(folder / name)
