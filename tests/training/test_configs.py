"""Every shipped configuration: it parses, its model builds, and its size is the one it is named for."""

import json
from dataclasses import replace

import pytest
import torch

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.integrations.trainer import OPTIMS
from hf_shampoo4.options import PRESETS, Options, parse_optim_args, resolve
from hf_shampoo4.studies.grid import read_plan
from hf_shampoo4.training.arguments import ModelArguments
from hf_shampoo4.training.config import config_root, read_config
from hf_shampoo4.training.model import build_model, load_model_config
from hf_shampoo4.training.pretrain import parse
from tests.support.tiny import ROOT

MODELS = sorted(path.stem for path in (config_root() / "models").glob("*.json"))
OPTIMIZERS = sorted((config_root() / "optimizers").glob("*.yaml"), key=lambda path: path.stem)
RUNS = sorted(path.stem for path in (config_root() / "train").glob("*.yaml"))

# Parameters with 32,000 tokens (LLaMA), 128,256 (LLaMA 3), 50,257 (GPT-2) and 4,096 (tiny).
# GaLore prints 58, 134, 368 and 1,339 million.
SIZES = {
    "llama_tiny": 1_840_256,
    "mixtral_tiny": 2_117_472,
    "bert_tiny": 1_767_936,
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
    "llama_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_405b": 405_853_388_800,
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
}


def test_every_model_is_known_here():
    assert set(MODELS) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_model_sizes(name):
    arguments = ModelArguments(model=name)
    with torch.device("meta"):
        model = build_model(arguments, load_model_config(arguments).vocab_size, masked=name == "bert_tiny")
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]


@pytest.mark.parametrize("name", RUNS)
def test_every_run_parses_and_its_model_is_long_enough(name):
    config = parse(name)
    model = load_model_config(config.model)
    assert model.max_position_embeddings >= config.data.seq_len
    assert config.training.optim == "shampoo4bit"
    assert config.training.output_dir == f"runs/{name}"


PAPERS = {
    "llama_130m_c4_paper": (20_000, 512, 0.0, "preset=paper_eigen,block_size=10000"),
    "llama_350m_c4_paper": (60_000, 512, 0.0, "preset=paper_eigen"),
    "llama_1b_c4_paper": (100_000, 512, 0.0, "preset=paper_eigen"),
    "gpt2_124m_openwebtext_paper": (60_000, 480, 0.1, "preset=paper_eigen"),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_settings(name):
    steps, batch, weight_decay, options = PAPERS[name]
    training = parse(name).training
    assert training.max_steps == steps
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == batch
    assert training.weight_decay == weight_decay
    assert (training.learning_rate, training.adam_beta1, training.adam_beta2) == (1e-3, 0.9, 0.999)
    assert training.get_warmup_steps(steps) == steps // 10
    assert training.bf16
    assert training.optim_args == options


@pytest.mark.parametrize("name", RUNS)
def test_the_papers_optimizer_is_named_so_and_every_other_run_has_the_default_one(name):
    options = Options(**resolve(parse_optim_args(parse(name).training.optim_args or "")))
    assert (options.algorithm == "shampoo") == name.endswith("_paper") == (name in PAPERS)
    assert name in PAPERS or replace(options, rates=()) == Options()


@pytest.mark.parametrize("name", PAPERS)
def test_beside_a_papers_settings_is_the_same_run_with_twice_the_rate_that_it_gave_adamw(name):
    paper, ours = parse(name).training, parse(name.removesuffix("_paper")).training
    assert ours.learning_rate == 2 * paper.learning_rate
    for same in ("max_steps", "per_device_train_batch_size", "lr_scheduler_type", "bf16", "seed"):
        assert getattr(ours, same) == getattr(paper, same), same


@pytest.mark.parametrize("name", ["stdlib_tiny", "gpt_stdlib_tiny"])
def test_a_tiny_run_has_the_rates_that_the_race_found_best(name):
    race = json.loads((ROOT / "docs" / "results" / "race" / "tiny_stdlib.json").read_text())
    best = race["contestants"]["shampoo4bit"]["point"]
    training = parse(name).training
    assert training.learning_rate == best["learning_rate"]
    assert dict(parse_optim_args(training.optim_args)["rates"]) == best["rates"]


def test_a_file_is_laid_over_the_one_that_it_is_like(tmp_path):
    (tmp_path / "mine.yaml").write_text("like: base.yaml\nseed: 1\n")
    (tmp_path / "base.yaml").write_text("like: stdlib_tiny\nseed: 2\nmax_steps: 3\n")
    expected = {**read_config("stdlib_tiny"), "seed": 1, "max_steps": 3}
    assert read_config(tmp_path / "mine.yaml") == expected
    (tmp_path / "base.yaml").write_text("like: mine.yaml")
    with pytest.raises(ConfigError, match=r"`like: mine.yaml` leads back to 'mine.yaml'"):
        read_config(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("like: nowhere")
    with pytest.raises(ConfigError, match="config 'nowhere' does not exist; allowed: a YAML file, or one of "):
        read_config(tmp_path / "mine.yaml")


def test_the_demo_parses():
    plan = read_plan()
    for name, own in plan["optims"].items():
        settings = {key: value for key, value in own.items() if key not in ("label", "rates")}
        parse({**plan["common"], **plan["quick"], "optim": name, **settings})


def test_shipped_configurations_are_found_by_name():
    assert read_config("stdlib_tiny") == read_config(config_root() / "train" / "stdlib_tiny.yaml")


@pytest.mark.parametrize("path", OPTIMIZERS, ids=lambda path: path.stem)
def test_every_options_file_goes_into_optim_args(path):
    chosen = parse_optim_args(f"config={path}")
    assert chosen
    if path.stem in PRESETS:
        assert chosen == PRESETS[path.stem]


@pytest.mark.parametrize("name", OPTIMS)
def test_every_optimizer_has_a_file_that_is_its_default(name):
    chosen = parse_optim_args(f"config={config_root() / 'optimizers' / f'{name}.yaml'}")
    assert Options(**{**OPTIMS[name], **chosen}) == Options(**OPTIMS[name])


def test_every_preset_has_a_file_and_the_template_is_the_default():
    assert set(PRESETS) <= {path.stem for path in OPTIMIZERS}
    template = parse_optim_args(f"config={config_root() / 'optimizers' / 'shampoo4bit.yaml'}")
    assert Options(**template) == Options()


def test_a_name_that_is_nearly_a_presets_is_answered_with_it(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="did you mean the preset llama3_8b"):
        load_model_config(ModelArguments(model="meta-llama/Llama-3.1-8B"))
