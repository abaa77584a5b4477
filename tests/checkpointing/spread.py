"""What `shard_state` has spread over two ranks is saved by everybody's programs: the worker of test_spread.py."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hf_shampoo4 as s4
from hf_shampoo4.checkpointing import optimizer_folder
from hf_shampoo4.sharding import rendezvous
from hf_shampoo4.utils.files import write_json

OPTIONS: dict[str, Any] = {"lr": 1e-2, "block_size": 16, "stats_every": 2}


def begun(**options: Any) -> tuple[nn.Module, s4.Shampoo4bit]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 24)))
    return model, s4.Shampoo4bit(model.named_parameters(), **{"shard_state": True, **OPTIONS, **options})


def train(model: nn.Module, optimizer: Any, steps: range) -> list[torch.Tensor]:
    for t in steps:
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(10 * t + dist.get_rank()))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def said(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def alone() -> dict[str, Any]:
    """One rank that asks for the state alone is told so; all of them together get all of it."""
    model, optimizer = begun()
    train(model, optimizer, range(2))
    patience, rendezvous.PATIENCE, rendezvous.REMINDER = rendezvous.PATIENCE, timedelta(seconds=0.4), timedelta(0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        error = said(optimizer.state_dict) if dist.get_rank() == 0 else ""
    rendezvous.PATIENCE = patience
    dist.barrier()
    train(model, optimizer, range(2, 3))
    state = optimizer.state_dict()["state"]
    whole, mine = begun(shard_state=False)
    train(whole, mine, range(3))
    truth = mine.state_dict()["state"]
    same = all(torch.equal(t, state[k][name]) for k, entry in truth.items() for name, t in entry.items())
    return {"error": error, "warned": [str(w.message) for w in warned], "same": same}


def late() -> dict[str, Any]:
    """Rank 1 comes late to a state_dict() of FSDP2, which has a part on every rank, and to save_optimizer()."""
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(32, 32), mesh=init_device_mesh("cpu", (2,)))
    optimizer = s4.Shampoo4bit(model.named_parameters(), **OPTIONS)
    model(torch.ones(4, 32)).square().mean().backward()
    optimizer.step()
    with (
        mock.patch.object(rendezvous, "LATE", timedelta(seconds=0.2)),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        for call in (optimizer.state_dict, lambda: s4.save_optimizer(optimizer, "/dev/null/there")):
            time.sleep(0.6 * dist.get_rank())
            said(call)
    return {"warned": [str(w.message) for w in warned if "has waited" in str(w.message)]}


def edited() -> bool:
    """A group is cut in two in the list, then these are joined: the state goes along from its owners."""
    found = []
    for is_edited in (False, True):
        model, optimizer = begun()
        train(model, optimizer, range(2))
        (group,) = optimizer.param_groups
        names, params = group["param_names"], group["params"]
        parts = [{**group, "params": params[k], "param_names": names[k]} for k in (slice(2, None), slice(2))]
        if is_edited:
            optimizer.param_groups = parts
        train(model, optimizer, range(2, 5))
        if is_edited:
            for key in ("params", "param_names"):
                parts[0][key] = parts[1][key] + parts[0][key]
            del optimizer.param_groups[1]
        train(model, optimizer, range(5, 7))
        state = optimizer.state_dict()["state"]
        found.append([*model.parameters(), *(t for k in sorted(state) for t in state[k].values())])
    return all(map(torch.equal, *found))


def full_disk(folder: Path) -> dict[str, Any]:
    """Rank 1 cannot write its blocks; then rank 0 the file that completes the folder; then there is room."""
    model, optimizer = begun()
    train(model, optimizer, range(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    blocks = said(lambda: s4.save_optimizer(optimizer, folder))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    module: Any = optimizer_folder

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    module.write_json = full
    mark = said(lambda: s4.save_optimizer(optimizer, folder))
    module.write_json = write_json
    half = said(lambda: s4.load_optimizer(begun()[1], folder))
    s4.save_optimizer(optimizer, folder)

    again, loaded = begun()
    again.load_state_dict(model.state_dict())
    s4.load_optimizer(loaded, folder)
    resumed = train(again, loaded, range(2, 4))
    new = nn.Parameter(torch.ones(16, 16))
    loaded.add_param_group({"params": [("new", new)]})
    new.grad = torch.ones(16, 16)
    added = said(lambda: train(again, loaded, range(4, 6)))
    same = all(map(torch.equal, resumed, train(model, optimizer, range(2, 4))))
    return {"blocks": blocks, "mark": mark, "half": half, "same": same, "added": added}


def accelerated(folder: Path) -> dict[str, Any]:
    """accelerate's save_state, and load_state into a new optimizer."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = begun()
    model, optimizer = accelerator.prepare(model.module, optimizer)
    train(model, optimizer, range(3))
    accelerator.save_state(str(folder))
    unbroken = train(model, optimizer, range(3, 5))
    accelerator.free_memory()
    model, optimizer = begun()
    model, optimizer = accelerator.prepare(model.module, optimizer)
    accelerator.load_state(str(folder))
    return {"same": all(map(torch.equal, train(model, optimizer, range(3, 5)), unbroken))}


def in_the_trainer(folder: Path) -> dict[str, Any]:
    """A callback of the user's asks for a checkpoint in on_step_end, after ours; a resumed run goes on from it."""
    from transformers import Trainer, TrainerCallback

    from tests.support.tiny import Tokens, arguments, llama

    class Save(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step == 2

    def run(**given: Any) -> list[float]:
        args = arguments(folder, optim_args="stats_every=2,shard_state=true", max_steps=4,
                         per_device_train_batch_size=2)  # fmt: skip
        trainer = Trainer(llama(num_hidden_layers=1), args, train_dataset=Tokens(16), callbacks=[Save()])
        trainer.train(**given)
        assert type(trainer.model_wrapped) is DistributedDataParallel
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    unbroken = run()
    return {"unbroken": unbroken, "resumed": run(resume_from_checkpoint=str(folder / "checkpoint-2"))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--saves", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]  # for accelerate
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{given.worker}/store", rank=rank, world_size=world)
    saves = given.saves
    found = {
        "alone": alone(), "late": late(), "edited": edited(), "full_disk": full_disk(saves / "side"),
        "accelerated": accelerated(saves / "state"), "in_the_trainer": in_the_trainer(saves / "trainer"),
    }  # fmt: skip
    write_json(given.worker / f"rank{rank}.json", found)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
