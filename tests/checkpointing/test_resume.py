"""A checkpoint that a kill has left half-written is told from a whole one, and never loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerState

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.checkpointing.completeness import incomplete, last_complete
from hf_shampoo4.cli import main
from hf_shampoo4.exceptions import CheckpointError, ConfigError
from hf_shampoo4.integrations.callback import Shampoo4bitCallback
from hf_shampoo4.sharding.exchange import Ranks, host
from hf_shampoo4.training.output_dir import prepare_output
from hf_shampoo4.training.pretrain import parse
from tests.support.tiny import Tokens, arguments, llama, python

SAVED = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training's folder with checkpoint-1 and checkpoint-2."""
    folder = tmp_path_factory.mktemp("trained")
    Trainer(llama(), arguments(folder, **SAVED), train_dataset=Tokens()).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def resumed(run: Path, **changes: object) -> Trainer:
    trainer = Trainer(llama(), arguments(run, **{**SAVED, "max_steps": 3, **changes}), train_dataset=Tokens())
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    return trainer


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def stepped() -> Shampoo4bit:
    w = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = Shampoo4bit([w], lr=1e-3)
    w.grad = torch.ones_like(w)
    optimizer.step()
    return optimizer


def of_ranks(run: Path, ranks: range, world: int, node: int | None = None) -> Path:
    """checkpoint-2 as `world` ranks would have left it, of which only some have finished."""
    folder = run / "checkpoint-2"
    for rank in ranks:
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
    (folder / "rng_state.pth").unlink()

    def note(state: dict) -> None:
        state["stateful_callbacks"]["Shampoo4bitCallback"]["attributes"] = {
            "world_size": world, "local_world_size": node or world,
        }  # fmt: skip

    edit(folder / "trainer_state.json", note)
    return folder


def test_whole_checkpoints_are_whole(run: Path) -> None:
    assert incomplete(run / "checkpoint-1") == ""
    assert last_complete(run) == (run / "checkpoint-2", {})
    moved = run / "elsewhere"
    shutil.copytree(run / "checkpoint-2", moved)
    assert incomplete(moved) == ""


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"]
)
def test_a_missing_file_is_noticed(run: Path, name: str) -> None:
    (run / "checkpoint-2" / name).unlink()
    found, passed_over = last_complete(run)
    assert found == run / "checkpoint-1"
    assert passed_over.keys() == {"checkpoint-2"}
    assert passed_over["checkpoint-2"]


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                                  "model.safetensors", "training_args.bin"])  # fmt: skip
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_noticed(run: Path, name: str, share: float) -> None:
    file = run / "checkpoint-2" / name
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    if name == "training_args.bin":  # not read on a resume
        assert incomplete(run / "checkpoint-2") == ""
    else:
        assert name in incomplete(run / "checkpoint-2")


@pytest.mark.parametrize(
    "content", ["[]", "null", "{}", '{"global_step": "x"}', '{"global_step": 2, "stateful_callbacks": 3}', "\x00\xff"]
)
def test_any_state_file_is_judged_without_a_crash(run: Path, content: str) -> None:
    (run / "checkpoint-2" / "trainer_state.json").write_bytes(content.encode("latin1"))
    assert isinstance(incomplete(run / "checkpoint-2"), str)


def test_a_rank_that_had_not_finished_is_noticed(run: Path) -> None:
    folder = of_ranks(run, range(1), 2)
    assert incomplete(folder) == "rank 1 of 2 had not finished: rng_state_1.pth is missing"
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert incomplete(folder) == ""


def test_a_node_has_as_many_ranks_as_are_on_its_host_whatever_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun and srun set no LOCAL_WORLD_SIZE; a callback that one rank alone has asks the others nothing."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    callback, state = Shampoo4bitCallback(), TrainerState(stateful_callbacks={}, max_steps=2)
    args, optimizer = SimpleNamespace(world_size=4, optim="shampoo4bit", optim_args=None), stepped()
    callback.on_train_begin(args, state, None, optimizer)
    monkeypatch.setattr(Shampoo4bit, "ranks_here", 2)
    callback.on_step_end(args, state, None, optimizer)
    assert callback.state()["attributes"]["local_world_size"] == 2


