"""SOAP, KL-Shampoo and KL-SOAP: against a literal float64 twin, torch's AdamW, and what must hold for any of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4 import state_report as report
from hf_shampoo4.exceptions import CheckpointError, OptionError
from hf_shampoo4.execution.blocking import blocks_of
from hf_shampoo4.integrations.trainer import OPTIMS
from hf_shampoo4.numerics.linalg import bjorck, transpose
from hf_shampoo4.numerics.precision import rotate
from hf_shampoo4.numerics.storage import allocate
from hf_shampoo4.options import Options, parse_optim_args
from hf_shampoo4.preconditioners import eigenbasis
from hf_shampoo4.preconditioners import together as together_
from hf_shampoo4.preconditioners.algorithms import intervals
from hf_shampoo4.preconditioners.bases import (
    BasisStep,
    DecodedSide,
    factor_in_basis,
    make_sides,
    rotated_sides,
    statistic,
)
from hf_shampoo4.preconditioners.two_sided import side_state

FAMILY = ("soap", "kl_shampoo", "kl_soap")
Array = np.ndarray


def gradient(shape: tuple[int, ...], t: int) -> Tensor:
    """Correlated rows and columns, so that the factors have a basis worth finding."""
    m, n = shape
    fixed, moving = torch.Generator().manual_seed(m * n), torch.Generator().manual_seed(t)
    mix_rows, mix_columns = torch.randn(m, m, generator=fixed), torch.randn(n, n, generator=fixed)
    return (mix_rows @ torch.randn(m, n, generator=moving) @ mix_columns + 2) / (m * n)


def train(shape: tuple[int, ...], steps: int, **options: object) -> tuple[nn.Parameter, Shampoo4bit]:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    optimizer = Shampoo4bit([p], lr=0.05, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1, **options)
    for t in range(steps):
        p.grad = gradient(shape, t)
        optimizer.step()
    return p, optimizer


# ---------------------------------------------------------------------------------------- the literal float64 twin


class Literal:
    """One block, in plain numpy and in the parameter's coordinates wherever the papers are: bases in full precision."""

    def __init__(self, w: Array, algorithm: str, beta: float, damping: float, vocabulary: bool) -> None:
        self.w, self.algorithm, self.damping = w, algorithm, damping
        m, n = w.shape
        self.u = [np.eye(m), np.eye(n)]
        self.rotated = [m < 2.5 * n and not vocabulary, n < 2.5 * m]
        self.beta = [0.98 if vocabulary else beta, beta]
        self.eigenvalues: list[Array] | None = None
        self.momentum = np.zeros_like(w)  # in the parameter's coordinates: what carrying over must preserve
        self.second = np.zeros_like(w)
        self.t = 0

    def step(self, g: Array, lr: float, wd: float, refresh_memory: float | None) -> None:
        self.t += 1
        kl = self.algorithm != "soap"
        inside = self.u[0].T @ g @ self.u[1]
        if self.eigenvalues is None:
            level = (inside**2).mean()
            self.eigenvalues = [np.full(k, level**0.5 if kl else level) for k in g.shape]
        if all(self.rotated):
            new = [self.variances(inside, side, kl) for side in (0, 1)]
            shares = self.shares(new, 1 - self.beta[0]) if kl else (1.0, 1.0)
            for side in (0, 1):
                self.follow(side, shares[side] * new[side])
        else:  # the side without a basis first: the other one is whitened by what it then has
            first = 0 if self.rotated[1] else 1
            new = [self.variances(inside, side, kl) for side in (0, 1)]
            grown = [of_side / old for of_side, old in zip(new, self.eigenvalues, strict=True)]
            ratio = self.jump(grown[first], grown[1 - first], 1 - self.beta[first])[1] if kl else 1.0
            self.follow(first, min(1.0, ratio) * new[first])
            self.follow(1 - first, self.variances(inside, 1 - first, kl))
        if refresh_memory is not None:
            self.refresh(g, refresh_memory, kl)
        inside = self.u[0].T @ g @ self.u[1]
        self.momentum = 0.9 * self.momentum + 0.1 * g
        m = self.u[0].T @ self.momentum @ self.u[1] / (1 - 0.9**self.t)
        if self.algorithm == "kl_shampoo":
            left, right = (x + self.damping * x.max() for x in self.eigenvalues)
            direction = m / np.sqrt(np.outer(left, right))
        else:
            self.second = 0.98 * self.second + 0.02 * inside**2
            direction = m / (np.sqrt(self.second / (1 - 0.98**self.t)) + 1e-8)
        self.w = (1 - lr * wd) * self.w - lr * self.u[0] @ direction @ self.u[1].T

    def variances(self, inside: Array, side: int, kl: bool) -> Array:
        """Of each row (side 0) or column of the rotated gradient, whitened by the other side if it is KL's."""
        rows = inside if side == 0 else inside.T
        other = self.eigenvalues[1 - side] if kl else np.ones(rows.shape[1])
        return np.array([np.mean(row**2 / other) for row in rows])

    def jump(self, rows: Array, columns: Array, weight: float) -> tuple[float, float]:
        """The growth of the squares beyond what the eigenvalues' product can take in, and on which side it is."""
        excess = max(1.0, weight * rows.mean())
        of_rows, of_columns = (((1 + x[x > 0]) ** -0.25).mean() for x in (rows, columns))
        ratio = (of_rows / of_columns) ** 4
        return excess, min(max(ratio, 1 / excess), excess)

    def shares(self, new: list[Array], weight: float) -> tuple[float, float]:
        excess, ratio = self.jump(*[of_side / old for of_side, old in zip(new, self.eigenvalues, strict=True)], weight)
        return (ratio / excess) ** 0.5, (ratio * excess) ** -0.5

    def follow(self, side: int, new: Array) -> None:
        beta = self.beta[side]
        self.eigenvalues[side] = beta * self.eigenvalues[side] + (1 - beta) * new

    def refresh(self, g: Array, decay: float, kl: bool) -> None:
        before = [x.copy() for x in self.eigenvalues]
        bases = [u.copy() for u in self.u]
        for side in (0, 1):
            if not self.rotated[side]:
                continue
            other = before[1 - side] if kl else np.ones_like(before[1 - side])
            x = bases[0].T @ g @ bases[1]
            x = x if side == 0 else x.T
            sample = x @ np.diag(1 / other) @ x.T / x.shape[1]
            scale = np.sqrt(np.minimum(before[side] / np.diag(sample), 100))
            a = (1 - decay) * np.outer(scale, scale) * sample
            np.fill_diagonal(a, before[side])
            q, r = np.linalg.qr(a)
            q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
            self.u[side] = bases[side] @ q
            self.eigenvalues[side] = np.diag(q.T @ a @ q)


