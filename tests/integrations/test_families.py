"""How the parameters of other people's models are treated: a table of families, as transformers builds them.

Models have the sizes of their configurations' defaults, with few layers, and no memory (the meta device).
"""

from __future__ import annotations

import warnings
from fnmatch import fnmatch
from math import prod
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

from hf_shampoo4.execution.blocking import blocks_of
from hf_shampoo4.groups import options_of, param_groups
from hf_shampoo4.state_report import block_bytes
from tests.support.tiny import llama

MATRIX, VOCABULARY, ADAMW = "matrix", "vocabulary", "AdamW"  # preconditioned, by its columns, not at all

LINEAR = {"*_proj.weight": MATRIX}
WORDS = {"*embed_tokens.weight": VOCABULARY}
HEAD = {"lm_head.weight": VOCABULARY}
DECODER = {**LINEAR, **WORDS, **HEAD}
EXPERTS = {"*.experts.gate_up_proj": MATRIX, "*.experts.down_proj": MATRIX}
MLP = {"*.fc?.weight": MATRIX}
CLASSIFIER = {"classifier.weight": MATRIX}
ENCODER = {
    "*.query.weight": MATRIX, "*.key.weight": MATRIX, "*.value.weight": MATRIX, "*.dense.weight": MATRIX,
    "*.position_embeddings.weight": ADAMW,
}  # fmt: skip
BERT = {**ENCODER, "*.word_embeddings.weight": VOCABULARY}
TOKEN_TYPES = {"*.token_type_embeddings.weight": ADAMW}
VIT = {
    **LINEAR, **MLP, **CLASSIFIER, "*.projection.weight": MATRIX,
    "*.cls_token": ADAMW, "*.position_embeddings": ADAMW,
}  # fmt: skip
SPEECH = {
    **LINEAR, "*.projection.weight": MATRIX, "*_dense.weight": MATRIX, "*.conv_layers.*.conv.weight": MATRIX,
    "*.pos_conv_embed.conv.parametrizations.weight.original1": MATRIX,
    "*.pos_conv_embed.conv.parametrizations.weight.original0": ADAMW,
}  # fmt: skip
MAMBA = {**LINEAR, "*.conv1d.weight": MATRIX}

