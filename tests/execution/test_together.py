"""What several ranks do together: replicas on unlike processors, what is no replica, and errors on one rank."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.stress.ranks import launch
from tests.stress.together import CASES

FAILING = [case for case in CASES if ":" in case]
WORLD = 3


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found; one launch for all workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / "together.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = Path(base / "together.json")
        if not file.exists():
            module, words = "tests.stress.together", ("--cases", "all")
            found = launch(WORLD, *words, module=module, of_rank=lambda rank: {"MKL_CBWR": PROCESSOR[rank]})
            file.write_text(json.dumps(found))
        return json.loads(file.read_text())


PROCESSOR = ("COMPATIBLE", "AVX2", "COMPATIBLE")
"""Which one each rank plays."""


def of(results: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    """What the ranks found in a case."""
    for rank in results:
        assert case in rank, f"a rank did not come to {case}"
        assert "error" not in rank[case], rank[case]["error"]
    return [rank[case] for rank in results]


@pytest.mark.parametrize("algorithm", ["kl_shampoo", "shampoo", "soap"])
def test_replicas_are_equal_on_processors_that_round_differently(results: list, algorithm: str) -> None:
    """Parameters and state; processes that compute all of it themselves are not."""
    ranks = of(results, "drift")
    if ranks[0]["alone"] == [True, True]:
        pytest.skip("MKL_CBWR changes nothing on this processor")
    assert all(rank[algorithm] == [True, True] for rank in ranks)


def test_ranks_that_update_all_themselves_and_go_apart_are_refused(results: list) -> None:
    """Soon after the first step with gradients of other last bits, or in which a rank failed: on every rank."""
    for rank in of(results, "apart"):
        assert rank["equal"]
        for what, said in {
            "gradients": "weights of parameter '0.weight' have other bits on ranks [1] than on rank 0 (4 of 4",
            "weights": "weights of parameter '1.bias' have other bits on ranks [2] than on rank 0 (1 of 4",
            "caught": "weights of parameter '0.weight' have other bits on ranks [1] than on rank 0 (4 of 4",
        }.items():
            assert rank[what].startswith(f"RuntimeError: RuntimeError: ranks are no longer equal: the {said}")
            assert rank[what].endswith(
                "Set apply=owners, with which each block's owner sends its weights, and go on from the last checkpoint"
            )
        assert "Set apply=owners and wire=exact" in rank["half a wire"]
        assert "Set wire=exact, with which each block's owner sends its weights" in rank["half a wire's weights"]


def test_rates_with_other_last_bits_are_the_same_for_all_ranks(results: list) -> None:
    """Where ranks update weights themselves: with apply=all, and where owners send updates."""
    for rank in of(results, "apart"):
        assert rank["rates"] == [True, True]


def test_ranks_that_update_all_themselves_on_unlike_processors_are_refused(results: list) -> None:
    if of(results, "drift")[0]["alone"] == [True, True]:
        pytest.skip("MKL_CBWR changes nothing on this processor")
    assert all("ranks are no longer equal" in rank["processors"] for rank in of(results, "apart"))


def test_owners_update_all_where_auto_finds_ranks_apart_or_one_has_no_gradient(results: list) -> None:
    """They send weights and state, so ranks are equal again.  A gradient that is missing on one rank must be zero."""
    for rank in of(results, "apart"):
        assert rank["auto"] == [True, True]
        assert len(rank["warned"]) == 2
        assert all("each block's owner updates it from here on" in warned for warned in rank["warned"])
        assert rank["no gradient"]
        for refused in rank["missing gradient"]:
            assert "parameter '1.bias' is no replica: its gradients differ between rank 0 and ranks [1]" in refused


def test_state_of_other_trainings_is_refused(results: list) -> None:
    """Whoever owns a block would take it from what it has loaded itself, and nothing would show that."""
    for rank in of(results, "loaded"):
        for refused in rank["others"]:
            assert (
                "ranks are no longer equal: the state of parameter '0.weight' have other bits on ranks [1, 2]"
                in refused
            )
            assert "It was loaded so: load the same checkpoint on every rank" in refused


def test_dtensors_of_whole_parameters_are_taken_over_by_every_rank(results: list) -> None:
    """State that was spread over ranks (shard_state), and is not any more; cut otherwise than the parameter, none."""
    for rank in of(results, "loaded"):
        assert rank["spread, then kept"]
        said = (
            "CheckpointError: the state of '0.weight' is DTensors, cut over ranks otherwise than the parameter is now"
        )
        assert said in rank["cut, then kept"]


def test_a_plain_gradient_of_a_cut_parameter_is_refused(results: list) -> None:
    """Every rank but the first would train on the first one's rows."""
    for rank in of(results, "loaded"):
        said = "TypeError: the gradient of '0.weight' is a plain tensor of all of it, (64, 64), but the parameter is a "
        assert said in rank["plain gradient"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("models", "its values differ between rank 0 and ranks [1, 2]"),
        ("gradients", "its gradients differ between rank 0 and ranks [1, 2]"),
        ("later", "its gradients differ between rank 0 and ranks [1, 2]"),
        ("after some steps", "its gradients differ between rank 0 and ranks [1, 2]"),
    ],
)
def test_what_is_no_replica_is_refused(results: list, what: str, said: str) -> None:
    """At the first step, at the first gradients, and after a power of two of steps."""
    for rank in of(results, "mixing"):
        assert rank[what].startswith(f"RuntimeError: parameter '0.weight' is no replica: {said}")
        for way_out in ("Average the gradients over these 3 ranks", "process_group=", "communicate=False"):
            assert way_out in rank[what]