@pytest.mark.parametrize("algorithm", [*FAMILY, "vocabulary"])
@pytest.mark.parametrize("shape", [(12, 12), (7, 16), (20, 7), (24, 4), (3, 16)])
@pytest.mark.parametrize(("every", "warmup"), [(1, 0), (3, 2)])
def test_32_bit_whole_run_agrees_with_the_literal_one(
    algorithm: str, shape: tuple[int, int], every: int, warmup: int
) -> None:
    options: dict[str, object] = {"factor_beta": 0.9, "damping": 1e-4}
    if vocabulary := algorithm == "vocabulary":
        if shape != (24, 4):
            pytest.skip("too few rows for a vocabulary: the base alone")
        algorithm, options = "kl_shampoo", {**options, "vocabulary": True, "vocabulary_beta": 0.98}
    torch.manual_seed(0)
    literal = Literal(torch.randn(shape).double().numpy(), algorithm, 0.9, 1e-4, vocabulary)
    for t in range(8):
        interval = min(every, max(1, (t + 1) // warmup)) if warmup else every
        decay = 0.9**interval if (t + 1) % interval == 0 else None
        literal.step(gradient(shape, t).double().numpy(), 0.05, 0.1, decay)
    p, _ = train(
        shape, 8, algorithm=algorithm, bits=32, moments="fp32", stats_every=every, refresh_warmup=warmup, **options
    )
    np.testing.assert_allclose(p.detach().numpy(), literal.w, rtol=0, atol=3e-4)


@pytest.mark.parametrize("vocabulary", [False, True])
@pytest.mark.parametrize("shape", [(12, 12), (7, 16), (24, 4), (3, 16)])
@pytest.mark.parametrize("grows", ["all", "row", "column"])
def test_where_gradients_grow_the_run_agrees_with_the_literal_one(
    grows: str, shape: tuple[int, int], vocabulary: bool
) -> None:
    if vocabulary and shape != (24, 4):
        pytest.skip("too few rows for a vocabulary: the base alone")

    def grown(t: int) -> Tensor:
        g = gradient(shape, t)
        at: object = {"all": ..., "row": (2,), "column": (slice(None), 1)}[grows]
        g[at] *= 1.0 if t < 5 else 1e3
        return g

    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    literal = Literal(p.detach().double().numpy(), "kl_shampoo", 0.9, 1e-4, vocabulary)
    optimizer = Shampoo4bit(
        [{"params": [p], "vocabulary": vocabulary}], lr=0.05, betas=(0.9, 0.98), weight_decay=0.1, bits=32,
        moments="fp32", stats_every=100, refresh_warmup=0, factor_beta=0.9, vocabulary_beta=0.98, damping=1e-4,
    )  # fmt: skip
    for t in range(8):
        literal.step(grown(t).double().numpy(), 0.05, 0.1, None)
        p.grad = grown(t)
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), literal.w, rtol=0, atol=3e-4)


