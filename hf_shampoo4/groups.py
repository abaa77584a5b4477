"""Which parameters are preconditioned, which are not, and which are decayed: named parameter groups of any model.

What a parameter is for is told by the module that has it; the first line that fits holds.  One that several modules
share is an embedding if it is that in any of them.

    fewer than two dimensions                                       elementwise
    nn.Embedding, EmbeddingBag (one named ...bias: elementwise)     vocabulary
    what get_output_embeddings() returns; a linear layer "lm_head"  vocabulary
    the weight of nn.Linear, nn.Conv*, transformers' Conv1D         matrix
    norms: torch's types, classes named ...Norm                     elementwise
    what a layer of PEFT calls its adapter, but for embeddings      matrix
  and in a module whose type says nothing:
    named ...bias..., scale, ..._log                                elementwise
    named as a table (embed, token, position, ...), or in a class   elementwise; an embedding of (n, d): vocabulary
      named ...Embed...
    in a class named ...Expert...                                   matrix
    named as a weight (weight, proj, kernel, w1, lora_A, ...)       matrix
    three dimensions, none of them 1: a stack of weights            matrix
    anything else                                                   elementwise

Whether a vocabulary or a matrix is preconditioned, and from which sides, depends on its shape (`blocking.blocks_of`).

Names are the last resort, and what they leave unsure is elementwise.  In the 561 model types that transformers 5.23
builds on its own, parameters of two dimensions in modules of no known type have 47 names.  The last line is for 12 of
them: queries, latents, scales, and two of weights (`fn` and `hc_fn` of hyper-connections), which AdamW updates.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from .exceptions import OptionError
from .execution.blocking import blocks_of
from .options import ALGORITHMS, FALLBACK, NAMES, Options
from .preconditioners.algorithms import algorithm_class
from .sharding.local_parameter import full_shape, note_flat_ranges, note_purpose, noted_purpose

# The names that Trainer.get_decay_parameter_names leaves undecayed.
_NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_HEAD_NAME = re.compile(r"(?:^|\.)(?:lm_head|embed_out)$", re.IGNORECASE)
_NORM_CLASS = re.compile(r"Norm(?:\dd)?$")
_VECTOR_NAME = re.compile(r"bias|(?:^|_)scale(?:_\d+)?$|_log$", re.IGNORECASE)
_TABLE_NAME = re.compile(r"embed|(?:^|_)emb(?:_|$)|token|table|(?:^|_)pos(?:_|$|ition)", re.IGNORECASE)
_WEIGHT_NAME = re.compile(r"weight|proj|kernel|lora_[AB]|(?:^|_)w(?:\d|_|$)", re.IGNORECASE)

# treatment -> its options; the order of the groups, for the learning rate that the Trainer logs is the first's
_TREATMENTS: dict[str, dict[str, Any]] = {
    "matrix": {},
    "conv1d": {"matrix_view": "flatten"},  # (out, in, width): one matrix, not `out` matrices as a 3-D expert weight is
    "vocabulary": {"vocabulary": True},
    "elementwise": {"algorithm": FALLBACK},
}


class Purpose(NamedTuple):
    """What a parameter is for."""

    treatment: str
    """A key of `_TREATMENTS`."""
    kind: str
    """`Options.kind`."""
    why: str
    """For people."""


_EMBEDDING = Purpose("vocabulary", "embedding", "embedding")
_HEAD = Purpose("vocabulary", "head", "output head")


class _Place(NamedTuple):
    """Where a model has a parameter."""

    path: str
    """The name of the module."""
    module: nn.Module
    attribute: str
    """Of the module."""


def param_groups(
    model: nn.Module,
    weight_decay: float | None = None,
    is_target: Callable[[str, nn.Module], bool] | None = None,
    head: Mapping[str, Any] | None = None,
    decayed: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Named parameter groups for `Shampoo4bit`: matrices first, then vocabularies, then what the base alone updates.

    Vocabularies are embeddings and the output head (told by identity, so a tied head is found too); elementwise are
    norms, biases (also stacks of them), positions, tokens and other tables, and what is no target.  Norms, biases and
    everything of fewer than 2 dimensions are not decayed; embeddings and the head are, as the Hugging Face Trainer
    does.

    Args:
        model: any module; frozen parameters are left out, a shared parameter is taken once.
        weight_decay: of the decayed groups; the others get 0.  Default: what the optimizer is given.
        is_target: tells by a module's name and the module whether its parameters may be preconditioned (default: yes).
        head: options that the output head alone gets, in a group of its own (tied: with the embedding that it is).
        decayed: the names of the parameters that are decayed, instead of those above; of any that the model has,
            frozen ones and other names of a shared one too.

    Returns:
        Groups `{"params": [(name, parameter), ...], "weight_decay": ..., "kind": ..., ...}`, each of one kind
        (`Options.kind`), none of them empty, in an order that depends on the model and the arguments alone.

    Raises:
        OptionError: `decayed` names what is no parameter of the model.
    """
    _check_names(decayed or (), model)
    note_flat_ranges(model)
    places, heads, order = _places(model), _output_heads(model), list(_TREATMENTS)
    norms = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(False)}
    members: dict[tuple[int, str, bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key, shape = id(parameter), full_shape(parameter)
        treatment, kind, why = _purpose(places[key], shape, key in heads)
        if treatment != "elementwise" and is_target and not any(is_target(p.path, p.module) for p in places[key]):
            treatment, why = "elementwise", f"{why}, not a target"
        note_purpose(parameter, why)
        if decayed is None:
            undecayed = len(shape) < 2 or key in norms or bool(_NO_DECAY_NAME.search(name))
        else:
            undecayed = name not in decayed
        of_head = bool(head) and key in heads
        members.setdefault((order.index(treatment), kind, of_head, undecayed), []).append((name, parameter))
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    return [
        {
            "params": named,
            **({"weight_decay": 0.0} if undecayed else decay),
            "kind": kind,
            **_TREATMENTS[order[treatment]],
            **(head if head and of_head else {}),
        }
        for (treatment, kind, of_head, undecayed), named in sorted(members.items(), key=lambda item: item[0])
    ]


def _check_names(names: Collection[str], model: nn.Module) -> None:
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if unknown := sorted({*names} - known - _slots(model)):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"they are {', '.join(sorted(known)[:4])}, ..."
        raise OptionError(f"decayed={unknown[0]!r} is no name of a parameter of {type(model).__name__}: {hint}")


def _slots(model: nn.Module) -> set[str]:
    """What a Trainer's list may have beside: names with a wrapper's own part in them, and of a norm without weights."""
    modules = model.named_modules(remove_duplicate=False)
    return {f"{path}.{name}".removeprefix(".") for path, module in modules for name in module._parameters}


def is_of_matrices(group: Mapping[str, Any]) -> bool:
    """Whether a group of `param_groups` has the matrices that a preconditioner is for, vocabularies not counted."""
    return "algorithm" not in group and "vocabulary" not in group


def options_of(group: Mapping[str, Any], chosen: Mapping[str, Any]) -> Options:
    """What a group of `param_groups` gets from an optimizer with the options `chosen`."""
    return Options(**{**chosen, **{name: group[name] for name in NAMES if name in group}}).carried_out()


def require_preconditioned(groups: Iterable[Mapping[str, Any]], chosen: Mapping[str, Any]) -> None:
    """Refuse a training in which no block would be preconditioned, by the blocks that are planned.

    Args:
        groups: of `param_groups`.
        chosen: options of the optimizer.

    Raises:
        ValueError: none would be, and `algorithm="elementwise"` does not ask for that.
    """
    trained = [(p, options_of(group, chosen)) for group in groups for _, p in group["params"]]
    algorithm = chosen.get("algorithm", Options.algorithm)
    if not algorithm_class(algorithm).preconditions or any(_preconditions(full_shape(p), o) for p, o in trained):
        return
    found = sorted({f"{noted_purpose(p)} {full_shape(p)}" for p, _ in trained})
    raise ValueError(
        f"nothing to precondition: the {len(trained)} trained parameters are {'; '.join(found[:4])}"
        f"{', ...' if len(found) > 4 else ''}, which the base optimizer alone updates"
        + (f" beside {algorithm=}" if ALGORITHMS[algorithm].vocabulary == FALLBACK else "")
        + ".  For that use --optim adamw4bit (algorithm='elementwise')."
    )


def _preconditions(shape: tuple[int, ...], options: Options) -> bool:
    return any(block.algorithm.preconditions for block in blocks_of(shape, options))


def _purpose(places: list[_Place], shape: tuple[int, ...], is_head: bool) -> Purpose:
    if len(shape) < 2:
        module, name = places[0].module, places[0].attribute
        return Purpose("elementwise", "vector", "norm" if _is_norm(module) else "bias" if "bias" in name else "vector")
    found = [_purpose_in(place, shape) for place in places]
    embedding = next((purpose for purpose in found if purpose.kind == "embedding"), None)
    return embedding or (_HEAD if is_head else found[0])


def _purpose_in(place: _Place, shape: tuple[int, ...]) -> Purpose:
    """By the table above; of a parameter of two or more dimensions."""
    module, is_weight = place.module, "weight" in place.attribute
    if isinstance(module, _EMBEDDINGS):
        of_biases = "bias" in place.path.rpartition(".")[2]  # T5's relative_attention_bias
        return Purpose("elementwise", "embedding", "table of biases") if of_biases else _EMBEDDING
    if is_weight and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
        return _HEAD if _HEAD_NAME.search(place.path) else Purpose("matrix", "matrix", "linear layer")
    if is_weight and isinstance(module, _CONVOLUTIONS):
        return Purpose("conv1d" if len(shape) == 3 else "matrix", "matrix", "convolution")
    if _is_norm(module):
        return Purpose("elementwise", "vector", "norm")
    if place.attribute in getattr(module, "adapter_layer_names", ()) and not _TABLE_NAME.search(place.attribute):
        return Purpose("matrix", "matrix", "adapter")  # of PEFT, whose layers say which parameters are their weights
    return _purpose_by_name(type(module).__name__, place.attribute, shape)


def _purpose_by_name(owner: str, name: str, shape: tuple[int, ...]) -> Purpose:
    """In a module whose type says nothing: by its class's name, the parameter's, and the number of dimensions."""
    if _VECTOR_NAME.search(name):
        return Purpose("elementwise", "vector", "biases or scales")
    if "Embed" in owner or _TABLE_NAME.search(name):
        is_embedding = len(shape) == 2 and ("Embed" in owner or "embed" in name)
        return _EMBEDDING if is_embedding else Purpose("elementwise", "embedding", "positions or tokens")
    if "Expert" in owner:
        return Purpose("matrix", "matrix", "experts")
    if _WEIGHT_NAME.search(name):
        return Purpose("matrix", "matrix", "weight")
    if len(shape) == 3 and min(shape) > 1:
        return Purpose("matrix", "matrix", "stack of weights")
    return Purpose("elementwise", "vector", "no weight by its name")


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or bool(_NORM_CLASS.search(type(module).__name__))


def _places(model: nn.Module) -> dict[int, list[_Place]]:
    """By a parameter's id: every place where the model has it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, list[_Place]] = {}
    for path, module in modules.items():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(_place(path, attribute, modules))
    return found


def _place(path: str, attribute: str, modules: Mapping[str, nn.Module]) -> _Place:
    """Through what only keeps a module's parameters for it: its parametrizations, dicts and lists."""
    if isinstance(modules[path], ParametrizationList):  # "conv.parametrizations.weight"
        path, _, attribute = f".{path}".rpartition(".parametrizations.")
        path = path[1:]
    elif path and isinstance(modules[path], (nn.ParameterDict, nn.ParameterList)):
        path, _, attribute = path.rpartition(".")
    return _Place(path, modules[path], attribute)


def _output_heads(model: nn.Module) -> set[int]:
    """The weights that make logits, as the models of transformers (also inside wrappers and adapters) tell them."""
    heads = [getattr(module, "get_output_embeddings", lambda: None)() for module in model.modules()]
    weights = [getattr(head, "weight", None) for head in heads]
    return {id(weight) for weight in weights if isinstance(weight, Tensor)}
