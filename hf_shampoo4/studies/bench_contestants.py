"""What `hf-shampoo4 bench` compares: models, optimizers, and how long each is measured."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.training.config import config_root


@dataclass(frozen=True)
class Contestant:
    """An optimizer, and how it is called."""

    label: str
    target: str
    """`module:class`."""
    package: str = ""
    """What to `pip install` for it, if anything; its module is the target's."""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    rest: str = ""
    """Class that has what is not a hidden matrix (vocabularies, norms), fused; "": the same optimizer has it."""
    period: int = 1
    """Steps after which its work repeats, where it is not ours."""
    ours: bool = False
    compiled: bool = False
    """Whether its step is compiled: what it launches cannot be counted then."""


def _ours(label: str, **options: Any) -> Contestant:
    return Contestant(label, "hf_shampoo4:Shampoo4bit", "", options, ours=True)


# The names of ours are those of --optim, and what was set.
CONTESTANTS: dict[str, Contestant] = {
    "adamw_fused": Contestant("torch AdamW, fused", "torch.optim:AdamW", keywords={"fused": True}),
    "bnb_adamw8bit": Contestant("bitsandbytes AdamW8bit", "bitsandbytes.optim:AdamW8bit", "bitsandbytes"),
    "torchao_adamw4bit": Contestant("torchao AdamW4bit", "torchao.optim:AdamW4bit", "torchao", compiled=True),
    "adamw4bit": _ours("ours: adamw4bit", algorithm="elementwise", moments="4bit"),
    "muon": Contestant("torch Muon, fused AdamW for the rest", "torch.optim:Muon", rest="torch.optim:AdamW"),
    "shampoo4bit": _ours("ours: shampoo4bit"),
    "shampoo4bit_bf16": _ours("ours: shampoo4bit, rotations in bfloat16", rotation_precision="bfloat16"),
    "soap4bit": _ours("ours: soap4bit", algorithm="soap"),
    "po_soap": Contestant(  # no basis for a vocabulary's long side, which is more than it says by default
        "pytorch_optimizer SOAP",
        "pytorch_optimizer:SOAP",
        "pytorch_optimizer",
        {"max_precondition_dim": 3072},
        period=10,
    ),
    "heavyball_soap": Contestant("HeavyBall SOAP", "heavyball:SOAP", "heavyball", period=2),
    "paper_shampoo4bit": _ours("ours: the papers' Shampoo, 4-bit", algorithm="shampoo"),
}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def models() -> list[str]:
    """The presets of configs/models."""
    return sorted(file.stem for file in (config_root() / "models").glob("*.json"))


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long."""

    model: str = "llama_130m"
    layers: int | None = None
    """How many of the model's; None: all."""
    steps: int = 10
    """Late steps that are timed: whole periods of basis updates."""
    turning: int = 2
    """Steps that are timed in which all bases are updated."""
    seconds: float = math.inf
    """After which no further step of a contestant begins."""
    threads: int = 2
    device: str = "cpu"
    clock: str = "wall"
    """`cpu`: this process's processor time, all threads together, for a machine that is busy with other work."""

    def __post_init__(self) -> None:
        if self.model not in models():
            raise OptionError(f"unknown model {self.model!r}; known: {', '.join(models())}")
        most = self._written()[1]
        if self.layers is not None and not 1 <= self.layers <= most:
            raise OptionError(f"--layers {self.layers}: {self.model} has 1 to {most}")
        if self.clock not in CLOCKS:
            raise OptionError(f"--clock {self.clock}: one of {', '.join(CLOCKS)}")
        for name in ("steps", "turning", "threads"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} is not allowed: it must be at least 1")
        if not self.seconds > 0:
            raise OptionError(f"--seconds {self.seconds} is not allowed: it must be a number above 0")

    def _written(self) -> tuple[str, int]:
        """What the model's configuration calls its layers, and how many there are."""
        config = json.loads((config_root() / "models" / f"{self.model}.json").read_text(encoding="utf-8"))
        key = next(key for key in ("num_hidden_layers", "n_layer") if key in config)
        return key, config[key]

    def overrides(self) -> str:
        """`model_overrides` of the model that is measured."""
        return "" if self.layers is None else f"{self._written()[0]}={self.layers}"

    def title(self) -> str:
        """The model in words."""
        return self.model if self.layers is None else f"{self.layers} layers of {self.model}"
