"""What `torch.set_default_dtype` and `torch.set_default_device` say changes no bit: PINNs begin with float64."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.numerics import quantize, storage

OFTEN = {"algorithm": "shampoo", "stats_every": 2, "roots_every": 2}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "kl_shampoo": {"stats_every": 2, "diagnose_every": 3},
    "kl_shampoo 32": {"bits": 32, "moments": "fp32", "stats_every": 2},
    "soap": {"algorithm": "soap", "stats_every": 2, "moments": "bf16"},
    "kl_soap": {"algorithm": "kl_soap", "stats_every": 2, "stochastic_from": 2},
    "eigen": {"factor": "eigen", "diagnose_every": 3, **OFTEN},
    "cholesky_ef": {"factor": "cholesky_ef", "root": "newton_db", "base": "sgdm", **OFTEN},
    "direct": {"factor": "direct", "root": "newton", "graft": "block", **OFTEN},
    "8bit": {"algorithm": "elementwise", "moments": "8bit"},
    "4bit": {"algorithm": "elementwise", "moments": "4bit"},
    "4bit_eden": {"algorithm": "elementwise", "moments": "4bit_eden"},
    "4bit_zipsr": {"algorithm": "elementwise", "moments": "4bit_zipsr"},
    "4bit_factored": {"algorithm": "elementwise", "moments": "4bit_factored"},
}
SHAPES = [(64, 96), (70, 64), (9,), (600, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _defaults_are_put_back() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def trained(options: dict[str, Any]) -> list[Tensor]:
    """Weights and state after four steps, a checkpoint after two."""
    for module in (quantize, storage):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    ps = [nn.Parameter(normal(shape, dtype)) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]

    def made() -> Shampoo4bit:
        vocabulary = {} if "factor" in options else {"vocabulary": True}
        groups = [{"params": ps[:3]}, {"params": ps[3:], **vocabulary}]
        return Shampoo4bit(groups, lr=1e-2, weight_decay=0.1, stochastic_rounding=True, **options)

    optimizer = made()
    for step in range(4):
        for p in ps:
            p.grad = normal(tuple(p.shape), p.dtype)
        optimizer.step()
        if step == 1:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = made()
            optimizer.load_state_dict(torch.load(file))
    return [p.detach() for p in ps] + [t for p in ps for _, t in sorted(optimizer.state[p].items())]


@cache
def expected(name: str) -> list[Tensor]:
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    return trained(CONFIGURATIONS[name])


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    usual = expected(name)
    torch.set_default_dtype(dtype)
    found = trained(CONFIGURATIONS[name])
    assert [t.dtype for t in found] == [t.dtype for t in usual]
    assert all(map(torch.equal, found, usual))


@pytest.mark.parametrize("name", ["kl_shampoo", "cholesky_ef", "4bit_zipsr"])
def test_the_default_device_is_not_where_state_is_made(name: str) -> None:
    usual = expected(name)
    torch.set_default_device("meta")
    assert all(map(torch.equal, trained(CONFIGURATIONS[name]), usual))
