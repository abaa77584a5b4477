"""A profile of a step on two ranks: while one wave is computed, the next one's gradients travel.

    python -m benchmarks.overlap --output docs/results/overlap

Two processes, FSDP2 over gloo on one machine, a wave for each matrix.  Written are a JSON file with the share of the
time of all-to-alls in which this rank computed, and a picture of one step.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.execution.wave_step import WaveStep
from hf_shampoo4.utils.files import write_json
from hf_shampoo4.utils.plots import picture, style

MATRICES, SIDE, STEPS = 6, 512, 3
Spans = list[tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("overlap"), help="without a suffix")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"file://{folder}/store", given.output), nprocs=2)


def work(rank: int, store: str, output: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(MATRICES)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    options = {"algorithm": "shampoo", "stats_every": 1, "roots_every": 1, "block_size": SIDE // 2}
    optimizer = Shampoo4bit(model.named_parameters(), lr=1e-3, **options)
    mark(WaveStep)
    import_module("hf_shampoo4.execution.blocking").WAVE_ELEMENTS = 1  # a wave for each matrix
    for _ in range(STEPS):
        model(torch.randn(64, SIDE)).square().mean().backward()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:  # kept is the last step's: the first one plans
            optimizer.step()
    if rank == 0:
        write(profiler, output)
    dist.barrier()
    os._exit(0)


def mark(kind: type) -> None:
    """Name the parts of a wave in the profile."""
    for name in ("collect", "update", "send", "apply"):
        method = getattr(kind, name)

        def marked(self: Any, method: Any = method, name: str = name) -> None:
            with record_function(f"wave:{name}"):
                method(self)

        setattr(kind, name, marked)


def spans(profiler: Any, name: str) -> Spans:
    found = [(e.time_range.start, e.time_range.end) for e in profiler.events() if e.name == name]
    return sorted(found)


def together(a: Spans, b: Spans) -> float:
    """The time that is in a span of both."""
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)


def write(profiler: Any, output: Path) -> None:
    sent, computed = spans(profiler, "gloo:all_to_all"), spans(profiler, "wave:update")
    total = sum(end - start for start, end in sent)
    write_json(output.with_suffix(".json"), {
        "command": "python -m benchmarks.overlap", "torch": torch.__version__, "backend": "gloo",
        "waves": len(computed),
        "all_to_alls": len(sent), "all_to_all_ms": round(total / 1e3, 2),
        "compute_ms": round(sum(end - start for start, end in computed) / 1e3, 2),
        "share_of_all_to_all_during_compute": round(together(sent, computed) / total, 3),
    })  # fmt: skip
    draw(sent, computed, output.with_suffix(".png"))


def draw(sent: Spans, computed: Spans, path: Path) -> None:
    first = min(start for start, _ in [*sent, *computed])
    with picture(path, (9, 2.4), grid="x") as (_, panels):
        axes = panels[0][0]
        for row, (spans_of, i) in enumerate([(sent, 1), (computed, 0)]):
            spans_ms = [((a - first) / 1e3, (b - a) / 1e3) for a, b in spans_of]
            axes.broken_barh(spans_ms, (row - 0.4, 0.8), color=style(i)["color"])
        axes.set(yticks=[0, 1], yticklabels=["all-to-alls under way", "a wave is computed"], xlabel="ms of one step")
        axes.set_title(f"One step of {MATRICES} matrices, 2 processes (gloo): what is sent while a wave is computed")


if __name__ == "__main__":
    main()
