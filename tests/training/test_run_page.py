"""`hf-shampoo4 report`: runs of the Trainer and of own loops on one page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import hf_shampoo4 as s4
from hf_shampoo4.cli import main
from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.training.run_page import page, read_run


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
    assert text.count("<svg") == 5  # every curve that one of them logged; nothing was skipped and nothing failed
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


def test_default_output_and_errors(tmp_path, capsys):
    run = trainer_run(tmp_path / "a")
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
    with pytest.raises(ConfigError, match=r"has neither trainer_state.json nor metrics.jsonl"):
        read_run(tmp_path)
    (run / "trainer_state.json").write_text("{")
    assert main(["report", str(run)]) == 2
    assert "cannot be read" in capsys.readouterr().err
