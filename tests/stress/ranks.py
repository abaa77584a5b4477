"""The optimizer on several ranks against one process, in processes with gloo: `python -m tests.stress.ranks --all`.

A launch starts `world` workers once and runs many cases in them.  The model's loss is linear in its parameters, with
coefficients of few bits: the engines' averages of the gradients are then exact in any order of summation, and what is
left to differ is the optimizer.  Judged is a result file a rank, not how a process ends.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]

import hf_shampoo4 as s4  # noqa: E402
from hf_shampoo4 import Shampoo4bit  # noqa: E402
from hf_shampoo4.checkpointing.convert import by_position, read  # noqa: E402
from hf_shampoo4.execution import gradients  # noqa: E402
from hf_shampoo4.execution.blocking import blocks_of, loads_of  # noqa: E402
from hf_shampoo4.numerics import quantize  # noqa: E402
from hf_shampoo4.options import Options  # noqa: E402
from hf_shampoo4.preconditioners import protocols  # noqa: E402
from hf_shampoo4.sharding.local_parameter import clean_name, full_shape, local_tensor, note_flat_ranges  # noqa: E402
from hf_shampoo4.utils.files import write_json  # noqa: E402
from tests.support import LONGEST_CHILD, end, used  # noqa: E402
from tests.support.regions import entries  # noqa: E402

# Otherwise MKL's eigh and QR give a matrix other last bits when it lies elsewhere in memory, as in a smaller stack.
BITWISE = {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}

OFTEN = {"stats_every": 2, "block_size": 32}
RARELY = ("3.unused",)  # has no gradient on every third step

# name -> shape: uneven rows, several blocks, experts, a fused q k v, fewer rows than ranks, vectors, one element
SHAPES: list[dict[str, tuple[int, ...]]] = [
    {"tied": (30, 24), "weight": (53, 70), "words": (812, 20)},
    {"qkv": (96, 64), "norm": (9,), "short": (2, 40)},
    {"experts": (3, 20, 30), "bias": (5000,), "one": (1,)},
    {"unused": (33, 20), "frozen": (12, 12), "last": (64, 66)},
]


class Layer(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            p = nn.Parameter(torch.randn(shape, generator=generator).to(dtype), requires_grad=name != "frozen")
            setattr(self, name, p)

    def forward(self, x: Tensor, coefficients: dict[str, Tensor]) -> Tensor:
        """x + sum_p <p, c_p>: the gradient of p is c_p."""
        for name, p in self.named_parameters(recurse=False):
            if name in coefficients:
                c = coefficients[name].to(p.dtype)
                if hasattr(p, "placements"):  # what tensor parallelism has left of it here
                    p, c = p.to_local(), cut(c, p.device_mesh, p.placements).to_local()
                x = x + (p * c).sum().float()
        return x


class Linear(nn.Module):
    """Loss linear in the parameters; `0.tied` is used in the first and, as the root's, in no other layer."""

    start: dict[str, Tensor] | None = None
    """The parameters that models are made with, if not the random ones."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shapes, i, dtype) for i, shapes in enumerate(SHAPES))
        if Linear.start is not None:
            self.load_state_dict(Linear.start)
        self.first = self.layers[0]  # shared module: its parameters appear once, under two names

    def forward(self, coefficients: list[dict[str, Tensor]]) -> Tensor:
        x = torch.zeros(())
        for layer, of_layer in zip(self.layers, coefficients, strict=True):
            x = layer(x, of_layer)
        return x


def coefficients(step: int, rank: int, world: int) -> list[dict[str, Tensor]]:
    """A rank's gradient: world * i / 64 with small integers i, so that means over ranks are exact, also in bfloat16."""
    found = []
    for i, shapes in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + i)
        of_layer = {}
        for name, shape in shapes.items():
            c = torch.randn(shape, generator=generator).mul_(4).round_().clamp_(-9, 9) * (world / 64)
            if name != "frozen" and not (f"{i}.{name}" in RARELY and step % 3 == 1):
                of_layer[name] = c
        found.append(of_layer)
    return found


def mean_coefficients(step: int, world: int) -> list[dict[str, Tensor]]:
    each = [coefficients(step, rank, world) for rank in range(world)]
    return [{name: sum(c[i][name] for c in each) / world for name in of_layer} for i, of_layer in enumerate(each[0])]


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def optimizer_of(model: nn.Module, options: dict[str, Any]) -> Shampoo4bit:
    """Three groups, as the integrations make them: matrices, a vocabulary, and what the base alone updates."""
    chosen = {"lr": 1e-2, "weight_decay": 0.1, "algorithm": "shampoo", **OFTEN, **options}
    chosen = used({**chosen, "roots_every": 3})
    lookups = ("tied", "bias", "norm", "one", "short")
    matrices = [(n, p) for n, p in named(model) if not n.endswith((*lookups, "words"))]
    words = [(n, p) for n, p in named(model) if n.endswith("words")]
    rest = [(n, p) for n, p in named(model) if n.endswith(lookups)]
    groups = [
        {"params": matrices, "row_splits": (64, 16, 16)}, {"params": words, "vocabulary": True},
        {"params": rest, "algorithm": "elementwise"},
    ]  # fmt: skip
    if chosen["algorithm"] == "elementwise":
        groups[0].pop("row_splits")
    return Shampoo4bit(groups, **chosen)


