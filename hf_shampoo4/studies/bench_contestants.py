"""What `hf-shampoo4 bench` compares: the models' shapes, the optimizers, and how long each is measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.options import ALGORITHMS, FALLBACK, users_of
from hf_shampoo4.preconditioners.algorithms import algorithm_class


@dataclass(frozen=True)
class Model:
    """The weight matrices of a transformer; embeddings are another matter (elementwise)."""

    layers: int
    matrices: tuple[tuple[int, int], ...]
    """Of one layer, (rows, columns) as `torch.nn.Linear` has them."""


def _llama(layers: int, width: int, hidden: int) -> Model:
    return Model(layers, (*[(width, width)] * 4, *[(hidden, width)] * 2, (width, hidden)))


MODELS = {
    "gpt2_124m": Model(12, ((2304, 768), (768, 768), (3072, 768), (768, 3072))),
    "llama_130m": _llama(12, 768, 2048),  # the LLaMA sizes are GaLore's (2403.03507)
    "llama_350m": _llama(24, 1024, 2736),
    "llama_1b": _llama(24, 2048, 5461),
    "tiny": _llama(1, 64, 128),  # does the command work here?
}


@dataclass(frozen=True)
class Contestant:
    """An optimizer, and how it calls what all have in common."""

    label: str
    target: str
    """`module:class`."""
    package: str = ""
    """What to `pip install` for it, if anything; its module is the target's."""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    every: tuple[str, ...] = ()
    """Keywords that take the steps between two refreshes."""
    block: str = ""
    """Keyword that takes the largest order of a factor, if longer sides are cut (and not left alone)."""


def _ours(label: str, **options: Any) -> Contestant:
    every = tuple(algorithm_class(options["algorithm"]).every.values())
    if options["algorithm"] in users_of("refresh_warmup"):
        options["refresh_warmup"] = 0  # the others' bases are not updated at every step to begin with
    return Contestant(label, "hf_shampoo4:Shampoo4bit", "", options, every, "block_size" if every else "")


CONTESTANTS: dict[str, Contestant] = {
    "adamw_fused": Contestant("torch AdamW, fused", "torch.optim:AdamW", keywords={"fused": True}),
    "adamw_foreach": Contestant("torch AdamW, foreach", "torch.optim:AdamW", keywords={"foreach": True}),
    "bnb_adamw8bit": Contestant("bitsandbytes AdamW8bit", "bitsandbytes.optim:AdamW8bit", "bitsandbytes"),
    "torchao_adamw4bit": Contestant("torchao AdamW4bit", "torchao.optim:AdamW4bit", "torchao"),
    "ours_elementwise": _ours("ours: AdamW, 4-bit", algorithm="elementwise"),
    "muon": Contestant("torch Muon", "torch.optim:Muon"),
    "po_soap": Contestant(
        "pytorch_optimizer SOAP", "pytorch_optimizer:SOAP", "pytorch_optimizer", every=("precondition_frequency",)
    ),
    "po_shampoo": Contestant(
        "pytorch_optimizer ScalableShampoo", "pytorch_optimizer:ScalableShampoo", "pytorch_optimizer",
        {"start_preconditioning_step": 1},
        ("preconditioning_compute_steps", "statistics_compute_steps"), "block_size",
    ),
    "heavyball_soap": Contestant("HeavyBall SOAP", "heavyball:SOAP", "heavyball", every=("precondition_frequency",)),
    **{f"ours_{name}": _ours(f"ours: {name}, 4-bit", algorithm=name) for name in ALGORITHMS if name != FALLBACK},
    "ours_shampoo_staggered": _ours("ours: shampoo, 4-bit, staggered", algorithm="shampoo", stagger=True),
    "ours_kl_shampoo_together": _ours("ours: kl_shampoo, 4-bit, all at once", algorithm="kl_shampoo", stagger=False),
    "ours_shampoo32": _ours("ours: shampoo, 32-bit", algorithm="shampoo", factor="direct", bits=32, moments="fp32"),
}  # fmt: skip


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long."""

    model: str = "llama_130m"
    layers: int = 2
    block: int = 1024
    every: int = 10
    """Steps between two refreshes, for every contestant that has them."""
    warmup: int = 20
    steps: int = 20
    threads: int = 2
    device: str = "cpu"
    clock: str = "wall"
    """`cpu`: this process's processor time, all threads together, for a machine that is busy with other work."""
    stagger: bool = True
    """Whether those of ours that spread their refreshes over the steps may."""

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise OptionError(f"unknown model {self.model!r}; known: {', '.join(MODELS)}")
        if not 1 <= self.layers <= MODELS[self.model].layers:
            raise OptionError(f"--layers {self.layers}: {self.model} has 1 to {MODELS[self.model].layers}")
        if self.clock not in CLOCKS:
            raise OptionError(f"--clock {self.clock}: one of {', '.join(CLOCKS)}")
        for name in ("warmup", "steps"):
            if getattr(self, name) < 1 or getattr(self, name) % self.every:
                raise OptionError(f"--{name} {getattr(self, name)} must be whole refresh periods of {self.every} steps")

    def shapes(self) -> list[tuple[int, int]]:
        """Of all matrices."""
        return list(MODELS[self.model].matrices) * self.layers