# family -> model class, its configuration where that is not the default, name -> treatment of each parameter of two or
# more dimensions: the first pattern that fits.  Parameters of fewer dimensions are always AdamW's.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "qwen3": ("Qwen3ForCausalLM", {}, DECODER),
    "qwen3 tied": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}, {**LINEAR, **WORDS}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}, {**DECODER, **EXPERTS, "*.gate.weight": MATRIX}),
    "mixtral": ("MixtralForCausalLM", {}, {**DECODER, **EXPERTS, "*.gate.weight": MATRIX}),
    "gemma3": ("Gemma3ForConditionalGeneration", {}, {
        **LINEAR, **WORDS, **MLP, "*.mm_input_projection_weight": MATRIX, "*.in_proj_weight": MATRIX,
        "*.patch_embedding.weight": MATRIX, "*.position_embedding.weight": ADAMW, "*.probe": ADAMW,
    }),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {"first_k_dense_replace": 1}, {
        **DECODER, **EXPERTS, "*.kv_a_proj_with_mqa.weight": MATRIX, "*.gate.weight": MATRIX,
    }),
    "gpt_oss": ("GptOssForCausalLM", {}, {
        **DECODER, **EXPERTS, "*.router.weight": MATRIX, "*.gate_up_proj_bias": ADAMW, "*.down_proj_bias": ADAMW,
    }),
    "phi3": ("Phi3ForCausalLM", {}, DECODER),
    "llama4": ("Llama4ForCausalLM", {}, {**DECODER, **EXPERTS, "*.router.weight": MATRIX}),
    "llama4 vision": ("Llama4VisionModel", {}, {
        **LINEAR, **MLP, "*.linear.weight": MATRIX, "positional_embedding_vlm": ADAMW,
    }),
    "mamba2": ("Mamba2ForCausalLM", {}, {**MAMBA, **HEAD, "*.embeddings.weight": VOCABULARY}),
    "mamba": ("MambaForCausalLM", {}, {**MAMBA, "*.embeddings.weight": VOCABULARY, "*.A_log": ADAMW}),
    "rwkv": ("RwkvForCausalLM", {}, {
        "*.key.weight": MATRIX, "*.value.weight": MATRIX, "*.receptance.weight": MATRIX, "*.output.weight": MATRIX,
        "*.embeddings.weight": VOCABULARY, "head.weight": VOCABULARY, "*.time_mix_*": ADAMW,
    }),
    "qwen3_next": ("Qwen3NextForCausalLM", {}, {
        **DECODER, **EXPERTS, "*.in_proj_*.weight": MATRIX, "*.conv1d.weight": MATRIX, "*.gate.weight": MATRIX,
        "*.shared_expert_gate.weight": ADAMW,
    }),
    "jamba": ("JambaForCausalLM", {}, {
        **DECODER, **EXPERTS, "*.conv1d.weight": MATRIX, "*.router.weight": MATRIX, "*.A_log": ADAMW,
    }),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {"attention_window_size": 16}, {
        **LINEAR, **WORDS, "*.linear_*.weight": MATRIX, "*.conv_1d.weight": MATRIX,
        "*.rg_lru.*_gate_weight": MATRIX, "*.rg_lru.*_gate_bias": ADAMW,
    }),
    "falcon_h1": ("FalconH1ForCausalLM", {}, {**DECODER, "*.conv1d.weight": MATRIX}),
    "zamba": ("ZambaForCausalLM", {}, {
        **LINEAR, **WORDS, "*.linear.weight": MATRIX, "*.conv1d.weight": MATRIX, "*_proj_weight": MATRIX,
        "*.A_log": ADAMW, "*.D": ADAMW, "*.dt_proj_bias": ADAMW,
    }),
    "t5": ("T5ForConditionalGeneration", {}, {
        "*.[qkvo].weight": MATRIX, "*.w[io].weight": MATRIX, "shared.weight": VOCABULARY,
        "*.relative_attention_bias.weight": ADAMW,
    }),
    "bart": ("BartForConditionalGeneration", {}, {
        **LINEAR, **MLP, "*.shared.weight": VOCABULARY, "*.embed_positions.weight": ADAMW,
    }),
    "whisper": ("WhisperForConditionalGeneration", {}, {
        **LINEAR, **MLP, **WORDS, "*.conv?.weight": MATRIX, "*.embed_positions.weight": ADAMW,
    }),
    "clip": ("CLIPModel", {}, {
        **LINEAR, **MLP, "*_projection.weight": MATRIX, "*.patch_embedding.weight": MATRIX,
        "*.token_embedding.weight": VOCABULARY, "*.position_embedding.weight": ADAMW,
    }),
    "modernbert": ("ModernBertForMaskedLM", {}, {
        "*.Wqkv.weight": MATRIX, "*.W[io].weight": MATRIX, "head.dense.weight": MATRIX,
        "*.tok_embeddings.weight": VOCABULARY,
    }),
    "bert": ("BertForMaskedLM", {}, {**BERT, **TOKEN_TYPES}),
    "roberta": ("RobertaForMaskedLM", {}, {**BERT, **TOKEN_TYPES, "lm_head.dense.weight": MATRIX}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", {}, {
        **ENCODER, **TOKEN_TYPES, "lm_head.dense.weight": MATRIX, "lm_head.decoder.weight": VOCABULARY,
    }),
    "deberta-v2": ("DebertaV2ForMaskedLM", {}, {
        **LINEAR, "*.dense.weight": MATRIX,
        "*.word_embeddings.weight": VOCABULARY, "*.position_embeddings.weight": ADAMW,
    }),
    "esm": ("EsmForMaskedLM", {"vocab_size": 33, "pad_token_id": 1}, {
        **BERT, "*.word_embeddings.weight": ADAMW, "*.contact_head.regression.weight": ADAMW,
    }),
    "ibert": ("IBertForMaskedLM", {}, {**BERT, **TOKEN_TYPES}),
    "gpt2": ("GPT2LMHeadModel", {}, {
        "*.c_attn.weight": MATRIX, "*.c_proj.weight": MATRIX, "*.c_fc.weight": MATRIX,
        "*.wte.weight": VOCABULARY, "*.wpe.weight": ADAMW,
    }),
    "xlnet": ("XLNetLMHeadModel", {}, {
        "*.rel_attn.[qkvor]": MATRIX, "*.layer_?.weight": MATRIX, "*.word_embedding.weight": VOCABULARY,
        "*.mask_emb": ADAMW, "*.seg_embed": ADAMW, "*.r_?_bias": ADAMW,
    }),
    "cohere": ("CohereForCausalLM", {"use_qk_norm": True}, {**LINEAR, **WORDS, "*.[qk]_norm.weight": ADAMW}),
    "vit": ("ViTForImageClassification", {}, VIT),
    "dinov2": ("Dinov2WithRegistersForImageClassification", {}, {
        **VIT, "*.register_tokens": ADAMW, "*.mask_token": ADAMW,
    }),
    "gemma4 vision": ("Gemma4VisionModel", {}, {
        **LINEAR, "*.linear.weight": MATRIX, "*.position_embedding_table": ADAMW,
    }),
    "swin": ("SwinForImageClassification", {}, {
        **LINEAR, **MLP, **CLASSIFIER, "*.projection.weight": MATRIX, "*.reduction.weight": MATRIX,
        "*.relative_position_bias_table": ADAMW,
    }),
    "convnext": ("ConvNextForImageClassification", {}, {
        **CLASSIFIER, "*.patch_embeddings.weight": MATRIX, "*.dwconv.weight": MATRIX, "*.pwconv?.weight": MATRIX,
        "*.downsampling_layer.*.weight": MATRIX,
    }),
    "resnet": ("ResNetForImageClassification", {}, {"*.convolution.weight": MATRIX, "classifier.*.weight": MATRIX}),
    "wav2vec2": ("Wav2Vec2ForPreTraining", {}, {
        **SPEECH, "project_*.weight": MATRIX, "quantizer.codevectors": ADAMW,
    }),
    "hubert": ("HubertForCTC", {}, {**SPEECH, "lm_head.weight": ADAMW}),
    "sam": ("SamModel", {}, {
        **LINEAR, "*.projection.weight": MATRIX, "*.qkv.weight": MATRIX, "*.proj.weight": MATRIX,
        "*.lin?.weight": MATRIX, "*conv?.weight": MATRIX, "*.proj_*.weight": MATRIX,
        "*_mlps.?.*.weight": MATRIX, "*_head.*.weight": MATRIX,
        "*.pos_embed": ADAMW, "*.rel_pos_[hw]": ADAMW, "*.positional_embedding": ADAMW,
        "*.no_mask_embed.weight": ADAMW, "*point_embed.*weight": ADAMW, "*.iou_token.weight": ADAMW,
        "*.mask_tokens.weight": ADAMW,
    }),
    "encodec": ("EncodecModel", {}, {
        "*.lstm.weight_*": MATRIX, "*.original0": ADAMW, "decoder.layers.15.*.original1": ADAMW, "*.original1": MATRIX,
    }),
    "patchtst": ("PatchTSTForPrediction", {"positional_encoding_type": "random"}, {
        **LINEAR, "*.ff.*.weight": MATRIX, "head.projection.weight": MATRIX, "*.input_embedding.weight": ADAMW,
        "*.position_enc": ADAMW,
    }),
    "blip-2": ("Blip2ForConditionalGeneration", {}, {
        **LINEAR, **MLP, **WORDS, "*.qkv.weight": MATRIX, "*projection.weight": MATRIX,
        "*.patch_embedding.weight": MATRIX, "*.query.weight": MATRIX, "*.key.weight": MATRIX, "*.value.weight": MATRIX,
        "*.dense.weight": MATRIX, "*.embed_positions.weight": ADAMW, "query_tokens": ADAMW,
        "*.class_embedding": ADAMW, "*.position_embedding": ADAMW,
    }),
}  # fmt: skip


