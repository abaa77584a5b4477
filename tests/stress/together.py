"""What several ranks do together: three workers with gloo, the second of which plays another kind of processor.

Each case is a function; what it returns on every rank is judged by tests/execution/test_together.py.  They follow each
other in the same processes, so one that leaves a rank behind in a collective spoils the next.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_shampoo4 import Shampoo4bit, save_optimizer
from hf_shampoo4.checkpointing.convert import read
from hf_shampoo4.execution import build, wave_step
from hf_shampoo4.execution.apply import Machine
from hf_shampoo4.execution.descent import Descent
from hf_shampoo4.execution.state_map import StateMap
from hf_shampoo4.execution.wave_state import WaveState
from hf_shampoo4.execution.wave_step import WaveStep
from hf_shampoo4.preconditioners.protocols import Context
from hf_shampoo4.sharding import rendezvous
from hf_shampoo4.utils.files import write_json

SIZE = 64
OPTIONS: dict[str, Any] = {"lr": 1e-2, "block_size": 32, "refresh_warmup": 0, "stats_every": 3}
OWNERS: dict[str, Any] = {"apply": "owners"}
SHAMPOO: dict[str, Any] = {"lr": 1e-2, "block_size": 32, "algorithm": "shampoo", "stats_every": 3, "roots_every": 3}


def rank() -> int:
    return dist.get_rank()


def model(seed: int = 0, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(layers)))


def averaged(m: nn.Module, group: Any = None) -> None:
    for p in m.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)


def backward(m: nn.Module, seed: int, average: bool = True, group: Any = None) -> None:
    m.zero_grad()
    x = torch.randn(16, SIZE, generator=torch.Generator().manual_seed(seed))
    (m(x) - x.roll(1, 1)).square().mean().backward()
    if average:
        averaged(m, group)


def said(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def flat(m: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in m.parameters()])


def equal(t: Tensor) -> bool:
    """Whether all ranks have the same bits."""
    first = t.clone()
    dist.broadcast(first, 0)
    found = torch.tensor([float(not torch.equal(first, t))])
    dist.all_reduce(found)
    return not found.item()


# ------------------------------------------------------------------------------------------- unlike processors


def drift() -> dict[str, Any]:
    """40 steps on the very same gradients."""
    found: dict[str, Any] = {}
    for algorithm in ("kl_shampoo", "shampoo", "soap", "alone"):
        m = model()
        options: dict[str, Any] = {"algorithm": algorithm}
        if algorithm == "alone":
            options = {"communicate": False}
        o = Shampoo4bit(m.parameters(), lr=5e-3, block_size=48, **options)
        for t in range(40):
            backward(m, 10 * t, average=False)
            for p in m.parameters():
                dist.broadcast(p.grad, 0)
            o.step()
        state = [t.flatten().view(torch.uint8).float() for entry in o.state.values() for t in entry.values()]
        found[algorithm] = [equal(flat(m)), equal(torch.cat(state))]
    return found


# ------------------------------------------------------------------------------------------ what is no replica


def mixing() -> dict[str, Any]:
    """A model for each rank, gradients of its own, gradients that begin later, and what does not communicate."""

    def train(
        seed: int = 0, steps: int = 2, of_step: Callable[[int], int] = lambda t: rank(), **options: Any
    ) -> Tensor:
        m = model(seed)
        o = Shampoo4bit(m.named_parameters(), **OPTIONS, **options)
        for t in range(steps):
            backward(m, of_step(t), average=False)
            if of_step(t) < 0:
                for p in m.parameters():
                    p.grad = None if t % 2 else torch.zeros_like(p)
            o.step()
        return flat(m)

    other = train(rank(), communicate=False)
    return {
        "models": said(lambda: train(rank(), of_step=lambda t: 0)),
        "gradients": said(train),
        "later": said(lambda: train(steps=6, of_step=lambda t: rank() if t > 4 else -1)),
        "after some steps": said(lambda: train(steps=8, of_step=lambda t: rank() if t > 4 else t)),
        "on their own": not equal(other),
        "last bits": said(last_bits),
    }


def last_bits() -> None:
    """What processors that round differently may do to a model, clip factors and schedules."""
    m = model()
    o = Shampoo4bit(m.parameters(), **OPTIONS)
    for t in range(3):
        backward(m, t)
        for p in m.parameters():
            p.grad.mul_(1 + 3e-7 * rank())
        o.param_groups[0]["lr"] = 1e-2 * (1 + 1e-12 * rank())
        o.step()


def train_alone(
    of_step: Callable[[int, Any], None] = lambda t, m: None, steps: int = 4, rates: bool = False, **options: Any
) -> bool:
    """Every rank updates all itself, whatever processor it plays, after `of_step` has changed what is this rank's.

    Args:
        of_step: is given the step's number and the model.
        steps: how many.
        rates: whether they have other last bits on each rank.
        options: of the optimizer.

    Returns:
        Whether all ranks then have the same bits.
    """
    m = model()
    o = Shampoo4bit(m.named_parameters(), **{"apply": "all", **options})
    for t in range(steps):
        backward(m, t)
        of_step(t, m)
        o.param_groups[0]["lr"] = 1e-2 * (1 + 3e-7 * rank() * rates)
        said_of_step = said(o.step)
        if said_of_step and "no memory left" not in said_of_step:  # that is an error that a script catches
            raise RuntimeError(said_of_step)
    state = [x.flatten().view(torch.uint8).float() for entry in o.state.values() for x in entry.values()]
    return equal(flat(m)) and equal(torch.cat(state))


def last_bits_of_gradients(t: int, m: nn.Module) -> None:
    for p in m.parameters():
        p.grad.mul_(1 + 3e-7 * (rank() == 1))


def apart() -> dict[str, Any]:
    """What makes replicas unequal where every rank updates all itself, and what comes of it."""
    plain: dict[str, Any] = {"algorithm": "elementwise", "lr": 1e-2}  # which all processors round alike
    found: dict[str, Any] = {}

    def gone(t: int, m: nn.Module) -> None:
        if t == 2:  # a step in which gradients are not compared
            m[1].bias.grad = None if rank() == 1 else torch.zeros_like(m[1].bias)

    def missing(t: int, m: nn.Module) -> None:
        if rank() == 1 and t == 2:
            m[1].bias.grad = None

    def moved(t: int, m: nn.Module) -> None:
        if rank() == 2 and t == 1:
            m[1].bias.data[3] += 1e-6

    def fails(t: int, m: nn.Module) -> None:
        (patched.start if rank() == 1 and t == 2 else lambda: None)()
        (patched.stop if rank() == 1 and t == 3 else lambda: None)()

    patched = mock.patch.object(wave_step, "compute_updates", no_memory)
    with mock.patch.object(build, "this_machine", return_value=Machine((), "")):
        found["equal"] = train_alone(**plain)
        found["processors"] = said(lambda: train_alone(steps=6, **OPTIONS))
        found["gradients"] = said(lambda: train_alone(last_bits_of_gradients, **plain))
        found["no gradient"] = train_alone(gone, **plain)
        found["missing gradient"] = [said(lambda o=o: train_alone(missing, **plain, **o)) for o in ({}, OWNERS)]
        found["rates"] = [train_alone(rates=True, **plain, **o) for o in ({}, {"apply": "owners", "wire": "bf16"})]
        half: dict[str, Any] = {"apply": "owners", "wire": "bf16"}
        found["half a wire's weights"] = said(lambda: train_alone(moved, **half, **plain))
        found["weights"] = said(lambda: train_alone(moved, **plain))
        found["caught"] = said(lambda: train_alone(fails, **plain))
        with (
            mock.patch.object(build, "all_apply", lambda groups, _: [True] * len(groups)),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            found["auto"] = [train_alone(last_bits_of_gradients, apply="auto", **o) for o in (plain, OPTIONS)]
            found["warned"] = [str(w.message) for w in caught if "no longer equal" in str(w.message)]
            found["half a wire"] = said(lambda: train_alone(last_bits_of_gradients, apply="auto", wire="bf16", **plain))
    return found


def subgroups() -> dict[str, Any]:
    """Ranks 0 and 1 train one model, rank 2 another one, each in its group; a rank outside is refused."""
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    mine = single if rank() == 2 else pair
    o = Shampoo4bit(model().parameters(), **OPTIONS, process_group=mine)
    copied = copy.deepcopy(o)  # with parameters of its own
    alone = Shampoo4bit(model().parameters(), **OPTIONS, communicate=False)
    results = []
    for one in (o, copied, alone):
        for t in range(5):
            for i, p in enumerate(one.param_groups[0]["params"]):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + 10 * i + rank() // 2))
            one.step()
        results.append(torch.cat([p.detach().flatten() for p in one.param_groups[0]["params"]]))
    first = results[0].clone()
    dist.broadcast(first, dist.get_process_group_ranks(mine)[0], group=mine)
    return {
        "saved": saved_by_a_group(mine),
        "ranks equal": torch.equal(first, results[0]), "copy equal": torch.equal(*results[:2]),
        "off": ((results[0] - results[2]).abs().max() / results[2].abs().max()).item(),
        "world": (o.world_size, copied.world_size), "pickled": said(lambda: pickle.dumps(o)),
        "outside": said(lambda: Shampoo4bit(model().parameters(), process_group=pair)),
    }  # fmt: skip


def saved_by_a_group(group: Any) -> bool:
    """What `save_optimizer` writes is what `state_dict()` on all ranks of the group gives, though both are spread."""
    m = model()
    o = Shampoo4bit(m.named_parameters(), **OPTIONS, process_group=group, shard_state=True)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    o.step()
    folder = Path(os.environ["FOLDER"]) / f"saved{rank() // 2}"
    save_optimizer(o, folder)
    there, here = read(folder)["state"], o.state_dict()["state"]
    return all(torch.equal(t, there[o.names(0)[k]][key]) for k, entry in here.items() for key, t in entry.items())


def meshes() -> dict[str, Any]:
    """FSDP2 over ranks 1 and 2 of three: with their group, with another one, and with none."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh, one, other = DeviceMesh("cpu", [1, 2]), dist.new_group([1, 2]), dist.new_group([0, 1])
    found: dict[str, Any] = {}
    for name, group, ranks in (("its own", one, (1, 2)), ("another", other, (0, 1)), ("alone", None, (1, 2))):
        if rank() not in ranks:
            continue
        m = model()
        if name != "alone" and rank():
            fully_shard(m, mesh=mesh)
        o = Shampoo4bit(m.named_parameters(), **OPTIONS, process_group=group, communicate=group is not None)

        def train(m: nn.Module = m, o: Shampoo4bit = o) -> None:
            for t in range(5):
                if rank():
                    backward(m, t, average=False)
                o.step()

        if name == "another":
            for p in m.parameters():
                p.grad = torch.zeros_like(p)
            mesh_only = rank() == 1
            found[name] = said(o.step)
            assert mesh_only or rank() == 0
            continue
        train()
        found[name] = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in m.parameters()]
    if rank():
        found["off"] = max(
            (a - b).abs().max().item() for a, b in zip(found.pop("its own"), found.pop("alone"), strict=True)
        )
    return found


