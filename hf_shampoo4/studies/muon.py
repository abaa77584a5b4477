"""Muon as its papers have it: momentum in float32, in 8 bits (2509.23106) or in 4 (MuonQ, 2605.11396).

Contestants of the race that no package has.  Nothing here is used by this package's optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_shampoo4.numerics.quantize import pack

State = dict[str, Tensor]
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Keller Jordan's iteration, which brings singular values near 1 and no nearer."""


class Momentum(Protocol):
    """How a momentum is kept between steps, and what of it is orthogonalised.  All tensors are (..., m, n)."""

    def updated(self, state: State, gradient: Tensor, beta: float) -> Tensor:
        """Take a gradient into the state, which is empty before the first; give what is to be orthogonalised."""


class Float32:
    """Momentum as it is, with Nesterov's look ahead."""

    def updated(self, state: State, gradient: Tensor, beta: float) -> Tensor:
        """See `Momentum`."""
        momentum = gradient + beta * state["momentum"] if state else gradient.clone()
        state["momentum"] = momentum
        return gradient + beta * momentum


class Linear8:
    """Momentum in 8 bits, linear, `block` consecutive numbers sharing a scale (2509.23106), with Nesterov's look ahead.

    State: `codes`, int8, (blocks, block); `scales`, float32, (blocks, 1): the largest magnitude is 127.
    """

    def __init__(self, block: int = 2048) -> None:
        self.block = block

    def updated(self, state: State, gradient: Tensor, beta: float) -> Tensor:
        """See `Momentum`."""
        momentum = gradient + beta * self._read(state, gradient.shape) if state else gradient
        self._write(state, momentum)
        return gradient + beta * momentum

    def _read(self, state: State, shape: torch.Size) -> Tensor:
        numbers = state["codes"].float() * (state["scales"] / 127)
        return numbers.flatten()[: shape.numel()].view(shape)

    def _write(self, state: State, momentum: Tensor) -> None:
        count = min(self.block, momentum.numel())
        rows = torch.nn.functional.pad(momentum.flatten(), (0, -momentum.numel() % count)).view(-1, count)
        scales = rows.abs().amax(1, keepdim=True)
        state["codes"] = (rows * (127 / scales.clamp(min=1e-30))).round().to(torch.int8)
        state["scales"] = scales


class MuonQ4:
    """MuonQ's momentum in 4 bits: of unit norm, its leading directions apart, companded (2605.11396).

    The momentum M, of norm 1, is P R' + rest with P an orthonormal basis of M R, one step of power iteration from the R
    of the step before.  The rest is kept with one scale, P and R with one a column; each number as the nearest of 15
    levels of its mu-law companding.

    State: for each of `rest`, `left` (P) and `right` (R) its codes, uint8, two numbers a byte, and scales, float16.
    """

    def __init__(self, share: int = 16) -> None:
        self.share = share
        """One in so many singular directions is a leading one."""

    def updated(self, state: State, gradient: Tensor, beta: float) -> Tensor:
        """See `Momentum`."""
        *stack, m, n = gradient.shape
        rank = max(1, min(m, n) // self.share)
        momentum = _unit(gradient)
        if state:
            right = _read(state, "right", (*stack, n, rank))
            before = _read(state, "rest", gradient.shape) + _read(state, "left", (*stack, m, rank)) @ right.mT
            momentum = _unit(momentum + beta * before)
        else:
            right = torch.randn(*stack, n, rank, generator=torch.Generator().manual_seed(0)).to(gradient)
        left = torch.linalg.qr(momentum @ (right / (right.norm(dim=-2, keepdim=True) + 1e-7))).Q
        right = momentum.mT @ left
        _write(state, "rest", momentum - left @ right.mT, (-2, -1))
        _write(state, "left", left, (-2,))
        _write(state, "right", right, (-2,))
        return momentum


def _unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)


MU = 255.0


def _write(state: State, name: str, x: Tensor, shared: tuple[int, ...]) -> None:
    """Quantise to -7 .. 7 after companding, numbers along the dimensions `shared` with one scale."""
    small = x.sign() * torch.log1p(MU * x.abs().clamp(max=1)) / math.log1p(MU)
    scales = (small.abs().amax(shared, keepdim=True) / 7).clamp(min=1e-7)
    codes = (small / scales).round().clamp(-7, 7).to(torch.int8).flatten() + 8
    state[name] = pack(codes.to(torch.uint8), 4)
    state[f"{name}_scales"] = scales.to(torch.float16)


def _read(state: State, name: str, shape: tuple[int, ...]) -> Tensor:
    codes = torch.stack([state[name] >> 4, state[name] & 15], -1).flatten()[: math.prod(shape)]
    small = (codes.float() - 8).view(shape) * state[f"{name}_scales"].float()
    return small.sign() * torch.expm1(small.abs() * math.log1p(MU)) / MU


def orthogonalised(x: Tensor, steps: int = 5) -> Tensor:
    """About the nearest matrix with singular values 1, by Newton-Schulz; float32 on a CPU, bfloat16 elsewhere.

    Args:
        x: (..., m, n).
        steps: of the iteration.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalised(x.mT, steps).mT
    a, b, c = QUINTIC
    dtype = torch.float32 if x.device.type == "cpu" else torch.bfloat16
    y = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.to(x.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Moonlight's factor, .2 sqrt(max(m, n)): the root mean square of AdamW's updates.

    Args:
        params: groups of matrices (m, n), or of stacks of them (experts, m, n).
        lr: learning rate.
        momentum: decay of the momentum.
        weight_decay: decoupled.
        store: how the momentum is kept.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.1, store: Momentum | None = None
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.store = store or Float32()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient; `closure` is for the interface and not called."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    update = self.store.updated(self.state[p], p.grad.float(), group["momentum"])
                    alike.setdefault(p.shape, []).append((p, update))
            for shape, members in alike.items():
                factor = 0.2 * math.sqrt(max(shape[-2:]))
                updates = orthogonalised(torch.stack([update for _, update in members]))
                for (p, _), update in zip(members, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.to(p.dtype), alpha=-group["lr"] * factor)


class Joined(torch.optim.Optimizer):
    """Two optimizers as one: the first for the groups that say `use_muon`, the second for the others.

    Args:
        params: groups, each with `use_muon`, `lr` and `weight_decay`.
        lr: of groups without one.
        first: class and keywords.
        second: class and keywords.
    """

    def __init__(
        self, params: Any, lr: float, first: tuple[type, Mapping[str, Any]], second: tuple[type, Mapping[str, Any]]
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.parts: list[tuple[bool, torch.optim.Optimizer]] = []
        for use_muon, (kind, keywords) in ((True, first), (False, second)):
            if groups := self._groups(use_muon):
                self.parts.append((use_muon, kind(groups, lr=lr, **keywords)))

    def _groups(self, use_muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["use_muon"] is use_muon]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update by both; `closure` is for the interface and not called."""
        for use_muon, part in self.parts:
            part.state, part.param_groups = self.state, self._groups(use_muon)  # loading a state replaces both
            part.step()
