"""The table before training and the figures during it agree with the state that is really there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.execution.blocking import blocks_of
from hf_shampoo4.optimizer import Options
from hf_shampoo4.state_report import block_bytes, metrics, rows, table

SHAPES = [(70, 130), (64, 80), (3, 65, 66), (70, 3, 3, 3), (64, 64), (10,), (5000,), (), (30, 20), (64, 1)]
EXOTIC = [{}, {"factor": "direct"}, {"bits": 8}, {"bits": 32}, {"moments": "bf16"}, {"block_size": 64}]


def optimizer(**options: object) -> Shampoo4bit:
    matrices = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    table = nn.Parameter(torch.randn(100, 50))
    frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    return Shampoo4bit(
        [{"params": [*matrices, frozen]}, {"params": [table], "algorithm": "elementwise"}],
        stats_every=1, roots_every=2, **options,
    )  # fmt: skip


def step(made: Shampoo4bit, value: float = 1.0) -> None:
    for group in made.param_groups:
        for p in group["params"]:
            p.grad = value * torch.randn_like(p).clamp(-3, 3) if p.requires_grad else None
    made.step()


@pytest.mark.parametrize("options", EXOTIC, ids=str)
def test_bytes_promised_are_bytes_held(options: dict[str, object]) -> None:
    made = optimizer(**options)
    promised = sum(row.bytes for row in rows(made))
    assert metrics(made)["optim/state_bytes"] == 0
    step(made)
    tensors = [t for entry in made.state.values() for t in entry.values()]
    assert promised == sum(t.numel() * t.element_size() for t in tensors) == metrics(made)["optim/state_bytes"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == promised  # the views share stacks that hold nothing else


def test_rows_count_every_trainable_parameter_once() -> None:
    found = rows(optimizer())
    assert sum(row.parameters for row in found) == len(SHAPES) + 1
    assert sum(row.elements for row in found) == sum(torch.Size(s).numel() for s in SHAPES) + 5000
    by_shape = {row.shape: row for row in found}
    assert by_shape[3, 65, 66].treatment == "Shampoo eigen 4-bit, 4bit moments"
    assert by_shape[3, 65, 66].blocks == "3 of 65x66"
    assert by_shape[30, 20].treatment.endswith("fp32 moments")  # under 4,096 elements
    assert by_shape[100, 50].treatment == "AdamW 4bit"
    assert by_shape[10,].treatment == "AdamW fp32"
    assert by_shape[64, 1].treatment == "AdamW fp32"
    treatments = [row.treatment.startswith("AdamW") for row in found]
    assert treatments == sorted(treatments)  # the preconditioned ones first


def test_table_has_a_line_for_each_row_and_true_totals() -> None:
    made = optimizer(block_size=64)
    text = table(made)
    lines = text.splitlines()
    assert len([line for line in lines if line.startswith(("Shampoo eigen", "AdamW"))]) == len(rows(made))
    total = next(line for line in lines if line.startswith("total"))
    size, elements = sum(r.bytes for r in rows(made)), sum(r.elements for r in rows(made))
    assert total.split() == [
        "total", str(len(SHAPES) + 1), f"{elements / 1e6:.3f}", f"{size / 1e6:.3f}", f"{size / elements:.2f}",
    ]  # fmt: skip
    assert "70x130" in text
    assert "6 of 35x44" not in text
    assert "+" in next(line for line in lines if "70x130" in line)  # blocks of more than one shape


def test_bytes_of_the_headline_case() -> None:
    """A square matrix of order 1024: bases 1.125, moment .53; Shampoo's factors and roots 2.25, moments 1.04."""
    assert 1.6 < block_bytes(blocks_of((1024, 1024), Options())) / 2**20 < 1.7
    assert 3.2 < block_bytes(blocks_of((1024, 1024), Options(algorithm="shampoo"))) / 2**20 < 3.4
    assert block_bytes(blocks_of((1024, 1024), Options(algorithm="elementwise"))) / 2**20 < 1.05


def test_metrics_count_skips_and_failures_and_time() -> None:
    made = optimizer()
    assert metrics(made) == {
        "optim/state_bytes": 0, "optim/skipped_steps": 0, "optim/failed_refreshes": 0, "optim/refresh_seconds": 0.0,
    }  # fmt: skip
    step(made)
    step(made)
    seconds = metrics(made)["optim/refresh_seconds"]
    assert seconds > 0
    step(made, value=torch.inf)
    found = metrics(made)
    assert found["optim/skipped_steps"] == 1
    assert found["optim/failed_refreshes"] == 0
    assert found["optim/refresh_seconds"] == seconds
    step(made, value=5e18)  # finite, its square too, but its Gram matrices are not
    assert metrics(made)["optim/failed_refreshes"] > 0
    assert all(isinstance(value, (int, float)) for value in found.values())
