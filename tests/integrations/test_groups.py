"""param_groups: who is preconditioned, who is decayed, in which order."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

import hf_shampoo4 as s4
from hf_shampoo4.integrations.trainer import trainer_kwargs
from tests.support.tiny import arguments, llama


def names(group: dict) -> list[str]:
    return group.get("param_names") or [name for name, _ in group["params"]]


def kind_of(group: dict) -> str:
    return "vocabulary" if group.get("vocabulary") else group.get("algorithm") or group.get("matrix_view") or "matrix"


def kinds(groups: list[dict]) -> dict[str, str]:
    """Parameter name -> "matrix" | "flatten" | "vocabulary" | "elementwise"."""
    kind = {name: kind_of(g) for g in groups for name in names(g)}
    assert len(kind) == sum(len(g["params"]) for g in groups), "a parameter is in two groups"
    return kind


def test_llama_has_matrices_first_then_embedding_and_head_then_norms():
    matrices, embedding, head, norms = s4.param_groups(llama(), weight_decay=0.1)
    assert {name.split(".")[-2] for name in names(matrices)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    rest = {key: value for key, value in matrices.items() if key != "params"}
    assert rest == {"weight_decay": 0.1, "kind": "matrix"}
    assert (names(embedding), names(head)) == (["model.embed_tokens.weight"], ["lm_head.weight"])
    for group, kind in ((embedding, "embedding"), (head, "head")):
        assert (group["vocabulary"], group["weight_decay"], group["kind"]) == (True, 0.1, kind)
    assert all("norm" in name for name in names(norms))
    assert (norms["algorithm"], norms["weight_decay"], norms["kind"]) == ("elementwise", 0.0, "vector")


def test_the_decay_is_the_optimizers_or_the_groups_own_and_of_whom_they_say():
    def decays(model, decay, **chosen):
        optimizer = s4.Shampoo4bit(s4.param_groups(model, **chosen), lr=1e-3, weight_decay=decay)
        return {name: group["weight_decay"] for group in optimizer.param_groups for name in names(group)}

    found = decays(llama(), 0.1)
    assert found["lm_head.weight"] == 0.1
    assert {decay for name, decay in found.items() if "norm" in name} == {0.0}
    assert found == decays(llama(), 0.0, weight_decay=0.1) == decays(llama(), 0.3, weight_decay=0.1)
    assert set(decays(llama(), 0.3, weight_decay=0.0).values()) == {0.0}
    chosen = decays(llama(), 0.1, decayed=["model.norm.weight"])
    assert [name for name, decay in chosen.items() if decay] == ["model.norm.weight"]


def test_a_name_to_decay_that_the_model_does_not_have_is_refused():
    """One letter off, and nothing would have been decayed."""
    model = nn.Sequential(nn.Linear(80, 80), nn.LayerNorm(80), nn.LayerNorm(8, elementwise_affine=False))
    for wrong, hint in (("0.wieght", "did you mean '0.weight'"), ("head", "they are 0.bias, 0.weight, ")):
        with pytest.raises(ValueError, match=f"decayed='{wrong}' is no name of a parameter of Sequential: {hint}"):
            s4.param_groups(model, decayed=["1.weight", wrong])
    model[0].bias.requires_grad_(False)
    decayed = ["0.weight", "0.bias", "2.weight"]  # one is frozen, one is None
    assert [names(g) for g in s4.param_groups(model, 0.1, decayed=decayed) if g["weight_decay"]] == [["0.weight"]]
    tied = llama(tie_word_embeddings=True)
    assert s4.param_groups(tied, 0.1, decayed=Trainer.get_decay_parameter_names(None, tied))
    assert s4.param_groups(tied, 0.1, decayed=["lm_head.weight", "model.embed_tokens.weight"])


def test_a_kind_is_what_a_parameter_is_whether_preconditioned_or_not():
    def of(model, **options):
        return {name: group["kind"] for group in s4.param_groups(model, **options) for name in names(group)}

    plain = of(llama(attention_bias=True))
    assert of(llama(attention_bias=True), is_target=lambda name, module: "mlp" in name) == plain
    assert plain["model.layers.0.self_attn.q_proj.bias"] == "vector"
    assert of(llama(tie_word_embeddings=True))["model.embed_tokens.weight"] == "embedding"
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    assert of(gpt2)["transformer.wpe.weight"] == "embedding"
    assert of(nn.ModuleDict({"lm_head": nn.Linear(16, 64)})) == {"lm_head.weight": "head", "lm_head.bias": "vector"}


@pytest.mark.parametrize("tied", [False, True])
def test_decayed_are_the_parameters_that_the_trainer_decays(tied):
    model = llama(tie_word_embeddings=tied, attention_bias=True)
    decayed = {name for group in s4.param_groups(model, 0.1) if group["weight_decay"] for name in names(group)}
    wanted = set(Trainer.get_decay_parameter_names(None, model))
    assert decayed == {name for name, _ in model.named_parameters() if name in wanted}


def test_a_tied_head_is_told_by_identity_whatever_its_name():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(64, 256, bias=False)  # registered first, so the shared weight bears this name
            self.words = nn.Embedding(256, 64)
            self.words.weight = self.out.weight

    assert kinds(s4.param_groups(Tied())) == {"out.weight": "vocabulary"}


def test_gpt2_projections_are_matrices_and_positions_are_not():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    kind = kinds(s4.param_groups(model))
    assert {name for name in kind if kind[name] == "matrix"} == {
        f"transformer.h.0.{module}.weight" for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_convolutions_experts_norms_and_names_in_a_plain_module():
    model = nn.ModuleDict({
        "conv1": nn.Conv1d(8, 16, 3), "conv2": nn.Conv2d(8, 16, 3), "norm2d": nn.LayerNorm((16, 16)),
        "lm_head": nn.Linear(16, 64), "proj_norm": nn.Linear(16, 16),
    })  # fmt: skip
    model.experts = nn.Parameter(torch.zeros(4, 16, 32))
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
    model.position_embeddings = nn.Parameter(torch.zeros(1, 8, 16))
    groups = s4.param_groups(model, weight_decay=0.1)
    kind = kinds(groups)
    assert kind.pop("conv1.weight") == "flatten"
    assert {name for name in kind if kind[name] == "matrix"} == {"experts", "conv2.weight", "proj_norm.weight"}
    decay = {name: group["weight_decay"] for group in groups for name in names(group)}
    assert decay["proj_norm.weight"] == decay["norm2d.weight"] == decay["lm_head.bias"] == 0.0
    assert decay["lm_head.weight"] == decay["cls_token"] == 0.1
    assert names(groups[0]) == ["experts", "conv2.weight"], "decayed matrices come first: their rate is logged"


def test_frozen_parameters_are_left_out_and_compiled_modules_are_told():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1] = torch.compile(model.model.layers[1])
    found = kinds(s4.param_groups(model))
    assert not any("layers.0." in name for name in found)
    assert found["model.layers.1._orig_mod.mlp.up_proj.weight"] == "matrix"
    assert found["model.layers.1._orig_mod.input_layernorm.weight"] == "elementwise"


def test_grouping_does_not_depend_on_the_amount_of_decay():
    with_decay, without = s4.param_groups(llama(), 0.1), s4.param_groups(llama(), 0.0)
    assert [names(group) for group in with_decay] == [names(group) for group in without]


def test_lora_factors_are_matrices_but_lora_of_an_embedding_and_saved_heads_are_not():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    kind = kinds(s4.param_groups(peft.get_peft_model(llama(), config)))
    assert {name.split(".")[-3] for name in kind if kind[name] == "matrix"} == {"lora_A", "lora_B"}
    vocabularies = {name for name in kind if kind[name] == "vocabulary"}
    assert any("lora_embedding_A" in name for name in vocabularies)
    assert any("lm_head.modules_to_save" in name for name in vocabularies)


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*layers\.\d+\.mlp\..*", {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_optim_target_modules_are_the_only_ones_preconditioned(tmp_path, targets, parts):
    args = arguments(tmp_path, optim_target_modules=targets)
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, llama())
    kind = kinds(kwargs["params"])
    assert {name.split(".")[-2] for name in kind if kind[name] == "matrix"} == parts
    assert kind["model.embed_tokens.weight"] == "elementwise"


def test_what_plans_no_block_with_a_preconditioner_is_refused_in_the_trainer(tmp_path):
    """Prompt tuning and prefix tuning train a table of a few rows, which is no vocabulary."""
    with pytest.raises(ValueError, match=r"1 trained parameters are embedding \(20, 256\), which the base optimizer"):
        trainer_kwargs(nn.Embedding(20, 256), arguments(tmp_path))
    peft = pytest.importorskip("peft")
    for config in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        adapted = peft.get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
        with pytest.raises(ValueError, match=r"nothing to precondition.*--optim adamw4bit"):
            trainer_kwargs(adapted, arguments(tmp_path))
    trainer_kwargs(adapted, arguments(tmp_path), algorithm="elementwise")
    trainer_kwargs(nn.Embedding(2000, 16), arguments(tmp_path))
    with pytest.raises(ValueError, match=r"updates beside algorithm='shampoo'"):
        trainer_kwargs(nn.Embedding(2000, 16), arguments(tmp_path), algorithm="shampoo")


def test_a_model_without_a_matrix_is_refused_in_the_trainer(tmp_path):
    model = llama()
    model.model.layers.requires_grad_(False)
    s4.Shampoo4bit(s4.param_groups(model))  # embedding and head
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to precondition.*--optim adamw4bit"):
        trainer_kwargs(model, arguments(tmp_path))
    trainer_kwargs(model, arguments(tmp_path), algorithm="elementwise")


def test_optim_target_modules_that_match_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optim_target_modules=\['query'\] matches no module.*q_proj"):
        trainer_kwargs(llama(), arguments(tmp_path, optim_target_modules=["query"]))


def test_programs_find_their_parameters_in_the_trainers_groups_and_add_groups_of_their_own(tmp_path):
    """As sentence-transformers' learning_rate_mapping does: by identity, without names."""
    model = llama()
    special = [model.lm_head.weight, model.model.norm.weight]
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path), model)
    groups = kwargs.pop("params")
    before = sum(len(group["params"]) for group in groups)
    for group in groups:
        group["params"] = [p for p in group["params"] if all(p is not s for s in special)]
    assert sum(len(group["params"]) for group in groups) == before - 2
    optimizer = cls([*groups, {"params": special, "lr": 0.5}], **kwargs)
    assert optimizer.param_groups[-1]["lr"] == 0.5
    called = {p: name for name, p in model.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        assert optimizer.names(i) == [called[p] for p in group["params"]]
    again = cls([{"params": list(g["params"])} for g in optimizer.param_groups], **kwargs)
    assert again.names(0)[0] == "0.0"  # nameless all of them: as torch has it


def test_a_nameless_group_beside_named_ones_is_told_by_its_place():
    w, b = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
    optimizer = s4.Shampoo4bit([("w", w)])
    optimizer.add_param_group({"params": b})
    assert [optimizer.names(0), optimizer.names(1)] == [["w"], ["1.0"]]
    optimizer.load_state_dict(optimizer.state_dict())