def bare(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the model that was not wrapped."""
    return {clean_name(name): p for name, p in parameters.items()}


def cut(t: Tensor, mesh: Any, placements: Any) -> Any:
    """A DTensor from what every rank has."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, mesh, placements, src_data_rank=None)


def full(t: Tensor) -> Tensor:
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t


# ------------------------------------------------------------------------------------------------------- engines


@dataclass
class Run:
    """A model in an engine, its optimizer, and one training step of it."""

    model: nn.Module
    optimizer: Shampoo4bit
    step: Callable[..., None]
    parameters: Callable[[], dict[str, Tensor]]
    missing: str = "none"
    """What the engine hands to a parameter that no rank has a gradient of: `none`, `zeros` or the `last` one."""
    copies: torch.dtype | None = None
    """Of the model, if it is a rounded copy of what the optimizer updates."""
    data: int = 0
    """How many ranks have data of their own, if not all have."""

    @property
    def named(self) -> dict[str, Tensor]:
        """The model's parameters that the optimizer has."""
        o = self.optimizer
        return {n: p for i in range(len(o.groups)) for n, p in zip(o.names(i), o.parameters(i), strict=True)}


def reference(
    options: dict[str, Any],
    world: int,
    dtype: torch.dtype = torch.float32,
    missing: str = "none",
    copies: torch.dtype | None = None,
) -> Run:
    """One process that is given the mean gradient."""
    model = Linear(dtype)
    if copies is not None:
        model = model.to(copies).to(dtype)
    optimizer = optimizer_of(model, {**options, "communicate": False})
    last: list[dict[str, Tensor]] = [{} for _ in SHAPES]

    def step(t: int, ranks: int = world, missing: str = missing) -> None:
        gradients = mean_coefficients(t, ranks)
        for kept, of_layer in zip(last, gradients, strict=True):
            kept.update(of_layer)
            if missing != "none":
                of_layer.update({n: c if missing == "last" else 0 * c for n, c in kept.items() if n not in of_layer})
        optimizer.zero_grad()
        model(gradients).backward()
        for layer, of_layer in zip(model.layers, gradients, strict=True) if missing != "none" else ():
            for name in [name for name in of_layer if not getattr(layer, name).requires_grad]:
                getattr(layer, name).grad = torch.zeros_like(of_layer[name])  # DeepSpeed goes on with what is frozen
        optimizer.step()

    def parameters() -> dict[str, Tensor]:
        return {n: full(p).to(copies or dtype) for n, p in model.named_parameters()}

    return Run(model, optimizer, step, parameters)


def missing_of(engine: str) -> str:
    """What an engine hands to a parameter that no rank has a gradient of (DeepSpeed 0.19.8, torch 2.13)."""
    if engine in ZERO:
        return "last" if "zero3" in engine or "offload" in engine else "zeros"
    return "zeros" if engine in FSDP1 else "none"


def ddp(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Run:
    from torch.nn.parallel import DistributedDataParallel

    bare = Linear(dtype)
    model = DistributedDataParallel(bare, find_unused_parameters=True)
    return _run(model, bare, optimizer_of(bare, options))


def fsdp2(options: dict[str, Any], dtype: torch.dtype = torch.float32, kind: str = "") -> Run:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    model, world = Linear(dtype), dist.get_world_size()
    settings: dict[str, Any] = {"mesh": init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))}
    if kind == "hsdp":
        settings["mesh"] = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    if kind == "mixed":
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if kind == "offload":
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in model.layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    return _run(model, model, optimizer_of(model, options))


FSDP1 = {
    "fsdp1": "FULL_SHARD", "fsdp1_grad_op": "SHARD_GRAD_OP", "fsdp1_hybrid": "HYBRID_SHARD",
    "fsdp1_no_shard": "NO_SHARD", "fsdp1_mixed": "FULL_SHARD",
}  # fmt: skip


def fsdp1(options: dict[str, Any], dtype: torch.dtype = torch.float32, kind: str = "") -> Run:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy

    world, strategy = dist.get_world_size(), ShardingStrategy[FSDP1[kind]]
    settings: dict[str, Any] = {
        "sharding_strategy": strategy,
        "use_orig_params": True,
        "device_id": torch.device("cpu"),
    }
    if kind == "fsdp1_hybrid":
        settings["device_mesh"] = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    if kind == "fsdp1_mixed":
        settings["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    inner = Linear(dtype)
    inner.first = None  # the layer would have two names
    for i, layer in enumerate(inner.layers):
        inner.layers[i] = FullyShardedDataParallel(layer, **settings)
    model = FullyShardedDataParallel(inner, **settings)
    note_flat_ranges(model)

    run = _run(model, model, optimizer_of(model, options))
    return dataclasses.replace(run, parameters=lambda: bare(whole(model)), missing=missing_of(kind))


def tensor_parallel(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Run:
    """Parameters cut in any dimension, as fused ones are, or not at all, with the gradient of all ranks in each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    model, world = Linear(dtype), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    placed: dict[str, Any] = {
        "weight": Shard(1), "qkv": _StridedShard(0, split_factor=2), "experts": Shard(2), "unused": Shard(0),
        "last": _StridedShard(1, split_factor=3), "norm": Replicate(),
    }  # fmt: skip

    tensor_parallelised(model, mesh, placed)
    optimizer = optimizer_of(model, options)

    def step(t: int) -> None:
        optimizer.zero_grad()
        for layer, given in zip(model.layers, mean_coefficients(t, world), strict=True):
            for name, c in given.items():
                p, c = getattr(layer, name), c.to(dtype)
                if p.requires_grad:
                    p.grad = cut(c, mesh, [placed[name]]) if name in placed else c
        optimizer.step()

    return Run(model, optimizer, step, lambda: {n: full(p) for n, p in model.named_parameters()})


def tensor_parallelised(model: nn.Module, mesh: Any, placed: dict[str, Any]) -> None:
    for layer in model.layers:
        for name, p in [(name, p) for name, p in layer.named_parameters(recurse=False) if name in placed]:
            setattr(layer, name, nn.Parameter(cut(p.detach(), mesh, [placed[name]])))


def tp_fsdp2(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Run:
    """Tensor parallelism of some parameters, FSDP2 of all: the others live on meshes of a part of the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    model, data = Linear(dtype), dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (data, 2), mesh_dim_names=("dp", "tp"))
    placed = {"weight": Shard(1), "qkv": Shard(0), "experts": _StridedShard(1, split_factor=2)}
    tensor_parallelised(model, mesh["tp"], placed)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    run = _run(model, model, optimizer_of(model, options))

    def step(t: int) -> None:
        run.optimizer.zero_grad()
        model(coefficients(t, mesh.get_local_rank("dp"), data)).backward()
        run.optimizer.step()

    return dataclasses.replace(run, step=step, data=data)


ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero0_bf16": {"stage": 0},  # DeepSpeed's class FP16_UnfusedOptimizer
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero1_robin": {"stage": 1, "round_robin_gradients": True},
    "zero2_robin": {"stage": 2, "round_robin_gradients": True},
    "zero2_aligned": {"stage": 2, "parameter_alignment": True, "round_robin_gradients": True},
    "zero3_groups": {"stage": 3, "sub_group_size": 3000},
    "zero3_init": {"stage": 3},  # made under zero.Init, as from_pretrained does: no rank ever sees a whole parameter
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "sub_group_size": 3000},
    "zero2_accumulated": {"stage": 2},
    "zero3_accumulated": {"stage": 3},
    "zero1_bf16": {"stage": 1},
    "zero2_bf16": {"stage": 2},
    "zero3_bf16": {"stage": 3},
    "zero1_bf16_optimizer": {"stage": 1},  # DeepSpeed's class BF16_Optimizer
}