def test_what_only_rounds_differently_is_let_through(results: list) -> None:
    for rank in of(results, "mixing"):
        assert rank["last bits"] == ""
        assert rank["on their own"]


def test_a_process_group_trains_apart_from_the_other_ranks(results: list) -> None:
    ranks = of(results, "subgroups")
    for rank in ranks:
        assert rank["ranks equal"]
        assert rank["copy equal"]
        assert rank["saved"]
        assert rank["off"] < 1e-3
        assert rank["pickled"].startswith("TypeError: an optimizer with a process_group cannot be pickled")
    assert [rank["world"] for rank in ranks] == [[2, 2], [2, 2], [1, 1]]
    assert ranks[2]["outside"].startswith("ValueError: rank 2 is not in process_group: give every rank the group")


def test_a_mesh_must_be_in_the_process_group(results: list) -> None:
    ranks = of(results, "meshes")
    assert max(rank["off"] for rank in ranks[1:]) < 1e-3
    expected = "ValueError: parameter '0.weight' lives on a mesh of ranks [1, 2], but process_group has ranks [0, 1]"
    assert ranks[1]["another"].startswith(expected)
    assert ranks[0]["another"].startswith(f"RuntimeError: rank 1 failed, so no rank goes on; there: {expected}")


def test_who_waits_for_a_rank_is_told_which(results: list) -> None:
    ranks = of(results, "missing")
    for rank in ranks[:2]:
        (warned,) = rank["warned"]
        assert "for ranks [2] of 3, which have not called step()" in warned
    assert ranks[2]["warned"] == []


@pytest.mark.parametrize("case", FAILING)
def test_a_rank_that_raises_makes_all_raise(results: list, case: str) -> None:
    for number, rank in enumerate(of(results, case)):
        error = "OutOfMemoryError: no memory left"
        assert rank["said"] == (
            error if number == 1 else f"RuntimeError: rank 1 failed, so no rank goes on; there: {error}"
        )


def test_a_closure_raises_what_it_raises(results: list) -> None:
    """At once, and on its rank alone: it has collectives of its own, in which the others may be."""
    for rank in of(results, "closure"):
        assert (rank["said"], rank["step"]) == ("ValueError: no data left", 1)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("first", "parameter '0.weight' in parameter group 0 is trained, (64, 64) torch.float32 on rank 0, frozen,"),
        ("late", "parameter '0.weight' in parameter group 0 is trained, (64, 64) torch.float32 on rank 0, frozen,"),
        ("damping", "damping in parameter group 0 is 1e-06 on rank 0, 0.001 on rank 1"),
        ("wire", "wire in parameter group 0 is exact on rank 0, bf16 on rank 1"),
        ("betas", "betas[0] in parameter group 0 is 0.9 on rank 0, 0.5 on rank 1"),
        ("lr", "lr in parameter group 0 is 0.01 on rank 0, 0.5 on rank 1"),
        ("loaded", "the state in parameter group 0 is kept on rank 0, new, or just loaded on rank 1"),
    ],
)
def test_what_is_other_on_one_rank_is_named(results: list, what: str, said: str) -> None:
    for rank in of(results, "frozen"):
        assert rank[what].startswith(f"RuntimeError: ranks disagree on options or model: {said}")


def test_what_one_rank_alone_sets_in_a_group_is_read_or_refused_on_all(results: list) -> None:
    lr = "OptionError: lr=nan is not allowed: it must be a number >= 0; look at the schedule that has set it"
    text = "OptionError: option stats_every='abc' is not allowed: it must be an integer"
    for number, rank in enumerate(of(results, "frozen")):
        there = "" if number == 1 else "RuntimeError: rank 1 failed, so no rank goes on; there: "
        for what, (said, then) in rank["edited"].items():
            refused = {"lr": lr, "stats_every=abc": text}
            expected = next((there + error for cause, error in refused.items() if what.startswith(cause)), "")
            assert said.startswith(expected), what
            assert bool(said) == bool(expected), what
            assert then == "", what


def test_join_is_refused_before_anything_waits(results: list) -> None:
    for number, rank in enumerate(of(results, "join")):
        assert rank["refused"].startswith("RuntimeError: DistributedDataParallel.join() lets ranks run out of inputs")
        assert "exhausted" in rank["early end"], number
        assert rank["alone"] == ""


def test_ranks_that_changed_are_noticed(results: list) -> None:
    for number, rank in enumerate(of(results, "groups")):
        assert rank["gone"].startswith("RuntimeError: the process group of 3 ranks that the optimizer works in is gone")
        assert rank["swapped"].startswith(
            f"RuntimeError: this process is rank {(number + 1) % 3} of 3, and was rank {number} of 3 when"
        )
        assert rank["loaded"] == ""