def missing() -> dict[str, Any]:
    """Rank 2 comes two seconds late to the first step."""
    m = model()
    o = Shampoo4bit(m.parameters(), **OPTIONS)
    backward(m, 0)
    if rank() == 2:
        time.sleep(2)
    with (
        mock.patch.object(rendezvous, "LATE", datetime.timedelta(seconds=0.5)),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        o.step()
    return {"warned": [str(w.message) for w in caught if "has waited" in str(w.message)]}


# ------------------------------------------------------------------------------------------- raising together


def no_memory(*arguments: Any, **settings: Any) -> Any:
    raise torch.OutOfMemoryError("no memory left")


# Where a rank fails -> what of its work is broken there, and in which modes.  "first" is the step that makes state.
PLACES: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "collect": (wave_step, "packed", ("fsdp2",)),
    "update": (Context, "moment_step", ("fsdp2", "ddp_sharded")),
    "send": (WaveStep, "results", ("ddp", "fsdp2")),
    "new weights": (Descent, "descend", ("ddp",)),
    "apply": (Descent, "write", ("fsdp2",)),
    "received state": (wave_step, "write_rows", ("ddp",)),
    "first plan": (build, "make_wave", ("ddp",)),
    "first state": (WaveState, "copy_whole", ("ddp", "fsdp2")),
    "saving": (StateMap, "rows_at", ("fsdp2",)),
    "loading": (StateMap, "dtensor_rows", ("fsdp2",)),
}
MODES: dict[str, dict[str, Any]] = {"ddp": OPTIONS, "fsdp2": OPTIONS, "ddp_sharded": {**SHAMPOO, "shard_state": True}}


