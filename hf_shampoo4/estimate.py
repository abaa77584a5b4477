"""What training takes before anything is rented: `hf-shampoo4 plan` and `hf_shampoo4.plan`.

From geometry alone: the model is built on the meta device, so neither its weights nor a GPU are needed, and what the
optimizer would keep is summed from the same descriptions that it allocates its state by.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import nn

from .algorithms import Elementwise
from .files import write_figure, write_json
from .integrations.groups import param_groups
from .integrations.trainer import OPTIMS
from .options import NAMES, OptionError, Options, parse_optim_args, resolve
from .plan import Block, _in_waves, blocks_of
from .report import block_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHARDINGS = {
    "ddp": "every rank holds the whole model and the whole state (also: one process)",
}


@dataclass(frozen=True)
class Load:
    """One quantity over the ranks."""

    total: int
    largest: int
    """Of one rank."""

    @classmethod
    def of(cls, ranks: Sequence[int]) -> Load:
        return cls(sum(ranks), max(ranks))


@dataclass(frozen=True)
class Plan:
    """What training a model takes; bytes, unless it says otherwise."""

    model: str
    world_size: int
    sharding: str
    options: dict[str, Any]
    """Those that were set; the others are at their default."""
    parameters: int
    """Elements of the trainable parameters."""
    preconditioned: int
    """Of them, elements of parameters that have factors."""
    tensors: int
    preconditioned_tensors: int
    blocks: int
    """Rectangles with a pair of factors."""
    largest_block: tuple[int, int]
    state: Load
    working: Load
    """Gradient copies and other temporaries of the largest wave."""
    exchange: Load
    """Send and receive buffers of the largest wave."""
    refresh_cost: Load
    """Multiplications of one update of all roots, leading order: m^3 + n^3 a block."""
    wire_step: Load
    """Sent by the optimizer in a step; what the data parallelism itself sends is not in it."""
    wire_refresh: Load
    """Sent besides, in a step that computes roots."""
    others: dict[str, Load]
    """State of other optimizers of this model, cut evenly over the ranks where it is sharded."""

    @property
    def peak(self) -> int:
        """Optimizer memory of the fullest rank at the worst moment of a step."""
        return self.state.largest + self.working.largest + self.exchange.largest

    def bytes_per_parameter(self, load: Load) -> float:
        """Of one copy of the state."""
        return load.total / self.parameters / (self.world_size if self.sharding == "ddp" else 1)

    @property
    def balance(self) -> float:
        """Refresh work of the busiest rank over the mean: 1 is perfect."""
        return self.refresh_cost.largest * self.world_size / max(self.refresh_cost.total, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        return {**asdict(self), "peak": self.peak, "balance": self.balance}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan(
    model_or_config: Union[nn.Module, PreTrainedConfig, str], world_size: int = 1, sharding: str = "ddp", **options: Any
) -> Plan:
    """Memory, balance and traffic of training a model with `Shampoo4bit`, without its weights and without a GPU.

    Args:
        model_or_config: a module (on any device, meta too), a transformers configuration, or what `--model` of
            `hf-shampoo4 train` takes: a preset of configs/models, a config.json, a folder or a hub name.
        world_size: ranks.
        sharding: a name of `SHARDINGS`.
        options: options of the optimizer, `preset` and `config` among them.

    Returns:
        The plan; `print` shows it as a table.  `plan(...).state` is exact: what a live optimizer holds after a step.

    Raises:
        OptionError: an option, sharding, world size or model that is not allowed.
    """
    if sharding not in SHARDINGS:
        raise OptionError(f"sharding={sharding!r} is not allowed: it must be one of {', '.join(SHARDINGS)}")
    if world_size < 1:
        raise OptionError(f"world_size={world_size!r} is not allowed: it must be an integer >= 1")
    chosen = resolve(options)
    name, model = _named_model(model_or_config)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups = [_Group.of(group, chosen, embeddings) for group in param_groups(model)]
    treated = [one for group in groups for one in group.members]
    factored = [one for one in treated if one.factored]
    if not factored and chosen.get("algorithm") != "elementwise":
        raise OptionError(f"nothing to precondition: {name} has no matrix besides embeddings and the output head")
    blocks = [block for one in factored for block in one.blocks]
    return Plan(
        model=name,
        world_size=world_size,
        sharding=sharding,
        options=chosen,
        parameters=sum(one.elements for one in treated),
        preconditioned=sum(one.elements for one in factored),
        tensors=len(treated),
        preconditioned_tensors=len(factored),
        blocks=len(blocks),
        largest_block=max((block.rect.shape for block in blocks), key=math.prod, default=(0, 0)),
        state=_replicated(sum(block_bytes(one.blocks) for one in treated), world_size),
        working=_replicated(max(group.working for group in groups), world_size),
        exchange=_replicated(0, world_size),
        refresh_cost=_replicated(sum(map(_refresh_cost, blocks)), world_size),
        wire_step=_replicated(0, world_size),
        wire_refresh=_replicated(0, world_size),
        others={label: _replicated(sum(map(size, treated)), world_size) for label, size in OTHERS.items()},
    )


# ---------------------------------------------------------------------------------------------- the model


def _named_model(given: Union[nn.Module, PreTrainedConfig, str]) -> tuple[str, nn.Module]:
    """A module with the parameters' shapes, on the meta device unless it was one already."""
    if isinstance(given, nn.Module):
        return type(given).__name__, given
    import transformers

    from .train import ModelArguments, load_model_config

    config = load_model_config(ModelArguments(model=given)) if isinstance(given, str) else given
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is not None:
            return str(given) if isinstance(given, str) else architecture.__name__, architecture(config)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return str(given) if isinstance(given, str) else type(model).__name__, model