def zero_config(kind: str) -> dict[str, Any]:
    """A DeepSpeed configuration; it clips gradients by default."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2 if "accumulated" in kind else 1,
        "zero_optimization": ZERO[kind], "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0, "bf16": {"enabled": "bf16" in kind}, "steps_per_print": 10**9,
    }  # fmt: skip
    if kind == "zero1_bf16_optimizer":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def deepspeed_without_compiler() -> Any:
    """DeepSpeed for several processes of one CPU without its extension in shared memory, which it would compile."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return deepspeed


def zero(options: dict[str, Any], dtype: torch.dtype = torch.float32, kind: str = "") -> Run:
    deepspeed, config = deepspeed_without_compiler(), zero_config(kind)
    rank, world = dist.get_rank(), dist.get_world_size()
    copies = torch.bfloat16 if "bf16" in kind else None
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=kind == "zero3_init"):
        model = Linear()
    model = model.to(copies or dtype)
    optimizer = optimizer_of(model, options)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def step(t: int) -> None:
        for _ in range(config["gradient_accumulation_steps"]):  # of the same gradient: their mean is exact
            engine.backward(engine(coefficients(t, rank, world)))
            engine.step()

    return Run(engine, optimizer, step, lambda: bare(whole(engine)), missing_of(kind), copies)


def _run(model: nn.Module, bare: nn.Module, optimizer: Shampoo4bit) -> Run:
    rank, world = dist.get_rank(), dist.get_world_size()

    def step(t: int) -> None:
        optimizer.zero_grad()
        model(coefficients(t, rank, world)).backward()
        optimizer.step()

    return Run(model, optimizer, step, lambda: {n: full(p) for n, p in bare.named_parameters()})


ENGINES: dict[str, Callable[..., Run]] = {
    "single": lambda options, dtype=torch.float32: reference(options, 1, dtype),
    "ddp": ddp,
    "ddp_all": lambda options, dtype=torch.float32: ddp({**options, "apply": "all"}, dtype),
    "ddp_wire": lambda options, dtype=torch.float32: ddp({**options, "wire": "bf16"}, dtype),
    "ddp_sharded": lambda options, dtype=torch.float32: ddp({**options, "shard_state": True}, dtype),
    "fsdp2": fsdp2,
    "fsdp2_mixed": lambda options, dtype=torch.float32: fsdp2(options, dtype, "mixed"),
    "fsdp2_offload": lambda options, dtype=torch.float32: fsdp2(options, dtype, "offload"),
    "hsdp": lambda options, dtype=torch.float32: fsdp2(options, dtype, "hsdp"),
    "tp": tensor_parallel,
    "tp_sharded": lambda options, dtype=torch.float32: tensor_parallel({**options, "shard_state": True}, dtype),
    "tp_fsdp2": tp_fsdp2,
    **{kind: functools.partial(fsdp1, kind=kind) for kind in FSDP1},
    **{kind: functools.partial(zero, kind=kind) for kind in ZERO},
}

OPTIONS: dict[str, dict[str, Any]] = {
    "shampoo": {},
    "cholesky_ef": {"factor": "cholesky_ef", "root": "newton"},
    "direct32": {"factor": "direct", "bits": 32, "moments": "fp32", "graft": "block"},
    "soap": {"algorithm": "soap", "refresh_warmup": 3},
    "kl_shampoo": {"algorithm": "kl_shampoo", "refresh_warmup": 3},
    "half": {"algorithm": "kl_shampoo", "refresh_warmup": 3, "rotation_precision": "bfloat16"},
    "kl_together": {"algorithm": "kl_shampoo", "refresh_warmup": 3, "stagger": False},
    "shampoo_staggered": {"algorithm": "shampoo", "stagger": True},
    "kl_soap": {"algorithm": "kl_soap", "refresh_warmup": 0},
    "elementwise": {"algorithm": "elementwise"},
    "sgdm": {"base": "sgdm"},
    "zipsr": {"moments": "4bit_zipsr", "stochastic_from": 3},
    "wire": {"wire": "bf16"},
    "bf16": {"dtype": "bfloat16", "stochastic_rounding": True},
}


# --------------------------------------------------------------------------------------------------------- cases


@dataclass
class Case:
    """What one mode is tried with: options, the form of a checkpoint to save, or ENGINE+FORM of one to load."""

    engine: str
    options: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.options}"

    def run(self, truths: dict[str, dict[str, Tensor]], folder: Path) -> dict[str, Any]:
        if self.engine == "accelerate":
            return accelerated(self, folder)
        if self.options in FORMS:
            return checkpoint(self, folder)
        if self.engine == "trainer":
            return trainer(self, folder)
        if self.options == "wide":
            return wide(self)
        if self.options == "failing":
            return failing(self)
        if self.options == "replanned":
            return replanned(self)
        if self.options == "moved":
            return moved(self)
        if self.options == "lopsided":
            return lopsided(self)
        if self.options == "strangers":
            return strangers(self)
        if self.options == "refused":
            return refused(self, folder)
        if self.options == "contract":
            return contract(self)
        return reshard(self, folder) if "+" in self.options else equality(self, truths)


