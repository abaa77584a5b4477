"""What training takes before anything is rented: `hf-shampoo4 plan` and `hf_shampoo4.plan`.

From geometry alone: the model is built on the meta device, so neither its weights nor a GPU are needed, and what the
optimizer would keep is summed from the same descriptions that it allocates its state by.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from torch import nn

from ..exceptions import OptionError
from ..execution.blocking import Block, _in_parts, _in_waves, blocks_of, loads_of
from ..execution.build import _assign
from ..execution.waves import Member
from ..groups import is_of_matrices, options_of, param_groups
from ..integrations.trainer import OPTIMS, head_options
from ..numerics.storage import nbytes
from ..options import Options, parse_optim_args, resolve
from ..preconditioners.algorithms import Elementwise
from ..preconditioners.protocols import Algorithm
from ..preconditioners.schedule import intervals
from ..sharding.geometry import Rect
from ..sharding.local_parameter import held_itself
from ..sharding.placement import Layout, Placement, Region, Split, ranges, sharded, whole
from ..utils.extras import named
from ..utils.files import write_json
from ..utils.plots import COLOURS, picture

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHARDINGS = {
    "ddp": "every rank holds the whole model",
    "fsdp2": "every rank holds some rows of every parameter, and the state of the blocks it owns",
    "hsdp": "the ranks of a group share the rows of every parameter, and all ranks the state of the blocks they own",
    "zero1": "every rank holds a range of all float32 weights (DeepSpeed), and the state of the blocks it owns",
    "zero2": "every rank holds a range of all float32 weights (DeepSpeed), and the state of the blocks it owns",
    "zero3": "every rank holds a range of every parameter (DeepSpeed), and the state of the blocks it owns",
}

NODE = 8  # ranks that share a copy of the model under HSDP, unless said otherwise: the GPUs of a machine
SUB_GROUP = 1_000_000_000  # entries of a rank that ZeRO-3 updates together: DeepSpeed's default sub_group_size


@dataclass(frozen=True)
class Load:
    """One quantity over the ranks."""

    total: int
    largest: int
    """Of one rank."""

    @classmethod
    def of(cls, ranks: np.ndarray) -> Load:
        return cls(int(ranks.sum()), int(ranks.max()))


@dataclass(frozen=True)
class Plan:
    """What training a model takes; bytes, unless it says otherwise."""

    model: str
    world_size: int
    sharding: str
    shards: int
    """Ranks that share one copy of the model's weights."""
    copies: int
    """Of the state: 1 where the ranks share it, else one a rank."""
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
    """Gradient copies and other temporaries of the largest wave; an estimate."""
    exchange: Load
    """What is sent and received of the largest wave, in buffers."""
    work: Load
    """Operations of the blocks' owners, an average step: `preconditioners.operations.Work.cost`."""
    wire_step: Load
    """Sent by the optimizer in a late step, on average where refreshes are spread over the steps of a period; what the
    data parallelism itself sends is not in it."""
    wire_refresh: Load
    """The same in a step that computes all factors, roots or bases."""
    others: dict[str, Load]
    """State of other optimizers of this model, cut evenly over the ranks where ours is."""

    @property
    def peak(self) -> int:
        """Optimizer memory of the fullest rank at the worst moment of a step."""
        return self.state.largest + self.working.largest + self.exchange.largest

    def bytes_per_parameter(self, load: Load) -> float:
        """Of one copy of the state."""
        return load.total / self.parameters / self.copies

    @property
    def balance(self) -> float:
        """Work of the busiest rank over the mean: 1 is perfect."""
        return self.work.largest * self.world_size / max(self.work.total, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        return {**asdict(self), "peak": self.peak, "balance": self.balance}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan(
    model_or_config: Union[nn.Module, PreTrainedConfig, str],
    world_size: int = 1,
    sharding: str = "ddp",
    shards: int | None = None,
    **options: Any,
) -> Plan:
    """Memory, balance and traffic of training a model with `Shampoo4bit`, without its weights and without a GPU.

    Args:
        model_or_config: a module (on any device, meta too), a transformers configuration, or what `--model` of
            `hf-shampoo4 train` takes: a preset of configs/models, a config.json, a folder or a hub name.
        world_size: ranks.
        sharding: ddp, fsdp2, hsdp, zero1, zero2 or zero3.
        shards: under hsdp, the ranks that share one copy of the model; it divides `world_size` (default: 8, or all).
        options: options of the optimizer, `preset` and `config` among them.

    Returns:
        The plan; `print` shows it as a table.  `plan(...).state` is exact: what a live optimizer holds after a step.

    Raises:
        OptionError: an option, sharding, world size or model that is not allowed.
        MissingPackage: a model by name or configuration without transformers (the extra `train`).
    """
    if sharding not in SHARDINGS:
        raise OptionError(f"sharding={sharding!r} is not allowed: it must be one of {', '.join(SHARDINGS)}")
    if world_size < 1:
        raise OptionError(f"world_size={world_size!r} is not allowed: it must be an integer >= 1")
    layout = _layout(sharding, world_size, shards)
    chosen = resolve(options)
    name, model = _named_model(model_or_config)
    groups = _groups(model, chosen, layout)
    members = [member for group in groups for member in group.members]
    factored = [member for member in members if _is_factored(member)]
    if not factored and chosen.get("algorithm") != "elementwise":
        raise OptionError(f"nothing to precondition: {name} has no matrix that is not left to the base optimizer")
    blocks = [block for member in factored for block in member.blocks]
    tally = _Tally(world_size)
    for group in groups:
        tally.add(group)
    return Plan(
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
        largest_block=max((block.shape for block in blocks), key=math.prod, default=(0, 0)),
        **{name: Load.of(getattr(tally, name)) for name in RANK_FIGURES},
        others=_others(model, world_size, groups[0].replicated),
    )


# ---------------------------------------------------------------------------------------------- the model


def _named_model(given: Union[nn.Module, PreTrainedConfig, str]) -> tuple[str, nn.Module]:
    """A module with the parameters' shapes, on the meta device unless it was one already."""
    if isinstance(given, nn.Module):
        return type(given).__name__, given
    with named():
        import transformers

        from ..training.model import ModelArguments, load_model_config

    config = load_model_config(ModelArguments(model=given)) if isinstance(given, str) else given
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is not None:
            return str(given) if isinstance(given, str) else architecture.__name__, architecture(config)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return str(given) if isinstance(given, str) else type(model).__name__, model


# ---------------------------------------------------------------------------------------------- over the ranks


@dataclass(frozen=True)
class _Group:
    """A parameter group as the optimizer would treat it; the blocks have their owners."""

    options: Options
    members: list[Member]
    replicated: bool
    """Whether every rank keeps all of the state."""


@dataclass(frozen=True)
class _Layout:
    """How the ranks share the parameters."""

    sharding: str
    world: int
    shards: int

    @property
    def in_deepspeed(self) -> bool:
        """DeepSpeed has the optimizer update one parameter group at a time, so owners are chosen for each alone."""
        return self.sharding.startswith("zero")

    def units(self, named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
        """The parameters of a group that are updated together."""
        if self.sharding != "zero3":
            return [named]
        units: list[list[tuple[str, nn.Parameter]]] = [[]]
        filled = 0
        for name, p in named:
            if filled >= SUB_GROUP:
                units.append([])
                filled = 0
            units[-1].append((name, p))
            filled += -(-p.numel() // self.world)
        return units

    def placements(self, shapes: list[tuple[int, ...]]) -> list[Placement]:
        """Where the parameters of a unit live."""
        ranks, rows = tuple(range(self.world)), Split(0, 1)
        if self.sharding == "ddp":
            return [whole(shape, self.world) for shape in shapes]
        if self.sharding == "fsdp2":
            return [sharded(shape, Layout((ranks,), (self.world,), (rows,))) for shape in shapes]
        if self.sharding == "hsdp":
            mesh = (self.world // self.shards, self.shards)
            return [sharded(shape, Layout((ranks,), mesh, (None, rows))) for shape in shapes]
        if self.sharding == "zero3":
            return [_cut_evenly(shape, self.world) for shape in shapes]
        return _in_one_buffer(shapes, self.world)


def _layout(sharding: str, world: int, shards: int | None) -> _Layout:
    if sharding != "hsdp":
        if shards is not None:
            raise OptionError(f"shards={shards!r} is for sharding='hsdp'; with {sharding!r} leave it out")
        return _Layout(sharding, world, 1 if sharding == "ddp" else world)
    chosen = min(NODE, world) if shards is None else shards
    if chosen < 1 or world % chosen:
        raise OptionError(f"shards={chosen!r} is not allowed: it must divide world_size={world}")
    return _Layout(sharding, world, chosen)


@cache
def _cut_evenly(shape: tuple[int, ...], world: int) -> Placement:
    """ZeRO-3: every parameter in equal ranges, the last ones shorter."""
    numel = math.prod(shape)
    size = -(-numel // world)
    return ranges(shape, [(min(r * size, numel), min((r + 1) * size, numel)) for r in range(world)])


def _in_one_buffer(shapes: list[tuple[int, ...]], world: int) -> list[Placement]:
    """ZeRO-1 and ZeRO-2: the parameters of a group one after the other, and that in equal ranges (aligned to 2)."""
    size = 2 * -(-sum(map(math.prod, shapes)) // (2 * world))
    placements, at = [], 0
    for shape in shapes:
        numel = math.prod(shape)
        bounds = [(0, 0)] * world
        for rank in range(at // size, min(-(-(at + numel) // size), world)):
            bounds[rank] = max(rank * size - at, 0), min((rank + 1) * size - at, numel)
        placements.append(ranges(shape, bounds))
        at += numel
    return placements


def _groups(model: nn.Module, chosen: Mapping[str, Any], layout: _Layout) -> list[_Group]:
    groups = []
    for group in param_groups(model, head=head_options(chosen)):
        options = options_of(group, chosen)
        replicated = layout.world == 1 or (layout.sharding == "ddp" and not options.shard_state)
        cut = {shape: blocks_of(shape, options) for shape in {tuple(p.shape) for _, p in group["params"]}}
        for unit in layout.units(group["params"]):
            placements = layout.placements([tuple(p.shape) for _, p in unit])
            members = [
                Member(held_itself(name, p), placement, blocks, [0] * len(blocks))
                for (name, p), placement in zip(unit, placements, strict=True)
                for blocks in [cut[tuple(p.shape)]]
            ]
            groups.append(_Group(options, members, replicated))
    for assigned in [[group] for group in groups] if layout.in_deepspeed else [groups]:
        _assign([group.members for group in assigned], [group.options for group in assigned], layout.world)
    return groups


RANK_FIGURES = ("state", "working", "exchange", "work", "wire_step", "wire_refresh")


@dataclass
class _Tally:
    """What every rank has and sends: int64 arrays over the ranks, bytes but for `work`."""

    world: int
    state: np.ndarray = field(init=False)
    working: np.ndarray = field(init=False)
    exchange: np.ndarray = field(init=False)
    work: np.ndarray = field(init=False)
    wire_step: np.ndarray = field(init=False)
    wire_refresh: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        for name in RANK_FIGURES:
            setattr(self, name, np.zeros(self.world, np.int64))
        self._held_of: dict[int, np.ndarray] = {}

    def add(self, group: _Group) -> None:
        """Count a group, wave by wave."""
        for batch in _in_waves(group.members):
            self._add_wave(batch, group)

    def _add_wave(self, members: Sequence[Member], group: _Group) -> None:
        counts: np.ndarray = np.zeros((4, self.world), np.int64)
        owned, kept, held, asked = counts
        state: np.ndarray = np.zeros(self.world, np.int64)
        blocks: dict[Algorithm, np.ndarray] = {}
        for member in members:
            held += self._held(member.placement)
            asked += self._asked(member)
            for block, owner, load in zip(
                member.blocks, member.owners, loads_of(member.blocks, group.options), strict=True
            ):
                owned[owner] += math.prod(block.rect.shape)
                blocks.setdefault(block.algorithm, np.zeros(self.world, np.int64))[owner] += 1
                kept[owner] += _overlap(block, member.placement.share_of[owner].region)
                state[owner] += load.bytes
                self.work[owner] += load.flops
        self.state += state.sum() if group.replicated else state
        split = _parts(members)
        self.working = np.maximum(self.working, 4 * _working(blocks, owned, split))
        if self.world > 1:
            self._add_traffic(members, group, split, *counts)

    def _held(self, placement: Placement) -> np.ndarray:
        """Entries of a parameter by rank; equal placements are one object."""
        if id(placement) not in self._held_of:
            found: np.ndarray = np.zeros(self.world, np.int64)
            for region, ranks in placement.shares:
                found[list(ranks)] += region.numel
            self._held_of[id(placement)] = found
        return self._held_of[id(placement)]

    def _asked(self, member: Member) -> np.ndarray:
        """Entries of the gradient that each rank gives to owners: of replicas, the one in the owner's place does."""
        replicas = next(len(ranks) for region, ranks in member.placement.shares if region.numel)
        if member.placement.whole or replicas == 1:
            return self._held(member.placement)
        found: np.ndarray = np.zeros(self.world, np.int64)
        for block, owner in zip(member.blocks, member.owners, strict=True):
            for region, ranks in member.placement.shares:
                found[ranks[owner * len(ranks) // self.world]] += _overlap(block, region)
        return found

    def _add_traffic(
        self, members: Sequence[Member], group: _Group, split: int, owned: Any, kept: Any, held: Any, asked: Any
    ) -> None:
        """Entries that a rank gives and does not own travel to their owner, and back to all that hold them."""
        width, short = members[0].parameter.element_size(), group.options.wire == "bf16"
        gradient, update = (2, 2) if short else (width, 4)
        if members[0].placement.whole:  # the owner has the gradient and the weights; everybody needs the new ones
            weights = 2 if short else width
            out, into = (self.world - 1) * weights * owned, weights * (owned.sum() - owned)
        else:
            copies = held.sum() // owned.sum()
            out = gradient * (asked - kept) + update * (copies * owned - kept)
            into = gradient * (owned - kept) + update * (held - kept)
        often, seldom = _changed(members, group, self.world)
        refresh = out + (self.world - 1) * sum(seldom.values(), often)
        self.wire_step += out + (self.world - 1) * often
        if group.options.stagger:
            for every, size in seldom.items():
                self.wire_step += (self.world - 1) * size // every
        self.wire_refresh += refresh
        arriving = into + (refresh - out).sum() // (self.world - 1) - (refresh - out) // (self.world - 1)
        self.exchange = np.maximum(self.exchange, -(-(refresh + arriving) // split))


def _changed(members: Sequence[Member], group: _Group, world: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Bytes of state that every rank's blocks change for all to have: at each step, and once in so many steps."""
    often: np.ndarray = np.zeros(world, np.int64)
    seldom: dict[int, np.ndarray] = {}
    blocks = Counter((b.algorithm, o) for m in members for b, o in zip(m.blocks, m.owners, strict=True))
    for (algorithm, owner), count in blocks.items() if group.replicated else ():
        sizes = {name: count * nbytes(storage) for name, storage in algorithm.storages().items()}
        for refresh, names in algorithm.refreshes().items():
            seldom.setdefault(intervals(group.options)[refresh], np.zeros(world, np.int64))[owner] += sum(
                sizes.pop(name) for name in names
            )
        often[owner] += sum(sizes.values())
    return often, seldom


def _parts(members: Sequence[Member]) -> int:
    """In how many parts a wave is computed."""
    blocks = [block for member in members for block in member.blocks]
    return len(_in_parts(blocks, [owner for member in members for owner in member.owners], members[0].parts)) or 1


def _overlap(block: Block, region: Region) -> int:
    """Entries of a block in a range of its parameter."""
    return _before(block, region.start + region.numel) - _before(block, region.start)


def _before(block: Block, position: int) -> int:
    """Entries of a block whose row-major position in the parameter is below `position`."""
    r: Rect = block.rect
    row, column = divmod(position, block.view.columns)
    row -= r.matrix * block.view.rows
    rows = min(max(row - r.r0, 0), r.r1 - r.r0)
    part = min(max(column - r.c0, 0), r.c1 - r.c0) if r.r0 <= row < r.r1 else 0
    return rows * (r.c1 - r.c0) + part


def _working(blocks: Mapping[Algorithm, np.ndarray], owned: np.ndarray, split: int) -> np.ndarray:
    """float32 numbers that each rank has at once beside the state: gradients, updates, and the largest stack's room.

    Args:
        blocks: of a wave, how many each rank owns.
        owned: their entries.
        split: in how many parts the wave is computed.
    """
    room: np.ndarray = np.zeros_like(owned)
    for algorithm, counts in blocks.items():
        numbers, which = np.unique(-(-counts // split), return_inverse=True)
        room = np.maximum(room, np.array([max(algorithm.room(int(n)).values()) for n in numbers])[which])
    copies = 3 if any(algorithm.grafted for algorithm in blocks) else 2  # P of all stacks, before any has its update
    return room + copies * -(-owned // split)


def _is_factored(member: Member) -> bool:
    return bool(member.blocks) and not isinstance(member.blocks[0].algorithm, Elementwise)


# ---------------------------------------------------------------------------------------------- other optimizers


@dataclass(frozen=True)
class _Treated:
    """A parameter, as other optimizers tell them apart."""

    shape: tuple[int, ...]
    embedding: bool
    hidden_matrix: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


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
    return (4 if p.hidden_matrix else 8) * p.elements


OTHERS = {"AdamW, 32-bit": _adamw, "AdamW, 8-bit": _adamw_8bit, "SOAP": _soap, "Muon": _muon}
"""Optimizer -> bytes of its state for a float32 parameter."""


def _others(model: nn.Module, world: int, replicated: bool) -> dict[str, Load]:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {id(p) for group in param_groups(model) if is_of_matrices(group) for _, p in group["params"]}
    treated = [
        _Treated(tuple(p.shape), id(p) in embeddings, id(p) in matrices) for p in model.parameters() if p.requires_grad
    ]
    sizes = {label: sum(map(size, treated)) for label, size in OTHERS.items()}
    if replicated:
        return {label: Load(size * world, size) for label, size in sizes.items()}
    return {label: Load(size, -(-size // world)) for label, size in sizes.items()}


# ---------------------------------------------------------------------------------------------- output


def _lines(p: Plan) -> list[str]:
    """The plan as text."""
    settings = ", ".join(f"{name}={value}" for name, value in p.options.items()) or "default options"
    share = p.preconditioned / p.parameters
    return [
        f"{p.model}: {p.parameters:,} parameters in {p.tensors:,} tensors; {settings}",
        f"{_spread(p)}: {SHARDINGS[p.sharding]}",
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
        f"{'  sent where every block is refreshed':<40}{_size(p.wire_refresh.largest):>12}",
        f"work of the busiest rank: {p.balance:.2f} times the mean",
    ]


def _spread(p: Plan) -> str:
    """The ranks, as people write them."""
    groups = f"{p.world_size // p.shards:,} x {p.shards:,}" if p.sharding == "hsdp" else f"{p.world_size:,}"
    return f"{groups} x {p.sharding}"


def _size(size: int) -> str:
    """Bytes for people: three significant digits or more, in powers of 1,000."""
    unit = min(max(len(str(size)) - 1, 0) // 3, 4)
    return f"{size / 1000**unit:.{2 if unit else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def draw(p: Plan, path: Path) -> None:
    """Optimizer memory of the fullest rank, beside other optimizers' state, as a picture."""
    loads = {"Shampoo4bit": p.state, **p.others}
    sizes = [load.largest / 1e9 for load in loads.values()]
    ends = [p.peak / 1e9, *sizes[1:]]
    with picture(path, (9, 3.6), grid="x", dpi=160) as (_, panels):
        axes = panels[0][0]
        axes.barh(list(loads), sizes, color=[COLOURS[1], *["#adb5bd"] * len(p.others)])
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
        axes.set_title(f"Optimizer state of {p.model}, {_spread(p)}")
        axes.legend(frameon=False, loc="lower right")


def main(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 plan`."""
    chosen = _parser().parse_args(arguments)
    named = OPTIMS[chosen.optim]
    options = {**named, **parse_optim_args(chosen.optim_args, beneath=named)}
    made = plan(chosen.model, chosen.world_size, chosen.sharding, chosen.shards, **options)
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
    add("--shards", type=int, metavar="N", help="under hsdp, ranks that share one copy of the model (default: 8)")
    add("--optim", choices=OPTIMS, default="shampoo4bit", help="as in --optim of a training (default: shampoo4bit)")
    add("--optim_args", "--optim-args", help='as in a training: "block_size=512,preset=paper_eigen"')
    add("--output_dir", "--output-dir", type=Path, help="write plan.json and plan.png there")
    return parser
