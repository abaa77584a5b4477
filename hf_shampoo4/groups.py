"""Which parameters are preconditioned, which are not, and which are decayed: named parameter groups of any model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .sharding.local_parameter import full_shape, remember

# The names that Trainer.get_decay_parameter_names leaves undecayed.
_NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)

# Rows that are looked up or are classes, in modules that no type tells: PEFT's LoRA of an embedding and its trainable
# tokens, learned positions and class tokens; the head of a model without get_output_embeddings().
_LOOKUP_NAME = re.compile(r"lora_embedding_|trainable_tokens_|(?:embed|embeddings?|_token)$", re.IGNORECASE)
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
_HEAD_NAME = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.", re.IGNORECASE)

# treatment -> its options; the order of the groups, for the learning rate that the Trainer logs is the first's
_TREATMENTS: dict[str, dict[str, Any]] = {
    "matrix": {},
    "conv1d": {"matrix_view": "flatten"},  # (out, in, width): one matrix, not `out` matrices as a 3-D expert weight is
    "vocabulary": {"vocabulary": True},
    "elementwise": {"algorithm": "elementwise"},
}


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    is_target: Callable[[str, nn.Module], bool] | None = None,
    head: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Named parameter groups for `Shampoo4bit`: matrices first, then vocabularies, then what the base alone updates.

    Vocabularies are embeddings and the output head (told by identity, so a tied head is found too); elementwise are
    the parameters with fewer than 2 dimensions, norms, and what is no target.  Norms, biases and everything of fewer
    than 2 dimensions are not decayed; embeddings and the head are, as the Hugging Face Trainer does.

    Args:
        model: any module; frozen parameters are left out, a shared parameter is taken once.
        weight_decay: of the decayed groups; the others get 0.
        is_target: tells by a module's name and the module whether its parameters may be preconditioned (default: yes).
        head: options that the output head alone gets, in a group of its own (tied: with the embedding that it is).

    Returns:
        Groups `{"params": [(name, parameter), ...], "weight_decay": ..., "kind": ..., ...}`, each of one kind
        (`Options.kind`), none of them empty, in an order that depends on the model and the arguments alone.
    """
    remember(model)
    kind_of, targets, convolutions = _kinds(model), _ids_of_targets(model, is_target), _ids(model, _CONVOLUTIONS)
    heads, order = _output_head(model) if head else set[int](), list(_TREATMENTS)
    members: dict[tuple[int, str, bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key, kind = id(parameter), kind_of(name, parameter)
        if kind == "vector" or key not in targets:
            treatment = "elementwise"
        elif kind in ("embedding", "head"):
            treatment = "vocabulary"
        else:
            treatment = "conv1d" if key in convolutions else "matrix"
        undecayed = kind == "vector" or bool(_NO_DECAY_NAME.search(name))
        members.setdefault((order.index(treatment), kind, key in heads, undecayed), []).append((name, parameter))
    return [
        {
            "params": named,
            "weight_decay": 0.0 if undecayed else weight_decay,
            "kind": kind,
            **_TREATMENTS[order[treatment]],
            **(head if head and of_head else {}),
        }
        for (treatment, kind, of_head, undecayed), named in sorted(members.items(), key=lambda item: item[0])
    ]


def is_of_matrices(group: Mapping[str, Any]) -> bool:
    """Whether a group of `param_groups` has the matrices that a preconditioner is for, vocabularies not counted."""
    return "algorithm" not in group and "vocabulary" not in group


def _kinds(model: nn.Module) -> Callable[[str, Tensor], str]:
    """Tells a parameter's `Options.kind` by its name and itself."""
    embeddings, heads = _ids(model, (nn.Embedding, nn.EmbeddingBag)), _output_head(model)
    norms = _ids(model, (nn.LayerNorm, nn.RMSNorm))

    def kind(name: str, parameter: Tensor) -> str:
        key = id(parameter)
        if len(full_shape(parameter)) < 2 or key in norms:
            return "vector"
        if key not in embeddings and (key in heads or _HEAD_NAME.search(name)):
            return "head"
        return "embedding" if key in embeddings or _LOOKUP_NAME.search(name) else "matrix"

    return kind


def _ids(model: nn.Module, types: tuple[type[nn.Module], ...]) -> set[int]:
    modules = (module for module in model.modules() if isinstance(module, types))
    return {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}


def _ids_of_targets(model: nn.Module, is_target: Callable[[str, nn.Module], bool] | None) -> set[int]:
    def parameters() -> Iterator[nn.Parameter]:
        for name, module in model.named_modules():
            if is_target is None or is_target(name, module):
                yield from module.parameters(recurse=False)

    return {id(parameter) for parameter in parameters()}


def _output_head(model: nn.Module) -> set[int]:
    """The weight that makes logits, as the models of transformers (also inside PEFT's wrappers) tell it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return {id(weight)} if isinstance(weight, Tensor) else set()
