"""Options: casting, precedence, and messages that say what is allowed."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from hf_shampoo4 import Shampoo4bit, param_groups, plan, trainer_kwargs
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.integrations.trainer import optim_options
from hf_shampoo4.options import (
    CONFIG_ENV,
    NAMES,
    PRESETS,
    STRUCTURAL,
    Options,
    pairs_as_text,
    parse_optim_args,
    resolve,
    users_of,
)


def test_defaults_are_allowed_and_every_option_is_documented() -> None:
    Options()
    source = (Path(__file__).resolve().parents[2] / "hf_shampoo4" / "options" / "fields.py").read_text()
    for name in NAMES:
        line = next(i for i, text in enumerate(source.splitlines()) if text.startswith(f"    {name}: "))
        assert source.splitlines()[line + 1].strip().startswith('"""'), name
    assert set(STRUCTURAL) <= set(NAMES)
    users = [users for users, _ in itertools.groupby(NAMES, key=users_of)]
    assert len(users) == len(set(users)), "the fields stand in groups by the algorithms that use them"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_valid_and_cast(preset: str) -> None:
    resolved = resolve({}, preset=preset)
    assert resolved == PRESETS[preset]
    assert dataclasses.asdict(Options(**resolved)).items() >= resolved.items()


# ------------------------------------------------------------------------------------------------------- casting


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("bits", "8", 8),
        ("bits", 8.0, 8),
        ("algorithm", "elementwise", "elementwise"),
        ("block_size", "512", 512),
        ("block_size", 512.0, 512),
        ("damping", "1e-4", 1e-4),
        ("factor_beta", 0, 0.0),
        ("stochastic_rounding", "true", True),
        ("stochastic_rounding", "False", False),
        ("stochastic_rounding", "1", True),
        ("stochastic_rounding", 0, False),
        ("stochastic_rounding", "no", False),
        ("row_splits", "64;32;32", (64, 32, 32)),
        ("row_splits", "64", (64,)),
        ("row_splits", "", ()),
        ("row_splits", [64, "32"], (64, 32)),
        ("seed", "12345678901", 12345678901),
        ("rates", "embedding:6;head:2", (("embedding", 6.0), ("head", 2.0))),
        ("rates", {"head": 2, "embedding": "6"}, (("embedding", 6.0), ("head", 2.0))),
        ("rates", [["head", 2]], (("head", 2.0),)),  # of a checkpoint that went through torch's full state dict
        ("rates", {}, ()),
    ],
)
def test_casting(name: str, text: object, value: object) -> None:
    cast = resolve({name: text})[name]
    assert cast == value
    assert type(cast) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 5}, "option bits=5 is not allowed: it must be one of 4, 8, "),
        ({"bits": "four"}, "option bits='four' is not allowed: it must be one of 4, 8, "),
        ({"bits": True}, "option bits=True is not allowed"),
        ({"bits": None}, "option bits=None is not allowed"),
        ({"algorithm": "adam"}, "option algorithm='adam' is not allowed: it must be one of shampoo, "),
        ({"moments": "16bit"}, "it must be one of fp32, bf16, "),
        ({"block_size": "1k"}, "option block_size='1k' is not allowed: it must be an integer"),
        ({"block_size": 512.5}, "option block_size=512.5 is not allowed: it must be an integer"),
        ({"block_size": True}, "option block_size=True is not allowed: it must be an integer"),
        ({"block_size": [1]}, "it must be an integer"),
        ({"block_size": float("inf")}, "it must be an integer"),
        ({"block_size": 0}, "option block_size=0 is not allowed: it must be an integer >= 1"),
        ({"quant_block": -1}, "option quant_block=-1 is not allowed: it must be an integer >= 0"),
        ({"stats_every": 0}, "option stats_every=0 is not allowed"),
        ({"algorithm": "shampoo", "roots_every": 0}, "option roots_every=0 is not allowed"),
        ({"rectify_stats": -1}, "option rectify_stats=-1 is not allowed: it must be an integer >= 0"),
        ({"algorithm": "shampoo", "rectify_roots": -1}, "option rectify_roots=-1 is not allowed"),
        ({"seed": -1}, "option seed=-1 is not allowed"),
        ({"factor_beta": 1.0}, r"option factor_beta=1.0 is not allowed: it must be a number in \[0, 1\)"),
        ({"factor_beta": -0.1}, "option factor_beta=-0.1 is not allowed"),
        ({"factor_beta": "nan"}, "option factor_beta=nan is not allowed"),
        ({"factor_beta": True}, "option factor_beta=True is not allowed: it must be a number"),
        ({"damping": 0}, r"option damping=0.0 is not allowed: it must be a number in \(0, 1\)"),
        ({"damping": "small"}, "option damping='small' is not allowed: it must be a number"),
        ({"stochastic_rounding": "maybe"}, "option stochastic_rounding='maybe' is not allowed: it must be true or"),
        ({"stochastic_rounding": 2}, "option stochastic_rounding=2 is not allowed"),
        ({"row_splits": "64;x"}, "option row_splits='64;x' is not allowed: it must be sizes such as 64;32;32"),
        ({"row_splits": 64}, "option row_splits=64 is not allowed: it must be sizes"),
        (
            {"rates": {"embeding": 6}},
            "option rates={'embeding': 6.0} is not allowed: it must be numbers > 0 by kind, such",
        ),
        ({"rates": "embedding:0"}, "option rates={'embedding': 0.0} is not allowed: it must be numbers > 0 by kind"),
        ({"rates": "embedding:inf"}, "rates={'embedding': inf} is not allowed"),
        ({"rates": "embedding:nan"}, "rates={'embedding': nan} is not allowed"),
        ({"rates": "head:2;head:3"}, "rates={'head': 3.0} is not allowed"),
        (
            {"rates": "embedding"},
            "option rates='embedding' is not allowed: it must be numbers by kind, such as embedding:6;",
        ),
        (
            {"stochastic_last": 0.1, "stochastic_from": 5},
            "option stochastic_from=5 is not allowed: it must be 0 beside stochastic_last=0.1,",
        ),
        ({"rates": 6}, "option rates=6 is not allowed: it must be numbers by kind"),
        ({"rates": {"head": None}}, "is not allowed: it must be numbers by kind"),
        ({"kind": "bias"}, "option kind='bias' is not allowed: it must be one of any, embedding, head, matrix, vector"),
        ({"row_splits": [64, 0]}, r"option row_splits=\(64, 0\) is not allowed: it must be positive sizes"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve(given)


def test_an_unknown_option_lists_the_valid_ones_and_guesses() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'block_sise' .did you mean 'block_size'") as caught:
        resolve({"block_sise": 64})
    assert all(name in str(caught.value) for name in (*NAMES, "preset", "config"))
    with pytest.raises(OptionError, match=f"unknown option 'zzz'; valid options: {', '.join(NAMES)}"):
        resolve({"zzz": 1})


def test_an_option_error_is_a_value_error() -> None:
    assert issubclass(OptionError, ValueError)


def test_an_unknown_preset_lists_the_valid_ones() -> None:
    with pytest.raises(OptionError, match=f"unknown preset 'papr'; valid presets: {', '.join(sorted(PRESETS))}"):
        resolve({}, preset="papr")
    with pytest.raises(OptionError, match="unknown preset ''"):
        resolve({"preset": ""})


# ---------------------------------------------------------------------------------------------------- precedence


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "options.yaml"
    path.write_text("preset: paper_eigen\nblock_size: 256\nrow_splits: [8, 8]\ndamping: '1e-4'\n")
    return str(path)


def test_explicit_over_file_over_preset(config: str) -> None:
    found = resolve({"block_size": "128", "config": config})
    assert found == {**PRESETS["paper_eigen"], "block_size": 128, "row_splits": (8, 8), "damping": 1e-4}
    assert resolve({}, config=config)["block_size"] == 256
    assert resolve({"preset": "shampoo32"}, config=config)["factor"] == "direct"
    assert resolve({}) == {}


@pytest.mark.parametrize("factor", ["direct", "cholesky", "cholesky_ef", "eigen"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_another_factor_than_the_presets(preset: str, factor: str) -> None:
    found = Options(**resolve({"factor": factor}, preset=preset))
    assert (found.algorithm, found.factor, found.stats_every) == ("shampoo", factor, 200)


@pytest.mark.parametrize("algorithm", ["kl_shampoo", "soap"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_another_algorithm_than_the_presets(preset: str, algorithm: str) -> None:
    found = Options(**resolve({"algorithm": algorithm}, preset=preset))
    assert (found.algorithm, found.stats_every) == (algorithm, 200)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"graft": "norm"}, "graft has no effect with algorithm=kl_shampoo: remove it, or add algorithm=shampoo"),
        ({"roots_every": 10}, "roots_every has no effect with algorithm=kl_shampoo: "),
        ({"factor": "eigen", "algorithm": "soap"}, "factor has no effect with algorithm=soap: "),
        ({"base": "adamw"}, "base has no effect with algorithm=kl_shampoo: .* add algorithm=shampoo or elementwise"),
        ({"refresh_warmup": 5, "algorithm": "shampoo"}, "add algorithm=soap or kl_shampoo or kl_soap"),
        ({"root": "eigh", "algorithm": "elementwise"}, "root has no effect with algorithm=elementwise: "),
        (
            {"stats_every": 10, "algorithm": "elementwise"},
            "stats_every has no effect with .* add .*=shampoo",
        ),
        (
            {"rotation_precision": "tf32", "algorithm": "shampoo"},
            "has no effect with .* add algorithm=soap",
        ),
        ({"error_beta": 0.7, "algorithm": "shampoo"}, "error_beta has no effect with factor=eigen: .* add factor=chol"),
        ({"rectify_roots": 4, "factor": "direct", "preset": "paper_eigen"}, "no effect with factor=direct"),
        ({"codebook": "dynamic", "bits": 32}, "codebook has no effect with bits=32: remove it, or add bits=4 or 8"),
        ({"quant_block": 0, "bits": 32, "algorithm": "shampoo"}, "quant_block has no effect with bits=32: "),
        ({"rectify_stats": 2, "bits": 32, "algorithm": "soap"}, "rectify_stats has no effect with bits=32: "),
        ({"rectify_roots": 4, "bits": 32, "preset": "paper_eigen"}, "rectify_roots has no effect with bits=32: "),
        ({"oblong": 3, "sides": "short"}, "oblong has no effect with sides=short: remove it, or add sides=auto"),
        ({"vocabulary_beta": 0.9, "embeddings": "elementwise"}, "vocabulary_beta has no effect with embeddings=elem"),
    ],
)
def test_no_option_changes_the_algorithm_and_none_is_without_effect(given: dict[str, Any], message: str) -> None:
    """Whatever its value: who writes a default down must not get another optimizer."""
    with pytest.raises(OptionError, match=message):
        resolve(given)


@pytest.mark.parametrize(
    "chosen", [{"factor": "direct"}, {"bits": 32}, {"algorithm": "kl_shampoo"}, {"algorithm": "elementwise"}]
)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_of_a_preset_what_the_explicit_choice_does_not_use_is_left_out(preset: str, chosen: dict[str, Any]) -> None:
    """The Trainer resolves twice: what the first time has left is no explicit option without effect."""
    found = resolve(chosen, preset=preset)
    assert resolve(found) == found
    assert found.items() >= chosen.items()


def test_a_group_of_another_algorithm_does_not_have_the_optimizers_base() -> None:
    p, q = torch.nn.Parameter(torch.zeros(64, 64)), torch.nn.Parameter(torch.zeros(64, 64))
    other = {"params": [q], "algorithm": "kl_shampoo", "moments": "4bit_zipsr"}  # which has no place over sgdm
    first, second = Shampoo4bit([{"params": [p]}, other], algorithm="shampoo", base="sgdm").param_groups
    assert (first["base"], second["base"]) == ("sgdm", "adamw")


def test_a_whole_group_of_another_optimizer_is_taken() -> None:
    p = torch.nn.Parameter(torch.zeros(64, 64))
    (group,) = Shampoo4bit([p]).param_groups
    (again,) = Shampoo4bit([{**group}]).param_groups
    assert {name: again[name] for name in NAMES} == {name: group[name] for name in NAMES}


def test_a_group_with_another_factor_than_the_optimizers() -> None:
    p, q = torch.nn.Parameter(torch.zeros(64, 64)), torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Shampoo4bit([p], preset="paper_eigen")
    optimizer.add_param_group({"params": [q], "factor": "cholesky"})
    first, second = optimizer.param_groups
    assert (first["factor"], second["factor"], second["stats_every"]) == ("eigen", "cholesky", 200)


@pytest.mark.parametrize(
    "ours", [{"algorithm": "shampoo"}, {"algorithm": "shampoo", "factor": "cholesky"}, {"algorithm": "elementwise"}]
)
def test_a_group_of_another_algorithm_than_the_optimizers(ours: dict[str, Any]) -> None:
    """What the optimizer was told for its own algorithm is not the group's business."""
    p, q = torch.nn.Parameter(torch.zeros(64, 64)), torch.nn.Parameter(torch.zeros(64, 64))
    told = {"refresh_warmup": 0, "vocabulary_beta": 0.9}
    optimizer = Shampoo4bit([{"params": [p], **ours}, {"params": [q]}], **told)
    first, second = optimizer.param_groups
    assert first["algorithm"] == ours["algorithm"]
    assert (second["algorithm"], second["refresh_warmup"], second["vocabulary_beta"]) == ("kl_shampoo", 0, 0.9)


def test_what_is_left_to_the_base_by_rule_is_not_refused_for_its_neighbours_options() -> None:
    model = torch.nn.Sequential(torch.nn.Conv1d(8, 72, 9), torch.nn.Linear(8, 8))
    groups = param_groups(model)
    options = {"stats_every": 20, "bits": 8, "sides": "both"}
    assert [group["algorithm"] for group in Shampoo4bit(groups, **options).param_groups][-1] == "elementwise"
    alone = Shampoo4bit(param_groups(model), algorithm="elementwise", moments="4bit_eden")
    with pytest.raises(OptionError, match="has no effect with algorithm=elementwise: remove it, or add "):
        alone.add_param_group({"params": [torch.nn.Parameter(torch.zeros(8, 8))], **options})
    assert {o["matrix_view"] for o in alone.param_groups} == {"auto", "flatten"}  # which says what a tensor is


def test_what_the_usual_block_and_levels_are() -> None:
    for algorithm, bits, block, codebook in (
        ("kl_shampoo", 4, 16, "lloyd16"), ("soap", 4, 16, "lloyd16"), ("kl_soap", 8, 16, "linear2"),
        ("shampoo", 4, 64, "linear2"),
    ):  # fmt: skip
        options = Options(algorithm=algorithm, bits=bits)
        assert (options.factor_block, options.factor_codebook) == (block, codebook)
    assert Options(quant_block=32).factor_block == 32


def test_presets_are_not_changed_by_use(config: str) -> None:
    before = {name: dict(options) for name, options in PRESETS.items()}
    resolve({"block_size": 3}, preset="paper_eigen", config=config)
    assert before == PRESETS


# --------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"bits: [", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- bits\n- 4\n", "must map option names to values, not list"),
        (b"just text\n", "must map option names to values, not str"),
        (b"bitz: 4\n", "unknown option 'bitz' .did you mean 'bits'"),
        (b"bits: 5\n", "option bits=5 is not allowed"),
        (b"bits: {a: 1}\n", "option bits={'a': 1} is not allowed"),
        (b"config: other.yaml\n", "an options file cannot name another one"),
        (b"preset: nope\n", "unknown preset 'nope'"),
    ],
)
def test_malformed_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "options.yaml"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        resolve({}, config=str(path))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"options file .*absent.yaml' cannot be read: No such file"):
        resolve({"config": str(tmp_path / "absent.yaml")})
    with pytest.raises(OptionError, match="cannot be read: Is a directory"):
        resolve({"config": str(tmp_path)})


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("# nothing\n")
    assert resolve({}, config=str(path)) == {}