def treatments(model: nn.Module) -> dict[str, str]:
    """Name -> treatment of the parameters of two or more dimensions, by the blocks that are planned."""
    found = {}
    for group in param_groups(model):
        options = options_of(group, {})
        for name, p in group["params"]:
            blocks = blocks_of(tuple(p.shape), options)
            elementwise = not any(block.algorithm.preconditions for block in blocks)
            kind = ADAMW if elementwise else VOCABULARY if options.vocabulary else MATRIX
            if p.dim() > 1:
                found[name] = kind
            else:
                assert kind == ADAMW, name
            if kind == ADAMW and p.numel() >= 4096:
                assert block_bytes(blocks) < 1.4 * p.numel(), f"{name} {tuple(p.shape)}"
    return found


def few_layers(config: Any) -> Any:
    """At most two of everything that a configuration calls layers."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            few_layers(value)
        elif type(value) is int and value > 2 and ("layers" in key or key == "n_layer"):
            setattr(config, key, 2)
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_is_treated_as_the_table_says(family: str) -> None:
    name, configuration, table = FAMILIES[family]
    build = getattr(transformers, name)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = treatments(build(few_layers(build.config_class(**configuration))))
    patterns = sorted(table, key=len, reverse=True)
    by_pattern = {name: next((p for p in patterns if fnmatch(name, p)), "") for name in found}
    wanted = {name: table.get(pattern) for name, pattern in by_pattern.items()}
    assert {name: kind for name, kind in found.items() if kind != wanted[name]} == {}
    unused = set(table) - set(by_pattern.values())
    assert unused == set()


def test_modules_of_torch() -> None:
    conv = lambda: nn.Conv1d(768, 768, 128, groups=16)  # noqa: E731  positions of wav2vec2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.ModuleDict({
            "plain": conv(), "normed": parametrizations.weight_norm(conv(), dim=2), "old": old_weight_norm(conv()),
            "spectral": parametrizations.spectral_norm(nn.Linear(64, 64)), "lstm": nn.LSTM(32, 64),
            "attention": nn.MultiheadAttention(64, 4, add_bias_kv=True), "image": nn.LayerNorm((16, 16)),
            "bilinear": nn.Bilinear(32, 32, 32), "bag": nn.EmbeddingBag(1000, 32), "lm_head": nn.Linear(32, 1000),
        })  # fmt: skip
    found = treatments(model)
    assert {name for name, kind in found.items() if kind == VOCABULARY} == {"bag.weight", "lm_head.weight"}
    assert {name for name, kind in found.items() if kind == ADAMW} == {
        "normed.parametrizations.weight.original0", "old.weight_g", "image.weight", "image.bias",
        "attention.bias_k", "attention.bias_v",
    }  # fmt: skip
    kernels = {
        block_bytes(blocks_of(tuple(p.shape), options_of(group, {})))
        for group in param_groups(model)
        for _, p in group["params"]
        if p.numel() == prod((768, 48, 128))
    }
    assert len(kernels) == 1, "normed or not, it is the same matrix"
    assert kernels.pop() < 2 * prod((768, 48, 128))


def test_a_weight_normed_model_itself_and_dicts_of_parameters_go_by_their_own_names() -> None:
    normed = parametrizations.weight_norm(nn.Conv1d(32, 32, 16))
    assert treatments(normed) == {
        "parametrizations.weight.original0": ADAMW, "parametrizations.weight.original1": MATRIX
    }  # fmt: skip
    model = nn.Module()
    model.lora_A, model.prompts = nn.ParameterDict(), nn.ParameterList([nn.Parameter(torch.zeros(20, 64))])
    model.lora_A["default"] = nn.Parameter(torch.zeros(8, 64))
    assert treatments(model) == {"lora_A.default": MATRIX, "prompts.0": ADAMW}


ADAPTERS: dict[str, dict[str, str]] = {
    "LoraConfig": {"*.lora_A.*": MATRIX, "*.lora_B.*": MATRIX},
    "AdaLoraConfig": {"*.lora_A.*": MATRIX, "*.lora_B.*": MATRIX, "*.lora_E.*": ADAMW},
    "LoHaConfig": {"*.hada_w?_?.*": MATRIX},
    "LoKrConfig": {"*.lokr_w?.*": MATRIX},
    "HRAConfig": {"*.hra_u.*": MATRIX},
    "MissConfig": {"*.miss_block.*": MATRIX},
    "OFTConfig": {"*.oft_R.*": MATRIX},
    "VeraConfig": {},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_weights_of_adapters_are_matrices(adapter: str) -> None:
    peft = pytest.importorskip("peft")
    extra = {"AdaLoraConfig": {"total_step": 10}, "OFTConfig": {"oft_block_size": 8}}.get(adapter, {"r": 4})
    config = getattr(peft, adapter)(target_modules=["q_proj"], **extra)
    found = treatments(peft.get_peft_model(llama(num_hidden_layers=1), config))
    table = ADAPTERS[adapter]
    assert {name: kind for name, kind in found.items() if not any(fnmatch(name, p) for p in table)} == {}
    assert all(kind == table[p] for name, kind in found.items() for p in table if fnmatch(name, p))
    assert bool(found) == bool(table)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v1 = nn.Parameter(torch.zeros(4 * 64, 32))  # DBRX: the experts are the rows
        self.v1_bias = nn.Parameter(torch.zeros(4, 64))


def test_what_no_type_tells_goes_by_names_and_what_these_leave_unsure_is_elementwise() -> None:
    model = nn.Module()
    model.experts = Experts()
    for name, shape in {
        "W_Q": (4, 64, 16), "w1": (64, 32), "text_projection": (64, 32), "mixer": (4, 32, 64), "tok_embed": (512, 32),
        "pos_embed": (16, 16, 32), "codebook": (64, 32), "relative_bias": (4, 32, 64), "probe": (1, 1, 64),
    }.items():  # fmt: skip
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    assert treatments(model) == {
        "experts.v1": MATRIX, "experts.v1_bias": ADAMW, "W_Q": MATRIX, "w1": MATRIX, "text_projection": MATRIX,
        "mixer": MATRIX, "tok_embed": VOCABULARY, "pos_embed": ADAMW, "codebook": ADAMW, "relative_bias": ADAMW,
        "probe": ADAMW,
    }  # fmt: skip


def test_the_head_is_found_inside_a_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    config = transformers.GPTNeoXConfig(num_hidden_layers=1, vocab_size=1024, hidden_size=64, num_attention_heads=2)
    with torch.device("meta"):
        found = treatments(Wrapper(transformers.GPTNeoXForCausalLM(config)))
    vocabularies = {name for name, kind in found.items() if kind == VOCABULARY}
    assert vocabularies == {"module.lm_head.weight", "module.gpt_neox.embed_in.weight"}
