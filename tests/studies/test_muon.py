"""Muon with its momentum in few bits, against Muon in float32, and that against others' code."""

from __future__ import annotations

import importlib

import pytest
import torch

from hf_shampoo4.studies.machine import state_bytes
from hf_shampoo4.studies.muon import Float32, Joined, Linear8, Muon, MuonQ4, orthogonalised

SHAPES = ((64, 64), (160, 64), (64, 160))


def weights(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes or SHAPES]


def trained(parameters, optimizer, steps: int = 8, seed: int = 1) -> list[torch.Tensor]:
    """Weights after steps on gradients with a few strong directions and noise, the same for every optimizer."""
    generator = torch.Generator().manual_seed(seed)
    strong = [torch.randn(*p.shape[:-1], 3, generator=generator) for p in parameters]
    for _ in range(steps):
        for p, left in zip(parameters, strong, strict=True):
            right = torch.randn(*p.shape[:-2], 3, p.shape[-1], generator=generator)
            p.grad = 1e-2 * (left @ right + torch.randn(p.shape, generator=generator))
        optimizer.step()
    return [p.detach() for p in parameters]


def moved(store=None, steps: int = 8, shapes=SHAPES) -> list[torch.Tensor]:
    parameters = weights(*shapes)
    return [
        new - old
        for new, old in zip(
            trained(parameters, Muon(parameters, lr=1e-2, store=store), steps), weights(*shapes), strict=True
        )
    ]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_float32_muon_is_that_of_pytorch_optimizer() -> None:
    package = pytest.importorskip("pytorch_optimizer")
    base = importlib.import_module("pytorch_optimizer.optimizer.muon.base")
    iterate = base.zero_power_via_newton_schulz_5

    def in_float32(*args, **kwargs):
        return iterate(*args, **{**kwargs, "dtype": torch.float32})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "zero_power_via_newton_schulz_5", in_float32)
        theirs = weights()
        group = {"params": theirs, "use_muon": True, "lr": 1e-2, "weight_decay": 0.1}
        trained(theirs, package.Muon([group], use_adjusted_lr=True))
    ours = weights()
    trained(ours, Muon(ours, lr=1e-2))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_float32_muon_is_torchs_up_to_bfloat16() -> None:
    ours, theirs = weights(), weights()
    trained(ours, Muon(ours, lr=1e-2))
    trained(theirs, torch.optim.Muon(theirs, lr=1e-2, adjust_lr_fn="match_rms_adamw"))
    for a, b, start in zip(ours, theirs, weights(), strict=True):
        assert cosine(a - start, b - start) > 0.995


def test_8_bits_move_weights_as_float32_does() -> None:
    for a, b in zip(moved(Linear8()), moved(Float32()), strict=True):
        assert cosine(a, b) > 0.99


def muonq_in_float32(gradients: list[torch.Tensor], beta: float = 0.95) -> torch.Tensor:
    """The paper's momentum without its quantiser: of unit norm, as are the gradients."""
    momentum = torch.zeros_like(gradients[0])
    for g in gradients:
        momentum = beta * momentum + g / g.norm()
        momentum /= momentum.norm()
    return momentum


def test_4_bits_keep_the_direction_of_the_papers_momentum() -> None:
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(128, 4, generator=generator)
    noise, spans = torch.randn(20, 128, 96, generator=generator), torch.randn(4, 96, generator=generator)
    gradients = [strong @ spans + n for n in noise]
    store, state = MuonQ4(), {}
    kept = [store.updated(state, g, 0.95) for g in gradients]
    exact = muonq_in_float32(gradients)
    assert cosine(kept[-1], exact) > 0.98
    assert cosine(orthogonalised(kept[-1]), orthogonalised(exact)) > 0.95


def test_the_strong_directions_are_kept_apart_from_the_rest() -> None:
    """What the split is for: without it strong directions take the levels that the rest needs."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(128, 4, generator=generator) @ torch.randn(4, 96, generator=generator)
    gradients = [30 * strong + torch.randn(128, 96, generator=generator) for _ in range(6)]
    exact = orthogonalised(muonq_in_float32(gradients))

    def agreement(store: MuonQ4) -> float:
        state: dict[str, torch.Tensor] = {}
        return cosine(orthogonalised([store.updated(state, g, 0.95) for g in gradients][-1]), exact)

    assert agreement(MuonQ4()) > agreement(MuonQ4(share=1000)) + 0.05


def test_a_stack_of_experts_is_its_matrices_one_by_one() -> None:
    for store in (Float32, Linear8, MuonQ4):
        stack = weights((3, 64, 32))
        single = [torch.nn.Parameter(p.detach().clone()) for p in stack[0]]
        kept = store()
        a, b = Muon(stack, lr=1e-2, store=kept), Muon(single, lr=1e-2, store=kept)
        for seed in range(3):
            gradient = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(seed))
            stack[0].grad = gradient.clone()
            for p, g in zip(single, gradient, strict=True):
                p.grad = g.clone()
            a.step()
            b.step()
        start = weights((3, 64, 32))[0].detach()
        for i, p in enumerate(single):  # blocks of 2048 and the first directions lie elsewhere
            assert cosine(stack[0][i].detach() - start[i], p.detach() - start[i]) > (
                0.9999 if store is Float32 else 0.93
            ), store


def test_bytes_of_the_state_are_those_of_the_papers() -> None:
    def bytes_a_parameter(store) -> float:
        parameters = weights((512, 512))
        optimizer = Muon(parameters, lr=1e-2, store=store)
        trained(parameters, optimizer, steps=1)
        return state_bytes(optimizer) / parameters[0].numel()

    assert bytes_a_parameter(Float32()) == 4
    assert bytes_a_parameter(Linear8()) == pytest.approx(1 + 4 / 2048)
    assert 0.56 < bytes_a_parameter(MuonQ4()) < 0.57  # .5 (1 + 1/8), the paper's 7.3-th of float32's with its scales


def test_two_optimizers_are_one_to_a_schedule() -> None:
    parameters = weights((64, 64), (64,))
    groups = [
        {"params": [p], "use_muon": p.ndim == 2, "lr": lr} for p, lr in zip(parameters, (1e-2, 1e-3), strict=True)
    ]
    optimizer = Joined(groups, 1e-2, (Muon, {}), (torch.optim.AdamW, {"betas": (0.9, 0.99)}))
    optimizer.load_state_dict(optimizer.state_dict())  # accelerate does, and new groups come of it
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    schedule.step()
    before = [p.detach().clone() for p in parameters]
    assert not any(torch.equal(a, b) for a, b in zip(before, weights((64, 64), (64,)), strict=True))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert len(optimizer.state) == 2
