"""The model of a pretraining: a configuration of transformers, from scratch or with its weights."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, Union

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..exceptions import ConfigError, reason
from .arguments import ModelArguments
from .config import config_root


def load_model_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The model's configuration with its overrides.

    Raises:
        ConfigError: no such preset, file or name; an override that the configuration does not have.
    """
    config, source = _base_config(arguments)
    changes = dict(_override(item, config) for item in filter(None, arguments.model_overrides.split(",")))
    if arguments.tie_word_embeddings is not None:
        changes["tie_word_embeddings"] = arguments.tie_word_embeddings
    if not changes:
        return config
    try:  # over what was written, not over what the class has made of it: a head's size follows from the hidden size
        written = PreTrainedConfig.get_config_dict(source)[0] if source else {}
        return type(config).from_dict({**written, **changes})
    except Exception as error:  # validators of transformers, each with types of its own
        raise ConfigError(f"model_overrides {arguments.model_overrides!r} do not fit the {config.model_type} "
                          f"configuration: {reason(error)}") from error  # fmt: skip


def _base_config(arguments: ModelArguments) -> tuple[PreTrainedConfig, Union[str, Path, None]]:
    """A configuration, and where it is written; None: nowhere, it is a type's default."""
    presets = config_root() / "models"
    preset = presets / f"{arguments.model}.json"
    try:
        if not arguments.model and arguments.model_type:
            return AutoConfig.for_model(arguments.model_type), None
        source = preset if arguments.model and preset.is_file() else arguments.model
        return AutoConfig.from_pretrained(source), source
    except (OSError, ValueError, KeyError) as error:
        names = sorted(file.stem for file in presets.glob("*.json"))
        asked = re.sub(r"[-.]", "_", arguments.model.rpartition("/")[2].lower())
        close = difflib.get_close_matches(asked, names, n=1, cutoff=0.7)
        hint = f"did you mean the preset {close[0]}? " if close else ""
        why = "there is no such file or folder" if _is_no_file(arguments.model) else reason(error)
        raise ConfigError(
            f"model {arguments.model or arguments.model_type!r} cannot be loaded ({why}); {hint}"
            f"allowed: one of {', '.join(names)}, a config.json, a folder or a hub name"
        ) from error


def _is_no_file(model: str) -> bool:
    """Whether it can only have been meant as a path, and nothing is there; the hub has names like `owner/name`."""
    is_path = model.startswith((".", "/", "~")) or model.endswith(".json") or model.count("/") > 1
    return is_path and not Path(model).exists()


def _override(item: str, config: PreTrainedConfig) -> tuple[str, Any]:
    """One `key=value` of `model_overrides`, the value read as JSON where it is JSON and as text elsewhere."""
    key, equals, text = (part.strip() for part in item.partition("="))
    known = config.to_dict()
    if not equals or key not in known:
        close = difflib.get_close_matches(key, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"model_overrides item {item!r} is not key=value with a key of {config.model_type}{hint}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return key, text
    return key, float(value) if type(value) is int and isinstance(known[key], float) else value


def build_model(
    arguments: ModelArguments, vocab_size: int, eos_token_id: int | None = None, masked: bool = False
) -> PreTrainedModel:
    """A model from scratch (or from its weights), with an embedding for each of the tokenizer's tokens.

    Args:
        arguments: which model.
        vocab_size: tokens of the tokenizer; the model's vocabulary is this unless `model_overrides` sets a larger one.
        eos_token_id: the tokenizer's end of text, for generation.
        masked: a masked language model instead of a causal one.

    Raises:
        ConfigError: as `load_model_config`, a vocabulary too small for the tokenizer, or a model of the other sort.
    """
    config = load_model_config(arguments)
    fixed = arguments.init_from_pretrained or re.search(r"\bvocab_size\s*=", arguments.model_overrides)
    if not fixed:
        config.vocab_size = vocab_size
    if config.vocab_size < vocab_size:
        raise ConfigError(f"model {arguments.model!r} has vocab_size={config.vocab_size}, "
                          f"too small for a tokenizer of {vocab_size} tokens")  # fmt: skip
    config.eos_token_id = eos_token_id
    if not arguments.init_from_pretrained:  # they are of the tokenizer that the configuration was written for
        config.bos_token_id = config.pad_token_id = None
    options = {"dtype": getattr(torch, arguments.dtype), "attn_implementation": arguments.attn_implementation}
    family, known = _SORTS[masked]
    if type(config) not in known:
        raise ConfigError(f"model {arguments.model or arguments.model_type!r} is of type {config.model_type}, which is "
                          f"no {'masked' if masked else 'causal'} language model (mask_fraction)")  # fmt: skip
    if arguments.init_from_pretrained:
        model = family.from_pretrained(arguments.model, config=config, **options)
    else:
        model = family.from_config(config, **options)
    if not masked and type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model.config, "is_decoder", False):
        raise ConfigError(f"model {arguments.model or arguments.model_type!r} is an encoder, which sees the token that "
                          "it is to predict: set mask_fraction=0.3, or model_overrides is_decoder=true")  # fmt: skip
    if masked or getattr(config, "output_router_logits", False):
        # most masked ones, and all routers' losses, are a batch's mean whatever the Trainer tells the model of other
        # batches and ranks: it is to divide
        model.accepts_loss_kwargs = False
    return model


_SORTS = {
    True: (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    False: (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
}
