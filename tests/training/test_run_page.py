"""`hf-shampoo4 report`: runs of the Trainer and of own loops on one page."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import Trainer

import hf_shampoo4 as s4
from hf_shampoo4.cli import main
from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.training.run_page import _figures, _unit_of_time, page, read_run
from tests.support.tiny import Tokens, arguments, llama


def trainer_run(folder: Path, inside: str = "") -> Path:
    log = [{"step": step, "loss": 5.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0} for step in range(1, 6)]
    log += [{"step": 5, "eval_loss": 1.25}, {"step": 3, "eval_loss": 1.5}]
    (folder / inside).mkdir(parents=True)
    (folder / inside / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def own_loop(folder: Path) -> Path:
    """As docs/trackers.md shows."""
    folder.mkdir()
    weight = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = s4.Shampoo4bit([weight], algorithm="shampoo", stats_every=2, roots_every=2)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 5):
            loss = weight.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            file.write(json.dumps({"step": step, "loss": loss.item(), **s4.metrics(optimizer)}) + "\n")
    return folder


class Balanced(HTMLParser):
    """Fails on an element that is closed without having been opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_two_runs_on_one_page(tmp_path, capsys):
    runs = [trainer_run(tmp_path / "adam & eve"), own_loop(tmp_path / "mine")]
    output = tmp_path / "new" / "both.html"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    text = output.read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "Training runs: adam & eve, mine" in parser.text
    assert text.count("<figure") == 5  # every curve that one of them logged; nothing was skipped and nothing failed
    assert "optimizer state, MB" in text


def test_runs_of_the_same_name_are_told_apart_and_what_went_wrong_is_drawn(tmp_path, capsys):
    runs = [trainer_run(tmp_path / parent / "run") for parent in ("a", "b")]
    state = json.loads((runs[1] / "trainer_state.json").read_text())
    state["log_history"] += [{"step": step, "optim/skipped_steps": step - 1} for step in (1, 2)]
    (runs[1] / "trainer_state.json").write_text(json.dumps(state))
    assert main(["report", *map(str, runs)]) == 0
    text = (runs[0] / "report.html").read_text()
    assert "Training runs: a/run, b/run" in text
    assert "Steps skipped for a gradient that was not finite" in text
    assert text.count("<b>1.2500</b>") == 2


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    text = page([read_run(trainer_run(tmp_path / "a"))])
    assert "<script" not in text
    assert not re.search(r"(?:src|href)=\"(?!#)", text)
    assert "@import" not in text


def test_figures_are_the_runs(tmp_path):
    run = read_run(trainer_run(tmp_path / "a", inside="checkpoint-5"))
    assert run.curve("eval_loss") == [(3, 1.5), (5, 1.25)]
    text = page([run])
    assert "<td>5</td><td>1.0000</td><td>1.2500</td><td>1.2500</td><td>0.001</td>" in text
    loop = read_run(own_loop(tmp_path / "mine"))
    assert loop.last("optim/state_bytes") > 0
    assert loop.last("optim/skipped_steps") == 0


def test_the_optimizer_its_options_and_time_are_on_the_page(tmp_path):
    s4.register()
    args = arguments(tmp_path / "run", optim="adamw_torch", optim_args=None, max_steps=4)
    trainer = Trainer(llama(), args, train_dataset=Tokens())
    trainer.train()
    trainer.save_state()
    run = read_run(tmp_path / "run")
    assert run.optimizer == "adamw_torch"
    assert [step for step, _ in run.curve("loss")] == list(run.seconds) == [1, 2, 3, 4]
    assert list(run.seconds.values()) == sorted(run.seconds.values())
    assert [at for at, _ in run.curve_in_time("loss")] == list(run.seconds.values())
    text = page([run])
    assert '<td class="text">adamw_torch</td>' in text
    assert "Training loss, against time" in text
    assert "nats a token" in text


@pytest.mark.parametrize(
    ("longest", "unit"), [(7199.0, ("minutes", 60)), (7200.0, ("hours", 3600)), (119.0, ("seconds", 1))]
)
def test_time_is_told_in_units_of_its_size(longest, unit):
    assert _unit_of_time(longest) == unit


def test_the_lowest_loss_is_bold_above_ten_too(tmp_path):
    runs = [own_loop(tmp_path / name) for name in ("a", "b")]
    for run, loss in zip(runs, (10.2, 9.8), strict=True):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4, "eval_loss": loss}) + "\n")
    text = page([read_run(run) for run in runs])
    assert "<b>9.8000</b>" in text
    assert "<b>10.2000</b>" not in text


