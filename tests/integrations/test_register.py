"""--optim shampoo4bit in arguments: made, parsed, saved and read back; and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.training_args import OptimizerNames

import hf_shampoo4 as s4
from hf_shampoo4.integrations.trainer import OPTIMS, check_args
from tests.support.tiny import Tokens, arguments, llama, python


def test_importing_the_package_and_registering_import_nothing_heavy():
    child = python("-c", "import sys, hf_shampoo4; hf_shampoo4.register(); print(*sys.modules)")
    assert not {"torch", "transformers", "numpy", "yaml"} & set(child.stdout.split()), child.stderr


def test_registering_again_changes_nothing():
    before = list(OptimizerNames), list(DEFAULT_CALLBACKS), Trainer.get_optimizer_cls_and_kwargs
    s4.register()
    assert before == (list(OptimizerNames), list(DEFAULT_CALLBACKS), Trainer.get_optimizer_cls_and_kwargs)
    assert len(set(OptimizerNames)) == len(OptimizerNames)


@pytest.mark.parametrize("name", OPTIMS)
def test_the_name_is_a_member_like_any_other(name, tmp_path):
    member = OptimizerNames(name)
    assert member in OptimizerNames
    assert member == name
    assert OptimizerNames[name.upper()] is getattr(OptimizerNames, name.upper()) is member
    args = arguments(tmp_path, optim=name)
    assert args.optim is member
    assert args.set_optimizer(name).optim is member
    assert name.upper() in str(args)
    assert copy.deepcopy(args).optim is copy.copy(args).optim is dataclasses.replace(args).optim is member


@pytest.mark.parametrize("name", OPTIMS)
def test_command_line_json_and_dict_are_parsed(name, tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--optim", name, "--optim_args", "bits=8, stats_every=2"]
    (args,) = parser.parse_args_into_dataclasses(words)
    assert args.optim is OptimizerNames(name)
    (tmp_path / "args.json").write_text(args.to_json_string())
    assert json.loads(args.to_json_string())["optim"] == name
    (again,) = parser.parse_json_file(str(tmp_path / "args.json"))
    assert again.optim is args.optim


def test_pickle_and_torch_save_keep_the_member(tmp_path):
    args = arguments(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(args, protocol)).optim is OptimizerNames("shampoo4bit")
    pure = io.BytesIO()
    pickle._Pickler(pure).dump(args)  # multiprocessing and cloudpickle use the pure Python one
    assert pickle.loads(pure.getvalue()).optim is args.optim


def test_saved_arguments_load_in_a_process_that_never_heard_of_us(tmp_path):
    torch.save(arguments(tmp_path), tmp_path / "training_args.bin")
    code = f"import torch; print(torch.load(r'{tmp_path / 'training_args.bin'}', weights_only=False).optim.value)"
    child = python("-c", code)
    assert child.stdout.split()[-1:] == ["shampoo4bit"], child.stderr


def test_sft_config(tmp_path):
    trl = pytest.importorskip("trl")
    assert trl.SFTConfig(output_dir=str(tmp_path), optim="shampoo4bit", use_cpu=True, bf16=False).optim == "shampoo4bit"


def test_hyper_parameters_come_from_the_arguments(tmp_path):
    args = arguments(
        tmp_path, learning_rate=3e-4, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7, weight_decay=0.1,
        optim_args=" block_size = 64 , moments=bf16",
    )  # fmt: skip
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, llama())
    assert [group["weight_decay"] for group in kwargs.pop("params")] == [0.1, 0.1, 0.1, 0.0]
    assert cls is s4.Shampoo4bit
    assert kwargs == {
        "lr": 3e-4, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1, "block_size": 64, "moments": "bf16"
    }  # fmt: skip


@pytest.mark.parametrize("registered", [True, False])
def test_a_trainer_that_says_itself_what_is_decayed_is_followed(tmp_path, registered):
    class Own(Trainer):
        def get_decay_parameter_names(self, model):
            return [name for name in super().get_decay_parameter_names(model) if "embed" not in name]

    args = arguments(tmp_path, weight_decay=0.1, optim="shampoo4bit" if registered else "adamw_torch", optim_args=None)
    for cls in (Own, Trainer):
        model = llama()
        trainer = cls(model, args, **({} if registered else s4.trainer_kwargs(model, args)))
        optimizer = trainer.create_optimizer()
        decayed = {id(p) for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 0.1}
        assert isinstance(optimizer, s4.Shampoo4bit)
        names = trainer.get_decay_parameter_names(model)
        assert decayed == {id(p) for name, p in model.named_parameters() if name in names}


def test_who_says_what_is_decayed_is_asked_for_our_optimizers_alone(tmp_path):
    class Silent(Trainer):
        def get_decay_parameter_names(self, model):
            raise AssertionError("nobody has asked for it")

    model = llama()
    given = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = Silent(model, arguments(tmp_path, optim="sgd", optim_args=None), optimizers=(given, None))
    assert trainer.create_optimizer() is given
    trainer = Trainer(model, arguments(tmp_path, optim="shampoo4bit", weight_decay=0.1))
    trainer.get_decay_parameter_names = lambda model: []
    assert {group["weight_decay"] for group in trainer.create_optimizer().param_groups} == {0.0}


def test_targets_without_a_model_are_refused(tmp_path):
    args = arguments(tmp_path, optim_target_modules=["mlp"])
    with pytest.raises(ValueError, match=r"optim_target_modules=\['mlp'\] needs the model"):
        Trainer.get_optimizer_cls_and_kwargs(args)


def test_the_base_alone_is_an_optimizer_of_its_own(tmp_path):
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="adamw4bit", optim_args="moments=fp32"))
    assert (kwargs["algorithm"], kwargs["moments"]) == ("elementwise", "fp32")
    assert "params" not in kwargs, "asked without a model"


def test_other_optimizers_are_untouched(tmp_path):
    cls, _ = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="sgd", optim_args=None), llama())
    assert cls is torch.optim.SGD
    Trainer(llama(), arguments(tmp_path, optim="sgd", optim_args="blok_size=1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blok_size=64", r"unknown option 'blok_size' \(did you mean 'block_size'\?\); valid options: algorithm, .*"),
        ("flag", "'flag' is not key=value"),
        ("block_size=big", "block_size='big' is not allowed: it must be an integer"),
        ("bits=5", "bits='5' is not allowed: it must be one of 4, 8, 32"),
        ("preset=papers", "unknown preset 'papers'; valid presets: paper_cholesky, paper_eigen, shampoo32"),
        ("config=/nowhere/options.yaml", "'/nowhere/options.yaml' cannot be read"),
    ],
)
def test_bad_optim_args_are_refused_when_the_trainer_is_made(tmp_path, text, message):
    args = arguments(tmp_path, optim_args=text)
    with pytest.raises(s4.OptionError, match=message):
        Trainer(llama(), args, train_dataset=Tokens())
    with pytest.raises(s4.OptionError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(args, llama())


def test_bad_options_of_trainer_kwargs_are_refused(tmp_path):
    with pytest.raises(s4.OptionError, match="unknown option 'blocksize'"):
        s4.trainer_kwargs(llama(), arguments(tmp_path), blocksize=64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, 'has an "optimizer" of its own, which would be used instead of hf_shampoo4'),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "offloads the optimizer to NVMe",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "would use DeepSpeedCPUAdam"),
    ],
)
def test_deepspeed_configurations_that_would_train_otherwise_are_refused(tmp_path, config, message):
    args = arguments(tmp_path)
    args.deepspeed_plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))  # of several processes
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(args, llama())
    with pytest.raises(ValueError, match=message):
        check_args(args)


def test_deepspeed_as_accelerate_launch_configures_it_is_looked_at_too(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    for name, value in (("USE_DEEPSPEED", "true"), ("DEEPSPEED_ZERO_STAGE", "2"),
                        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")):  # fmt: skip
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="would use DeepSpeedCPUAdam"):
        check_args(args)


def test_an_optimizer_that_takes_the_place_of_ours_is_refused(tmp_path):
    model = llama()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Tokens(),
                      optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))  # fmt: skip
    with pytest.raises(ValueError, match="--optim shampoo4bit was asked for, but SGD would train"):
        trainer.train()


def test_other_sharding_is_not_refused(tmp_path):
    args = arguments(tmp_path)
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    config = {**offload, "zero_force_ds_cpu_optimizer": False}
    args.deepspeed_plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))
    assert Trainer.get_optimizer_cls_and_kwargs(args, llama())[0] is s4.Shampoo4bit