def equality(case: Case, truths: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Train, and compare every parameter with the single process's; compare the ranks with each other."""
    options = dict(OPTIONS[case.options])
    dtype = getattr(torch, options.pop("dtype", "float32"))
    world = dist.get_world_size()
    run = ENGINES[case.engine](options, dtype)
    EXCHANGES.clear()
    key = f"{case.options} {run.missing} {run.copies}"
    if key not in truths:
        alone = reference(options, run.data or world, dtype, run.missing, run.copies)
        if dist.get_rank() == 0:
            for t in range(case.steps):
                alone.step(t)
        found = [alone.parameters()]
        dist.broadcast_object_list(found)
        truths[key] = found[0]
    start = time.perf_counter()
    for t in range(case.steps):
        run.step(t)
    seconds = time.perf_counter() - start
    mine, truth = run.parameters(), truths[key]
    digest = _digest(mine)
    digests: list[Any] = [None] * world
    dist.all_gather_object(digests, digest)
    worst = max(
        (mine[n].float() - p.float()).abs().max().item() / p.float().abs().max().item() for n, p in truth.items()
    )
    loads = [
        load
        for i, group in enumerate(run.optimizer.groups.groups)
        for p in run.optimizer.parameters(i)
        for load in loads_of(blocks_of(full_shape(p), Options.of(group)), Options.of(group))
    ]
    return {
        "bitwise": all(torch.equal(mine[n], p) for n, p in truth.items()),
        "worst": worst,
        "differ": [n for n, p in truth.items() if not torch.equal(mine[n], p)],
        "ranks_equal": len(set(digests)) == 1,
        "moved": max((mine[n].float() - p).abs().max().item() for n, p in Linear(dtype).named_parameters()),
        "state_bytes": sum(t.nbytes for entry in run.optimizer.state.values() for t in entry.values()),
        "all_state_bytes": sum(load.bytes for load in loads),
        "largest_block_bytes": max(load.bytes for load in loads),
        "sent": run.optimizer.sent,
        "theory": theory(run, case.steps),
        "exchanges": EXCHANGES.pop("made", 0),
        "parts": sum(len(wave.parts) for wave in run.optimizer.waves()),
        "most_parts": max(len(wave.parts) for wave in run.optimizer.waves()),
        "ms_per_step": round(1e3 * seconds / case.steps, 1),
    }


def replanned(case: Case) -> dict[str, Any]:
    """An option changes in mid-training, a parameter is frozen and trained again, another one only later trained."""
    run = ENGINES[case.engine]({}, torch.float32)
    alone = reference({}, run.data or dist.get_world_size(), missing=run.missing)
    for t in range(case.steps):
        for each in (run, alone):
            each.named["layers.3.last"].requires_grad_(t >= 2)
            each.named["layers.0.weight"].requires_grad_(t < 3 or t >= 5)
            each.optimizer.param_groups[0]["damping"] = 1e-6 if t < 4 else 1e-4
            each.step(t)
    return _compared(run.parameters(), alone.parameters())


def moved(case: Case) -> dict[str, Any]:
    """Between steps weights and state are moved, state on one rank alone too; what is saved stays what it is."""
    run = ENGINES[case.engine]({}, torch.float32)
    alone = reference({}, run.data or dist.get_world_size(), missing=run.missing)
    for t in range(case.steps):
        for each in (run, alone):
            each.step(t)
        before = _state(run.optimizer)
        for entry in run.optimizer.state.values():
            for key, tensor in list(entry.items()):
                if t == 3:
                    tensor.data = tensor.data.clone()
                elif t % 2 == 0 or dist.get_rank() == 0:
                    entry[key] = tensor.clone()
        if t % 2:
            run.model.cpu()
        after = _state(run.optimizer)
        assert before.keys() == after.keys(), t
        assert all(torch.equal(before[key], after[key]) for key in before), t
    return _compared(run.parameters(), alone.parameters())


def _state(optimizer: Shampoo4bit) -> dict[tuple[Any, str], Tensor]:
    """What is saved, as this rank has it."""
    entries = optimizer.state_dict()["state"].items()
    return {
        (p, key): (t.to_local() if hasattr(t, "to_local") else t).clone()
        for p, entry in entries
        for key, t in entry.items()
        if isinstance(t, Tensor)
    }


def lopsided(case: Case) -> dict[str, Any]:
    """Triton builds kernels (here: interprets them) on rank 0 alone."""
    alike, truths = dataclasses.replace(case, options="kl_shampoo", steps=3), dict[str, dict[str, Tensor]]()
    equality(alike, truths)
    with (
        mock.patch.object(quantize, "GPUS", ("cpu",)),
        mock.patch.object(quantize, "_triton_works", return_value=dist.get_rank() == 0),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        found = equality(alike, truths)
        found["works"] = quantize.has_kernels(torch.device("cpu"), 2)  # for another optimizer of this process
    return {**found, "said": [str(w.message) for w in said if "Triton" in str(w.message)]}


def strangers(case: Case) -> dict[str, Any]:
    """What each rank says where meshes of a part of the ranks train numbers of their own."""
    run = ENGINES[case.engine]({}, torch.float32)
    with torch.no_grad():
        own: Any = run.named["layers.3.last"]
        own.to_local().mul_(1 + dist.get_rank() % 2)
    return {"said": _message(lambda: run.step(0))}


EXCHANGES: dict[str, int] = {}
"""How many all-to-alls this process has made since it was cleared."""


def count_exchanges() -> None:
    exchange = dist.all_to_all_single

    def counted(*arguments: Any, **settings: Any) -> Any:
        EXCHANGES["made"] = EXCHANGES.get("made", 0) + 1
        return exchange(*arguments, **settings)

    dist.all_to_all_single = counted


def theory(run: Run, steps: int) -> dict[str, int]:
    """The bytes that this rank has to send, counted entry by entry: who holds it, and who owns its block."""
    rank, sent = dist.get_rank(), {"gradients": 0, "updates": 0}
    for wave in run.optimizer.waves():
        for member in wave.members:
            shape = member.blocks[0].view
            owner = np.full((shape.count, shape.rows, shape.columns), -1)
            for block, of_block in zip(member.blocks, member.owners, strict=True):
                rect = block.rect
                owner[rect.matrix, rect.r0 : rect.r1, rect.c0 : rect.c1] = of_block
            rare = member.name.endswith(RARELY) and run.missing == "none"
            times = sum(1 for t in range(steps) if not (rare and t % 3 == 1))
            for region, ranks in member.placement.shards:
                of_share = owner.flatten()[entries(region)]
                if ranks == (rank,):
                    sent["gradients"] += 4 * times * int((of_share != rank).sum())
                sent["updates"] += 4 * times * int((of_share == rank).sum()) * len(set(ranks) - {rank})
    return sent


# ---------------------------------------------------------------------------------------------------- checkpoints

FORMS = ("plain", "full", "sharded", "flat", "own", "side")


def save(run: Run, form: str, folder: Path) -> None:
    """The optimizer's state by one of the ways that users have, and the parameters as a full dict."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    parameters, rank, found = run.parameters(), dist.get_rank(), None
    if form == "plain":
        run.optimizer.consolidate()
        found = run.optimizer.state_dict() if rank == 0 else None  # the Trainer's way under DDP: the others never ask
    elif form == "own":
        run.model.save_checkpoint(str(folder))
    elif form == "side":
        s4.save_optimizer(run.optimizer, folder)
    elif is_fsdp1(run.model):
        found = fsdp1_state(run, form)
    elif form == "full":
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    else:
        found = get_optimizer_state_dict(run.model, run.optimizer, options=flattened(form))
    if form in ("sharded", "flat"):
        dcp.save({"optimizer": found}, checkpoint_id=folder / "optimizer_0")
    elif found and rank == 0:
        torch.save(found, folder / ("optimizer.pt" if form == "plain" else "optimizer.bin"))
    if rank == 0:
        torch.save(parameters, folder / "parameters.pt")
    dist.barrier()


def flattened(form: str) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=form == "flat")


def is_fsdp1(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(model, FullyShardedDataParallel)


def fsdp1_state(run: Run, form: str) -> dict[str, Any]:
    """As accelerate asks FSDP1 for it."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    with FullyShardedDataParallel.state_dict_type(run.model, StateDictType[f"{form.upper()}_STATE_DICT"]):
        return FullyShardedDataParallel.optim_state_dict(run.model, run.optimizer)


def resumed(engine: str, form: str, folder: Path) -> Run:
    """A new run of the same mode and number of ranks that goes on, as its users do it."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    run = begun(engine, folder)
    found = next((torch.load(file, weights_only=True) for file in folder.glob("optimizer.*")), {})
    if form == "plain":
        run.optimizer.load_state_dict(found)
    elif form == "own":
        assert run.model.load_checkpoint(str(folder))[0]
    elif form == "side":
        s4.load_optimizer(run.optimizer, folder)
    elif is_fsdp1(run.model):
        fsdp1_load(run, form, found, folder)
    elif form == "full":
        set_optimizer_state_dict(run.model, run.optimizer, found, options=StateDictOptions(full_state_dict=True))
    else:
        template = {"optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=flattened(form))}
        dcp.load(template, checkpoint_id=folder / "optimizer_0")
        set_optimizer_state_dict(run.model, run.optimizer, template["optimizer"], options=flattened(form))
    return run


def fsdp1_load(run: Run, form: str, found: dict[str, Any], folder: Path) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    with FullyShardedDataParallel.state_dict_type(run.model, StateDictType[f"{form.upper()}_STATE_DICT"]):
        if form == "sharded":
            template = {"optimizer": FullyShardedDataParallel.optim_state_dict(run.model, run.optimizer)}
            dcp.load(template, checkpoint_id=folder / "optimizer_0")
            found = template["optimizer"]
        flat = FullyShardedDataParallel.optim_state_dict_to_load(run.model, run.optimizer, found)
        run.optimizer.load_state_dict(flat)


def begun(engine: str, folder: Path, options: dict[str, Any] | None = None) -> Run:
    """A new run with the parameters of a checkpoint."""
    Linear.start = torch.load(folder / "parameters.pt", weights_only=True)
    run = ENGINES[engine](options or {}, torch.float32)
    Linear.start = None
    return run


def checkpoint(case: Case, folder: Path) -> dict[str, Any]:
    """Train, save, train on: one who loads the file must be where this one is."""
    run = ENGINES[case.engine]({}, torch.float32)
    for t in range(case.steps):
        run.step(t)
    save(run, case.options, folder / case.name)
    for t in range(case.steps, 2 * case.steps):
        run.step(t)
    again = resumed(case.engine, case.options, folder / case.name)
    for t in range(case.steps, 2 * case.steps):
        again.step(t)
    return _compared(again.parameters(), run.parameters())


def reshard(case: Case, folder: Path) -> dict[str, Any]:
    """Go on from what other modes and numbers of ranks have saved, and compare with one process that did both."""
    source, form = case.options.split("+")
    saved = folder / f"{source}-{form}"
    if case.engine.startswith("fsdp2") and form in ("full", "sharded") and source.startswith("fsdp2"):
        run = resumed(case.engine, form, saved)
    else:
        run = begun(case.engine, saved)
        if form == "side":
            s4.load_optimizer(run.optimizer, saved)
        else:
            run.optimizer.load_state_dict(by_position(read(saved)))
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        alone = reference({}, 2)
        for t in range(case.steps):
            alone.step(t, 2, missing_of(source))
        for t in range(case.steps, 2 * case.steps):
            alone.step(t, dist.get_world_size(), missing_of(case.engine))
        found = [alone.parameters()]
    dist.broadcast_object_list(found)
    for t in range(case.steps, 2 * case.steps):
        run.step(t)
    return _compared(run.parameters(), found[0])


def trainer(case: Case, folder: Path) -> dict[str, Any]:
    """The Hugging Face Trainer with --fsdp or --deepspeed: train, and resume from the middle."""
    from transformers import Trainer

    from tests.support.tiny import Tokens, arguments, llama

    accelerate_on_a_cpu()
    if case.options in ZERO:
        deepspeed_without_compiler()
        file = ROOT / "configs" / "deepspeed" / f"{case.options}.json"  # as users give it
        sharding: dict[str, Any] = {"deepspeed": json.loads(file.read_text())}
    else:
        kind = "SHARDED_STATE_DICT" if case.options == "fsdp1" else case.options
        os.environ.update(FSDP_STATE_DICT_TYPE=kind)
        version: dict[str, Any] = {"version": 2, "reshard_after_forward": True, "state_dict_type": kind}
        if case.options == "fsdp1":
            first = {"sync_module_states": "false", "use_orig_params": "true", "reshard_after_forward": "FULL_SHARD"}
            version = {"version": 1, "state_dict_type": kind, **first}
        sharding = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **version}}

    def train(checkpoint: Path | None) -> tuple[list[float], dict[str, Tensor], Any]:
        changes = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "per_device_train_batch_size": 2}
        args = arguments(folder / case.name, use_cpu=False, **copy.deepcopy(sharding), **changes)
        found = Trainer(llama(), args, train_dataset=Tokens())
        found.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        losses = [entry["loss"] for entry in found.state.log_history if "loss" in entry]
        return losses, whole(found.model_wrapped), found

    losses, parameters, unbroken = train(None)
    resumed_losses, resumed, _ = train(folder / case.name / "checkpoint-3")
    ours = unwrapped(unbroken.optimizer)
    return {
        **_compared(resumed, parameters), "losses": losses, "resumed_losses": resumed_losses,
        "kind": type(unbroken.model_wrapped).__name__, "optimizer": type(ours).__name__,
        "state_bytes": sum(t.nbytes for entry in ours.state.values() for t in entry.values()),
        "files": sorted(p.name for p in (folder / case.name / "checkpoint-3").iterdir()),
    }  # fmt: skip


def accelerate_on_a_cpu() -> None:
    """accelerate shards on a CPU only if told that this is a machine with several devices."""
    from accelerate import state
    from accelerate.utils import DistributedType

    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu")
    for left_over in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):  # by another case in this process
        os.environ.pop(left_over, None)
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.PartialState._prepare_backend = lambda *a, **k: ("gloo", DistributedType.MULTI_GPU)


def accelerated(case: Case, folder: Path) -> dict[str, Any]:
    """A loop of one's own with accelerate: save_state, and load_state into a new one."""
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin

    from tests.support.tiny import Tokens, llama

    tokens, rank = Tokens().tokens, dist.get_rank()

    def begin() -> tuple[Any, Any, Any]:
        accelerate_on_a_cpu()
        if case.options in ZERO:
            deepspeed_without_compiler()
            config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": ZERO[case.options]}
            plugin: dict[str, Any] = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}
        else:
            settings = {"fsdp_version": 1 if case.options == "fsdp1" else 2, "state_dict_type": "SHARDED_STATE_DICT"}
            if case.options == "fsdp1":
                settings |= {"use_orig_params": True, "sync_module_states": False}
            plugin = {"fsdp_plugin": FullyShardedDataParallelPlugin(**settings)}
        accelerator, model = Accelerator(**plugin), llama()
        if case.options == "fsdp1":  # the groups need the wrapped model
            model = accelerator.prepare(model)
        made = Shampoo4bit(s4.param_groups(model), algorithm="shampoo", lr=1e-2, stats_every=2, roots_every=2)
        if case.options == "fsdp1":
            return accelerator, model, accelerator.prepare(made)
        return accelerator, *accelerator.prepare(model, made)

    def train(accelerator: Any, model: Any, optimizer: Any, steps: range) -> dict[str, Tensor]:
        for t in steps:
            rows = tokens[(2 * t + rank) % len(tokens)].unsqueeze(0)
            accelerator.backward(model(input_ids=rows, labels=rows).loss)
            optimizer.step()
            optimizer.zero_grad()
        return whole(model)

    first = begin()
    train(*first, range(3))
    first[0].save_state(str(folder / case.name))
    expected = train(*first, range(3, 5))
    again = begin()
    again[0].load_state(str(folder / case.name))
    kind = type(unwrapped(again[2])).__name__
    return {**_compared(train(*again, range(3, 5)), expected), "kind": type(again[1]).__name__, "optimizer": kind}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All of a wrapped model's parameters."""
    if "deepspeed" in type(model).__module__:
        import deepspeed

        sharded = any(hasattr(p, "ds_id") for p in model.parameters())
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=sharded):
            return {name: p.detach().clone() for name, p in model.named_parameters()}
    if is_fsdp1(model):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model):
            return {name: p.detach().clone() for name, p in model.named_parameters()}
    return {name: full(p) for name, p in model.named_parameters()}


