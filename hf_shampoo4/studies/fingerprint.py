"""What this package's optimizer computes, in 12 digits: equal bits mean equal updates, however the code reads."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_shampoo4.integrations.trainer import optim_options
from hf_shampoo4.optimizer import Shampoo4bit
from hf_shampoo4.options import Options, users_of

# One of each kind and geometry, and one that is cut into blocks.
GROUPS: tuple[tuple[dict[str, Any], tuple[tuple[int, ...], ...]], ...] = (
    ({"kind": "matrix"}, ((64, 64), (160, 64), (64, 160), (2200, 40))),
    ({"kind": "embedding", "vocabulary": True}, ((512, 64),)),
    ({"kind": "head", "vocabulary": True}, ((512, 64),)),
    ({"kind": "vector", "algorithm": "elementwise"}, ((64,),)),
)
STEPS, FASTER = 32, 50
"""Bases are updated ever more rarely; in so many steps at so many times the pace they come to their slowest."""


def fingerprint(settings: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of SHA-256 over the weights after a few steps on made-up gradients.

    The same on every run of the same arithmetic on one kind of processor; another processor may round otherwise.

    Args:
        settings: of a run; read are `optim`, one of ours, `optim_args` and the second beta.
    """
    return _fingerprint(settings["optim"], settings.get("optim_args", ""), float(settings.get("adam_beta2", 0.999)))


@functools.cache
def _fingerprint(optim: str, optim_args: str, beta2: float) -> str:
    generator = torch.Generator().manual_seed(0)
    groups = [
        {"params": [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes], **kind}
        for kind, shapes in GROUPS
    ]
    options = optim_options(optim, optim_args)
    if (chosen := Options(**options)).algorithm in users_of("refresh_warmup"):
        options["refresh_warmup"] = chosen.refresh_warmup // FASTER
    optimizer = Shampoo4bit(groups, lr=1e-2, betas=(0.9, beta2), weight_decay=0.1, **options)
    weights: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(STEPS):
            for p in weights:
                p.grad = 1e-2 * torch.randn(p.shape, generator=generator) + 0.1 * p.detach()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in weights)).hexdigest()[:12]
