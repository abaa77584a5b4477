"""State that `shard_state` has spread over the ranks of DDP, and folders that two ranks write: spread.py."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.stress.ranks import launch

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each rank found; one launch for all workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / "spread.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = Path(base / "spread.json")
        if not file.exists():
            saves = str(tmp_path_factory.mktemp("saves"))
            file.write_text(json.dumps(launch(2, "--saves", saves, module="tests.checkpointing.spread")))
        return json.loads(file.read_text())


def test_a_rank_that_asks_for_the_state_alone_is_told_what_to_do(ranks: Ranks) -> None:
    first, second = (rank["alone"] for rank in ranks)
    assert first["error"].startswith("RuntimeError: other ranks have not called state_dict(); with shard_state")
    assert "consolidate() on every rank" in first["error"]
    assert first["warned"][0].startswith("rank 0 waits for ranks [1]: with shard_state the state is spread")
    assert second["error"] == ""


def test_a_rank_that_waits_in_a_call_of_all_ranks_is_told_whom_for(ranks: Ranks) -> None:
    """`if rank == 0: torch.save(optimizer.state_dict())` under FSDP2 hung without a word."""
    first, second = (rank["late"]["warned"] for rank in ranks)
    assert [message.split(": ")[0].split(" seconds ")[1] for message in first] == [
        f"in {call} for ranks [1] of 2, which have not called it" for call in ("state_dict()", "save_optimizer()")
    ]
    assert second == []


def test_all_ranks_together_get_the_state_that_every_rank_would_keep(ranks: Ranks) -> None:
    assert all(rank["alone"]["same"] for rank in ranks)


def test_a_group_that_is_cut_in_two_in_the_list_keeps_its_state(ranks: Ranks) -> None:
    assert all(rank["edited"] for rank in ranks)


def test_a_full_disk_on_one_rank_makes_all_raise_and_nothing_is_taken_for_whole(ranks: Ranks) -> None:
    first, second = (rank["full_disk"] for rank in ranks)
    for rank in (first, second):
        assert "side was not completed: rank 1 could not write: OSError: " in rank["blocks"]
        assert rank["half"].startswith("FileNotFoundError")
        assert rank["same"]
    assert first["mark"].startswith("CheckpointError: ")
    assert "No space left on device" in first["mark"]
    assert second["mark"].startswith("RuntimeError: rank 0 failed, so no rank goes on; there: CheckpointError")


def test_a_group_that_comes_after_load_optimizer_begins_afresh(ranks: Ranks) -> None:
    assert [rank["full_disk"]["added"] for rank in ranks] == ["", ""]


def test_accelerates_save_state_and_load_state(ranks: Ranks) -> None:
    assert all(rank["accelerated"]["same"] for rank in ranks)


def test_the_trainer_saves_whenever_it_is_asked_to(ranks: Ranks) -> None:
    for rank in ranks:
        assert len(rank["in_the_trainer"]["unbroken"]) == 4
        assert rank["in_the_trainer"]["resumed"] == rank["in_the_trainer"]["unbroken"]
