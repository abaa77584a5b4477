"""Any number of ranks gives what one process gives, bit for bit: one launch of real processes a world size."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import launch

STEPS = "8"
CASES = {
    2: ["ddp-shampoo", "ddp_sharded-shampoo", "fsdp2-shampoo", "fsdp2_mixed-shampoo", "fsdp2_offload-shampoo",
        "tp-shampoo", "ddp-soap", "fsdp2-soap", "fsdp2-sgdm", "fsdp2-bf16"],
    3: ["ddp-kl_shampoo", "fsdp2-kl_shampoo", "fsdp2-cholesky_ef", "ddp_sharded-zipsr", "tp-elementwise"],
    4: ["hsdp-shampoo"],
}  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[tuple[int, str], list[dict[str, Any]]]:
    found = {}
    for world, cases in CASES.items():
        ranks = launch(world, "--cases", ",".join(cases), "--steps", STEPS)
        found.update({(world, case): [rank[case] for rank in ranks] for case in cases})
    return found


@pytest.mark.parametrize(("world", "case"), [(world, case) for world, cases in CASES.items() for case in cases])
def test_ranks_train_as_one_process_does(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        assert rank["moved"] > 0.01
        assert rank["ranks_equal"]
        assert rank["bitwise"], rank["differ"]


@pytest.mark.parametrize(("world", "case"), [(2, "ddp_sharded-shampoo"), (2, "fsdp2-shampoo"), (3, "fsdp2-kl_shampoo")])
def test_state_is_spread_over_the_ranks(results: dict, world: int, case: str) -> None:
    held = [rank["state_bytes"] for rank in results[world, case]]
    assert sum(held) == results[world, case][0]["all_state_bytes"]
    assert max(held) <= sum(held) / world + results[world, case][0]["largest_block_bytes"]
