"""`rates`: factors on the learning rate by kind of parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_shampoo4 import OptionError, Shampoo4bit, param_groups
from hf_shampoo4.exceptions import CheckpointError
from hf_shampoo4.state_report import table
from tests.support.tiny import Tokens, arguments, llama

ALL = {"embedding": 6.0, "head": 2.0, "matrix": 0.5, "vector": 3.0}


def one_step(rates: Any, by_lr: bool = False, **options: Any) -> dict[str, torch.Tensor]:
    """How far each parameter moved; the factors as the option, or multiplied into the groups' own rates."""
    model = llama()
    groups = param_groups(model, 0.1)
    if by_lr:
        groups = [{**group, "lr": 1e-2 * rates[group["kind"]]} for group in groups]
    optimizer = Shampoo4bit(groups, lr=1e-2, **options, **({} if by_lr else {"rates": rates}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("algorithm", ["kl_shampoo", "soap", "shampoo", "elementwise"])
def test_a_factor_is_a_rate_of_the_groups_own(algorithm: str) -> None:
    moved, wanted = one_step(ALL, algorithm=algorithm), one_step(ALL, by_lr=True, algorithm=algorithm)
    assert all(torch.equal(moved[name], wanted[name]) for name in wanted)


def test_kinds_that_are_not_named_keep_the_rate() -> None:
    moved, plain = one_step({"embedding": 8}), one_step({})
    for name, wanted in plain.items():
        factor = 8 if name == "model.embed_tokens.weight" else 1
        torch.testing.assert_close(moved[name], factor * wanted, rtol=1e-4, atol=1e-7)


def test_schedulers_keep_to_the_base_rate() -> None:
    optimizer = Shampoo4bit(param_groups(llama()), lr=1e-2, rates=ALL)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3}
    assert scheduler.get_last_lr()[0] == 5e-3


def test_parameters_of_an_unknown_kind_are_refused() -> None:
    model = llama()
    with pytest.raises(OptionError, match=r"rates={'head': 2.0} .*param_groups\(model\).*`kind`, one of embedding"):
        Shampoo4bit(model.parameters(), rates={"head": 2})
    Shampoo4bit(model.parameters(), rates={"head": 1})
    optimizer = Shampoo4bit([{"params": model.model.parameters(), "kind": "matrix"}], rates={"head": 2})
    with pytest.raises(OptionError, match="needs parameter groups of one kind each"):
        optimizer.add_param_group({"params": model.lm_head.parameters()})
    optimizer.add_param_group({"params": model.lm_head.parameters(), "kind": "head"})


def test_factors_come_from_the_checkpoint_as_the_rate_does_and_kinds_do_not() -> None:
    written = Shampoo4bit(param_groups(llama()), lr=1e-2, rates=ALL).state_dict()
    fresh = Shampoo4bit(param_groups(llama()), lr=1e-3)
    fresh.load_state_dict(written)
    assert [(dict(g["rates"]), g["lr"]) for g in fresh.param_groups] == [(ALL, 1e-2)] * 4
    for group in written["param_groups"]:  # of before there were kinds
        del group["kind"], group["rates"]
    fresh.load_state_dict(written)
    assert [g["kind"] for g in fresh.param_groups] == ["matrix", "embedding", "head", "vector"]
    assert {g["rates"] for g in fresh.param_groups} == {()}


def test_factors_for_kinds_that_are_unknown_here_are_refused() -> None:
    named = [{"params": [nn.Parameter(torch.zeros(8, 8))], "kind": "matrix"}]
    written = Shampoo4bit(named, rates={"matrix": 2}).state_dict()
    with pytest.raises(CheckpointError, match=r"the checkpoint was written with rates={'matrix': 2.0} needs"):
        Shampoo4bit([nn.Parameter(torch.zeros(8, 8))]).load_state_dict(written)


@pytest.mark.parametrize("optim", ["shampoo4bit", "adamw4bit"])
def test_through_the_trainer_with_the_base_rate_in_its_logs(tmp_path, capsys, optim: str) -> None:
    args = arguments(
        tmp_path, optim=optim, optim_args="rates=embedding:6,head:2", max_steps=2, logging_steps=1, learning_rate=1e-3,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(llama(), args, train_dataset=Tokens())
    trainer.train()
    assert {log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log} == {1e-3}
    titles = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert {"embedding, rate x6", "output head, rate x2", "linear layer"} <= set(titles)


def test_the_table_shows_the_factor_of_each_kind() -> None:
    text = table(Shampoo4bit(param_groups(llama(tie_word_embeddings=True)), rates=ALL))
    titles = [line.rpartition(": ")[2] for line in text.splitlines()]
    assert {"embedding, rate x6", "linear layer, rate x0.5"} <= set(titles)


@pytest.mark.parametrize("algorithm", ["kl_shampoo", "soap", "shampoo", "elementwise"])
def test_updates_have_adamws_root_mean_square_whatever_the_shape(algorithm: str) -> None:
    """Muon needs a factor from the shape for that (.2 sqrt(max(m, n)), 2502.16982); these algorithms need none."""
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.zeros(shape)) for shape in ((32, 32), (128, 32), (32, 128), (256, 64))]
    optimizer = Shampoo4bit(matrices, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0, algorithm=algorithm)
    squares = torch.zeros(len(matrices))
    for step in range(30):
        before = [p.detach().clone() for p in matrices]
        for p in matrices:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        if step >= 20:
            moved = [(p.detach() - old).square().mean() for p, old in zip(matrices, before, strict=True)]
            squares += torch.stack(moved) / 10
    of_noise = ((1 - 0.9) / (1 + 0.9)) ** 0.5  # a moving average of independent entries of 1
    assert squares.sqrt().tolist() == pytest.approx([of_noise] * len(matrices), rel=0.1)