def test_the_first_step_finds_out_which_ranks_are_on_the_same_host(monkeypatch: pytest.MonkeyPatch) -> None:
    here = host()

    def gather(ranks: Ranks, said: object) -> list:
        met = isinstance(said, tuple) and said[1:] == (here,)
        return [said, ("word", "another computer"), ("word", here)] if met else [said]

    monkeypatch.setattr(Ranks, "gather", gather)
    assert stepped().ranks_here == 2


@pytest.mark.parametrize(
    ("ranks", "whole"), [(range(2), True), (range(2, 4), True), (range(3), False), (range(4), True)]
)
def test_a_nodes_own_disk_has_the_files_of_its_ranks(run: Path, ranks: range, whole: bool) -> None:
    assert (incomplete(of_ranks(run, ranks, 4, node=2)) == "") == whole


def test_sharded_parts_end_with_their_table_of_contents(run: Path) -> None:
    folder = run / "checkpoint-2"
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / "__0_0.distcp").touch()
    assert "optimizer" in incomplete(folder)
    (folder / "optimizer_0" / ".metadata").touch()
    assert incomplete(folder) == ""
    (folder / "pytorch_model_fsdp_0").mkdir()
    assert incomplete(folder) == "pytorch_model_fsdp_0/.metadata, which is written last, is missing"


def test_a_missing_shard_of_the_model_is_noticed(run: Path) -> None:
    index = run / "checkpoint-2" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert incomplete(run / "checkpoint-2") == "model-2.safetensors is missing"


