"""The demo: its arithmetic on made-up curves, and a quick run of everything."""

import json

import pytest
import torch
from PIL import Image

from hf_shampoo4 import cli
from hf_shampoo4.studies.demo import draw, print_table
from hf_shampoo4.studies.grid import read_plan
from hf_shampoo4.studies.machine import state_bytes
from hf_shampoo4.studies.measured_run import Outcome, steps_to
from hf_shampoo4.utils.files import write_json


def outcome(label, losses, **changes):
    steps = range(0, 10 * len(losses), 10)
    fields = {
        "optim": label, "label": label, "settings": {"learning_rate": 1e-3}, "parameters": 1_000_000,
        "bytes_per_parameter": 8.0, "step_ms": 100.0, "optimizer_step_ms": 2.0, "seconds": 9.0,
        "validation": list(zip(steps, losses, strict=True)), "training": [], "step_seconds": [0.1] * steps[-1],
    }  # fmt: skip
    return Outcome(**{**fields, **changes})


def test_steps_to_a_loss_and_loss_at_a_step_lie_on_the_line():
    run = outcome("a", [8.0, 6.0, 5.0, 4.0])
    assert run.steps_to(5.5) == 15
    assert run.steps_to(4.0) == 30
    assert run.steps_to(3.9) is None
    assert run.loss_at(15) == 5.5
    assert run.loss_at(30) == run.final_loss == 4.0
    assert steps_to([(0, 3.0), (10, 4.0)], 3.5) == 0


def test_table_compares_with_the_first_run(capsys):
    print_table([outcome("AdamW", [8.0, 6.0, 5.0]), outcome("ours", [8.0, 5.0, 4.0], bytes_per_parameter=1.5)])
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in shown.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["steps to AdamW's final loss"]] == ["20", "10"]
    assert [cell.strip() for cell in rows["validation loss, step 10"]] == ["6.0000", "5.0000"]
    assert [cell.strip() for cell in rows["optimizer state, bytes a parameter"]] == ["8.00", "1.50"]


@pytest.mark.parametrize("curves", [[[8.0, 6.0, 5.0]], [[8.0, 6.0, 5.0], [8.0, 5.0, 4.0]], [[8.0, 6.0], [8.0, 7.0]]])
def test_picture_of_one_two_and_losing_runs(curves, tmp_path):
    draw([outcome(f"run {i}", losses) for i, losses in enumerate(curves)], tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


def test_json_is_replaced_at_once(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"a": 1})
    write_json(tmp_path / "new" / "a.json", {"a": 2})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": 2}
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_both_sides_share_everything_but_their_own_settings():
    own = read_plan()["optims"]
    assert all(set(settings) <= {"label", "optim", "learning_rate", "rates", "optim_args"} for settings in own.values())


def test_quick_demo(tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--steps", "4", "--output_dir", str(tmp_path / "demo")]) == 0
    shown = capsys.readouterr().out
    assert "steps to AdamW's final loss" in shown
    summary = json.loads((tmp_path / "demo" / "demo.json").read_text())
    adamw, scaled, ours = (summary["runs"][name] for name in ("adamw_torch_fused", "adamw_own_rates", "shampoo4bit"))
    assert adamw["validation"][0] == ours["validation"][0]  # before the first step: the same weights
    assert scaled["settings"]["rates"]["embedding"] > 1
    assert scaled["validation"][-1] != adamw["validation"][-1]
    assert [step for step, _ in ours["validation"]] == [0, 2, 4]
    assert adamw["bytes_per_parameter"] == pytest.approx(8.0, rel=1e-3)
    assert ours["bytes_per_parameter"] < 4.0
    assert len(ours["step_seconds"]) == 4
    assert summary["peak_memory_bytes"] > 1e8
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    assert cli.main(["demo", "--quick", "--output_dir", str(tmp_path / "demo")]) == 2


def test_no_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--steps", "0"])
    assert "'0' is not a whole number, 1 or more" in capsys.readouterr().err


def test_state_bytes_looks_into_tensor_subclasses():
    torchao = pytest.importorskip("torchao.optim")
    p = torch.nn.Parameter(torch.randn(1024, 256))
    optimizer = torchao.AdamW4bit([p], block_size=128)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert 1.06 < state_bytes(optimizer) / p.numel() < 1.1
