"""The optimizer against literal float64 references of the papers' algorithms, step by step (see reference.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit
from tests.support import used
from tests.support.reference import Checked, Settings, Shampoo4, Shampoo32

# What the phases of a 4-bit step may differ by: float32 against float64, errors in codes relative to their scale.
BOUNDS = {
    "parameter": 2e-4,
    "untouched": 0.0,
    "eigenvalues": 1e-5,
    "basis": 5e-3,
    "basis angle": 0.03,  # 1 - cosine, against the stored column: its rounding to 16 levels
    "statistic": 1e-3,
    "statistic diagonal": 1e-4,
    "root": 4e-3,  # the last bits of float32 products, which follow the memory's alignment, were seen to make it .0019
    "root diagonal": 1e-4,
    "first": 1e-5,
    "second": 1e-5,
}


def parameter(shape: tuple[int, ...], channels_last: bool = False) -> nn.Parameter:
    x = torch.randn(shape)
    return nn.Parameter(x.to(memory_format=torch.channels_last) if channels_last else x)


def gradient(p: nn.Parameter, t: int) -> torch.Tensor:
    """Correlated rows and columns of unequal size, so that preconditioning changes the direction."""
    generator = torch.Generator().manual_seed(1000 * t + p.numel())
    m, n = p.shape[-2:] if p.dim() == 3 else (p.shape[0], p[0].numel())
    g = torch.randn(p.numel() // (m * n), m, n, generator=generator)
    rows, columns = 1.0 + torch.arange(m) % 7, 1.0 + torch.arange(n) % 5
    g = g * rows.view(-1, 1) * columns + 3 * torch.randn(1, generator=generator)
    return torch.empty_like(p).copy_((g / 30).view(p.shape))


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().contiguous().numpy()


def snapshot(optimizer: Shampoo4bit, p: nn.Parameter) -> dict[str, np.ndarray]:
    return {name: tensor.clone().numpy() for name, tensor in optimizer.state[p].items()}


# ---------------------------------------------------------------------------------------------- 32-bit, whole runs

SHAPES_32 = [(12, 12), (7, 20), (20, 7), (3, 8, 17), (6, 3, 3, 3), (5, 4, 3)]


@pytest.mark.parametrize("graft", ["norm", "block"])
@pytest.mark.parametrize("block_size", [1024, 8])
@pytest.mark.parametrize(("t1", "t2"), [(1, 1), (2, 3)])
def test_shampoo_32_bit_whole_run(graft: str, block_size: int, t1: int, t2: int) -> None:
    parameters = [parameter(shape) for shape in SHAPES_32] + [parameter((6, 4, 3, 3), channels_last=True)]
    settings = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "block_size": block_size, "damping": 1e-4}
    optimizer = Shampoo4bit(
        parameters,
        algorithm="shampoo",
        factor="direct",
        bits=32,
        moments="fp32",
        stats_every=t1,
        roots_every=t2,
        graft=graft,
        **settings,
    )
    references = [Shampoo32(array(p), t1=t1, t2=t2, graft=graft, **settings) for p in parameters]
    expected = [array(p).copy() for p in parameters]
    plain = [array(p).copy() for p in parameters]
    for t in range(1, 21):
        lr = 0.01 * (1 - t / 40)
        optimizer.param_groups[0]["lr"] = lr
        for i, (p, reference) in enumerate(zip(parameters, references, strict=True)):
            p.grad = gradient(p, t)
            expected[i] = reference.step(expected[i], array(p.grad), lr)
        optimizer.step()
    for p, x, start in zip(parameters, expected, plain, strict=True):
        assert np.abs(array(p) - x).max() < 2e-3 * np.abs(x - start).max()


def test_the_reference_is_not_adamw() -> None:
    """The agreement above would mean little if preconditioning changed nothing."""
    p = parameter((12, 12))
    optimizer = Shampoo4bit(
        [p], algorithm="shampoo", lr=0.01, bits=32, factor="direct", moments="fp32", stats_every=1, roots_every=1
    )
    twin = nn.Parameter(p.detach().clone())
    adamw = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.0)
    start = p.detach().clone()
    for t in range(1, 11):
        p.grad = twin.grad = gradient(p, t)
        optimizer.step()
        adamw.step()
    assert (p - twin).norm() > 0.3 * (twin - start).norm()


# ----------------------------------------------------------------------------------- by its own state, step by step


def follow(shapes: list[tuple[int, ...]], steps: int, channels_last: bool = False, **options: object) -> Checked:
    """Run the optimizer, and the reference beside it from the same stored state at every phase."""
    chosen = {
        "algorithm": "shampoo", "factor": "eigen", "bits": 4, "moments": "4bit", "block_size": 1024, "quant_block": 64,
        "codebook": "linear2", "stats_every": 1, "roots_every": 1, "factor_beta": 0.9, "damping": 0.02,
        "rectify_stats": 1, "rectify_roots": 1, "graft": "norm", **options,
    }  # fmt: skip
    base = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    quantised = chosen["bits"] < 32
    reference = Shampoo4(
        Settings(
            t1=chosen["stats_every"], t2=chosen["roots_every"], beta=chosen["factor_beta"], damping=chosen["damping"],
            rectify_stats=chosen["rectify_stats"] if quantised else 0,
            rectify_roots=chosen["rectify_roots"] if quantised else 0,
            **{name: chosen[name] for name in
               ("bits", "block_size", "quant_block", "factor", "moments", "graft", "codebook")},
            **base,
        )
    )  # fmt: skip
    parameters = [parameter(shape, channels_last) for shape in shapes]
    optimizer = Shampoo4bit(parameters, **base, **used(chosen))
    for p in parameters:
        p.grad = gradient(p, 1)
    optimizer.step()  # makes the state that the reference begins from
    checked = Checked({})
    for t in range(2, steps + 2):
        before = [(array(p).copy(), snapshot(optimizer, p)) for p in parameters]
        for p in parameters:
            p.grad = gradient(p, t)
        optimizer.step()
        for p, (x, state) in zip(parameters, before, strict=True):
            reference.check_step(t, x, array(p.grad), array(p), state, snapshot(optimizer, p), checked)
    return checked


def assert_within_bounds(checked: Checked, *expected: str) -> None:
    assert set(expected) <= checked.worst.keys()
    assert {kind: value for kind, value in checked.worst.items() if not value <= BOUNDS[kind]} == {}


@pytest.mark.parametrize(
    "shapes",
    [[(64, 64)], [(64, 80), (96, 64)], [(130, 70)], [(2, 64, 65)], [(64, 8, 3, 3)]],
    ids=["square", "oblong", "blocks", "experts", "convolution"],
)
def test_4_bit_eigen_step_by_step(shapes: list[tuple[int, ...]]) -> None:
    checked = follow(shapes, steps=3, block_size=72)
    assert_within_bounds(checked, "basis", "basis angle", "eigenvalues", "root", "root diagonal", "first", "second")


def test_channels_last() -> None:
    checked = follow([(64, 8, 3, 3), (70, 80, 1, 1)], steps=2, channels_last=True)
    assert_within_bounds(checked, "basis", "root", "first", "second")


@pytest.mark.parametrize(("t1", "t2"), [(2, 3), (3, 2), (1, 4)])
def test_intervals(t1: int, t2: int) -> None:
    checked = follow([(64, 66)], steps=6, stats_every=t1, roots_every=t2)
    assert_within_bounds(checked, "untouched", "basis", "root")


@pytest.mark.parametrize("graft", ["block", "none"])
def test_grafts(graft: str) -> None:
    assert_within_bounds(follow([(130, 70)], steps=2, block_size=72, graft=graft), "parameter")


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("factor", ["eigen", "direct"])
@pytest.mark.parametrize("moments", ["fp32", "4bit"])
def test_bits_factors_and_moments(bits: int, factor: str, moments: str) -> None:
    checked = follow([(64, 67), (30, 40)], steps=2, bits=bits, factor=factor, moments=moments)
    assert_within_bounds(checked, "root", "first", "second", "parameter")


@pytest.mark.parametrize(
    "options",
    [{"codebook": "dynamic"}, {"quant_block": 16}, {"rectify_stats": 0, "rectify_roots": 0}, {"rectify_roots": 4}],
    ids=str,
)
def test_quantiser_options(options: dict[str, object]) -> None:
    assert_within_bounds(follow([(64, 70)], steps=2, **options), "basis", "root")


def test_what_the_step_by_step_check_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle has teeth: a wrong exponent, a forgotten rectification, a transposed root."""
    from hf_shampoo4.preconditioners import factors

    monkeypatch.setattr(factors, "EXPONENT", -0.26)
    assert follow([(64, 70)], steps=1).worst["root diagonal"] > 10 * BOUNDS["root diagonal"]
    monkeypatch.undo()
    monkeypatch.setattr(factors, "bjorck", lambda v, steps: v)
    assert follow([(64, 70)], steps=2).worst["root diagonal"] > 10 * BOUNDS["root diagonal"]
    monkeypatch.undo()
    monkeypatch.setattr(factors.Eigen, "root", lambda self, state: self.inverse_root.read(state["root"]).mT)
    assert follow([(64, 70)], steps=1).worst["parameter"] > 10 * BOUNDS["parameter"]


