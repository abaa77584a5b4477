"""Every launch file of configs/accelerate, started by `accelerate launch` as a user does it, with fewer processes.

Here it is a plain loop, tests/support/launched.py.  With the Trainer: ddp.yaml by test_runner_launch.py, and the files
of configs/deepspeed by test_ranks.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import hf_shampoo4 as s4
from hf_shampoo4.training.config import config_root
from tests.execution.test_ranks import TRAINER
from tests.support.launched import OPTIONS, Model
from tests.support.tiny import ROOT, python

FILES = {path.stem: path for path in sorted((config_root() / "accelerate").glob("*.yaml"))}

# file -> processes, flags that make it fit so few, and what the model must have become
LAUNCHED = {
    "single": (1, [], {"model": "Model", "mesh": []}),
    "fsdp2": (2, [], {"model": "FSDPModel", "mesh": [2]}),
    "hsdp": (4, ["--parallelism_config_dp_shard_size", "2"], {"model": "FSDPModel", "mesh": [2, 2]}),
    "fsdp1": (2, ["--fsdp_sync_module_states", "false", "--fsdp_cpu_ram_efficient_loading", "false"],
              {"model": "FullyShardedDataParallel"}),
    "zero1": (2, [], {"model": "DeepSpeedEngine", "stage": 1}),
    "zero2": (2, [], {"model": "DeepSpeedEngine", "stage": 2}),
    "zero3": (2, [], {"model": "DeepSpeedEngine", "stage": 3}),
}  # fmt: skip


def launch(name: str, processes: int, flags: list[str], folder: Path) -> list[dict]:
    """What the ranks say after a training, started by the file."""
    command = ["-m", "accelerate.commands.launch", "--config_file", FILES[name], "--num_processes", processes]
    command += ["--main_process_port", "0", *flags, "-m", "hf_shampoo4", ROOT / "tests" / "support" / "launched.py"]
    done = python(*command, "--result", folder / "result")
    files = [folder / f"result.{rank}" for rank in range(processes)]
    assert all(file.exists() for file in files), done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launch_file_trains(name: str, tmp_path: Path) -> None:
    """In the engine that it names; the state held and the bytes sent are those that `plan` says."""
    processes, flags, expected = LAUNCHED[name]
    ranks = launch(name, processes, flags, tmp_path)
    for rank in ranks:
        assert {key: rank[key] for key in expected} == expected, "another engine than the file names"
        assert (rank["world"], rank["precision"], rank["steps"]) == (processes, "bf16", 8)
        assert rank["losses"] == ranks[0]["losses"]
        assert rank["losses"][-1] < rank["losses"][0] - 0.5
    sharding = {"single": "ddp", "fsdp1": "fsdp2"}.get(name, name)
    plan = s4.plan(Model(), processes, sharding, 2 if name == "hsdp" else None, **OPTIONS)
    held = [rank["state_bytes"] for rank in ranks]
    assert sum(held) == plan.state.total
    if name != "fsdp1":  # which cuts by layers, and `plan` does not know them
        sent = [sum(rank["sent"].values()) for rank in ranks]
        assert max(held) == plan.state.largest
        assert (sum(sent), max(sent)) == (8 * plan.wire_step.total, 8 * plan.wire_step.largest), ranks[0]["sent"]


def test_every_launch_file_is_started_by_a_test() -> None:
    assert set(FILES) == {"ddp", *LAUNCHED}
    assert {path.stem for path in (config_root() / "deepspeed").iterdir()} == {"zero1", "zero2", "zero3"}
    assert {case for cases in TRAINER.values() for case in cases} >= {"trainer-zero1", "trainer-zero2", "trainer-zero3"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deepspeed_file_names_its_stage_and_leaves_the_rest_to_the_trainer(stage: int) -> None:
    config = json.loads((config_root() / "deepspeed" / f"zero{stage}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    assert "optimizer" not in config
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_clipping"] == "auto"


@pytest.mark.parametrize("name", FILES)
def test_a_launch_file_is_read_by_accelerate_and_asks_for_whole_groups(name: str) -> None:
    config = load_config_from_file(str(FILES[name]))  # refuses keys that it does not know
    sizes = (config.parallelism_config or {}).values()
    assert config.num_processes == (1 if name == "single" else 8)
    assert not sizes or config.num_processes == 2 * 4 == sorted(sizes)[0] * sorted(sizes)[1]
    comment = FILES[name].read_text().splitlines()[0]
    assert comment.startswith("# ")
    assert yaml.safe_load(FILES[name].read_text())["mixed_precision"] == "bf16"
