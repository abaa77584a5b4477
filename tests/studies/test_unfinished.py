"""A run that is killed goes on where it was, to the same bits; two processes do not make the same run."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from hf_shampoo4.studies import race
from hf_shampoo4.studies.grid import Contestant, Grid, Point, read_grid
from hf_shampoo4.studies.measured_run import Keeper, StepTimer
from hf_shampoo4.studies.peers import PEERS, code_of
from hf_shampoo4.studies.race import Study, carry_out, train
from hf_shampoo4.studies.runner import Runs

SETTINGS, CODE = {"optim": "a", "learning_rate": 1e-3, "seed": 0}, {"torch": "2"}
STEPS, KILLED = 5, 3  # an epoch has two
CONTESTANTS = [
    {"optim": "shampoo4bit", "optim_args": "refresh_warmup=4"}, {"optim": "adamw_torch_fused"}, {"peer": "muon"},
    {"peer": "muon_4bit"},
]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Of which a training sees more than one epoch."""
    path = tmp_path / "text.jsonl"
    told = (f"The {n} brown foxes jump over {n * n} lazy dogs. " * 8 for n in range(10))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in told))
    return path


def small(text: Path, **more: Any) -> dict[str, Any]:
    common = read_grid("tiny_stdlib", quick=True, changes={"max_steps": STEPS}).common
    sizes = {"dataset": str(text), "vocab_size": 300, "max_train_documents": None, "validation_fraction": 0.2}
    return {**common, **sizes, "learning_rate": 1e-2, "rates": {"embedding": 4}, "seed": 0, **more}


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint at every step, and an end after some."""
    on_save = Keeper.on_save

    def killed(self: Keeper, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        on_save(self, args, state, control)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(race, "KEPT_EVERY", 0.0)
    monkeypatch.setattr(Keeper, "on_save", killed)


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=str)
def test_a_killed_run_goes_on_to_the_same_weights(
    contestant: dict[str, Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(PEERS[contestant["peer"]].package if "peer" in contestant else "torch") is None:
        pytest.skip("its package is not installed")
    settings = small(text, **contestant)
    whole = train("A", settings, tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("checkpoint-*")), "a short run keeps nothing"
    kill_at(KILLED, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train("A", settings, tmp_path / "killed")
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == [f"checkpoint-{KILLED}"]
    monkeypatch.undo()
    found = train("A", settings, tmp_path / "killed")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    same = ("final_loss", "validation", "bytes_per_parameter", "parameters")
    assert {name: found[name] for name in same} == {name: whole[name] for name in same}
    assert [step for step, _ in found["validation"]] == [2, 4, 5]
    seconds = found["validation_seconds"]
    assert len(seconds) == 3
    assert 0 < seconds[0] <= seconds[1] <= seconds[2], "each step counts once"  # to hundredths


def test_times_of_both_parts_are_put_together() -> None:
    before, after = StepTimer(), StepTimer()
    before.steps, before.optimizer_steps, before._before = [9.0, 1.0], [8.0, 0.5], 100.0
    state = TrainerState(global_step=2, stateful_callbacks=[before])  # type: ignore[list-item]
    after.on_train_begin(None, state, None)  # type: ignore[arg-type]
    assert (after.steps, after.optimizer_steps) == ([9.0, 1.0], [8.0, 0.5])
    assert 100 < after.seconds < 101
    for _ in range(2):
        after.on_step_begin()
        after.on_pre_optimizer_step()
        after.on_optimizer_step()
        after.on_step_end()
    assert len(after.steps) == len(after.optimizer_steps) == 4
    assert after.steps[2] == after.steps[3], "the first after a checkpoint allocates"


def test_what_a_killed_run_has_left_is_found_by_the_same_code_alone_and_is_gone_with_the_run(tmp_path: Path) -> None:
    runs, left = Runs(tmp_path / "runs"), "checkpoint"

    def killed() -> None:
        with runs.alone(SETTINGS, CODE) as folder:
            (folder / left).touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert len(list((tmp_path / "unfinished").glob(f"*/{left}"))) == 1
    with runs.alone(SETTINGS, {"torch": "3"}) as other:
        assert not (other / left).exists()
    with runs.alone(SETTINGS, CODE) as again:
        assert (again / left).exists()
    assert not list((tmp_path / "unfinished").iterdir())


def test_a_run_that_another_has_in_hand_is_waited_for_and_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = Grid("g", "G", "a", None, (0,), {}, (Contestant("a", "A", (Point(1.0),), (), {"optim": "a"}),))
    made, begun, may_end = [], threading.Event(), threading.Event()

    def make(label: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
        made.append(folder)
        begun.set()
        assert may_end.wait(20)
        return {"final_loss": 3.0}

    def race_once() -> None:
        carry_out(grid, Runs(tmp_path / "runs"), study=Study(make, lambda _: CODE))

    first, second = threading.Thread(target=race_once), threading.Thread(target=race_once)
    first.start()
    assert begun.wait(20)
    second.start()
    while "waiting for it" not in capsys.readouterr().out:
        assert second.is_alive()
    may_end.set()
    first.join(20)
    second.join(20)
    assert len(made) == 1
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert not list((tmp_path / "unfinished").iterdir())


def test_a_run_keeps_its_place_by_settings_and_code(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs")
    settings = {"optim": "adamw_torch_fused", "learning_rate": 1e-3, "seed": 0}
    with runs.alone(settings, code_of(settings)) as folder:
        assert folder.name == runs.path(settings, code_of(settings)).stem
