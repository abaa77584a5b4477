"""Shampoo-class optimizers with 4-bit state, behind one flag of the Hugging Face Trainer.

    import hf_shampoo4 as s4
    s4.register()                                     # --optim shampoo4bit, soap4bit, kl_shampoo4bit, adamw4bit
    s4.Shampoo4bit(s4.param_groups(model), lr=1e-3)   # or the optimizer by hand

Names are looked up on first use, so that `import hf_shampoo4` imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

TYPE_CHECKING = False  # as type checkers read it: importing `typing` would take longer than all of this
if TYPE_CHECKING:
    from typing import Any

    from .checkpointing.optimizer_folder import load_optimizer, save_optimizer
    from .exceptions import OptionError
    from .groups import param_groups
    from .integrations.callback import Shampoo4bitCallback
    from .integrations.trainer import register, trainer_kwargs
    from .optimizer import Shampoo4bit
    from .planning.estimate import plan
    from .state_report import metrics

_HOMES = {
    "OptionError": ".exceptions",
    "Shampoo4bit": ".optimizer",
    "Shampoo4bitCallback": ".integrations.callback",
    "load_optimizer": ".checkpointing.optimizer_folder",
    "metrics": ".state_report",
    "param_groups": ".groups",
    "plan": ".planning.estimate",
    "register": ".integrations.trainer",
    "save_optimizer": ".checkpointing.optimizer_folder",
    "trainer_kwargs": ".integrations.trainer",
}

__all__ = [
    "OptionError", "Shampoo4bit", "Shampoo4bitCallback",
    "load_optimizer", "metrics", "param_groups", "plan", "register", "save_optimizer", "trainer_kwargs",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .utils.extras import named

    with named():
        return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