@dataclass(frozen=True)
class _Treated:
    """A parameter and how it is treated."""

    shape: tuple[int, ...]
    blocks: list[Block]
    embedding: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def factored(self) -> bool:
        return bool(self.blocks) and not isinstance(self.blocks[0].algorithm, Elementwise)


@dataclass(frozen=True)
class _Group:
    """A parameter group as the optimizer would treat it."""

    members: list[_Treated]
    working: int
    """Bytes of temporaries of its largest wave."""

    @classmethod
    def of(cls, group: Mapping[str, Any], chosen: Mapping[str, Any], embeddings: set[int]) -> _Group:
        options = Options(**{**chosen, **{key: value for key, value in group.items() if key in NAMES}})
        cut = {shape: blocks_of(shape, options) for shape in {tuple(p.shape) for _, p in group["params"]}}
        members = [_Treated(tuple(p.shape), cut[tuple(p.shape)], id(p) in embeddings) for _, p in group["params"]]
        wave = max(sum(p.numel() for _, p in wave) for wave in _in_waves(group["params"]))
        return cls(members, 4 * wave * _working_copies(options))


def _working_copies(options: Options) -> int:
    """float32 copies of a wave that a step holds at once: gradients, preconditioned, moments, update, rounding.

    tests/test_estimate.py counts every tensor that a step allocates.
    """
    return (8 if options.algorithm == "elementwise" else 12) + (8 if options.moments == "4bit_zipsr" else 0)


def _refresh_cost(block: Block) -> int:
    m, n = block.rect.shape
    return m**3 + n**3


def _replicated(size: int, world_size: int) -> Load:
    return Load(size * world_size, size)


# ---------------------------------------------------------------------------------------------- other optimizers


def _adamw(p: _Treated) -> int:
    """torch.optim.AdamW on float32 parameters."""
    return 8 * p.elements


