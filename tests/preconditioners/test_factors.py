"""The factors, above all Cholesky with error feedback, against literal float64 loops, and their bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.numerics.blocks import Buffers
from hf_shampoo4.numerics.codebooks import ONLY_4_BITS
from hf_shampoo4.numerics.storage import Blockwise, Dense, Triangles, allocate, nbytes, roundtrip
from hf_shampoo4.optimizer import Shampoo4bit
from hf_shampoo4.options import PRESETS, Options
from hf_shampoo4.preconditioners.factors import Cholesky, Factor, make_factor
from tests.support.reference import LINEAR2, PROPERTY, nearest

CODEBOOKS = ("linear2", "dynamic", "nf4", "lloyd16")
FACTORS = ["eigen", "direct", "cholesky", "cholesky_ef"]


def _state(factor: Factor, blocks: int = 1) -> dict[str, Buffers]:
    state = {name: allocate(storage, blocks, "cpu") for name, storage in factor.storages().items()}
    factor.initialise(state)
    return state


def _gram(order: int, rank: int, seed: int = 0, blocks: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(blocks, order, rank, generator=generator) * torch.logspace(0, -2, order).unsqueeze(-1)
    return g @ g.mT


def _cholesky(order: int, error_beta: float | None, block: int = 64, beta: float = 0.9, **changes: Any) -> Cholesky:
    given: dict[str, Any] = {"codebook": "linear2", "bits": 4, **changes}
    triangles = Triangles(order, given["codebook"], given["bits"], block, upper=error_beta is not None)
    return Cholesky(order, triangles, Dense((order, order)), beta, 1e-6, "eigh", error_beta)


# --------------------------------------------------------------------------------------------- literal references


def _literal_quantise(c: np.ndarray, block: int) -> np.ndarray:
    """Strict lower triangle through linear-2, column by column in runs of `block`; the diagonal stays."""
    k = len(c)
    places = [(i, j) for j in range(k) for i in range(j + 1, k)]
    out = np.diag(np.diag(c)).astype(np.float64)
    for start in range(0, len(places), block):
        run = places[start : start + block]
        scale = max(abs(c[p]) for p in run)
        for p in run:
            out[p] = LINEAR2[nearest(c[p] / scale, LINEAR2)] * scale if scale else 0.0
    return out


def _literal_cholesky(a: np.ndarray) -> np.ndarray:
    k = len(a)
    c = np.zeros((k, k))
    for j in range(k):
        c[j, j] = math.sqrt(a[j, j] - sum(c[j, t] ** 2 for t in range(j)))
        for i in range(j + 1, k):
            c[i, j] = (a[i, j] - sum(c[i, t] * c[j, t] for t in range(j))) / c[j, j]
    return c


def _literal_update(
    c: np.ndarray, e: np.ndarray, m: np.ndarray, beta: float, be: float | None, jitter: float, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """One update of (D(Cbar), D(E)), after 2412.10663: a Cholesky factor with error feedback."""
    k = len(c)
    a = beta * c @ c.T + (1 - beta) * m
    a += jitter * np.trace(a) / k * np.eye(k)
    exact = _literal_cholesky(a)
    if be is None:
        return _literal_quantise(exact, block), np.zeros_like(c)
    stored = _literal_quantise(exact + e, block)
    error = be * e + (1 - be) * (exact + e - stored)
    return stored, _literal_quantise(error, block)


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("be", [None, 0.0, 0.5, 0.95])
def test_update_is_the_papers(be: float | None, block: int) -> None:
    """Five updates from the state that the factor is in: C and E as literal float64 has them."""
    k, beta = 13, 0.9
    factor = _cholesky(k, be, block, beta)
    state = _state(factor)
    for step in range(5):
        before = factor.triangles.read(state["triangles"])[0].double().numpy()
        c, e = np.tril(before), np.triu(before, 1).T
        gram = _gram(k, 30, seed=step)
        assert not factor.update(state, gram).any()
        after = factor.triangles.read(state["triangles"])[0].double().numpy()
        expected_c, expected_e = _literal_update(c, e, gram[0].double().numpy(), beta, be, 1e-6, block)
        np.testing.assert_allclose(np.tril(after), expected_c, rtol=0, atol=2e-6 * np.abs(expected_c).max())
        np.testing.assert_allclose(np.triu(after, 1).T, expected_e, rtol=0, atol=1e-5 * np.abs(expected_c).max())


def test_the_error_state_decays_by_be_where_nothing_is_lost() -> None:
    """With 32 bits nothing is rounded: E <- be E exactly."""
    factor = Cholesky(6, Dense((6, 6)), Dense((6, 6)), 0.9, 1e-6, "eigh", 0.75)
    state = _state(factor)
    upper = torch.triu(torch.arange(1.0, 37.0).view(6, 6), 1) * 2.0**-30  # too small to move C
    state["triangles"]["dense"] += upper
    factor.update(state, 1e6 * torch.eye(6).unsqueeze(0))
    kept = torch.triu(state["triangles"]["dense"], 1)[0]
    rounding = 1e3 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(kept, 0.75 * upper, rtol=0, atol=0.25 * rounding)


# --------------------------------------------------------------------------------------------- properties


@PROPERTY
@given(order=st.integers(2, 40), rank=st.integers(1, 50), seed=st.integers(0, 999), bits=st.sampled_from([4, 8]),
       codebook=st.sampled_from(["linear2", "dynamic"]), feedback=st.booleans(), scale=st.floats(-18, 12))  # fmt: skip
def test_what_is_decoded_is_semidefinite(
    order: int, rank: int, seed: int, bits: int, codebook: str, feedback: bool, scale: float
) -> None:
    factor = _cholesky(order, 0.95 if feedback else None, 16, codebook=codebook, bits=bits)
    state = _state(factor)
    for i in range(3):
        assert not factor.update(state, _gram(order, rank, seed + i) * 10.0**scale).any()
    c = factor.triangles.read(state["triangles"])[0].tril().double()
    assert (c.diagonal() > 0).all()
    assert torch.linalg.eigvalsh(c @ c.mT)[0] > 0


def test_feedback_reduces_the_bias_of_repeated_storing() -> None:
    """The mean of what is stored approaches C with feedback, and stays where it is without.

    The less so the slower E is: with the paper's .95 an update is smaller than half a level of the 4-bit E, which
    then stays where it is (docs/results/errors.md).
    """
    a = _gram(64, 96)
    exact = torch.linalg.cholesky(a.double())[0]

    def bias(error_beta: float | None) -> float:
        factor = _cholesky(64, error_beta, beta=0.0)
        state, total = _state(factor), torch.zeros(64, 64, dtype=torch.float64)
        for i in range(120):
            factor.update(state, a)
            total += factor.triangles.read(state["triangles"])[0].tril() if i >= 60 else 0.0
        return ((total / 60 - exact).norm() / exact.norm()).item()

    without = bias(None)
    assert bias(0.5) < 0.1 * without
    assert bias(0.8) < 0.4 * without
    assert bias(0.95) < 0.9 * without


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("root", ["eigh", "newton", "newton_db"])
def test_at_32_bits_all_factors_and_solvers_agree(factor: str, root: str) -> None:
    """Against the eigendecomposition of the same moving average in float64."""
    order, beta = 48, 0.9
    side = make_factor(order, Options(algorithm="shampoo", factor=factor, bits=32, root=root, factor_beta=beta))
    state = _state(side)
    a = 1e-6 * torch.eye(order, dtype=torch.float64)
    for step in range(60):
        gram = _gram(order, 64, seed=step % 3)
        a = beta * a + (1 - beta) * gram[0].double()
        side.update(state, gram)
    assert not side.refresh(state).any()
    eigenvalues, u = torch.linalg.eigh(a)
    exact = (u * (eigenvalues + 1e-6 * eigenvalues[-1]) ** -0.25) @ u.mT
    error = (side.root(state)[0].double() - exact).norm() / exact.norm()
    assert error < (0.05 if factor == "eigen" else 5e-3)  # one QR iteration an update is not yet the eigenbasis


@pytest.mark.parametrize("factor", FACTORS)
def test_a_bad_block_keeps_its_last_good_state(factor: str) -> None:
    side = make_factor(64, Options(algorithm="shampoo", factor=factor))
    state = _state(side, blocks=2)
    side.update(state, _gram(64, 80, blocks=2))
    side.refresh(state)
    before = {(t, b): x.clone() for t, buffers in state.items() for b, x in buffers.items()}
    gram = _gram(64, 80, seed=1, blocks=2)
    gram[0, 3, 5] = torch.nan
    assert side.update(state, gram).tolist() == [True, False]
    for (tensor, buffer), old in before.items():
        assert torch.equal(state[tensor][buffer][0], old[0])
        if tensor != "root" and buffer == "codes":
            assert not torch.equal(state[tensor][buffer][1], old[1])


@pytest.mark.parametrize("factor", FACTORS)
def test_no_gradient_before_the_first_root_is_no_reason_to_stand(factor: str) -> None:
    p = nn.Parameter(torch.zeros(12, 8))
    options = {"algorithm": "shampoo", "factor": factor, "graft": "none", "stats_every": 1, "roots_every": 5}
    optimizer = Shampoo4bit([p], lr=1e-2, bits=32, moments="fp32", stagger=False, **options)
    for t in range(12):
        p.grad = torch.zeros_like(p) if t < 6 else torch.ones_like(p)
        optimizer.step()
    assert (p < -2e-2).all()


@pytest.mark.parametrize("factor", FACTORS)
def test_the_statistic_is_not_changed(factor: str) -> None:
    root = "newton" if factor.startswith("chol") else "eigh"
    side = make_factor(64, Options(algorithm="shampoo", factor=factor, root=root))
    state, gram = _state(side), _gram(64, 80)
    before = gram.clone()
    side.update(state, gram)
    stored = {(t, b): x.clone() for t, bs in state.items() for b, x in bs.items() if t != "root"}
    side.refresh(state)
    assert torch.equal(gram, before)
    assert all(torch.equal(state[t][b], x) for (t, b), x in stored.items())


# --------------------------------------------------------------------------------------------- bytes and storage


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("order", [2, 7, 64])
def test_triangles_keep_each_triangle_with_its_own_scales(order: int, upper: bool) -> None:
    x = torch.randn(3, order, order)
    x = x.tril() + 1e-4 * x.triu(1)  # an error state is much smaller than what it belongs to
    y = roundtrip(Triangles(order, "linear2", 8, 16, upper), x)
    assert torch.equal(y.diagonal(dim1=1, dim2=2), x.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(y.tril(), x.tril(), rtol=0, atol=0.03)
    if upper:
        torch.testing.assert_close(y.triu(1), x.triu(1), rtol=0, atol=3e-6)
    else:
        assert not y.triu(1).any()


def _live_bytes(options: dict[str, Any], order: int) -> dict[str, int]:
    p = torch.nn.Parameter(torch.randn(order, order))
    optimizer = Shampoo4bit([p], algorithm="shampoo", stats_every=1, roots_every=1, **options)
    p.grad = torch.randn_like(p)
    optimizer.step()
    found: dict[str, int] = {}
    for key, tensor in optimizer.state[p].items():
        name = key.split("/")[1].rsplit(".", 1)[0]
        found[name] = found.get(name, 0) + tensor.numel() * tensor.element_size()
    return found


def test_cholesky_takes_half_of_the_eigenvectors_bytes() -> None:
    """Measured on live tensors; error feedback takes the other half."""
    k = 256
    eigen, plain, fed_back = (_live_bytes({"factor": f}, k) for f in ("eigen", "cholesky", "cholesky_ef"))
    basis = eigen["left.basis"] + eigen["left.eigenvalues"]
    diagonal = 4 * k
    assert basis == k * k // 2 + k * (k // 64) * 4 + diagonal
    assert plain["left.triangles"] - diagonal <= (basis - diagonal) / 2
    assert fed_back["left.triangles"] - diagonal <= basis - diagonal
    assert fed_back["left.root"] == plain["left.root"] == eigen["left.root"]
    assert plain["left.triangles"] == nbytes(Triangles(k, "linear2", 4, 64, upper=False))
    assert eigen["left.basis"] == nbytes(Blockwise((k, k), "linear2", 4, 64, columns=True))


# --------------------------------------------------------------------------------------------- in the optimizer


@pytest.mark.parametrize(
    "storage",
    [{"bits": 32}, *({"bits": 8, "codebook": name} for name in CODEBOOKS if name not in ONLY_4_BITS),
     *({"bits": 4, "codebook": name} for name in CODEBOOKS)],
    ids=lambda storage: "-".join(map(str, storage.values())),
)  # fmt: skip
@pytest.mark.parametrize("factor", FACTORS)
def test_every_storage_of_every_factor_steps(factor: str, storage: dict[str, Any]) -> None:
    p = torch.nn.Parameter(torch.randn(64, 80))
    options = {"factor": factor, **storage, "stats_every": 1, "roots_every": 2, "algorithm": "shampoo"}
    optimizer = Shampoo4bit([p], lr=0.01, **options)
    target = torch.randn(64, 80)
    losses = []
    for _ in range(12):
        loss = ((p - target) ** 2).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(int(t.sum()) == 0 for key, t in optimizer.state[p].items() if key.endswith("failures.dense"))


def test_the_papers_preset_resolves_and_steps() -> None:
    p = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = Shampoo4bit([p], preset="paper_cholesky", stats_every=1, roots_every=1)
    p.grad = torch.randn_like(p)
    optimizer.step()
    group = optimizer.param_groups[0]
    assert PRESETS["paper_cholesky"]["error_beta"] == group["error_beta"] == 0.95
    assert (group["factor"], group["root"]) == ("cholesky_ef", "newton")
    assert torch.isfinite(p).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"factor": "cholesky", "error_beta": 0.9}, "cholesky_ef"),
        ({"error_beta": 0.9}, "cholesky_ef"),
        ({"factor": "cholesky_ef", "error_beta": 1.0}, r"\[0, 1\)"),
        ({"factor": "cholesky", "rectify_roots": 2}, "eigen"),
        ({"factor": "direct", "rectify_stats": 0}, "eigen"),
        ({"codebook": "nf4", "bits": 8}, "linear2 or dynamic"),
        ({"codebook": "lloyd16", "bits": 8}, "linear2 or dynamic"),
        ({"root": "svd"}, "eigh, newton, newton_db"),
        ({"factor": "lu"}, "cholesky_ef"),
    ],
)
def test_nonsense_is_refused_with_what_is_allowed(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Shampoo4bit([torch.nn.Parameter(torch.randn(4, 4))], algorithm="shampoo", **options)
