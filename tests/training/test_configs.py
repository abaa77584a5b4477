"""Every shipped configuration: it parses, its model builds, and its size is the one it is named for."""

import pytest
import torch

from hf_shampoo4.integrations.trainer import OPTIMS
from hf_shampoo4.options import PRESETS, Options, parse_optim_args
from hf_shampoo4.studies.grid import read_plan
from hf_shampoo4.training.config import config_root, read_config
from hf_shampoo4.training.model import ModelArguments, build_model, load_model_config
from hf_shampoo4.training.pretrain import parse

MODELS = sorted(path.stem for path in (config_root() / "models").glob("*.json"))
OPTIMIZERS = sorted((config_root() / "optimizers").glob("*.yaml"), key=lambda path: path.stem)
RUNS = sorted(path.stem for path in (config_root() / "train").glob("*.yaml"))

# Parameters with 32,000 tokens (LLaMA), 128,256 (LLaMA 3), 50,257 (GPT-2) and 4,096 (tiny).
# GaLore prints 58, 134, 368 and 1,339 million.
SIZES = {
    "llama_tiny": 1_840_256,
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
        model = build_model(arguments, load_model_config(arguments).vocab_size)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]


@pytest.mark.parametrize("name", RUNS)
def test_every_run_parses_and_its_model_is_long_enough(name):
    config = parse(name)
    model = load_model_config(config.model)
    assert model.max_position_embeddings >= config.data.seq_len
    assert config.training.optim == "shampoo4bit"
    assert config.training.output_dir == f"runs/{name}"


@pytest.mark.parametrize(
    ("name", "steps", "batch", "weight_decay", "options"),
    [
        ("llama_130m_c4", 20_000, 512, 0.0, "preset=paper_eigen,block_size=10000"),
        ("llama_350m_c4", 60_000, 512, 0.0, "preset=paper_eigen"),
        ("llama_1b_c4", 100_000, 512, 0.0, "preset=paper_eigen"),
        ("gpt2_124m_openwebtext", 60_000, 480, 0.1, "preset=paper_eigen"),
    ],
)
def test_the_papers_settings(name, steps, batch, weight_decay, options):
    training = parse(name).training
    assert training.max_steps == steps
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == batch
    assert training.weight_decay == weight_decay
    assert (training.learning_rate, training.adam_beta1, training.adam_beta2) == (1e-3, 0.9, 0.999)
    assert training.get_warmup_steps(steps) == steps // 10
    assert training.bf16
    assert training.optim_args == options


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