def failing(place: str, mode: str) -> Callable[[], dict[str, Any]]:
    """Rank 1 has no memory left at one place of a step, or of saving or loading; then all go on with another model."""

    def case() -> dict[str, Any]:
        from torch.distributed.fsdp import fully_shard

        m = model()
        if mode == "fsdp2":
            fully_shard(m)
        o = Shampoo4bit(m.named_parameters(), **MODES[mode])

        def step() -> None:
            backward(m, o.param_groups[0]["step"], average=mode != "fsdp2")
            o.step()

        if not place.startswith("first"):
            step()
        if place == "loading":
            o.load_state_dict(o.state_dict())
        action = o.state_dict if place == "saving" else step
        owner, name, _ = PLACES[place]
        with mock.patch.object(owner, name, no_memory) if rank() == 1 else contextlib.nullcontext():
            return {"said": said(action)}

    return case


def closure() -> dict[str, Any]:
    """A closure is the user's own: what it raises on all ranks is raised."""
    m = model()
    o = Shampoo4bit(m.parameters(), **OPTIONS)

    def evaluated() -> Tensor:
        raise ValueError("no data left")

    found = said(lambda: o.step(evaluated))
    backward(m, 0)
    o.step(lambda: torch.zeros(()))
    return {"said": found, "step": o.param_groups[0]["step"]}


