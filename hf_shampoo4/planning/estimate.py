"""What training takes before anything is rented: `hf_shampoo4.plan`, from shapes alone.

The model is built on the meta device, so neither its weights nor a GPU are needed, and what the
optimizer would keep is summed from the same descriptions that it allocates its state by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import torch
from torch import nn

from ..exceptions import OptionError
from ..execution.apply import Difference, difference, is_by_all, may_all_apply
from ..execution.waves import WaveParameter
from ..options import Options, require, resolve_for_all
from ..preconditioners.algorithms import algorithm_class
from ..training.arguments import DTYPES, ModelArguments
from ..utils.ceilings import Ceilings
from ..utils.extras import named
from .figures import OverRanks, Plan
from .other_optimizers import bytes_of_others
from .sharding_names import SHARDINGS
from .shardings import PlannedGroup, Sharding, planned_groups, sharding_of
from .tally import RANK_FIGURES, Tally
from .training_memory import Batch, TrainingMemory, activations, build, weights_and_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def plan(
    model_or_config: Union[nn.Module, PreTrainedConfig, str],
    world_size: int = 1,
    sharding: str = "ddp",
    shards: int | None = None,
    *,
    dtype: str = "float32",
    lora: int = 0,
    batch: Batch | None = None,
    **options: Any,
) -> Plan:
    """Memory, balance and traffic of training a model with `Shampoo4bit`, without its weights and without a GPU.

    Args:
        model_or_config: a module (on any device, meta too), a transformers configuration, or what `--model` of
            `hf-shampoo4 train` takes: a preset of configs/models, a config.json, a folder or a hub name.
        world_size: ranks.
        sharding: ddp, fsdp2, hsdp, zero1, zero2 or zero3.
        shards: under hsdp, the ranks that share one copy of the model; it divides `world_size` (default: 8, or all).
        dtype: of the parameters and their gradients, for a model by name or configuration: float32, bfloat16, float16.
        lora: for such a model, the rank of adapters on all its linear layers, which are then trained alone; 0: none.
        batch: what a rank computes at a time, for an estimate of the activations; None: none.
        options: options of the optimizer, `preset` and `config` among them.

    Returns:
        The plan; `print` shows it as a table.  `plan(...).state` is exact: what a live optimizer holds after a step.

    Raises:
        OptionError: an option, sharding, world size or model that is not allowed.
        MissingPackage: a model by name or configuration without transformers (the extra `train`).
    """
    return plan_of(Described(model_or_config, dtype, lora, batch), world_size, sharding, shards, **options)[0]


class Described(NamedTuple):
    """A model, and what `plan` takes besides for one by name or configuration."""

    given: Union[nn.Module, PreTrainedConfig, str]
    dtype: str = "float32"
    lora: int = 0
    batch: Batch | None = None


def plan_of(
    described: Described,
    world_size: int,
    sharding: str,
    shards: int | None,
    ceilings: Ceilings | None = None,
    **options: Any,
) -> tuple[Plan, nn.Module]:
    """`plan`, and the model that it was made of, for who goes on with it; `apply=auto` goes by the ceilings."""
    if sharding not in SHARDINGS:
        raise OptionError(f"sharding={sharding!r} is not allowed: it must be one of {', '.join(SHARDINGS)}")
    if world_size < 1:
        raise OptionError(f"world_size={world_size!r} is not allowed: it must be an integer >= 1")
    if described.lora < 0:
        raise OptionError(f"lora={described.lora!r} is not allowed: it must be an integer >= 0")
    layout = sharding_of(sharding, world_size, shards)
    chosen = resolve_for_all(options)
    name, model = _named_model(described)
    groups = planned_groups(model, chosen, layout)
    members = [member for group in groups for member in group.members]
    factored = [member for member in members if _is_factored(member)]
    if not factored and algorithm_class(chosen.get("algorithm", Options.algorithm)).preconditions:
        raise OptionError(f"nothing to precondition: {name} has no matrix that is not left to the base optimizer")
    blocks = [block for member in factored for block in member.blocks]
    against = _all_against_owners(groups, world_size)
    shorter = against is not None and ceilings is not None and against.seconds(ceilings) < 0
    by_all = against is not None and is_by_all(chosen.get("apply", Options.apply), shorter)
    tally = Tally(world_size, by_all)
    for group in groups:
        tally.add(group)
    made = Plan(
        model=name,
        world_size=world_size,
        sharding=sharding,
        shards=layout.shards,
        copies=world_size if groups[0].replicated else 1,
        options=chosen,
        parameters=sum(member.numel for member in members),
        preconditioned=sum(member.numel for member in factored),
        tensors=len(members),
        preconditioned_tensors=len(factored),
        blocks=len(blocks),
        wave=max(member.room for member in members),
        largest_block=max((block.shape for block in blocks), key=math.prod, default=(0, 0)),
        **{name: OverRanks.of(getattr(tally, name)) for name in RANK_FIGURES},
        apply="all" if by_all else "owners",
        all_against_owners=against,
        others=bytes_of_others(model, world_size, groups[0].replicated),
        training=_training(model, layout, described.batch),
    )
    return made, model


def _all_against_owners(groups: Sequence[PlannedGroup], world: int) -> Difference | None:
    """None: not every rank has all that it would need.

    Raises:
        OptionError: and yet it is asked for.
    """
    shared_out = [group.shared_out for group in groups]
    able = all(may_all_apply(*group, world) for group in shared_out)
    asked, cut = groups[0].options.apply, "auto or owners where ranks have a part of the parameters each"
    require("apply", asked, able or world == 1 or asked != "all", cut)
    return difference(shared_out, world) if able else None


def _config(given: Union[PreTrainedConfig, str]) -> PreTrainedConfig:
    with named():
        from ..training.model import load_model_config

    return load_model_config(ModelArguments(model=given)) if isinstance(given, str) else given


def _named_model(described: Described) -> tuple[str, nn.Module]:
    """A module with the parameters' shapes, on the meta device unless it was one already."""
    given, dtype, lora, batch = described
    if isinstance(given, nn.Module):
        if batch or lora or dtype != "float32":
            raise OptionError("dtype, lora and batch are for a model by name or configuration: a module has them")
        return type(given).__name__, given
    config = _config(given)
    with torch.device("meta"):
        model = build(config, _dtype(dtype), lora)
    name = given if isinstance(given, str) else (config.architectures or [type(config).__name__])[0]
    return f"{name}, LoRA of rank {lora}" if lora else str(name), model


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise OptionError(f"dtype={name!r} is not allowed: it must be one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def _training(model: nn.Module, layout: Sharding, batch: Batch | None) -> TrainingMemory:
    weights, gradients = weights_and_gradients(model.parameters(), layout)
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    kept = activations(model, batch) if batch else 0
    return TrainingMemory(" and ".join(kinds), weights, gradients, batch, kept)


def _is_factored(member: WaveParameter) -> bool:
    return bool(member.blocks) and member.blocks[0].algorithm.preconditions