def test_basis_updates_are_rarer_and_rarer() -> None:
    options = Options(stats_every=10, refresh_warmup=100)
    updates = [step for step in range(1, 2001) if step % intervals(options, step)["basis"] == 0]
    assert updates[:200] == [*range(1, 200), 200]
    assert [sum(a < step <= a + 100 for step in updates) for a in (100, 200, 300, 900, 1500)] == [100, 50, 34, 12, 10]
    assert {intervals(Options(stats_every=10, refresh_warmup=0), n)["basis"] for n in (1, 50, 10**6)} == {10}


def test_soap_in_the_first_basis_is_adamw() -> None:
    """An outsider: with no refresh the bases stay the identity."""
    p, _ = train((24, 40), 12, algorithm="soap", bits=32, moments="fp32", stats_every=10**6, refresh_warmup=0)
    torch.manual_seed(0)
    q = nn.Parameter(torch.randn(24, 40))
    adamw = torch.optim.AdamW([q], lr=0.05, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    for t in range(12):
        q.grad = gradient((24, 40), t)
        adamw.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_kl_shampoo_whitens_a_kronecker_gradient() -> None:
    """E[vec G vec G^T] = R x L: with true bases and eigenvalues the steps' second moment is the identity."""

    def distance_from_identity(stats_every: int) -> float:
        torch.manual_seed(0)
        left, right = torch.randn(8, 8), torch.randn(12, 12) * torch.logspace(0, -2, 12)
        p = nn.Parameter(torch.zeros(8, 12))
        optimizer = Shampoo4bit(
            [p], lr=1.0, betas=(0.0, 0.98), weight_decay=0.0, algorithm="kl_shampoo", bits=32, moments="fp32",
            stats_every=stats_every, refresh_warmup=0, factor_beta=0.99,
        )  # fmt: skip
        steps = []
        for _ in range(700):
            before = p.detach().clone()
            p.grad = left @ torch.randn(8, 12) @ right.T
            optimizer.step()
            steps.append((before - p.detach()).flatten())
        x = torch.stack(steps[300:])
        return float(torch.linalg.matrix_norm(x.T @ x / len(x) - torch.eye(96))) / 96**0.5

    assert distance_from_identity(1) < 0.75  # the sampling of 400 steps alone gives .49
    assert distance_from_identity(10**6) > 1.5  # variances alone, in the first basis


# ------------------------------------------------------------------------------------------------ the carried moment


def momentum_in_the_parameters_coordinates(optimizer: Shampoo4bit, p: Tensor) -> Tensor:
    stack = optimizer.waves(0)[0].stacks[0]
    a, state = stack.algorithm, stack.state
    sides = [DecodedSide(side, side_state(state, name)) for side, name in ((a.left, "left"), (a.right, "right"))]
    m = a.moments.first.read(state["first"])
    of_left, of_right = eigenbasis._scales(*sides, Options.of(optimizer.param_groups[0]))
    m = m * of_left * of_right
    return rotate(transpose(sides[0].vectors), m, transpose(sides[1].vectors))[0]


def moment_error(shape: tuple[int, int], **options: object) -> float:
    """Distance of the momentum from the exponential average of the gradients, relative."""
    p, optimizer = train(shape, 12, stats_every=2, refresh_warmup=0, factor_beta=0.5, **options)
    exact = sum(0.1 * 0.9 ** (11 - t) * gradient(shape, t) for t in range(12))
    found = momentum_in_the_parameters_coordinates(optimizer, p)
    return float(torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact))


@pytest.mark.parametrize("algorithm", FAMILY)
@pytest.mark.parametrize(("bits", "moments", "bound"), [(32, "fp32", 1e-5), (8, "bf16", 0.02), (4, "fp32", 0.3)])
def test_the_momentum_is_rotated_at_every_basis_update(algorithm: str, bits: int, moments: str, bound: float) -> None:
    assert moment_error((96, 80), algorithm=algorithm, bits=bits, moments=moments) < bound


