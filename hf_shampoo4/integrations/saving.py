"""The Trainer's checkpoints: what every rank must do before rank 0 alone asks the optimizer for its state, and whether
one is whole before it is loaded; and the model that a training of ours leaves at its end.

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
    from transformers import Trainer

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


def save_whole_model(trainer: Trainer) -> None:
    """`trainer.save_model()` at the end of a training, on every rank: the first one writes all weights, of all ranks.

    Where FSDP's checkpoints are sharded the Trainer would write nothing, and not say so: for this one save they are
    whole.  DeepSpeed's stage 3 writes parts if its configuration wants it so, and a line says what joins them.
    """
    if not trainer.is_fsdp_enabled:
        trainer.save_model()
        _say_what_joins_parts(trainer)
        return
    from torch.distributed.fsdp import StateDictType

    plugin = trainer.accelerator.state.fsdp_plugin
    of_checkpoints, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        trainer.save_model()
    finally:
        plugin.state_dict_type = of_checkpoints


def _say_what_joins_parts(trainer: Trainer) -> None:
    folder = trainer.args.output_dir
    whole = any(Path(folder).glob("*model*.safetensors"))  # an adapter always is
    if trainer.is_deepspeed_enabled and trainer.args.should_save and not whole:
        join = f"python {folder}/zero_to_fp32.py {folder} {folder} --safe_serialization"
        reason = "stage3_gather_16bit_weights_on_model_save is false"
        print(f"the weights in {folder} are in DeepSpeed's parts ({reason}): `{join}` joins them", flush=True)


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
            f"checkpoint {str(folder)!r} is not complete: {reason}.  "
            f"`hf-shampoo4 checkpoint last {folder.parent}` finds the last one that is."
        )
    for name in ("optimizer.pt", "optimizer.bin"):
        check_archive(folder / name)
