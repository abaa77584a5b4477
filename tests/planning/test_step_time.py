"""Predictions of a step's time: ceilings and their sources, what a launch takes, and `plan --gpu`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.planning import estimate
from hf_shampoo4.planning.command import main
from hf_shampoo4.planning.estimate import Described, plan_of
from hf_shampoo4.planning.launches import Launch
from hf_shampoo4.planning.step_time import Prediction, Seconds, predict, seconds, unknown
from hf_shampoo4.utils.ceilings import Ceilings, ceilings_of

CARDS = ("h100", "h200", "a100", "b200", "4090")
COUNTS = {"late": {"launches": 1, "bytes": 1, "products": {}}}
SLOW = Ceilings(
    "slow", {"float32": 100.0, "bfloat16": 1000.0}, memory=10.0, peak=1000.0, launch=0.5,
    decompositions={"linalg_qr": {10: 1.0, 20: 4.0}},
)  # fmt: skip


@pytest.mark.parametrize("card", CARDS)
def test_every_number_of_a_card_has_a_source(card: str) -> None:
    found = ceilings_of(card)
    assert all(found.sources.values())
    assert {"tflops.float32", "tflops.tf32", "tflops.bfloat16", "tbytes", "gbytes", "launch_us"} <= set(found.sources)
    assert found.products["float32"] <= found.products["tf32"] <= found.products["bfloat16"]
    assert 0 < found.decomposition("linalg_cholesky_ex", 768) < found.decomposition("linalg_qr", 768)


def test_a_launch_takes_the_longest_of_what_it_has_to_do() -> None:
    assert seconds({Launch("add", 1): 3}, SLOW) == 1.5
    assert seconds({Launch("add", 20): 1}, SLOW) == 2.0
    assert seconds({Launch("add", 20): 1}, SLOW, share=0.5) == 1.0
    assert seconds({Launch("mm", 20, 700, "float32"): 1}, SLOW) == 7.0
    assert seconds({Launch("mm", 20, 7000, "bfloat16"): 1}, SLOW) == 7.0
    assert seconds({Launch("linalg_qr", 1, order=20, matrices=3): 1}, SLOW) == 12.0


def test_what_is_overwritten_is_read_first_where_memory_is_a_cpus() -> None:
    found = replace(SLOW, in_place=20.0, one_by_one={"index_select": 4.0})
    assert seconds({Launch("copy_", 40, written=20): 1}, found) == pytest.approx(
        4.0
    )  # what a copy was measured to take
    assert seconds({Launch("mul_", 40): 1}, found) == 2.0
    assert seconds({Launch("mul_", 40, written=20): 1}, SLOW) == 4.0
    assert seconds({Launch("index_select", 40, numbers=40): 1}, found) == 10.0
    assert seconds({Launch("index_select", 40, numbers=40): 1}, SLOW) == 4.0


def test_orders_between_those_that_were_measured() -> None:
    assert SLOW.decomposition("linalg_qr", 40) == 32.0
    assert SLOW.decomposition("linalg_qr", 14) == pytest.approx(1.96, rel=0.01)
    assert SLOW.decomposition("linalg_qr", 5) == 0.5
    assert SLOW.decomposition("linalg_eigh", 5) is None


def test_a_decomposition_without_a_time_is_told_and_not_priced_at_a_launch() -> None:
    launches = {Launch("linalg_inv_ex", 1, order=20, matrices=3): 2, Launch("linalg_qr", 1, order=20, matrices=3): 1}
    assert unknown(launches, SLOW) == ["6 x linalg_inv_ex of order 20"]
    found = Prediction(
        "card", {}, 1, 0.4, True, 7.0, {"shampoo4bit": Seconds(3.0, 9.0, 4.0)}, COUNTS, unknown(launches, SLOW)
    )
    assert "NOT in these figures, for the card's table has no time of it: 6 x linalg_inv_ex of order 20" in str(found)


def test_roots_of_shampoo_are_priced_and_those_that_iterate_refused() -> None:
    options = {"algorithm": "shampoo", "factor": "direct"}
    made, model = plan_of(Described("llama_tiny"), 1, "ddp", None, **options)
    prediction = predict(model, made, ceilings_of("h100"), 4096)
    decomposed = prediction.counts["all"]["decompositions"]
    matrices = sum(n for name, n in decomposed.items() if "eigh" in name)
    assert not prediction.unknown
    assert prediction.optimizers["shampoo4bit"].worst > 1e-3 * matrices > 0
    made, model = plan_of(Described("llama_tiny"), 1, "ddp", None, **options, root="newton_db")
    with pytest.raises(OptionError, match="root=newton_db cannot be counted"):
        predict(model, made, ceilings_of("h100"), 4096)


def test_the_break_even_is_in_steps() -> None:
    optimizers = {"shampoo4bit": Seconds(3.0, 9.0, 4.0), "AdamW": Seconds(1.0, 1.0, 1.0)}
    found = Prediction("card", {}, 1, 0.4, True, model=7.0, optimizers=optimizers, counts={})
    assert found.share("shampoo4bit") == 0.3
    assert found.fewer_steps("AdamW") == pytest.approx(0.2)


def test_a_file_changes_numbers_and_adds_cards(tmp_path: Path) -> None:
    file = tmp_path / "cards.yaml"
    file.write_text('h100:\n  launch_us: [3, "mine"]\nmine:\n  like: h100\n  tbytes: [1, "mine too"]\n')
    assert ceilings_of("h100", file).launch == pytest.approx(3e-6)
    assert ceilings_of("h100", file).memory == ceilings_of("h100").memory
    mine = ceilings_of("mine", file)
    assert (mine.sources["tbytes"], mine.launch) == ("mine too", pytest.approx(3e-6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("h100:\n  speed: [1, x]\n", "unknown 'speed'"),
        ("h100:\n  tbytes: 3.35\n", r"h100.tbytes is 3.35; it must be \[a number above 0, its source\]"),
        ("h100:\n  tbytes: [0, x]\n", r"h100.tbytes is \[0, 'x'\]"),
        ("mine:\n  tbytes: [1, x]\n", "lacks tflops"),
        ("mine:\n  like: other\n", "is like 'other'"),
        ("- h100\n", "is not a mapping of cards"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "cards.yaml"
    file.write_text(content)
    with pytest.raises(OptionError, match=message):
        ceilings_of("mine" if content.startswith("mine") else "h100", file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "v100"], "--gpu 'v100' is not known; known: h100, h200, a100, b200, 4090"),
        (["--ceilings", "x.yaml"], "--ceilings x.yaml is for --gpu CARD"),
        (["--tokens-per-step", "9"], "--tokens-per-step 9 is for --gpu CARD"),
        (["--utilisation", ".5"], "--utilisation 0.5 is for --gpu CARD"),
        (["--seq_len", "9"], "--seq-len 9 is for --batch N"),
        (["--gradient_checkpointing"], "--gradient-checkpointing is for --batch N"),
        (["--gpu", "h100", "--ceilings", "none.yaml"], "none.yaml cannot be read"),
    ],
)
def test_bad_arguments_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        main(["llama_tiny", *arguments])


def test_the_model_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = estimate.build
    monkeypatch.setattr(estimate, "build", lambda *args: built.append(args) or build(*args))
    main(["llama_tiny", "--gpu", "h100", "--batch", "1", "--seq_len", "16"])  # an estimate of activations beside it
    assert len(built) == 1


def test_plan_predicts_and_says_that_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["llama_tiny", "--gpu", "h100", "--tokens-per-step", "4096", "--output_dir", str(tmp_path)])
    told = capsys.readouterr().out
    assert "A prediction for the NVIDIA H100 SXM5; nothing of it was measured there" in told
    assert "\nshampoo4bit is faster than AdamW, fused to the same loss if it needs " in told
    found = json.loads((tmp_path / "plan.json").read_text())["prediction"]
    ours, adamw = found["optimizers"]["shampoo4bit"], found["optimizers"]["AdamW, fused"]
    assert adamw["late"] < ours["late"] < ours["first"] < ours["worst"]
    assert 0 < found["fewer_steps"]["AdamW, fused"] < 1
    assert found["counts"]["late"]["launches"] < found["counts"]["all"]["launches"]
    assert found["sources"]["tbytes"] == "NVIDIA H100 data sheet"
