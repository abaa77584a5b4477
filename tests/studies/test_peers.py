"""Every contestant's optimizer takes a learning rate for each kind of parameter, by one mechanism."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.groups import param_groups
from hf_shampoo4.studies.peers import PEERS, code_of, optimizer_of
from tests.support.tiny import Tokens, arguments, llama

RATES = {"embedding": 8.0, "head": 4.0, "vector": 0.5}
NAMED = [
    {"optim": "adamw_torch_fused"}, {"optim": "adamw4bit"}, {"optim": "shampoo4bit"},
    *({"peer": name} for name in PEERS),
]  # fmt: skip


def made(settings: dict[str, Any], tmp_path, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    package = PEERS[settings["peer"]].package if "peer" in settings else "torch"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    args = arguments(tmp_path, optim=settings.get("optim", "adamw_torch"), optim_args=None, learning_rate=1e-2, **more)
    chosen, kwargs = optimizer_of({**settings, "rates": RATES})(model, args)
    return chosen(**kwargs)


@pytest.mark.parametrize("settings", NAMED, ids=str)
def test_a_kind_has_its_rate_and_its_parameters_move_by_it(settings: dict[str, Any], tmp_path) -> None:
    model = llama()
    kinds = {id(p): group["kind"] for group in param_groups(model) for _, p in group["params"]}
    optimizer = made(settings, tmp_path, model)
    seen = set()
    for group in optimizer.param_groups:
        (kind,) = {kinds[id(p)] for p in group["params"]}
        assert group["lr"] == 1e-2 * RATES.get(kind, 1.0)
        seen |= {id(p) for p in group["params"]}
    assert seen == set(kinds), "every parameter is in a group"


def test_a_schedule_multiplies_every_kinds_rate(tmp_path) -> None:
    args = arguments(tmp_path, max_steps=4, lr_scheduler_type="linear", learning_rate=1e-2)
    model = llama()
    trainer = Trainer(
        model,
        args,
        train_dataset=Tokens(),
        optimizer_cls_and_kwargs=optimizer_of({"optim": "adamw_torch_fused", "rates": RATES})(model, args),
    )
    trainer.create_optimizer_and_scheduler(4)
    before = [group["lr"] for group in trainer.optimizer.param_groups]
    trainer.train()
    assert trainer.state.global_step == 4
    assert len(set(before)) == 4
    assert all(group["lr"] == 0 for group in trainer.optimizer.param_groups)


def test_one_rate_is_what_the_trainer_itself_makes(tmp_path) -> None:
    def trained(optimizer: Any) -> dict[str, torch.Tensor]:
        model = llama()
        args = arguments(tmp_path, optim="adamw_torch_fused", optim_args=None, max_steps=2, weight_decay=0.1)
        Trainer(
            model, args, train_dataset=Tokens(), optimizer_cls_and_kwargs=optimizer and optimizer(model, args)
        ).train()
        return model.state_dict()

    ours, theirs = trained(optimizer_of({"optim": "adamw_torch_fused"})), trained(None)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_torchaos_block_size_is_a_number(tmp_path) -> None:
    """transformers 5.23 hands it the text of optim_args."""
    pytest.importorskip("torchao.optim")
    args = arguments(tmp_path, optim="adamw_torch_4bit", optim_args="block_size=128")
    chosen, kwargs = optimizer_of({"optim": "adamw_torch_4bit"})(llama(), args)
    assert kwargs["block_size"] == 128
    chosen(**kwargs)


def test_a_strange_kind_or_peer_is_refused() -> None:
    with pytest.raises(ConfigError, match="rates has no kind 'bias'; kinds are embedding, head, matrix, vector"):
        optimizer_of({"rates": {"bias": 2}})
    with pytest.raises(ConfigError, match="there is no peer 'moon'; there are: muon"):
        optimizer_of({"peer": "moon"})


def test_the_code_of_a_run_is_that_of_its_optimizer() -> None:
    assert "hf_shampoo4" in code_of({"optim": "adamw4bit"})
    assert "hf_shampoo4" not in code_of({"optim": "adamw_torch_fused"})
    assert {"pytorch_optimizer", "muon"} <= set(code_of({"peer": "muon"}))
    assert "bitsandbytes" in code_of({"optim": "adamw_bnb_8bit"})