def adapted(*names: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    model = peft.get_peft_model(llama(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


@pytest.mark.parametrize("names", [("style",), ("default", "style"), ("style", "tone")])
def test_adapters_are_whole_by_whatever_name_and_resumed_from(tmp_path: Path, names: tuple[str, ...]) -> None:
    """PEFT writes each but "default" into a folder of its name."""
    Trainer(adapted(*names), arguments(tmp_path, **SAVED), train_dataset=Tokens()).train()
    folder = tmp_path / "checkpoint-2"
    assert last_complete(tmp_path) == (folder, {})
    trainer = Trainer(adapted(*names), arguments(tmp_path, **{**SAVED, "max_steps": 3}), train_dataset=Tokens())
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 3
    for name in names:
        weights = ("" if name == "default" else f"{name}/") + "adapter_model.safetensors"
        content = (folder / weights).read_bytes()
        (folder / weights).write_bytes(content[:-100])
        assert incomplete(folder) == f"{weights} is cut off"
        (folder / weights).unlink()
        assert "weights" in incomplete(folder)
        old = (folder / weights).with_suffix(".bin")  # of an earlier PEFT
        old.write_bytes(content)
        assert incomplete(folder) == f"{old.relative_to(folder)} is cut off"
        torch.save({}, old)
        assert incomplete(folder) == ""


# ---------------------------------------------------------------------------------------------- who resumes from them


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_the_callback_stops_where_the_trainer_would_go_on_without_a_file(run: Path, name: str) -> None:
    (run / "checkpoint-2" / name).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-2' is not complete.*missing.*checkpoint last"):
        resumed(run)


def test_a_checkpoint_of_weights_alone_is_called_that(tmp_path: Path) -> None:
    """Of `save_only_model=True`, which nobody was stopped in writing."""
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    Trainer(llama(), arguments(tmp_path, **settings), train_dataset=Tokens()).train()
    assert incomplete(tmp_path / "checkpoint-1").startswith("it has weights alone (save_only_model=True)")


def test_the_callback_finds_a_turned_bit_that_torch_loads(run: Path) -> None:
    file = run / "checkpoint-2" / "optimizer.pt"
    largest = max((t for e in torch.load(file)["state"].values() for t in e.values()), key=lambda t: t.nbytes)
    content = bytearray(file.read_bytes())
    content[content.index(largest.numpy().tobytes())] ^= 1
    file.write_bytes(content)
    torch.load(file)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is not what was written, by the checksum"):
        resumed(run)


@pytest.mark.parametrize("own", [True, False])
def test_the_folder_that_is_named_to_train_is_looked_at_wherever_it_lies(run: Path, tmp_path: Path, own: bool) -> None:
    """By `trainer.train(resume_from_checkpoint=...)` alone, with a whole one of the same name of its own or without."""
    if own:
        shutil.copytree(run, tmp_path / "here")
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    trainer = Trainer(llama(), arguments(tmp_path / "here", **{**SAVED, "max_steps": 3}), train_dataset=Tokens())
    with pytest.raises(CheckpointError, match=r"run/checkpoint-2' is not complete.*optimizer is missing"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_a_checkpoint_from_before_the_callback_noted_the_ranks(run: Path) -> None:
    edit(
        run / "checkpoint-2" / "trainer_state.json",
        lambda state: state["stateful_callbacks"].pop("Shampoo4bitCallback"),
    )
    assert incomplete(run / "checkpoint-2") == ""
    resumed(run)
    assert incomplete(run / "checkpoint-3") == ""


def test_a_checkpoint_that_is_being_replaced_is_no_longer_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run from step 1 on comes to checkpoint-2 again, and dies while it writes."""
    saving = torch.save

    def save(content: object, file: object, *rest: object, **more: object) -> None:
        if "scheduler" in str(file):
            raise KeyboardInterrupt
        saving(content, file, *rest, **more)

    trainer = Trainer(llama(), arguments(run, **SAVED), train_dataset=Tokens())
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert last_complete(run)[0] == run / "checkpoint-1"


def test_the_command_prints_the_last_whole_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    assert main(["checkpoint", "last", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(run / "checkpoint-1")
    assert err.startswith("passed over checkpoint-2: trainer_state.json, which is written last, is missing")
    shutil.rmtree(run / "checkpoint-1")
    assert main(["checkpoint", "last", str(run)]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err


def asked_for(run: Path, resume: object) -> str | None:
    config = parse({"output_dir": str(run), "resume_from_checkpoint": str(resume), "max_steps": 1})
    return prepare_output(config.run, config.training)


def test_train_takes_the_last_whole_one(run: Path) -> None:
    (run / "checkpoint-2" / "scheduler.pt").unlink()
    assert asked_for(run, "auto") == asked_for(run, "true") == str(run / "checkpoint-1")
    with pytest.raises(ConfigError, match=r"checkpoint-2' is not a complete checkpoint: scheduler\.pt is missing"):
        asked_for(run, run / "checkpoint-2")


def test_train_begins_again_where_no_checkpoint_was_completed(run: Path) -> None:
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(ConfigError, match="there is no complete checkpoint"):
        asked_for(run, "true")
    (run / "all_results.json").touch()  # of a training that ended
    with pytest.raises(ConfigError, match="is not empty"):
        asked_for(run, "auto")
    (run / "all_results.json").unlink()
    assert asked_for(run, "auto") is None
    assert not list(run.glob("checkpoint-*"))
    aside = sorted(folder.name for folder in run.glob("incomplete-*"))  # their weights may be wanted
    assert aside == ["incomplete-checkpoint-1", "incomplete-checkpoint-2", "incomplete-checkpoint-3"][: len(aside)]
    assert (run / aside[0] / "model.safetensors").exists()


def test_a_scheduler_of_deepspeeds_own_is_in_its_files(run: Path) -> None:
    folder = run / "checkpoint-2"
    (folder / "scheduler.pt").unlink()
    (folder / "global_step2").mkdir()
    torch.save({}, folder / "global_step2" / "mp_rank_00_model_states.pt")
    assert incomplete(folder) == ""


@pytest.mark.slow
def test_a_training_survives_kills(tmp_path: Path) -> None:
    """A sample of `python -m tests.stress.crash`."""
    done = python("-m", "tests.stress.crash", "--kills", 2, "--modes", "single", "--output", tmp_path / "crash.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "crash.json").read_text())["kills"] == 2
