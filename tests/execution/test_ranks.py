"""Any number of ranks gives what one process gives, bit for bit: one launch of real processes a world size."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_shampoo4.checkpointing.command import main
from hf_shampoo4.checkpointing.convert import by_position, described, read
from hf_shampoo4.exceptions import CheckpointError
from hf_shampoo4.execution.state_layout import is_partial
from tests.stress.ranks import SHAPES, launch
from tests.support import LONGEST_CHILD

STEPS = "8"
CASES = {
    2: ["ddp-shampoo", "ddp_sharded-shampoo", "fsdp2-shampoo", "fsdp2_mixed-shampoo", "fsdp2_offload-shampoo",
        "tp-shampoo", "ddp-half", "ddp-soap", "ddp_all-kl_shampoo",
        "ddp_all-shampoo_staggered", "ddp_all-bf16", "fsdp2-soap", "fsdp2-sgdm", "fsdp2-bf16", "fsdp1-shampoo",
        "zero1-shampoo", "zero2_robin-shampoo", "zero3_groups-kl_shampoo", "zero1_bf16_optimizer-shampoo",
        "zero0_bf16-elementwise"],
    3: ["ddp-kl_shampoo", "ddp_all-soap",
        "fsdp2-kl_shampoo", "fsdp2-half", "fsdp2-cholesky_ef", "ddp_sharded-zipsr", "tp-elementwise",
        "fsdp1_grad_op-soap", "zero3-shampoo"],
    4: ["hsdp-shampoo", "fsdp1_hybrid-shampoo", "tp_fsdp2-kl_shampoo"],
}  # fmt: skip
REPLANNED = {2: ["fsdp2-replanned", "tp_sharded-replanned", "zero2-replanned", "zero3_groups-replanned"]}
MOVED = {2: ["fsdp2-moved", "tp_sharded-moved", "ddp_sharded-moved", "ddp_all-moved", "zero2-moved"]}
STRANGERS = {4: ["tp_fsdp2-strangers"]}
SAVED = {2: ["fsdp2-full", "fsdp2-sharded", "fsdp2-flat", "tp-flat", "ddp-plain", "ddp_all-plain", "ddp_sharded-plain",
             "ddp_sharded-full", "ddp_sharded-flat", "zero0-own", "zero0_bf16-own", "zero1-own", "zero2-own",
             "zero2-side", "fsdp1-full", "fsdp1-sharded"],
         4: ["tp_fsdp2-full"],
         1: ["zero2_offload-own"]}  # fmt: skip
LOADED = {3: ["ddp_all-ddp+plain", "ddp-ddp_all+plain",
              "fsdp2-fsdp2+sharded", "ddp-fsdp2+full", "fsdp2-ddp+plain", "ddp_sharded-ddp+plain", "zero3-zero2+own",
              "fsdp1-zero2+side", "fsdp2-fsdp1+full"],
          1: ["single-fsdp2+full", "single-ddp_sharded+plain", "single-zero2+own", "single-zero0+own",
              "single-fsdp1+sharded", "single-tp_fsdp2+full", "single-fsdp2+flat"]}  # fmt: skip
FAILING = {2: ["fsdp2-failing", "ddp-failing", "ddp_all-failing", "zero2-failing", "fsdp1-failing"]}
REFUSED = {2: ["zero3-refused"], 3: ["fsdp1-refused"]}
TRAINER = {2: ["trainer-zero1", "trainer-zero2", "trainer-zero3", "trainer-fsdp1"]}
ACCELERATED = {2: ["accelerate-fsdp2", "accelerate-zero2"]}
ENGINE_OF = {"accelerate-fsdp2": "FSDPLlamaForCausalLM", "accelerate-zero2": "DeepSpeedEngine"}
CONTRACT = {2: ["ddp-contract", "ddp_sharded-contract", "fsdp2-contract"]}
HYBRID = {2: ["fsdp1_hybrid-elementwise"]}
WIDE = {2: ["tp-wide"]}
LOPSIDED = {2: ["ddp_all-lopsided", "ddp_wire-lopsided"]}
ROUNDED = {2: ["ddp-wire", "ddp_all-wire"]}
KINDS = (
    CASES, WIDE, LOPSIDED, ROUNDED, REPLANNED, MOVED, STRANGERS, SAVED, LOADED, FAILING, REFUSED, TRAINER, ACCELERATED,
    CONTRACT, HYBRID,
)  # fmt: skip
WORLDS = (2, 3, 4, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (base / "ranks").mkdir(exist_ok=True)
    return base / "ranks"


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "results.json"
        if not file.exists():
            found = {}
            for world in WORLDS:
                cases = ",".join(case for kind in KINDS for case in kind.get(world, ()))
                words = ("--cases", cases, "--steps", STEPS, "--checkpoints", str(folder))
                found[world] = launch(world, *words, timeout=3 * LONGEST_CHILD)
            file.write_text(json.dumps(found))
        found = json.loads(file.read_text())
    return {(int(world), case): [rank[case] for rank in ranks] for world, ranks in found.items() for case in ranks[0]}


def each(kind: dict[int, list[str]]) -> Any:
    return pytest.mark.parametrize(
        ("world", "case"), [(world, case) for world, cases in kind.items() for case in cases]
    )


@each(CASES)
def test_ranks_train_as_one_process_does(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        assert rank["moved"] > 0.01
        assert rank["ranks_equal"]
        assert rank["bitwise"], rank["differ"]


@each(WIDE)
def test_gradients_are_sent_in_their_own_dtype(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        assert rank["bitwise"], rank["differ"]


@each(LOPSIDED)
def test_no_rank_uses_kernels_that_another_one_cannot_build(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        assert rank["ranks_equal"]
        assert len(rank["said"]) == 1
        assert rank["said"][0].startswith("ranks build different kernels (Triton ")
        assert "torch " in rank["said"][0]
        assert ": ranks [0]; none: ranks [1])" in rank["said"][0]
    assert [rank["works"] for rank in results[world, case]] == [True, False], "it is that optimizer's affair alone"


@each(ROUNDED)
def test_what_is_rounded_on_the_wire_trains_alike_and_ranks_stay_equal(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        assert rank["ranks_equal"]
        assert 0 < rank["worst"] < 1e-3


@each(REPLANNED)
def test_a_new_plan_in_mid_training_is_as_in_one_process(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        assert rank["bitwise"], rank["differ"]


@each(MOVED)
def test_weights_and_state_that_others_move_are_what_is_trained_and_saved(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        assert rank["bitwise"], rank["differ"]


@each(STRANGERS)
def test_meshes_that_train_numbers_of_their_own_are_refused(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "'layers.3.last' has other numbers on each of the meshes of ranks [(0, 2), (1, 3)]" in rank["said"]


SHARDED = [(2, "ddp_sharded-shampoo"), (2, "fsdp2-shampoo"), (3, "fsdp2-kl_shampoo"), (3, "zero3-shampoo"),
           (3, "fsdp1_grad_op-soap"), (2, "zero3_groups-kl_shampoo")]  # fmt: skip


@pytest.mark.parametrize(("world", "case"), SHARDED)
def test_what_is_sent_is_what_must_be_and_at_once(results: dict, world: int, case: str) -> None:
    """`theory` looks at every entry: who holds it, and who owns its block."""
    for rank in results[world, case]:
        assert {"gradients": 0, **rank["sent"]} == rank["theory"]
        assert rank["exchanges"] <= 2 * rank["parts"] * int(STEPS)
        assert rank["most_parts"] > 1


@pytest.mark.parametrize(("world", "case"), SHARDED)
def test_state_is_spread_over_the_ranks(results: dict, world: int, case: str) -> None:
    held = [rank["state_bytes"] for rank in results[world, case]]
    assert sum(held) == results[world, case][0]["all_state_bytes"]
    assert max(held) <= sum(held) / world + results[world, case][0]["largest_block_bytes"]


@each(SAVED)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        assert rank["bitwise"], rank["differ"]


@each(TRAINER)
def test_the_trainer_trains_and_resumes(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        engine = "FullyShardedDataParallel" if "fsdp1" in case else "DeepSpeedEngine"
        assert (rank["kind"], rank["optimizer"]) == (engine, "Shampoo4bit")
        assert rank["losses"][-1] < rank["losses"][0] - 0.1
        assert rank["resumed_losses"] == rank["losses"]
        assert rank["bitwise"], rank["differ"]


@each(ACCELERATED)
def test_a_loop_with_accelerate_is_saved_and_goes_on(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        assert (rank["kind"], rank["optimizer"]) == (ENGINE_OF[case], "Shampoo4bit")
        assert rank["bitwise"], rank["differ"]


@each(HYBRID)
def test_replicas_of_one_shard_are_refused_under_fsdp1(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "ValueError: FSDP1's HYBRID_SHARD over 2 replicas of one shard each" in rank["error"]


@each(LOADED)
def test_a_checkpoint_goes_on_in_another_mode_and_number_of_ranks(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        assert rank["bitwise"], rank["differ"]


def test_a_sharded_checkpoint_is_read_in_one_process(results: dict, folder: Path) -> None:
    state_dict = read(folder / "fsdp2-sharded")
    trained = {f"layers.{i}.{name}" for i, shapes in enumerate(SHAPES) for name in shapes if name != "frozen"}
    assert set(state_dict["state"]) == trained
    numbered = by_position(state_dict)
    assert set(numbered["state"]) == set(range(len(trained)))
    assert [i for group in numbered["param_groups"] for i in group["params"]] == list(range(len(trained)))
    lines = "\n".join(described(state_dict))
    assert f"step {STEPS}" in lines
    assert "block_size=32" in lines
    assert "basis" in lines


@each(FAILING)
def test_all_ranks_raise_together(results: dict, world: int, case: str) -> None:
    said = [rank["said"] for rank in results[world, case]]
    for rank in said:
        assert rank["disagree"].startswith(
            "RuntimeError: ranks disagree on options or model: damping in parameter group 0"
        )
    assert said[0]["gradient"] == "RuntimeError: rank 1 failed, so no rank goes on; there: TypeError: a sparse gradient"
    assert said[1]["gradient"] == "TypeError: a sparse gradient"
    assert said[0]["compute"] == "RuntimeError: rank 1 failed, so no rank goes on; there: MemoryError: no memory left"
    assert said[1]["compute"] == "MemoryError: no memory left"


def test_files_of_deepspeed_are_converted_or_refused(results: dict, folder: Path, tmp_path: Path) -> None:
    main(["convert", str(folder / "zero2-own"), "--output", str(tmp_path / "optimizer.pt")])
    state_dict = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    trained = [name for shapes in SHAPES for name in shapes if name != "frozen"]
    assert len(state_dict["state"]) == len(trained)
    assert not any(map(is_partial, state_dict["state"].values()))
    shutil.copytree(folder / "zero2-own", tmp_path / "lacking")
    next((tmp_path / "lacking").glob("global_step*/*_pp_rank_1_*_optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match="was written by 2 ranks, but has 1 of their files"):
        read(tmp_path / "lacking")
    for file in (tmp_path / "lacking").glob("global_step*/*_optim_states.pt"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds no optimizer, and the files of ZeRO's ranks are not beside it"):
        read(tmp_path / "lacking")
    for name in ("zero0-own", "zero0_bf16-own", "zero2_offload-own"):  # the last one of one rank
        assert len(read(folder / name)["state"]) == len(trained)


@each(CONTRACT)
def test_freezing_emptying_going_up_and_copies_are_what_they_are_in_one_process(
    results: dict, world: int, case: str
) -> None:
    for rank in results[world, case]:
        assert "error" not in rank, rank["error"]
        assert all(all(steps) for steps in rank["same"].values()), rank["same"]
        assert rank["said"]["emptied"].count("11 of the parameters that are trained") == 2  # here and in one process
        assert rank["said"]["one"] == (
            "RuntimeError: the state of 'layers.0.weight' is there on ranks [0] and gone on ranks [1]: "
            "load the same checkpoint on every rank, or empty it on all"
        )
        refused = "RuntimeError: a copy or pickle of this optimizer would have a part of its state only"
        assert rank["said"]["copy"].startswith(refused if case != "ddp-contract" else "")
        assert bool(rank["said"]["copy"]) == (case != "ddp-contract")


@each(REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_on_all_ranks(results: dict, world: int, case: str) -> None:
    said = [rank["said"] for rank in results[world, case]]
    for i, rank in enumerate(said):
        assert (
            rank["part"].startswith("CheckpointError: the checkpoint has blocks ")
            or "so no rank goes on" in rank["part"]
        )
        assert "checkpoint convert DIR" in rank["part"]
        assert rank["options"].startswith(
            "CheckpointError: the checkpoint was written with bits=4, this run has bits=8"
        )
        failed = "" if i == 1 else "RuntimeError: rank 1 failed, so no rank goes on; there: "
        assert rank["lacking"].startswith(f"{failed}CheckpointError: ")
        assert ("DP world size of 2 but the current world size is 3" in rank["engine"]) == (world == 3)


@each(FAILING)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(results: dict, world: int, case: str) -> None:
    for rank in results[world, case]:
        assert rank["skipped"] == 1
        assert rank["unchanged"]


@each(FAILING)
def test_learning_rates_with_other_last_bits_leave_replicas_the_same(results: dict, world: int, case: str) -> None:
    assert len({rank["with other last bits"] for rank in results[world, case]}) == 1
