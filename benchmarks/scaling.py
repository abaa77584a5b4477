"""Plan the optimizer for models and clusters that are not here: real planning, placement and routes, nothing else.

    python -m benchmarks.scaling --output docs/results/scaling.json

torch's `fake` process group and tensors on the meta device stand in for ranks and parameters; the plan is the code that
a training runs at its first step, on one rank of the cluster.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_shampoo4.execution.blocking import loads_of
from hf_shampoo4.execution.build import build
from hf_shampoo4.execution.waves import Wave
from hf_shampoo4.options import Options
from hf_shampoo4.sharding.dtensor import sharded, sharding_of
from hf_shampoo4.sharding.exchange import Ranks
from hf_shampoo4.sharding.local_parameter import local_parameter
from hf_shampoo4.sharding.placement import Layout, Split
from hf_shampoo4.sharding.route import Transfer

# hidden, inner, layers, rows of keys and values, vocabulary
MODELS = {
    "llama_7b": (4096, 11008, 32, 4096, 32000),
    "llama_70b": (8192, 28672, 80, 1024, 128256),
    "llama_405b": (16384, 53248, 126, 1024, 128256),
}


def shapes(hidden: int, inner: int, layers: int, key_values: int, vocabulary: int) -> tuple[list, list]:
    """Matrices, and what the base alone updates."""
    layer = [(hidden, hidden), (key_values, hidden), (key_values, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return layer * layers, [(vocabulary, hidden)] * 2 + [(hidden,)] * (2 * layers + 1)


def parameter(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Any, ...], rank: int) -> torch.Tensor:
    """A DTensor without memory, as fully_shard leaves it on one rank."""
    ranks = tuple(mesh.mesh.flatten().tolist())
    splits = tuple(Split(0, 1) if placement.is_shard() else None for placement in placements)
    held = sharded(shape, Layout((ranks,), tuple(mesh.mesh.shape), splits)).shard_of[rank].region.numel
    rows = held // max(1, int(np.prod(shape[1:])))
    local = torch.empty((rows, *shape[1:]), device="meta")
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def sent(transfer: Transfer, rank: int) -> int:
    """Entries that a rank sends to others."""
    return sum(p.numel for to, pieces in transfer.out.items() if to != rank for p in pieces)


def planned(model: str, world: int, sharding: str, options: Options) -> dict[str, Any]:
    """One row of the table."""
    rank = world // 2
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    size, placements = ((world,), (Shard(0),)) if sharding == "fsdp2" else ((world // 8, 8), (Replicate(), Shard(0)))
    mesh = init_device_mesh("cpu", size)
    matrices, rest = shapes(*MODELS[model])
    groups = [
        (o, [local_parameter(f"{i}.{k}", parameter(shape, mesh, placements, rank)) for k, shape in enumerate(of_group)])
        for i, (o, of_group) in enumerate([(options, matrices), (Options(algorithm="elementwise"), rest)])
    ]
    every = [p for _, of_group in groups for p in of_group]

    def reports(_: Ranks, make: Callable[[], tuple[Any, list[Any]]]) -> list[tuple[Any, list[Any]]]:
        """What all ranks would say: the same machine, and each how many entries it has."""
        machine, mine = make()
        cuts = [sharding_of(p.parameter) for p in every]
        placed = [sharded(p.shape, Layout((s.mesh,), s.shape, s.splits)) for p, s in zip(every, cuts, strict=True)]
        return [
            (
                machine,
                [
                    said._replace(sharding=said.sharding._replace(held=placement.shard_of[rank].region.numel))
                    for said, placement in zip(mine, placed, strict=True)
                ],
            )
            for rank in range(world)
        ]

    start = time.perf_counter()
    with_shapes = [(o, members, {p.name: p.shape for p in members}) for o, members in groups]
    with mock.patch("hf_shampoo4.execution.build.gather_or_raise", reports):
        waves: list[Wave] = [wave for of_group in build(with_shapes, Ranks(rank, world)) for wave in of_group]
    routes = [part.route for wave in waves for part in wave.parts]
    seconds = time.perf_counter() - start
    flops, held = np.zeros(world), np.zeros(world)
    for wave in waves:
        for member in wave.members:
            loads = loads_of(member.blocks, options)
            np.add.at(flops, member.owners, [load.flops for load in loads])
            np.add.at(held, member.owners, [load.bytes for load in loads])
    dist.destroy_process_group()
    return {
        "model": model, "ranks": world, "sharding": sharding, "waves": len(waves),
        "blocks": sum(len(member.blocks) for wave in waves for member in wave.members),
        "imbalance": round(flops.max() / flops.mean(), 3), "state_mean": int(held.mean()), "state_max": int(held.max()),
        "sent_gradients": 4 * sum(sent(r.collect, rank) for r in routes),
        "sent_updates": 4 * sum(sent(r.send, rank) for r in routes), "plan_seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--worlds", nargs="*", type=int, default=[8, 64, 512, 4096])
    given = parser.parse_args()
    rows = []
    for model in given.models:
        for world in given.worlds:
            for sharding in ("fsdp2", "hsdp"):
                rows.append(planned(model, world, sharding, Options(algorithm="shampoo")))
                print(json.dumps(rows[-1]), flush=True)
    given.output.write_text(json.dumps({"options": "algorithm=shampoo", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
