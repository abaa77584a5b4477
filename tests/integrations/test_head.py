"""The output head's first moment in the last part of training, through the Trainer."""

from __future__ import annotations

import pytest
from transformers import Trainer

from hf_shampoo4 import Shampoo4bit, param_groups, trainer_kwargs
from tests.support.tiny import Tokens, arguments, llama


def trained(tmp_path, optim_args: str, model=None, made=Trainer, times: int = 1, **changes) -> Shampoo4bit:
    args = arguments(tmp_path, optim="adamw4bit", optim_args=optim_args, **changes)
    trainer = made(model or llama(), args, train_dataset=Tokens())
    for _ in range(times):
        trainer.train()
    return trainer.optimizer.optimizer


def by_name(optimizer: Shampoo4bit) -> dict[str, int]:
    """Parameter name -> the step from which its first moment is rounded stochastically."""
    return {name: g["stochastic_from"] for i, g in enumerate(optimizer.param_groups) for name in optimizer.names(i)}


@pytest.mark.parametrize("moments", ["4bit_eden", "4bit_zipsr"])
def test_the_heads_last_tenth(tmp_path, moments: str) -> None:
    steps = by_name(trained(tmp_path, f"moments={moments}", max_steps=20))
    assert steps.pop("lm_head.weight") == 19  # steps 19 and 20
    assert set(steps.values()) == {0}


def test_epochs_are_counted_in_steps(tmp_path) -> None:
    steps = by_name(trained(tmp_path, "moments=4bit_eden", max_steps=-1, num_train_epochs=5))
    assert steps["lm_head.weight"] == 10  # 2 steps an epoch


def test_a_tied_head_is_the_embedding(tmp_path) -> None:
    steps = by_name(trained(tmp_path, "moments=4bit_eden", llama(tie_word_embeddings=True), max_steps=10))
    assert steps.pop("model.embed_tokens.weight") == 10
    assert set(steps.values()) == {0}


@pytest.mark.parametrize(
    ("optim_args", "expected"),
    [
        ("moments=4bit", {0}),
        ("moments=bf16", {0}),
        ("moments=4bit_eden,stochastic_last=0", {0}),
        ("moments=4bit_eden,stochastic_last=0.5", {6}),
        ("moments=4bit,stochastic_last=1", {1}),
        ("moments=4bit_eden,stochastic_from=4", {4}),
    ],
)
def test_an_explicit_choice_holds_for_all(tmp_path, optim_args: str, expected: set[int]) -> None:
    assert set(by_name(trained(tmp_path, optim_args, max_steps=10)).values()) == expected


def test_a_share_that_is_set_in_the_groups_as_text_is_read(tmp_path) -> None:
    trainer = Trainer(llama(), arguments(tmp_path, optim="adamw4bit", max_steps=10), train_dataset=Tokens())
    for group in trainer.create_optimizer().param_groups:
        group["stochastic_last"] = "0.5"
    trainer.train()
    assert set(by_name(trainer.optimizer.optimizer).values()) == {6}


def test_the_head_has_a_group_of_its_own_only_when_asked() -> None:
    model = llama()
    assert all("stochastic_last" not in group for group in param_groups(model))
    groups = param_groups(model, 0.1, head={"stochastic_last": 0.2})
    (head,) = (group for group in groups if group.get("stochastic_last"))
    assert [name for name, _ in head["params"]] == ["lm_head.weight"]
    assert (head["vocabulary"], head["weight_decay"]) == (True, 0.1)
    assert sum(len(g["params"]) for g in groups) == sum(len(g["params"]) for g in param_groups(model))


def test_without_patching_too(tmp_path) -> None:
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None)
    factory, kwargs = trainer_kwargs(llama(), args, moments="4bit_zipsr")["optimizer_cls_and_kwargs"]
    groups = factory()(llama(), **kwargs).param_groups
    assert [g["stochastic_last"] for g in groups if g["stochastic_last"]] == [0.1]


def test_a_resumed_run_goes_on_with_the_new_length(tmp_path) -> None:
    trained(tmp_path, "moments=4bit_eden", max_steps=10, save_strategy="steps", save_steps=5)
    args = arguments(tmp_path, optim="adamw4bit", optim_args="moments=4bit_eden", max_steps=20)
    trainer = Trainer(llama(), args, train_dataset=Tokens())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert by_name(trainer.optimizer.optimizer)["lm_head.weight"] == 19


class TooLarge(Trainer):
    """Runs out of memory at step 4, until the Trainer has taken half of the batch."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3 and self._train_batch_size == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(*args, **kwargs)


def test_an_optimizer_that_is_older_than_the_training_counts_from_its_begin(tmp_path) -> None:
    changes = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    optimizer = trained(tmp_path, "moments=4bit_eden", times=2, **changes)
    assert {group["step"] for group in optimizer.param_groups} == {20}
    assert by_name(optimizer)["lm_head.weight"] == 20, "the 10th step of the second training"
    trainer = Trainer(
        llama(), arguments(tmp_path, optim="adamw4bit", optim_args="moments=4bit_eden", max_steps=10),
        train_dataset=Tokens(),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))  # of the second training
    assert by_name(trainer.optimizer.optimizer)["lm_head.weight"] == 20
    optimizer = trained(tmp_path, "moments=4bit_eden", made=TooLarge, max_steps=10, auto_find_batch_size=True)
    assert {group["step"] for group in optimizer.param_groups} == {13}
    assert by_name(optimizer)["lm_head.weight"] == 13
