"""The table before training and the figures during it agree with the state that is really there."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit, param_groups
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
        algorithm="shampoo", stats_every=1, roots_every=2, **options,
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


def test_table_has_a_line_for_each_row_under_what_is_done_and_true_totals() -> None:
    made = optimizer(block_size=64)
    text = made.report()
    assert text == table(made)
    lines = text.splitlines()
    titles = [line for line in lines if line.startswith(("Shampoo eigen", "AdamW"))]
    assert set(titles) == {f"{row.treatment}: {row.why}" for row in rows(made)}
    assert len(titles) == len(set(titles))
    shapes = {"x".join(map(str, row.shape)) or "scalar" for row in rows(made)}
    assert len([line for line in lines if line.split()[0] in shapes]) == len(rows(made))
    total = next(line for line in lines if line.startswith("  total"))
    size, elements = sum(r.bytes for r in rows(made)), sum(r.elements for r in rows(made))
    assert total.split() == [
        "total", str(len(SHAPES) + 1), f"{elements / 1e6:.3f}", f"{size / 1e6:.3f}", f"{size / elements:.2f}",
    ]  # fmt: skip
    assert " 6 up to 35x44 " in next(line for line in lines if line.startswith("  70x130"))
    assert max(map(len, lines)) <= 80


def test_a_list_of_parameters_is_said_to_be_one() -> None:
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    told = Shampoo4bit(param_groups(model)).report()
    for title in (
        "KL-Shampoo one-sided 4-bit, 8bit moments: embedding", "KL-Shampoo two-sided 4-bit, 4bit moments: linear layer",
        "AdamW fp32: norm", "AdamW fp32: bias",
    ):  # fmt: skip
        assert f"\n{title}\n" in told
    assert "no model was given" not in told
    untold = Shampoo4bit(model.parameters()).report()  # of the same parameters
    assert "no model was given: embeddings" in untold
    assert "linear layer" not in untold
    grown = Shampoo4bit(param_groups(model))
    grown.param_groups[0]["params"].append(nn.Parameter(torch.zeros(64, 64)))  # as programs do that prune and grow
    assert "4bit moments: matrices\n" in grown.report()


@pytest.mark.parametrize("copied", [deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_reports_what_the_optimizer_does(copied) -> None:
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    optimizer = Shampoo4bit(param_groups(model))
    copy = copied((model, optimizer))[1]
    assert copy.report() == copied(copy).report() == optimizer.report()


def test_a_table_is_80_columns_wide_also_with_large_shapes_and_many_options() -> None:
    with torch.device("meta"):
        shapes = [(128, 5760, 2880), (151936, 8192), (1, 64, 64, 768), (100_000_001,)]
        big = [nn.Parameter(torch.empty(shape)) for shape in shapes]
    made = Shampoo4bit([{"params": big, "kind": "matrix"}], rates={"matrix": 1.25}, moments="4bit_factored")
    assert max(map(len, made.report().splitlines())) <= 80


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
