"""One of many ranks without the others: what a step of it launches, on the meta device."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from hf_shampoo4 import Shampoo4bit, optimizer, param_groups
from hf_shampoo4.execution import build, consensus, gradients, plans
from hf_shampoo4.planning.launches import Counted, LaunchCounter
from hf_shampoo4.sharding import agreement
from hf_shampoo4.sharding.exchange import Form, Pending, Ranks


class Alone(Ranks):
    """A rank whose others say what it says, and send nothing in particular."""

    def require(self) -> None:
        pass

    def require_same(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world

    def reduce(self, x: Tensor, largest: bool = False) -> Tensor:
        return x

    def all_to_all(self, purpose: str, out: Any, sizes: Any, into: Any, device: torch.device, lost: int = 0) -> Pending:
        if out:
            torch.cat([out[rank] for rank in self.others])
        forms: dict[int, list[Form]] = {rank: list(into.get(rank, ())) for rank in self.others}
        received = torch.empty(sum(f.nbytes for of in forms.values() for f in of), dtype=torch.uint8, device=device)
        return Pending(received, forms, device)


def late_steps(model: nn.Module, world: int, triton: bool, steps: int = 10, **options: Any) -> Counted:
    """What rank 0 launches in some late steps.

    Args:
        model: on the meta device.
        world: ranks.
        triton: with its kernels.
        steps: how many.
        options: of the optimizer.
    """
    opt = Shampoo4bit(
        param_groups(model), refresh_warmup=0, orthogonalise="cholesky_qr", rotation_precision="float32", **options
    )
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    with ExitStack() as stack:  # what asks meta tensors for numbers or addresses, or torch for a process group
        for where, name, stands_for in (
            (opt, "_find_ranks", lambda: Alone(0, world)),
            (gradients, "are_finite", lambda *_, **__: True),
            (optimizer, "check_replicas", lambda *_: None),
            (agreement, "agree", lambda ranks, mine, *_: mine),
            (consensus, "in_first_step", lambda _: nullcontext()),
            (build, "_refuse_sharing", lambda _: None),
            (plans.EqualReplicas, "digest", lambda *_: None),  # once in 97 steps
            (plans.ReplicaChecks, "begin", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(where, name, stands_for))
        opt.step()
        counter = LaunchCounter()
        with counter.with_triton() if triton else nullcontext(), counter:
            for _ in range(steps):
                opt.step()
    return counter.found