@pytest.mark.parametrize("algorithm", ["soap", "kl_shampoo"])
@pytest.mark.parametrize("wrong", [lambda q: None, transpose])
def test_a_wrong_carry_over_is_found(
    wrong: Callable[[Tensor], Tensor | None], algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = together_.update_bases

    def update_bases(steps: list[BasisStep]) -> list[tuple[Tensor | None, Tensor]]:
        return [(wrong(q), failed) for q, failed in right(steps)]

    monkeypatch.setattr(together_, "update_bases", update_bases)
    assert moment_error((96, 80), algorithm=algorithm, bits=32, moments="fp32") > 0.3


def test_a_4_bit_moment_serves_small_directions_as_well_as_large_ones() -> None:
    """Columns of the gradient are 1 to 1/128 in size, KL-Shampoo's steps are not, nor are errors of rounding."""

    def last_step(moments: str) -> Tensor:
        p = nn.Parameter(torch.zeros(64, 128))
        optimizer = Shampoo4bit([p], lr=1.0, bits=32, moments=moments, stats_every=10**6, refresh_warmup=0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(150):  # until the eigenvalues have forgotten their start
            before = p.detach().clone()
            p.grad = torch.randn(64, 128, generator=generator) / torch.arange(1, 129)
            optimizer.step()
        return before - p.detach()

    exact, rounded = last_step("fp32"), last_step("4bit")
    error = ((rounded - exact).square().mean(0) / exact.square().mean(0)).sqrt()
    assert error.max() < 0.35
    assert error[96:].mean() < 1.2 * error[:32].mean()


# ------------------------------------------------------------------------------------------------------------ parts


def test_factor_in_basis_is_semidefinite_and_keeps_its_diagonal() -> None:
    torch.manual_seed(0)
    x, eigenvalues = torch.randn(3, 20, 4), torch.logspace(0, -6, 20).expand(3, 20)  # a sample of rank 4
    a = factor_in_basis(eigenvalues, statistic(x, torch.ones(3, 1)), 0.6)
    torch.testing.assert_close(a.diagonal(dim1=-2, dim2=-1), eigenvalues)
    scale = eigenvalues.double().rsqrt()
    correlations = a.double() * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    assert torch.linalg.eigvalsh(correlations).min() > 0.6 - 1e-4


@pytest.mark.parametrize("algorithm", FAMILY)
def test_rounding_does_not_add_up_over_basis_updates(algorithm: str) -> None:
    """After 35 updates; rounding once gives .15, of which a Bjorck step, done before each update, leaves a tenth."""
    _, optimizer = train((128, 96), 60, algorithm=algorithm, stats_every=2, refresh_warmup=10)
    stack = optimizer.waves(0)[0].stacks[0]
    for name, side in (("left", stack.algorithm.left), ("right", stack.algorithm.right)):
        u = DecodedSide(side, side_state(stack.state, name)).vectors
        assert defect(u) < 0.2, name
        assert defect(bjorck(u, 1)) < 0.1, name


def test_float32_bases_stay_orthogonal_over_thousands_of_basis_updates() -> None:
    """Without a Bjorck step before each update the defect is 3e-5 by then, and grows in proportion to them."""
    side, _ = make_sides((8, 8), Options(algorithm="soap"), (True, True))
    state = {name: allocate(storage, 4, "cpu") for name, storage in side.storages().items()}
    side.initialise(state)
    state["eigenvalues"]["dense"].fill_(1.0)
    generator, scales = torch.Generator().manual_seed(0), torch.logspace(0, -2, 8).unsqueeze(-1)
    for _ in range(2000):
        decoded = DecodedSide(side, state)
        g = decoded.vectors.mT @ (scales * torch.randn(4, 8, 16, generator=generator))
        decoded.update_basis(statistic(g, torch.ones(4, 1)), 0.9, slice(0, 4))
    assert max(map(defect, state["basis"]["dense"])) < 1e-6


def defect(u: Tensor) -> float:
    return float(torch.linalg.matrix_norm(u.mT @ u - torch.eye(u.shape[-1]))) / u.shape[-1] ** 0.5


@pytest.mark.parametrize("algorithm", FAMILY)
@pytest.mark.parametrize("bits", [4, 32])
def test_no_gradient_no_step(algorithm: str, bits: int) -> None:
    p = nn.Parameter(torch.ones(80, 72))
    optimizer = Shampoo4bit([p], lr=1.0, weight_decay=0.0, algorithm=algorithm, bits=bits)
    for size, moves in ((0.0, False), (0.0, False), (1.0, True), (0.0, True)):
        before = p.detach().clone()
        p.grad = torch.full_like(p, size)
        optimizer.step()
        assert torch.isfinite(p).all()
        assert torch.equal(p, before) != moves


@pytest.mark.parametrize("orthogonalise", ["qr", "cholesky_qr"])
@pytest.mark.parametrize("algorithm", FAMILY)
def test_gradients_of_rank_one_and_of_any_size(algorithm: str, orthogonalise: str) -> None:
    for size in (1e-8, 1.0, 1e12):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(70, 90))
        options = {"algorithm": algorithm, "stats_every": 3, "orthogonalise": orthogonalise}
        optimizer = Shampoo4bit([p], lr=1e-2, weight_decay=0.0, **options)
        for _ in range(30):
            p.grad = size * torch.outer(torch.randn(70), torch.ones(90))
            optimizer.step()
        assert torch.isfinite(p).all()
        assert 0 < p.abs().max() < 3.0, size
        assert not optimizer.waves(0)[0].stacks[0].state["failures"]["dense"].any()


@pytest.mark.parametrize("algorithm", FAMILY)
def test_by_cholesky_factors_a_training_is_that_by_qr(algorithm: str) -> None:
    options = {"algorithm": algorithm, "bits": 32, "moments": "fp32"}
    of_qr, of_cholesky = (
        train((96, 80), 40, stats_every=3, refresh_warmup=10, orthogonalise=how, **options)[0]
        for how in ("qr", "cholesky_qr")
    )
    assert torch.linalg.matrix_norm(of_cholesky - of_qr) < 1e-3 * torch.linalg.matrix_norm(of_qr)


@pytest.mark.parametrize("stats_every", [1, 3])
@pytest.mark.parametrize("algorithm", FAMILY)
def test_bases_of_all_stacks_at_once_are_those_of_one_after_the_other(
    algorithm: str, stats_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where it takes fewer launches; of one order and of others, whole stacks and some of their blocks."""

    def trained() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((80, 80), (80, 80), (80, 72), (72, 80), (300, 80), (80, 80))
        ps = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        options = {"stats_every": stats_every, "refresh_warmup": 0, "orthogonalise": "cholesky_qr"}
        optimizer = Shampoo4bit(ps, lr=0.1, algorithm=algorithm, **options)
        for t in range(7):
            for i, p in enumerate(ps):
                p.grad = None if (i, t) == (1, 2) else torch.randn(p.shape, generator=generator)
            optimizer.step()
        state = [t for entry in optimizer.state.values() for t in entry.values()]
        return [*(p.detach() for p in ps), *state]

    alone, calls = trained(), list[int]()
    monkeypatch.setattr(together_, "ALONE", ())
    right = together_.update_bases
    monkeypatch.setattr(together_, "update_bases", lambda steps: calls.append(len(steps)) or right(steps))
    for one, other in zip(trained(), alone, strict=True):
        assert torch.equal(one, other)
    assert max(calls) > 2


@pytest.mark.parametrize("how", ["qr", "cholesky_qr"])
def test_a_block_whose_sample_is_not_finite_keeps_its_basis_and_no_other_does(how: str) -> None:
    side, _ = make_sides((8, 8), Options(algorithm="soap", orthogonalise=how), (True, True))
    state = {name: allocate(storage, 3, "cpu") for name, storage in side.storages().items()}
    side.initialise(state)
    state["eigenvalues"]["dense"][:2] = 2.0  # the third has had no gradient
    decoded = DecodedSide(side, state)
    samples = statistic(torch.randn(3, 8, 16), torch.ones(3, 1))
    samples[1, 2, 3] = samples[1, 3, 2] = torch.nan
    samples[2] = 0.0
    q, failed = decoded.update_basis(samples, 0.5, slice(0, 3))
    assert failed.tolist() == [False, True, False]
    eye = torch.eye(8)
    assert not torch.equal(q[0], eye)
    assert all(torch.equal(x, eye) for x in (q[1], q[2], decoded.vectors[1], decoded.vectors[2]))
    assert decoded.eigenvalues[1].tolist() == [2.0] * 8
    assert decoded.eigenvalues[2].tolist() == [0.0] * 8


@pytest.mark.parametrize("algorithm", FAMILY)
def test_long_silence_is_survived(algorithm: str) -> None:
    """What is stored of the moment is its quotient with the eigenvalues, which then fall to 1e-16 of what they were."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(72, 70))
    options = {"algorithm": algorithm, "factor_beta": 0.5, "stats_every": 10, "refresh_warmup": 0}
    optimizer = Shampoo4bit([p], lr=1.0, weight_decay=0.0, **options)
    for size in (*[1e8] * 20, *[0.0] * 200, *[1.0] * 5):
        before = p.detach().clone()
        p.grad = size * torch.randn_like(p)
        optimizer.step()
        assert torch.isfinite(p).all()
        assert (before - p.detach()).abs().max() < 100.0


@pytest.mark.parametrize("beta1", [0.9, 0.95, 0.98])
@pytest.mark.parametrize(("shape", "rows", "columns"), [((200, 32), [3, 90], []), ((32, 200), [], [3, 90])])
def test_rows_and_columns_whose_gradients_end_come_to_rest(
    beta1: float, shape: tuple[int, int], rows: list[int], columns: list[int]
) -> None:
    """Units that die: with eigenvalues forgotten faster than the moment (.9 where beta1 was .98), they ran away."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Shampoo4bit([p], lr=1.0, betas=(beta1, 0.999), bits=32, moments="fp32")
    moved = []
    for t in range(400):
        before = p.detach().clone()
        p.grad = torch.randn(shape)
        if t >= 100:
            p.grad[rows], p.grad[:, columns] = 0.0, 0.0
        optimizer.step()
        step = p.detach() - before
        moved.append(torch.cat([step[rows].flatten(), step[:, columns].flatten()]).square().mean().sqrt())
    assert max(moved[101:]) < 1.2 * moved[100]
    assert moved[399] < 0.1 * moved[100]


@pytest.mark.parametrize("algorithm", FAMILY)
def test_silence_ends_in_rest_and_is_not_remembered(algorithm: str) -> None:
    """An expert that no token reaches, a parameter that an engine hands zeros: ten steps of drift, as with AdamW."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(72, 70))
    optimizer = Shampoo4bit([p], lr=1.0, weight_decay=0.0, algorithm=algorithm, moments="fp32")
    moved = []
    for size in (*[1.0] * 20, *[0.0] * 900, *[3.0] * 5):
        before = p.detach().clone()
        p.grad = size * torch.randn_like(p)
        optimizer.step()
        moved.append((p.detach() - before).norm())
    assert sum(moved[20:920]) < 12 * moved[19]
    assert moved[919] == 0
    assert all(moved[19] / 5 < there < 8 * moved[19] for there in moved[920:])


def test_a_failed_basis_update_keeps_the_basis_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_shampoo4.preconditioners import bases

    p, optimizer = train((80, 72), 4, algorithm="kl_shampoo", stats_every=1)
    key = "80x72/left.eigenvalues.dense"
    monkeypatch.setattr(bases, "factor_in_basis", lambda e, s, m: torch.full_like(s, torch.nan))
    eigenvalues = optimizer.state[p][key].clone()
    p.grad = gradient((80, 72), 5)
    optimizer.step()
    assert torch.isfinite(p).all()
    assert torch.isfinite(optimizer.state[p][key]).all()
    assert not torch.equal(optimizer.state[p][key], eigenvalues)  # they follow the gradient as ever
    assert optimizer.state[p]["80x72/failures.dense"].item() == 1


# ------------------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize(("algorithm", "most"), [("soap", 2.3), ("kl_shampoo", 1.75), ("kl_soap", 2.3)])
def test_bytes_of_live_tensors(algorithm: str, most: float) -> None:
    """LLaMA-130M's matrices."""
    shapes = [(768, 768)] * 4 + [(2048, 768)] * 2 + [(768, 2048)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = Shampoo4bit(parameters, algorithm=algorithm, stats_every=10**6, refresh_warmup=0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    size = sum(t.numel() * t.element_size() for entry in optimizer.state.values() for t in entry.values())
    assert size / sum(p.numel() for p in parameters) <= most


@pytest.mark.parametrize(
    ("sides", "rotated"),
    [
        ("auto", {(100, 100): "both", (249, 100): "both", (250, 100): "columns", (40, 100): "rows", (41, 100): "both"}),
        ("both", {(100, 100): "both", (4096, 8): "both", (8, 4096): "both"}),
        ("short", {(100, 100): "columns", (101, 100): "columns", (100, 101): "rows"}),
    ],
)
def test_which_sides_have_a_basis(sides: str, rotated: dict[tuple[int, int], str]) -> None:
    names = {(True, True): "both", (True, False): "rows", (False, True): "columns"}
    assert {shape: names[rotated_sides(*shape, Options(sides=sides))] for shape in rotated} == rotated
    assert rotated_sides(4096, 128, Options(sides=sides, vocabulary=True)) == (False, True)


def test_the_shape_of_the_matrix_decides_not_that_of_a_block() -> None:
    """Cut to squares, an oblong matrix would have two bases; cut to strips, a square one would have one."""
    oblong = blocks_of((96, 240), Options(block_size=96, basis_order=48))
    square = blocks_of((120, 120), Options(block_size=100))
    assert {block.rect.shape for block in oblong} == {(48, 240)}
    assert not any(block.algorithm.is_two_sided for block in oblong)
    assert all(block.algorithm.is_two_sided for block in square)


def test_fused_matrices_are_taken_one_by_one() -> None:
    """q (96 x 96) has two bases, k and v (24 x 96, four times as wide) one each."""
    blocks = blocks_of((144, 96), Options(row_splits=(96, 24, 24)))
    assert [(block.rect.shape, block.algorithm.is_two_sided) for block in blocks] == [
        ((96, 96), True), ((24, 96), False), ((24, 96), False),
    ]  # fmt: skip
    with pytest.raises(OptionError, match="blocks of one shape, of which some have two bases and some have one"):
        blocks_of((11250, 3000), Options(row_splits=(7500, 3750), block_size=4000, basis_order=3000))


@pytest.mark.parametrize("algorithm", FAMILY)
@pytest.mark.parametrize(("shape", "long"), [((8, 1024), "right"), ((1024, 8), "left")])
def test_an_oblong_matrix_has_a_basis_on_its_short_side_alone(
    algorithm: str, shape: tuple[int, int], long: str
) -> None:
    """A LoRA adapter."""
    p, optimizer = train(shape, 2, algorithm=algorithm)
    (short,) = {"left", "right"} - {long}
    layout = {key.split("/")[1]: tuple(t.shape[1:]) for key, t in optimizer.state[p].items()}
    sides = {key: size for key, size in layout.items() if key.startswith(("left", "right"))}
    assert sides == {
        f"{long}.eigenvalues.dense": (1024,), f"{short}.eigenvalues.dense": (8,), f"{short}.basis.dense": (8, 8),
    }  # fmt: skip
    if algorithm == "kl_shampoo":
        assert sum(t.numel() * t.element_size() for t in optimizer.state[p].values()) / p.numel() < 1.1


def test_a_vocabulary_has_a_diagonal_factor_and_one_moment_in_8_bits() -> None:
    p, optimizer = train((4096, 128), 2, algorithm="soap", vocabulary=True)
    layout = {key.split("/")[1]: tuple(t.shape[1:]) for key, t in optimizer.state[p].items()}
    assert layout == {
        "steps.dense": (), "failures.dense": (), "left.eigenvalues.dense": (4096,), "right.eigenvalues.dense": (128,),
        "right.basis.codes": (128, 64), "right.basis.scales": (128, 8), "right.basis.largest": (128, 1),
        "first.codes": (4096 * 128,), "first.scales": (4096 * 128 // 256,),
    }  # fmt: skip
    size = sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
    assert size / p.numel() <= 1.1


@pytest.mark.parametrize("options", [{"embeddings": "elementwise"}, {"algorithm": "shampoo"}])
@pytest.mark.parametrize("shape", [(256, 64), (96, 64)])
def test_a_vocabulary_without_a_preconditioner(shape: tuple[int, int], options: dict[str, object]) -> None:
    """Asked for, or hardly a vocabulary."""
    chosen = {} if shape == (96, 64) else options
    parameters = [nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(shape))]
    optimizer = Shampoo4bit([{"params": parameters[:1]}, {"params": parameters[1:], "vocabulary": True}], **chosen)
    (block,) = blocks_of(shape, Options.of(optimizer.param_groups[1]))
    assert not block.algorithm.preconditions


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((50257, 768), {(5584, 768), (5585, 768)}),
        ((32000, 1024), {(8000, 1024)}),
        ((32000, 4096), {(8000, 2048)}),
        ((4096, 128), {(4096, 128)}),
    ],
)
def test_blocks_of_a_vocabulary_are_tall(shape: tuple[int, int], blocks: set[tuple[int, int]]) -> None:
    """Eight times as tall as wide, unless that is more than a wave holds."""
    found = blocks_of(shape, Options(vocabulary=True))
    assert {block.rect.shape for block in found} == blocks
    assert sum(block.rect.shape[0] * block.rect.shape[1] for block in found) == shape[0] * shape[1]


# ---------------------------------------------------------------------------------------------- as an optimizer


SHAPES = [(70, 66), (24, 140), (200, 70), (9,), (3, 20, 32)]


def model(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def optimizer_of(parameters: list[nn.Parameter], **options: object) -> Shampoo4bit:
    return Shampoo4bit(parameters, lr=1e-2, **{"block_size": 100, "stats_every": 2, "refresh_warmup": 1, **options})


def advance(optimizer: Shampoo4bit, steps: range, unused: int | None = None) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(1000 + t)
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            g = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if i == unused and t % 2 else g
        optimizer.step()


def values(optimizer: Shampoo4bit) -> list[Tensor]:
    parameters = optimizer.param_groups[0]["params"]
    return [p.detach() for p in parameters] + [t for p in parameters for _, t in sorted(optimizer.state[p].items())]


@pytest.mark.parametrize("algorithm", FAMILY)
@pytest.mark.parametrize("moments", ["fp32", "4bit", "4bit_eden", "4bit_zipsr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_repeats_the_bits(algorithm: str, moments: str, dtype: torch.dtype) -> None:
    options = {"algorithm": algorithm, "moments": moments, "stochastic_rounding": True}
    whole = optimizer_of(model(dtype), **options)
    advance(whole, range(5), unused=1)
    parameters = [nn.Parameter(p.detach().clone()) for p in whole.param_groups[0]["params"]]
    resumed = optimizer_of(parameters, **options)
    resumed.load_state_dict(whole.state_dict())
    advance(whole, range(5, 9), unused=1)
    advance(resumed, range(5, 9), unused=1)
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(resumed), strict=True))


@pytest.mark.parametrize("algorithm", FAMILY)
def test_waves_do_not_matter(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = optimizer_of(model(), algorithm=algorithm), optimizer_of(model(), algorithm=algorithm)
    advance(together, range(3))
    monkeypatch.setattr(import_module("hf_shampoo4.execution.blocking"), "WAVE_ELEMENTS", 1)
    advance(apart, range(3))
    assert len(apart.waves(0)) == len(SHAPES) > len(together.waves(0)) == 1
    for a, b in zip(model_of(together), model_of(apart), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # batched products round otherwise; a code may differ


def model_of(optimizer: Shampoo4bit) -> list[Tensor]:
    return [p.detach() for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize("algorithm", FAMILY)
def test_another_algorithms_checkpoint_is_refused(algorithm: str) -> None:
    there = optimizer_of(model(), algorithm=algorithm)
    advance(there, range(2))
    here = Shampoo4bit(model(), lr=1e-2, block_size=100, algorithm="shampoo")
    with pytest.raises(CheckpointError, match=f"algorithm={algorithm}, this run has algorithm=shampoo"):
        here.load_state_dict(there.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": "cholesky"}, "factor has no effect with algorithm=soap: remove it, or add algorithm=shampoo"),
        ({"base": "sgdm", "moments": "fp32"}, "base has no effect with algorithm=soap: remove it, or add"),
        ({"roots_every": 20}, "roots_every has no effect with algorithm=soap"),
        ({"graft": "none"}, "graft has no effect with algorithm=soap"),
        ({"algorithm": "shampoo", "refresh_warmup": 5}, "refresh_warmup has no effect with algorithm=shampoo"),
        ({"algorithm": "shampoo", "sides": "short"}, "sides has no effect with algorithm=shampoo"),
        ({"algorithm": "shampoo", "oblong": 3}, "oblong has no effect with algorithm=shampoo"),
        ({"algorithm": "shampoo", "basis_order": 9}, "basis_order has no effect with algorithm=shampoo"),
        ({"sides": "long"}, "sides='long' is not allowed: it must be one of auto, both, short"),
        ({"basis_order": 0}, "basis_order=0 is not allowed: it must be an integer >= 1"),
        ({"oblong": 1}, "oblong=1.0 is not allowed: it must be a number above 1"),
        ({"oblong": "inf"}, "oblong=inf is not allowed: it must be a number above 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        Shampoo4bit(model(), lr=1e-2, **{"algorithm": "soap", **options})


def test_the_names_of_the_flag_carry_their_options() -> None:
    options = parse_optim_args("refresh_warmup=7,stats_every=3", beneath=OPTIMS["kl_shampoo4bit"])
    assert options == {"refresh_warmup": 7, "stats_every": 3}
    with pytest.raises(OptionError, match="roots_every"):
        parse_optim_args("roots_every=7", beneath=OPTIMS["soap4bit"])


@pytest.mark.parametrize(
    ("algorithm", "treatment"), [("soap", "SOAP"), ("kl_soap", "KL-SOAP"), ("kl_shampoo", "KL-Sh")]
)
def test_report(algorithm: str, treatment: str) -> None:
    rows = report.rows(optimizer_of(model(), algorithm=algorithm))
    assert rows[0].treatment.startswith(treatment)
    assert any("4-bit, 4bit moments" in row.treatment for row in rows)
    optimizer = optimizer_of(model(), algorithm=algorithm)
    advance(optimizer, range(1))
    assert sum(row.bytes for row in rows) == report.metrics(optimizer)["optim/state_bytes"]


@pytest.mark.parametrize("algorithm", ["kl_shampoo", "soap"])
@pytest.mark.parametrize("shape", [(256, 64), (64, 256), (96, 64)], ids=str)
def test_a_matrix_is_trained_to_the_same_bits_alone_and_beside_others_of_its_shape(
    algorithm: str, shape: tuple[int, int]
) -> None:
    """As a rank that has one block of a stack trains what one process trains with all of them."""

    def trained(count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        first, *others = (nn.Parameter(torch.zeros(shape)) for _ in range(count))
        optimizer = Shampoo4bit(
            [first, *others], lr=0.1, algorithm=algorithm, refresh_warmup=0, stats_every=2, stagger=False
        )
        for _ in range(4):
            first.grad = torch.randn(shape, generator=generator)
            for p in others:
                p.grad = 2 * first.grad
            optimizer.step()
        return first.detach()

    alone = trained(1)
    for count in (2, 3):
        assert torch.equal(trained(count), alone), count