def _adamw_8bit(p: _Treated) -> int:
    """bitsandbytes in the Trainer: blocks of 256; embeddings and tensors of fewer than 4,096 elements in 32 bits."""
    return 8 * p.elements if p.embedding or p.elements < 4096 else 2 * (p.elements + 4 * -(-p.elements // 256))


def _soap(p: _Treated) -> int:
    """nikhilvyas/SOAP at its defaults (2409.11321): a factor and a basis for every side of at most 10,000."""
    sides = [side for side in p.shape if side <= 10_000] if len(p.shape) > 1 else []
    return 8 * p.elements + sum(2 * 4 * side**2 for side in sides)


def _muon(p: _Treated) -> int:
    """KellerJordan/Muon: a momentum for hidden matrices, AdamW for the rest."""
    return (4 if p.factored else 8) * p.elements


OTHERS = {"AdamW, 32-bit": _adamw, "AdamW, 8-bit": _adamw_8bit, "SOAP": _soap, "Muon": _muon}
"""Optimizer -> bytes of its state for a float32 parameter."""


# ---------------------------------------------------------------------------------------------- output


def _lines(p: Plan) -> list[str]:
    """The plan as text."""
    settings = ", ".join(f"{name}={value}" for name, value in p.options.items()) or "default options"
    share = p.preconditioned / p.parameters
    return [
        f"{p.model}: {p.parameters:,} parameters in {p.tensors:,} tensors; {settings}",
        f"{p.world_size:,} x {p.sharding}: {SHARDINGS[p.sharding]}",
        f"preconditioned: {p.preconditioned:,} parameters ({share:.1%}) of {p.preconditioned_tensors:,} tensors, "
        f"in {p.blocks:,} blocks of up to {p.largest_block[0]} x {p.largest_block[1]}",
        "",
        f"{'optimizer state':<16}{'bytes/param':>12}{'a rank':>12}{'all ranks':>12}",
        *(
            f"{name:<16}{p.bytes_per_parameter(load):>12.2f}{_size(load.largest):>12}{_size(load.total):>12}"
            for name, load in [("Shampoo4bit", p.state), *p.others.items()]
        ),
        "",
        "Shampoo4bit, the fullest rank",
        f"{'  state':<40}{_size(p.state.largest):>12}",
        f"{'  working memory of a step':<40}{_size(p.working.largest):>12}",
        f"{'  exchange buffers':<40}{_size(p.exchange.largest):>12}",
        f"{'  peak':<40}{_size(p.peak):>12}",
        f"{'  sent in a step':<40}{_size(p.wire_step.largest):>12}",
        f"{'  sent besides when roots are computed':<40}{_size(p.wire_refresh.largest):>12}",
        f"refresh work of the busiest rank: {p.balance:.2f} times the mean",
    ]


def _size(size: int) -> str:
    """Bytes for people: three significant digits or more, in powers of 1,000."""
    unit = min(max(len(str(size)) - 1, 0) // 3, 4)
    return f"{size / 1000**unit:.{2 if unit else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def draw(p: Plan, path: Path) -> None:
    """Optimizer memory of the fullest rank, beside other optimizers' state, as a picture."""
    import matplotlib
    from matplotlib.figure import Figure

    loads = {"Shampoo4bit": p.state, **p.others}
    sizes = [load.largest / 1e9 for load in loads.values()]
    ends = [p.peak / 1e9, *sizes[1:]]
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
        axes = figure.subplots()
        axes.barh(list(loads), sizes, color=["#d9480f", *["#adb5bd"] * len(p.others)])
        start = sizes[0]
        for part, colour, label in (
            (p.working.largest, "#ffc9a3", "working memory of a step"),
            (p.exchange.largest, "#ffe8d6", "exchange buffers"),
        ):
            if part:
                axes.barh(0, part / 1e9, left=start, color=colour, label=label)
            start += part / 1e9
        for row, (end, load) in enumerate(zip(ends, loads.values(), strict=True)):
            text = f"{_size(load.largest)}, {p.bytes_per_parameter(load):.1f} bytes/param"
            axes.annotate(text, (end, row), xytext=(6, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.45 * max(ends)), xlabel="GB on the fullest rank")
        axes.set_title(f"Optimizer state of {p.model}, {p.world_size:,} x {p.sharding}")
        axes.legend(frameon=False, loc="lower right")
        write_figure(path, figure)


def main(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 plan`."""
    chosen = _parser().parse_args(arguments)
    options = {**OPTIMS[chosen.optim], **parse_optim_args(chosen.optim_args)}
    made = plan(chosen.model, chosen.world_size, chosen.sharding, **options)
    print(made)
    if chosen.output_dir:
        write_json(chosen.output_dir / "plan.json", made.to_dict())
        draw(made, chosen.output_dir / "plan.png")
        print(f"\n{chosen.output_dir / 'plan.json'}, {chosen.output_dir / 'plan.png'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 plan", description=__doc__)
    add = parser.add_argument
    add("model", help="a preset of configs/models, a config.json, a folder or a hub name")
    add("--world-size", "--world_size", type=int, default=1, metavar="N", help="ranks (default: 1)")
    add("--sharding", choices=SHARDINGS, default="ddp", help="how the ranks share the model (default: ddp)")
    add("--optim", choices=OPTIMS, default="shampoo4bit", help="as in --optim of a training (default: shampoo4bit)")
    add("--optim_args", "--optim-args", help='as in a training: "block_size=512,preset=paper_eigen"')
    add("--output_dir", "--output-dir", type=Path, help="write plan.json and plan.png there")
    return parser