def test_default_damping_keeps_the_invariants() -> None:
    """With a damping of 1e-6 and a low-rank gradient QR's last columns are arbitrary; what they stand for is not."""
    p = parameter((64, 96))
    optimizer = Shampoo4bit([p], algorithm="shampoo", bits=32, stats_every=1, roots_every=1, moments="fp32")
    for t in range(1, 9):
        g = gradient(p, t)
        p.grad = g[:, :1] @ g[:1, :] + g[:, 1:2] @ g[1:2, :]
        if t == 1:
            rebuilt = 1e-6 * float(p.grad.square().sum()) / 64 * np.eye(64)
        optimizer.step()
        u, lam = (array(optimizer.state[p][f"64x96/left.{name}.dense"][0]) for name in ("basis", "eigenvalues"))
        a = 0.95 * rebuilt + 0.05 * array(p.grad) @ array(p.grad).T
        rebuilt = u @ np.diag(lam) @ u.T
        assert np.abs(u.T @ u - np.eye(64)).max() < 1e-5
        assert abs(lam.sum() - np.trace(a)) < 1e-5 * np.trace(a)
        assert np.abs(lam - np.diag(u.T @ a @ u)).max() < 1e-5 * lam.max()
        # the columns of one power iteration span what A's do: nothing of A lies outside the first rank(A) of them
        rank = np.linalg.matrix_rank(a, tol=1e-3 * lam.max())
        assert np.linalg.norm(u.T[rank + 4 :] @ a) < 0.05 * np.linalg.norm(a)
    assert torch.isfinite(p).all()