def frozen() -> dict[str, Any]:
    """A parameter that one rank alone does not train, from the first step on or later; and options of one rank."""
    found: dict[str, Any] = {"edited": edited()}
    for when in ("first", "late"):
        m = model()
        o = Shampoo4bit(m.named_parameters(), **OPTIONS)
        if when == "late":
            backward(m, 0)
            o.step()
        if rank() == 1:
            m[0].weight.requires_grad_(False)
        backward(m, 1, average=False)
        found[when] = said(o.step)
    for name, value in {"damping": 1e-3, "wire": "bf16", "betas": (0.5, 0.9), "lr": 0.5}.items():
        m = model()
        o = Shampoo4bit(m.named_parameters(), **OPTIONS)
        backward(m, 0)
        o.step()
        if rank() == 1:
            o.param_groups[0][name] = value
        backward(m, 1)
        found[name] = said(o.step)
    m = model()
    o = Shampoo4bit(m.named_parameters(), **OPTIONS)
    for t in range(2):
        backward(m, t)
        found["loaded"] = said(o.step)
        if rank() == 1:
            o.load_state_dict(o.state_dict())
    return found


def edited() -> dict[str, Any]:
    """What rank 1 alone sets in its group by hand, before the first step and later; then all go on."""
    found: dict[str, Any] = {}
    for when in (0, 2):
        for name, value in (("lr", torch.nan), ("stats_every", "abc"), ("stats_every", "3"), ("communicate", "true")):
            m = model()
            o = Shampoo4bit(m.named_parameters(), **OPTIONS)
            for t in range(when + 1):
                backward(m, t)
                if t == when and rank() == 1:
                    usual, o.param_groups[0][name] = o.param_groups[0][name], value
                last = said(o.step)
            if rank() == 1:
                o.param_groups[0][name] = usual
            found[f"{name}={value} {when}"] = [last, said(o.step)]
    return found


def join() -> dict[str, Any]:
    """Uneven inputs under DDP: refused at once; with an early end, or each rank for itself, they are none of ours."""
    found: dict[str, Any] = {}
    for name, settings, options in (
        ("refused", {}, {}),
        ("early end", {"throw_on_early_termination": True}, {}),
        ("alone", {}, {"communicate": False}),
    ):
        m = DistributedDataParallel(model())
        o = Shampoo4bit(m.parameters(), **OPTIONS, **options)

        def train(m: Any = m, o: Any = o, settings: Any = settings) -> None:
            with m.join(**settings):
                for t in range(3 + rank()):
                    m.zero_grad()
                    m(torch.randn(4, SIZE, generator=torch.Generator().manual_seed(t))).square().mean().backward()
                    o.step()

        found[name] = said(train)
        dist.barrier()
    return found