# ---------------------------------------------------------------------------------------------------- optim_args


def test_optim_args(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_optim_args("block_size=512,stats_every=20") == {"block_size": 512, "stats_every": 20}
    assert parse_optim_args(" block_size = 512 , row_splits=8;8 ,") == {"block_size": 512, "row_splits": (8, 8)}
    assert parse_optim_args({"bits": "8"}) == {"bits": 8}
    assert parse_optim_args(None) == parse_optim_args("") == {}
    assert parse_optim_args(f"config={config},bits=8")["block_size"] == 256
    monkeypatch.setenv(CONFIG_ENV, config)
    assert parse_optim_args("bits=8")["block_size"] == 256
    assert parse_optim_args("config=,bits=8") == {"bits": 8}  # an empty one switches the environment's off


@pytest.mark.parametrize(
    "text", ["rates=embedding:6;head:2,seed=1", "seed=1,rates = embedding:6, head:2", "rates=head:2,embedding:6,seed=1"]
)
def test_factors_by_kind_may_have_commas_too(text: str) -> None:
    assert parse_optim_args(text) == {"rates": (("embedding", 6.0), ("head", 2.0)), "seed": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betas=0.9;0.99", "in the Trainer --adam_beta1 and --adam_beta2"),
        ("lr=1e-3", "in the Trainer --learning_rate"),
        ("kind=head", "for a parameter group"),
        ("vocabulary=true", "for a parameter group"),
    ],
)
def test_what_is_no_choice_of_optim_args_is_said_to_belong_elsewhere(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_optim_args(text)


@pytest.mark.parametrize(("name", "value"), [("kind", "head"), ("vocabulary", True), ("vocabulary", False)])
def test_what_param_groups_sets_is_refused_wherever_the_options_are_for_all_groups(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file too: each group has its own, which would win in silence, or matrices would become vocabularies."""
    file = tmp_path / "options.yaml"
    file.write_text(f"block_size: 64\n{name}: {str(value).lower()}\n")
    model = torch.nn.Linear(8, 8)
    message = f"option {name} is for a parameter group, not for all: .* remove it here \\(or from the options file"
    with pytest.raises(OptionError, match=message):
        parse_optim_args(f"config={file}")
    monkeypatch.setenv(CONFIG_ENV, str(file))
    with pytest.raises(OptionError, match=message):
        optim_options("soap4bit", "bits=8")
    monkeypatch.delenv(CONFIG_ENV)
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    for options in ({name: value}, {"config": str(file)}):
        with pytest.raises(OptionError, match=message):
            trainer_kwargs(model, args, **options)
        with pytest.raises(OptionError, match=message):
            plan(model, **options)
    Shampoo4bit([{"params": list(model.parameters())}], config=str(file))  # whose groups have none of their own


def test_a_mapping_means_what_its_text_does() -> None:
    given = {"rates": {"embedding": 6, "head": 2}, "row_splits": [4, 2], "stagger": False, "block_size": 16}
    assert parse_optim_args(pairs_as_text(given)) == parse_optim_args(given)


@pytest.mark.parametrize("text", ["seed=1,head:2", "block_size", "bits=4,flag", "row_splits=64,32,32"])
def test_an_item_without_a_value(text: str) -> None:
    with pytest.raises(OptionError, match=r"is not key=value .lists use ';'"):
        parse_optim_args(text)


def test_a_value_with_an_equals_sign_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "a=b.yaml"
    path.write_text("bits: 8")
    assert parse_optim_args(f"config={path}") == {"bits": 8}


def test_an_unknown_key_lists_the_valid_ones() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'blocksize' .did you mean 'block_size'.*; valid options: "):
        parse_optim_args("blocksize=64")