def unwrapped(optimizer: Any) -> Any:
    """Without accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


# ------------------------------------------------------------------------------------------------------ failures


def wide(case: Case) -> dict[str, Any]:
    """float32 gradients of bfloat16 parameters (torch's `grad_dtype`), and one that some steps have on rank 0 only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()

    def trained(cut: Callable[[Tensor], Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(cut(torch.randn(64, 72, generator=generator).bfloat16())) for _ in range(3)]
        for p in ps[:2]:
            p.grad_dtype = torch.float32
        named = [(str(i), p) for i, p in enumerate(ps)]
        alone = cut is torch.clone
        optimizer = Shampoo4bit(named, lr=1e-2, weight_decay=0.1, communicate=not alone, **OFTEN, **options)
        for t in range(case.steps):
            for i, p in enumerate(ps):
                g = torch.randn(64, 72, generator=generator).to(torch.bfloat16 if i == 2 else torch.float32)
                absent = i == 1 and t % 2 == 1
                p.grad = cut(g * (torch.arange(64) < 32).to(g.dtype).unsqueeze(1) if absent else g)
                if absent and rank > 0 and not alone:
                    p.grad = None
            optimizer.step()
        return {name: full(p) for name, p in named}

    found = {}
    for name, options in {"kl_shampoo": {}, "sgdm": {"algorithm": "shampoo", "base": "sgdm"}}.items():
        there = trained(lambda t: distribute_tensor(t, mesh, [Shard(0)]), options)
        found |= {f"{name}.{i}": torch.equal(there[i], p) for i, p in trained(torch.clone, options).items()}
    return {"bitwise": all(found.values()), "differ": [name for name, equal in found.items() if not equal]}


def spoil(optimizer: Any, *_: Any) -> None:
    """Make a number of this rank's gradients infinite, as it has them when `step` is called."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        local = None if p.grad is None else local_tensor(p.grad)
        if local is not None and local.numel():
            local.view(-1)[0] = float("inf")
            return


def failing(case: Case) -> dict[str, Any]:
    """What each rank says when rank 1 has other options, a gradient that cannot be used, or cannot compute."""
    make, second = ENGINES[case.engine], dist.get_rank() == 1
    said = {"disagree": _message(lambda: make({"damping": 1e-3 if second else 1e-6}, torch.float32).step(0))}

    run = make({}, torch.float32)
    if second:
        with mock.patch.object(gradients, "are_finite", side_effect=TypeError("a sparse gradient")):
            said["gradient"] = _message(lambda: run.step(0))
    else:
        said["gradient"] = _message(lambda: run.step(0))

    run = make({}, torch.float32)
    run.step(0)
    if second:
        for wave in run.optimizer.waves():
            for stack in wave.stacks:
                stack.algorithm = Broken(stack.algorithm)
    said["compute"] = _message(lambda: [run.step(t) for t in range(1, 4)])

    run = make({}, torch.float32)
    run.step(0)
    before = run.parameters()
    if second:
        run.optimizer.register_step_pre_hook(spoil)
    run.step(1)
    unchanged = all(torch.equal(p, before[n]) for n, p in run.parameters().items())
    skipped = run.optimizer.param_groups[0]["skipped_steps"]

    run = make({}, torch.float32)
    for group in run.optimizer.param_groups:
        group["lr"] *= 1 + 5e-7 * second
    for t in range(3):
        run.step(t)
    return {"said": said, "skipped": skipped, "unchanged": unchanged, "with other last bits": _digest(run.parameters())}


def _digest(parameters: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(p.float().numpy().tobytes() for _, p in sorted(parameters.items()))).hexdigest()


def contract(case: Case) -> dict[str, Any]:
    """What every optimizer of torch's offers, on ranks as in one process: going up, freezing, emptying, copies."""
    make, world, said, same = ENGINES[case.engine], dist.get_world_size(), {}, {}

    def frozen(run: Run, name: str, flag: bool) -> None:
        for n, p in run.model.named_parameters():
            if n.endswith(name):
                p.requires_grad_(not flag)

    def both(run: Run, alone: Run, t: int) -> bool:
        run.step(t)
        alone.step(t)
        truth = alone.parameters()
        return all(torch.equal(p, truth[n]) for n, p in run.parameters().items())

    upwards, missing = {"maximize": True}, missing_of(case.engine)
    run, alone = make(upwards, torch.float32), reference(upwards, world, missing=missing)
    same["maximize"] = [both(run, alone, t) for t in range(3)]

    run, alone = make({}, torch.float32), reference({}, world, missing=missing)
    for of_one in (run, alone):
        frozen(of_one, "layers.1.qkv", True)
    same["frozen"] = [both(run, alone, t) for t in range(2)]
    for of_one in (run, alone):
        frozen(of_one, "layers.1.qkv", False)
        frozen(of_one, "layers.2.experts", True)
    same["unfrozen"] = [both(run, alone, t) for t in range(2, 4)]
    for of_one in (run, alone):
        frozen(of_one, "layers.2.experts", False)
        of_one.optimizer.state.clear()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        run.step(4)
        alone.step(4)
    said["emptied"] = "; ".join(str(w.message) for w in heard if "start afresh" in str(w.message))
    same["emptied"] = [both(run, alone, t) for t in range(5, 7)]
    said["copy"] = _message(lambda: copy.deepcopy(run.optimizer))
    if case.engine == "ddp_sharded":
        run.optimizer.consolidate()
        whole, copied = run.optimizer.state_dict()["state"], copy.deepcopy(run.optimizer).state_dict()["state"]
        same["copied"] = [torch.equal(t, copied[i][key]) for i, entry in whole.items() for key, t in entry.items()]
    if dist.get_rank() == 1:
        run.optimizer.state.clear()
    said["one"] = _message(lambda: run.step(7))
    return {"said": said, "same": same}


def refused(case: Case, folder: Path) -> dict[str, Any]:
    """What each rank says to checkpoints that do not fit: `zero2-own` and `zero2-side` were saved by two ranks."""
    saved, side, rank = folder / "zero2-own", folder / "zero2-side", dist.get_rank()
    files = sorted(saved.glob("global_step*/*_optim_states.pt"))
    said = {"engine": _message(lambda: resumed("zero2", "own", saved))}

    run = begun(case.engine, saved)
    part = torch.load(files[rank % len(files)], weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    run.optimizer.load_state_dict(part)
    said["part"] = _message(lambda: run.step(0))

    run = begun(case.engine, saved)
    said["options"] = _message(lambda: s4.load_optimizer(begun(case.engine, saved, {"bits": 8}).optimizer, side))
    lacking = folder / f"lacking{rank}"  # every rank its own, as on disks that are not shared
    shutil.copytree(side, lacking, dirs_exist_ok=True)
    if rank == 1:
        for file in lacking.glob("*.distcp"):
            file.unlink()
    s4.load_optimizer(run.optimizer, lacking)
    said["lacking"] = _message(lambda: run.step(0))
    return {"said": said}


class Broken:
    """An algorithm that runs out of memory."""

    def __init__(self, algorithm: Any) -> None:
        self._algorithm = algorithm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._algorithm, name)

    def update(self, *arguments: Any) -> Any:
        raise MemoryError("no memory left")


def _message(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _compared(mine: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Any]:
    differ = [n for n, p in truth.items() if not torch.equal(mine[n], p)]
    worst = max(
        (mine[n].float() - p.float()).abs().max().item() / p.float().abs().max().item() for n, p in truth.items()
    )
    return {"bitwise": not differ, "differ": differ, "worst": worst}


def worker(folder: Path, cases: list[Case], checkpoints: Path) -> None:
    """Run the cases on this rank and write what came out; then end without any teardown."""
    torch.set_num_threads(1)
    plan: Any = importlib.import_module("hf_shampoo4.execution.blocking")
    protocols.STRIP = 2048  # vocabularies and what the base alone updates are cut into several blocks
    plan.WAVE_ELEMENTS = 2048  # several waves, that of `words` of several parts
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    count_exchanges()
    found: dict[str, Any] = {}
    truths: dict[str, dict[str, Tensor]] = {}
    for case in cases:
        try:
            found[case.name] = case.run(truths, checkpoints)
        except Exception:
            found[case.name] = {"error": traceback.format_exc()}
        print(f"rank {rank}: {case.name} {found[case.name]}", flush=True)
        write_json(folder / f"rank{rank}.json", found)  # after every case: whoever stops it keeps what was done
    sys.stdout.flush()
    os._exit(0)


def launch(
    world: int,
    *words: str,
    timeout: float = LONGEST_CHILD,
    module: str = "tests.stress.ranks",
    of_rank: Callable[[int], dict[str, str]] = lambda rank: {},
) -> list[dict[str, Any]]:
    """Start `world` workers, in environments of their own, and return what each wrote."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers = []
        for rank in range(world):
            environment = {
                **os.environ,
                **BITWISE,
                "PYTHONFAULTHANDLER": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                **of_rank(rank),
            }
            with open(folder / f"log{rank}", "w") as log:
                command = [sys.executable, "-m", module, "--worker", name, *words]
                workers.append(
                    subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
                )
        latest = time.monotonic() + timeout
        for process in workers:
            try:
                process.wait(max(0.0, latest - time.monotonic()))
            except subprocess.TimeoutExpired:
                for other in workers:
                    end(other.pid)
        files = [folder / f"rank{rank}.json" for rank in range(world)]
        if not all(file.exists() for file in files):
            logs = "\n".join((folder / f"log{rank}").read_text()[-6000:] for rank in range(world))
            raise RuntimeError(f"a worker of {world} wrote no result:\n{logs}")
        return [json.loads(file.read_text()) for file in files]


# One engine of each kind is tried with every set of options, its variants with one of each way to treat a matrix.
KINDS = ("ddp", "ddp_sharded", "fsdp2", "tp", "fsdp1", "zero1", "zero2", "zero3")
FOR_VARIANTS = ("shampoo", "kl_shampoo")


def matrix(world: int, options: str) -> list[str]:
    engines = [engine for engine in ENGINES if engine != "single" and (engine != "hsdp" or world % 2 == 0)]
    engines = [e for e in engines if e not in ("fsdp1_hybrid", "tp_fsdp2") or world == 4]  # cut in two dimensions
    if options not in FOR_VARIANTS:
        engines = [engine for engine in engines if engine in KINDS]
    # parameters in bfloat16 are another thing under ZeRO, which keeps float32 ones: the variants *_bf16
    return [f"{engine}-{options}" for engine in engines if not (options == "bf16" and engine in ZERO)]


def whole_matrix(given: argparse.Namespace) -> None:
    """Every kind of engine with every set of options; what the file has of other cases stays there.

    One launch for a number of ranks and a set of options, after which its results are in the file.
    """
    file: Path = given.output
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"worlds": {}}
    found = {
        "command": "python -m tests.stress.ranks --all", "torch": torch.__version__, "backend": "gloo",
        "gradients": "exact averages, see the docstring", "worlds": found["worlds"],
    }  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    for world, options in itertools.product(given.worlds, given.options):
        cases = [case for case in matrix(world, options) if case.startswith(tuple(given.engines))]
        words = ("--cases", ",".join(cases), "--steps", str(given.steps))
        ranks = launch(world, *words, timeout=given.hours * 3600)
        of_world = found["worlds"].setdefault(str(world), {})
        for case in [case for case in cases if all(case in rank for rank in ranks)]:
            spread = {"state_bytes": [rank[case].get("state_bytes") for rank in ranks]}
            of_world[case] = {**ranks[0][case], **spread, "steps": given.steps, "commit": commit.strip()}
        write_json(file, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="the whole matrix, written to docs/results/ranks.json")
    parser.add_argument("--worlds", type=int, nargs="*", default=[2, 3, 4], help="with --all")
    parser.add_argument("--engines", nargs="*", default=[""], help="with --all: those that begin so")
    parser.add_argument("--options", nargs="*", default=[*OPTIONS], choices=OPTIONS, help="with --all")
    parser.add_argument("--hours", type=float, default=1, help="with --all: at most, for each launch")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "ranks.json", help="with --all")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--cases", default="ddp-shampoo,ddp_sharded-shampoo,fsdp2-shampoo", help="ENGINE-OPTIONS,...")
    parser.add_argument(
        "--checkpoints", default="/tmp/hf_shampoo4-ranks", help="folder that cases save to and load from"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    cases = [Case(*case.split("-"), given.steps) for case in given.cases.split(",")]
    if given.worker:
        worker(Path(given.worker), cases, Path(given.checkpoints))
    elif given.all:
        whole_matrix(given)
    else:
        words = ["--cases", given.cases, "--steps", str(given.steps), "--checkpoints", given.checkpoints]
        for name, there in launch(given.world, *words)[0].items():
            print(name, there.get("error") or json.dumps(there), flush=True)


if __name__ == "__main__":
    main()
