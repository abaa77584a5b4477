"""A training step under torch.compile: the model is compiled once, the optimizer is left as it is."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from hf_shampoo4 import Shampoo4bit


def trained(compiled: bool, closure: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    optimizer = Shampoo4bit(model.named_parameters(), lr=1e-2, stats_every=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))

    def loss_of(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        if closure:
            optimizer.step(lambda: loss_of(x))
        else:
            loss_of(x)
            optimizer.step()

    if compiled and closure:
        model = torch.compile(model, backend="eager")
    elif compiled:
        step = torch.compile(step, backend="eager")
    for _ in range(6):
        step(torch.randn(4, 16))
        schedule.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("closure", [False, True])
def test_a_compiled_training_step_is_compiled_once_and_gives_the_same_bits(closure: bool) -> None:
    expected = trained(False, closure)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = trained(True, closure)
    assert all(map(torch.equal, found, expected))
    stats = torch._dynamo.utils.counters["stats"]
    assert (stats["unique_graphs"], stats["calls_captured"] > 0) == (1, True)  # the model's; its step made 33 before
    torch._dynamo.reset()