def loaded() -> dict[str, Any]:
    """State of other trainings on each rank; and DTensors of whole parameters, spread and then kept by every rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def trained(steps: int, m: nn.Module, o: Shampoo4bit) -> Shampoo4bit:
        for t in range(steps):
            backward(m, 10 * t, average=False)  # of the same data on all ranks
            o.step()
        return o

    def cut(shape: tuple[int, ...]) -> nn.Module:
        m = model()
        fully_shard(m, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]))
        return m

    def goes_on(state: dict[str, Any], m: nn.Module | None = None, **options: Any) -> Shampoo4bit:
        m = m or model()
        o = Shampoo4bit(m.named_parameters(), **OPTIONS, **options)
        o.load_state_dict(state)
        return trained(1, m, o)

    def spread(shape: tuple[int, ...]) -> tuple[dict[str, Any], nn.Module, Shampoo4bit]:
        m = cut(shape)
        o = trained(4, m, Shampoo4bit(m.named_parameters(), **OPTIONS, shard_state=True))
        return copy.deepcopy(o.state_dict()), m, o

    def plain_gradient() -> None:
        m = model()
        fully_shard(m)
        backward(m, 0, average=False)
        m[0].weight.grad = m[0].weight.grad.full_tensor() * 0.5
        Shampoo4bit(m.named_parameters(), **OPTIONS).step()

    m = model(rank())
    mine = trained(3, m, Shampoo4bit(m.named_parameters(), **OPTIONS, communicate=False)).state_dict()
    saved, m, o = spread((3, 1))
    same = cut((3, 1))
    for p, q in zip(same.parameters(), m.parameters(), strict=True):
        p.to_local().detach().copy_(q.to_local())
    expected, kept = (one.state_dict()["state"] for one in (trained(1, m, o), goes_on(saved, same)))
    settings: tuple[dict[str, Any], ...] = ({}, {"apply": "all"}, {"shard_state": True})
    return {
        "others": [said(lambda o=o: goes_on(copy.deepcopy(mine), **o)) for o in settings],
        "spread, then kept": all(
            torch.equal(t.to_local(), kept[i][key]) for i, entry in expected.items() for key, t in entry.items()
        ),
        "cut, then kept": said(lambda: goes_on(spread((3,))[0])),
        "plain gradient": said(plain_gradient),
    }  # fmt: skip


def groups() -> dict[str, Any]:
    """Ranks that are others than before, and a group that is gone.  The last case: it takes the group away."""
    m = model()
    o = Shampoo4bit(m.parameters(), **OPTIONS)
    backward(m, 0)
    o.step()
    kept, now, world = o.state_dict(), rank(), dist.get_world_size()
    backward(m, 1)
    dist.barrier()
    dist.destroy_process_group()
    gone = said(o.step)
    store = f"file://{os.environ['FOLDER']}/again"
    dist.init_process_group("gloo", init_method=store, rank=(now + 1) % world, world_size=world)
    swapped = said(o.step)
    o.load_state_dict(kept)
    return {"gone": gone, "swapped": swapped, "loaded": said(o.step)}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "drift": drift, "apart": apart, "mixing": mixing, "subgroups": subgroups, "meshes": meshes, "missing": missing,
    **{f"{mode}: {place}": failing(place, mode) for place, (*_, modes) in PLACES.items() for mode in modes},
    "closure": closure, "frozen": frozen, "loaded": loaded, "join": join, "groups": groups,
}  # fmt: skip


def main() -> None:
    folder, cases = Path(sys.argv[sys.argv.index("--worker") + 1]), sys.argv[sys.argv.index("--cases") + 1]
    os.environ["FOLDER"] = str(folder)
    torch.set_num_threads(1)
    number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=world)
    found: dict[str, Any] = {}
    for name in cases.split(",") if cases != "all" else CASES:
        start, used = time.monotonic(), time.process_time()
        try:
            found[name] = CASES[name]()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        found[name]["seconds"] = [round(time.monotonic() - start, 1), round(time.process_time() - used, 1)]
        print(f"rank {number}: {name}: {found[name]}", flush=True)
        write_json(folder / f"rank{number}.json", found)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