@pytest.mark.filterwarnings("error:constrained_layout")
@pytest.mark.parametrize("order", [1, -1])
def test_a_run_that_diverged_is_not_the_best_and_its_name_stands_where_its_line_ends(tmp_path, order):
    losses = {"diverged": (2.0, float("nan")), "at_once": (float("nan"), float("inf")), "sound": (2.0, 1.5)}
    for name, of_run in losses.items():
        (tmp_path / name).mkdir()
        lines = [{"step": step, "eval_loss": loss} for step, loss in enumerate(of_run, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    runs = [read_run(tmp_path / name) for name in [*losses][::order]]
    assert {run.name: _figures(run)["lowest validation loss"] for run in runs} == {
        "diverged": "2.0000", "at_once": "", "sound": "1.5000"
    }  # fmt: skip
    text = page(runs)
    assert re.findall("<b>(.*?)</b>", text) == ["1.5000"]
    assert {*losses} & {*re.findall("<!-- (.*?) -->", text)} == {"diverged", "sound"}, "named beside their lines"


def test_what_two_callbacks_have_noted_is_read(tmp_path):
    file = trainer_run(tmp_path / "a") / "trainer_state.json"
    told = {"attributes": {"optimizer": "soap4bit", "seconds": [[1, 2.0], [2, 3.0]]}}
    both = {"stateful_callbacks": {"Shampoo4bitCallback": [{"attributes": {}}, told]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **both}))
    run = read_run(tmp_path / "a")
    assert (run.optimizer, run.seconds) == ("soap4bit", {1: 2.0, 2: 3.0})


def test_time_goes_on_where_a_checkpoint_was(tmp_path):
    s4.register()
    args = arguments(tmp_path / "run", optim_args="block_size=64", max_steps=4, save_strategy="steps", save_steps=2)
    Trainer(llama(), args, train_dataset=Tokens()).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    file = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["Shampoo4bitCallback"]["attributes"]["seconds"] = [[1, 100.0], [2, 200.0]]
    state["log_history"][-1]["optim/refresh_seconds"] = 50.0
    file.write_text(json.dumps(state))
    args.optim_args = "block_size=64,stats_every=3"
    trainer = Trainer(llama(), args, train_dataset=Tokens())
    for _ in ("to its end", "when it has ended"):
        trainer.train(resume_from_checkpoint=True)
        trainer.save_state()
        run = read_run(tmp_path / "run")
        assert run.optimizer == "shampoo4bit block_size=64", "the checkpoint's stats_every holds"
        assert list(run.seconds) == [1, 2, 3, 4]
        assert list(run.seconds.values())[:2] == [100.0, 200.0]
        assert 200.0 < run.seconds[3] < run.seconds[4]
        refreshed = [spent for _, spent in run.curve("optim/refresh_seconds")]
        assert refreshed[1] == 50.0 < refreshed[2] <= refreshed[3]
        shown = _figures(run)
        assert 200 <= float(shown["time, s"]) < 300
        assert 50 <= float(shown["of it on factors and bases, s"]) < 100
        assert shown["samples/s"] == "", "the Trainer's is of the last session"


def test_a_checkpoint_of_a_continuation_is_newer_than_the_end_before(tmp_path):
    def write(file: Path, at: int, log: list[dict]) -> None:
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(json.dumps({"log_history": log}))
        os.utime(file, (at, at))

    run, log = tmp_path / "run", [{"step": step, "loss": 5.0 / step} for step in range(1, 5)]
    ended = [*log[:2], {"step": 2, "train_runtime": 9.0, "train_samples_per_second": 3.0}]
    write(run / "checkpoint-1" / "trainer_state.json", 1, log[:1])
    write(run / "trainer_state.json", 2, ended)
    (run / "all_results.json").write_text(json.dumps({"train_runtime": 9.0, "train_samples_per_second": 3.0}))
    assert read_run(run).log == ended
    assert _figures(read_run(run))["samples/s"] == "3.0"
    os.utime(run / "checkpoint-1" / "trainer_state.json", (5, 5))  # a copy's
    assert read_run(run).log == ended
    write(run / "checkpoint-3" / "trainer_state.json", 6, log[:3])  # it goes on, and is at work or was killed
    shown = _figures(read_run(run))
    assert (shown["steps"], shown["time, s"], shown["samples/s"]) == ("3", "", "")
    write(run / "trainer_state.json", 7, log)
    assert read_run(run).log == log


def test_diagnostics_are_drawn(tmp_path):
    (tmp_path / "a").mkdir()
    lines = [{"step": i, "loss": 1.0, "optim/basis_turn": 0.1, "optim/condition": 3.0, "seconds": i} for i in (1, 2)]
    lines[0]["optimizer"] = "shampoo4bit bits=8, <b>"
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = page([read_run(tmp_path / "a")])
    assert "How far an update turned the bases" in text
    assert "Condition of the worst factor" in text
    assert "shampoo4bit bits=8, &lt;b&gt;" in text
    assert "Training loss, against time" in text


def test_ten_runs_have_ten_marks(tmp_path):
    text = page([read_run(trainer_run(tmp_path / f"run{i}")) for i in range(10)])
    marks = re.findall(r'<svg class="mark".*?</svg>', text)
    assert len(marks) == len(set(marks)) == 10


def test_a_cut_last_line_is_no_obstacle_and_another_one_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert read_run(tmp_path / "a").curve("loss") == [(1, 2.0), (2, 1.0)]
    file.write_text('{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 1: Unterminated string"):
        read_run(tmp_path / "a")
    file.write_text("")
    with pytest.raises(ConfigError, match="has no line yet"):
        read_run(tmp_path / "a")


def test_default_output_and_errors(tmp_path, capsys):
    run = trainer_run(tmp_path / "a")
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
    with pytest.raises(ConfigError, match=r"has neither trainer_state.json nor metrics.jsonl"):
        read_run(tmp_path)
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "nowhere").exists()
    assert "nowhere' cannot be read: there is no such folder" in capsys.readouterr().err
    (run / "trainer_state.json").write_text("{")
    assert main(["report", str(run)]) == 2
    assert "cannot be read" in capsys.readouterr().err
