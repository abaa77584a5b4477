"""`hf-shampoo4 sweep`: which runs it makes, what it refuses, and a short one from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_shampoo4 import cli
from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.integrations.trainer import optim_options
from hf_shampoo4.studies import sweep
from hf_shampoo4.studies.grid import RATE, Point
from hf_shampoo4.studies.runner import Runs
from hf_shampoo4.studies.sweep import as_markdown, carry_out, factors_as_text, search_of, shortened
from hf_shampoo4.training.commands import checked_settings, overrides_as_settings
from tests.support.tiny import chat_model, conversations

SETTINGS: dict[str, Any] = {"optim": "shampoo4bit", RATE: 1e-3, "optim_args": "bits=8,rates=head:4"}


def bowl(best: float):
    return lambda point: abs(math.log2(point.learning_rate / best))


def searched(search: sweep.Search, loss, most: int = 20) -> dict[Point, float]:
    losses: dict[Point, float] = {}
    while len(losses) < most and (point := search.next_point(losses)) is not None:
        assert point not in losses
        losses[point] = loss(point)
    return losses


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (1e-3, [1e-3, 2e-3, 5e-4]),
        (4e-3, [1e-3, 2e-3, 4e-3, 8e-3]),
        (2.5e-4, [1e-3, 2e-3, 5e-4, 2.5e-4, 1.25e-4]),
    ],
)
def test_three_runs_bracket_a_rate_and_more_follow_while_the_best_is_at_an_edge(best, rates) -> None:
    found = searched(search_of(SETTINGS, (), (), 2.0), bowl(best))
    assert [point.learning_rate for point in found] == rates


def test_given_rates_come_first_and_the_sweep_goes_on_beyond_them() -> None:
    found = searched(search_of(SETTINGS, (1e-3, 3e-3), (), 1.5), bowl(4e-3))
    assert [point.learning_rate for point in found] == [1e-3, 3e-3, 4.5e-3, 6.75e-3]


def test_after_runs_that_all_diverge_it_goes_down() -> None:
    found = searched(search_of(SETTINGS, (), (), 2.0), lambda p: 1.0 if p.learning_rate < 3e-4 else math.inf, 5)
    assert [point.learning_rate for point in found] == [1e-3, 5e-4, 2.5e-4, 1.25e-4]


def test_factors_by_kind_are_sought_from_those_of_the_configuration_at_its_rate() -> None:
    aims = {"embedding": 4.0, "head": 2.0}
    found = searched(
        search_of(SETTINGS, (), ("embedding", "head"), 2.0),
        lambda point: sum(abs(math.log2(point.get(kind) / aim)) for kind, aim in aims.items()),
    )
    assert {point.learning_rate for point in found} == {1e-3}
    best = min(found, key=lambda point: found[point])
    assert factors_as_text(best) == "rates=embedding:4;head:2;matrix:1;vector:1"
    search = search_of(SETTINGS, (), ("embedding", "head"), 2.0)
    assert 'optim_args: "rates=embedding:4;head:2;matrix:1;vector:1"' in as_markdown(found, search)
    assert "with a worse one on either side" in as_markdown(found, search)


def test_factors_of_an_optimizer_that_has_none_and_a_training_without_a_rate_are_refused() -> None:
    with pytest.raises(ConfigError, match="not 'adamw_torch'"):
        search_of({**SETTINGS, "optim": "adamw_torch"}, (), ("head",), 2.0)
    with pytest.raises(ConfigError, match="has no learning_rate: give one with --learning_rate, or some with --rates"):
        search_of({"optim": "shampoo4bit"}, (), (), 2.0)
    with pytest.raises(ConfigError, match="learning_rate='fast' is not allowed"):
        search_of({RATE: "fast"}, (), (), 2.0)


def test_a_short_run_has_the_schedule_in_proportion_and_leaves_no_checkpoints() -> None:
    whole = {
        "max_steps": 2000,
        "warmup_steps": 100,
        "lr_scheduler_kwargs": {"num_decay_steps": 500, "min_lr_ratio": 0.1},
    }
    short = shortened({**whole, "output_dir": "x", "save_strategy": "steps"}, None)
    assert (short["max_steps"], short["warmup_steps"]) == (200, 10)
    assert short["lr_scheduler_kwargs"] == {"num_decay_steps": 50, "min_lr_ratio": 0.1}
    assert (short["save_strategy"], short["eval_strategy"], short["report_to"]) == ("no", "no", "none")
    assert "output_dir" not in short
    assert shortened({"max_steps": 50, "warmup_steps": 0.1}, None)["warmup_steps"] == 0.1
    assert shortened({"max_steps": 50}, None)["max_steps"] == 50
    assert shortened({"num_train_epochs": 2, "warmup_steps": 0.03}, 30)["max_steps"] == 30
    with pytest.raises(ConfigError, match="warmup_steps=100 is in steps, and the training has no max_steps"):
        shortened({"num_train_epochs": 2, "warmup_steps": 100}, 30)
    with pytest.raises(ConfigError, match="no validation examples: give validation_fraction above 0"):
        shortened({"validation_fraction": "0"}, 30)


@pytest.mark.parametrize("as_text", [False, True])
def test_lengths_are_taken_in_proportion_as_a_file_and_as_the_command_line_has_them(as_text: bool) -> None:
    kwargs: Any = {"num_decay_steps": 500, "min_lr_ratio": 0.1}
    short = shortened({"max_steps": "2000", "lr_scheduler_kwargs": json.dumps(kwargs) if as_text else kwargs}, 200)
    assert short["lr_scheduler_kwargs"] == {"num_decay_steps": 50, "min_lr_ratio": 0.1}
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs='\{x' is not allowed: it must be a mapping, as JSON"):
        shortened({"max_steps": 2000, "lr_scheduler_kwargs": "{x"}, 200)
    with pytest.raises(ConfigError, match="num_decay_steps='many' is not allowed: it must be a number"):
        shortened({"max_steps": 2000, "lr_scheduler_kwargs": {"num_decay_steps": "many"}}, 200)


def test_the_step_from_which_moments_are_rounded_stochastically_is_taken_in_proportion(tmp_path: Path) -> None:
    whole = {"max_steps": 1000, "optim_args": "bits=8,moments=4bit,stochastic_from=900"}
    short = shortened(whole, 200)
    assert optim_options("shampoo4bit", short["optim_args"])["stochastic_from"] == 180
    assert optim_options("shampoo4bit", shortened(whole, 1)["optim_args"])["stochastic_from"] == 1
    (tmp_path / "options.yaml").write_text("stochastic_from: 900\n")
    short = shortened({**whole, "optim_args": f"config={tmp_path}/options.yaml"}, 200)
    assert optim_options("shampoo4bit", short["optim_args"])["stochastic_from"] == 180
    share = {**whole, "optim_args": "stochastic_last=0.1"}
    assert shortened(share, 200)["optim_args"] == "stochastic_last=0.1"
    assert shortened({**whole, "optim": "adamw_torch", "optim_args": "x=1"}, 200)["optim_args"] == "x=1"
    with pytest.raises(ConfigError, match=r"stochastic_from=900 is in steps, .* training, or stochastic_last, a share"):
        shortened({**whole, "max_steps": -1}, 200)


def test_finished_runs_are_not_made_again_and_max_runs_ends_a_sweep(tmp_path: Path, capsys) -> None:
    made: list[dict[str, Any]] = []

    def train(settings: dict[str, Any]) -> dict[str, Any]:
        made.append(settings)
        return {"final_loss": None if settings[RATE] > 3e-3 else 1e-3 / settings[RATE]}

    search = search_of(SETTINGS, (), (), 2.0)
    assert len(carry_out(SETTINGS, search, 2, Runs(tmp_path), train)) == 2
    losses = carry_out(SETTINGS, search, 8, Runs(tmp_path), train)
    assert [settings[RATE] for settings in made] == [1e-3, 2e-3, 4e-3]
    assert losses[Point(4e-3, (("head", 4.0),))] == math.inf
    assert made[0]["optim_args"] == SETTINGS["optim_args"]
    assert "learning_rate 0.004: diverged" in capsys.readouterr().out
    assert "| learning_rate 0.002 | 0.5000 (best) |" in as_markdown(losses, search)
    assert "at an edge in learning_rate" in as_markdown({Point(1e-3): 1.0}, search)
    assert "Every run diverged" in as_markdown({Point(1e-3): math.inf}, search)


def test_a_run_on_files_that_have_changed_is_made_again(tmp_path: Path) -> None:
    """The text, the model's configuration or the options' file: its name alone does not say what is in it."""
    (tmp_path / "texts").mkdir()
    files = [tmp_path / name for name in ("texts/a.txt", "model.json", "options.yaml")]
    for file in files:
        file.write_text("")
    made: list[dict[str, Any]] = []

    def train(settings: dict[str, Any]) -> dict[str, Any]:
        made.append(settings)
        return {"final_loss": 1.0}

    named = {"dataset": f"{tmp_path}/texts/*.txt", "model": str(files[1]), "optim_args": f"config={files[2]}"}
    for count, changed in enumerate((None, *files)):
        if changed:
            changed.write_text("bits: 8")
        for _ in range(2):
            settings = {**SETTINGS, **named}
            carry_out(settings, search_of(settings, (), (), 2.0), 1, Runs(tmp_path / "runs"), train)
        assert len(made) == count + 1
    assert set(made[0]) == {*SETTINGS, *named}


def test_settings_of_the_command_line_are_those_of_a_file() -> None:
    items = ["--a", "1", "--b=2", "--c-d", "x", "y", "--flag", "--e", "-1"]
    assert overrides_as_settings(items) == {"a": "1", "b": "2", "c_d": ["x", "y"], "flag": True, "e": "-1"}


def test_which_command_a_configuration_is_for(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("like: lora\nlearning_rate: 1.0e-4\n")
    assert checked_settings(str(own), [])[0] == "finetune"
    own.write_text("max_steps: 5\n")
    assert checked_settings(str(own), ["--max_steps", "7"]) == ("train", {"max_steps": "7"})
    assert checked_settings("full", [])[0] == "finetune"
    with pytest.raises(ConfigError, match="config 'nothing' does not exist; allowed: a YAML file, or one of gpt2"):
        checked_settings("nothing", [])
    with pytest.raises(ConfigError, match="unknown setting 'learning_rat'"):
        checked_settings(str(own), ["--learning_rat", "7"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rates", "1e-3,-1"], "'-1' is not a number above 0"),
        (["--kinds", "heads"], "'heads' is no kind of parameter"),
        (["--factor", "1"], "'1' is not a number above 1.01"),
        (["--factor", "1.001"], "'1.001' is not a number above 1.01"),
        (["--max_runs", "0"], "'0' is not a whole number"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_at_once(words, said, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sweep", "stdlib_tiny", *words])
    assert said in capsys.readouterr().err


def test_under_torchrun_it_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["sweep", "stdlib_tiny"]) == 2
    assert "a sweep trains in one process, not in WORLD_SIZE=2" in capsys.readouterr().err


def test_a_sweep_of_a_users_own_configuration(tmp_path: Path, capsys, monkeypatch) -> None:
    """Real runs of three steps; a second call makes none."""
    text = tmp_path / "texts.jsonl"
    rows = ({"text": " ".join(f"word{(i * j) % 37}" for j in range(60))} for i in range(40))
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump({
        "model": "llama_tiny", "model_overrides": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
        "dataset": str(text), "cache_dir": str(tmp_path / "cache"), "vocab_size": 300, "seq_len": 16,
        "max_validation_sequences": 8, "output_dir": str(tmp_path / "out"), "optim_args": {"bits": 8},
        "learning_rate": 1e-3, "max_steps": 100, "warmup_steps": 10, "save_steps": 1, "per_device_train_batch_size": 2,
        "disable_tqdm": True, "use_cpu": True,
    }))  # fmt: skip
    words = ["sweep", str(config), "--steps", "3", "--max_runs", "3", "--output_dir", str(tmp_path / "sweep")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("validation loss") == 1
    assert "    learning_rate: " in said
    assert len(list((tmp_path / "sweep" / "runs").iterdir())) == 3
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["runs", "sweep.md"]
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sweep, "_loss_of", None)
    assert cli.main(words) == 0
    assert (tmp_path / "sweep" / "sweep.md").read_text() in capsys.readouterr().out


def test_a_sweep_of_the_factors_of_a_fine_tuning(tmp_path: Path, capsys) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({
        "model_name_or_path": str(chat_model(tmp_path / "model")), "learning_rate": 1e-3, "bf16": False,
        "dataset": str(conversations(tmp_path / "chat.jsonl")), "per_device_train_batch_size": 4, "max_length": 48,
        "gradient_checkpointing": False, "assistant_only_loss": True, "validation_fraction": 0.2, "num_train_epochs": 1,
        "warmup_steps": 0.1, "disable_tqdm": True, "output_dir": str(tmp_path / "out"),
    }))  # fmt: skip
    words = ["sweep", str(config), "--kinds", "head", "--steps", "1", "--max_runs", "2"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "sweep")]) == 0
    said = capsys.readouterr().out
    assert "run 2: learning_rate 0.001, head x2: " in said
    assert 'optim_args: "rates=embedding:1;head:' in said
    assert "at an edge in head" in said
