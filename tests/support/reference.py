"""Literal float64 references, written from the papers and docs/design.md alone: plain loops, one matrix at a time.

Nothing here imports hf_shampoo4.  The references read the optimizer's stored bytes with their own decoder, so that a
step can be checked from whatever state the optimizer was in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import settings

# Same examples in every run: a failure on one machine is a failure on all.
PROPERTY = settings(derandomize=True, max_examples=40, deadline=None, database=None)

LINEAR2 = [-((1 - 2 * j / 15) ** 2) for j in range(7)] + [0.0] + [(-1 + 2 * j / 15) ** 2 for j in range(8, 16)]
_D = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
DYNAMIC = [-x for x in reversed(_D)] + [0.0, *_D, 1.0]
_EDGES = [0.1 + 0.9 * i / 8 for i in range(9)]
DYNAMIC_UNSIGNED = [
    0.0, 0.00325, 0.00775, 0.02125, 0.04375, 0.06625, 0.08875, *[(a + b) / 2 for a, b in pairwise(_EDGES)], 1.0,
]  # fmt: skip
LINEAR0 = [(j + 1) / 16 for j in range(16)]
LEVELS = {"linear2": LINEAR2, "dynamic": DYNAMIC, "dynamic_unsigned": DYNAMIC_UNSIGNED, "linear0": LINEAR0}

Array = np.ndarray
Entry = Mapping[str, Array]
"""What the optimizer keeps of one parameter: key -> array with dim 0 the block."""


# ---------------------------------------------------------------------------------------------------- quantiser


def nearest(x: float, levels: Sequence[float]) -> int:
    """Index of the level nearest to x, by trying all."""
    return min(range(len(levels)), key=lambda j: abs(x - levels[j]))


def unpack(codes: Array, length: int, bits: int) -> Array:
    """Codes of the last dimension, the high half of a byte first."""
    if bits == 8:
        return codes
    halves = np.stack([codes >> 4, codes & 15], axis=-1)
    return halves.reshape(*codes.shape[:-1], -1)[..., :length]


def decode_rows(codes: Array, scales: Array, levels: Sequence[float], block: int, length: int, bits: int = 4) -> Array:
    """(rows, bytes) and (rows, blocks) -> float64 (rows, length)."""
    plain = unpack(codes, length, bits)
    out = np.zeros(plain.shape)
    for i in range(plain.shape[0]):
        for j in range(length):
            out[i, j] = levels[plain[i, j]] * np.float64(scales[i, j // block])
    return out


def scales_of_rows(x: Array, block: int) -> Array:
    """The scale of every entry of (rows, length): its block's largest magnitude."""
    out = np.zeros_like(x)
    for start in range(0, x.shape[1], block):
        out[:, start : start + block] = np.abs(x[:, start : start + block]).max(axis=1, keepdims=True)
    return out


def scales_of_rank1(x: Array) -> Array:
    """The scale of every entry of a matrix: the smaller of its row's and its column's largest magnitude."""
    return np.minimum(np.abs(x).max(axis=1, keepdims=True), np.abs(x).max(axis=0, keepdims=True))


def excess_error(x: Array, decoded: Array, scale: Array, levels: Sequence[float]) -> float:
    """How much worse `decoded` is than x's best decoding, relative to the scale: 0 where every level is the nearest."""
    table = np.asarray(levels)
    best = np.abs(x[..., None] - table * scale[..., None]).min(-1)
    excess = np.abs(x - decoded) - best
    return float((excess / np.where(scale > 0, scale, 1.0)).max())


def neighbour(x: Array, decoded: Array, scale: Array, levels: Sequence[float]) -> Array:
    """Of the two levels around x, or the last one, that which is nearer to `decoded`; by noise either may be it."""
    table = np.asarray(levels) * scale[..., None]
    inside = np.clip(x, table[..., 0], table[..., -1])[..., None]
    lower = np.where(table <= inside + 1e-6 * scale[..., None], table, -np.inf).max(-1)
    upper = np.where(table >= inside - 1e-6 * scale[..., None], table, np.inf).min(-1)
    return np.where(np.abs(decoded - lower) < np.abs(decoded - upper), lower, upper)


# ------------------------------------------------------------------------------------------------------- blocks


@dataclass
class Rect:
    """One block of a matrix view: matrix index and slices."""

    matrix: int
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def as_matrices(x: Array) -> Array:
    """(d0, rest), or for a 3-D stack of experts its matrices."""
    if x.ndim == 3 and x.shape[-1] >= 16 and x.shape[0] <= max(x.shape[1:]):
        return x
    return x.reshape(1, x.shape[0], -1)


def cut(length: int, largest: int) -> list[slice]:
    """The fewest near-equal parts that are not longer than `largest`."""
    parts = math.ceil(length / largest)
    edges = [math.floor(length * i / parts) for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def rects(x: Array, block_size: int) -> list[Rect]:
    """All blocks in order: matrix, rows, columns."""
    matrices = as_matrices(x)
    return [
        Rect(k, r, c)
        for k in range(matrices.shape[0])
        for r in cut(matrices.shape[1], block_size)
        for c in cut(matrices.shape[2], block_size)
    ]


# ---------------------------------------------------------------------------------------------- matrix functions


def bjorck(v: Array, steps: int) -> Array:
    for _ in range(steps):
        v = 1.5 * v - 0.5 * v @ v.T @ v
    return v


def inverse_fourth_root(a: Array, damping: float) -> Array:
    """(A + damping lambda_max I)^-1/4; of an A that lost its symmetry to quantisation, the lower triangle counts."""
    lam, u = np.linalg.eigh(a, UPLO="L")
    lam = np.maximum(lam, 0.0)
    return (u * (lam + damping * lam.max()) ** -0.25) @ u.T


def polar(v: Array) -> Array:
    """The nearest orthogonal matrix."""
    u, _, w = np.linalg.svd(v)
    return u @ w


# -------------------------------------------------------------------------------------------- 32-bit references


class AdamW:
    """Decoupled weight decay, bias correction by counting."""

    def __init__(self, x: Array, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.m, self.v, self.t = np.zeros_like(x), np.zeros_like(x), 0
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def step(self, x: Array, g: Array, lr: float) -> Array:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return x - lr * self.weight_decay * x - lr * m_hat / (np.sqrt(v_hat) + self.eps)


class Shampoo32:
    """Shampoo in 32 bits (docs/design.md) on one parameter: L, R, roots; the norm graft; AdamW on the result."""

    def __init__(
        self, x: Array, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, block_size=1024,
        t1=10, t2=50, beta=0.95, damping=1e-6, graft="norm",
    ) -> None:  # fmt: skip
        self.base = AdamW(x, betas, eps, weight_decay)
        self.t1, self.t2, self.beta, self.damping, self.graft = t1, t2, beta, damping, graft
        self.rects, self.t = rects(x, block_size), 0
        self.left = [np.zeros((r.shape[0],) * 2) for r in self.rects]
        self.right = [np.zeros((r.shape[1],) * 2) for r in self.rects]
        self.left_root = [np.eye(r.shape[0]) for r in self.rects]
        self.right_root = [np.eye(r.shape[1]) for r in self.rects]

    def step(self, x: Array, g: Array, lr: float) -> Array:
        self.t += 1
        gradients, p = as_matrices(g), np.zeros_like(as_matrices(g))
        for k, r in enumerate(self.rects):
            b = gradients[r.matrix, r.rows, r.columns]
            if self.t % self.t1 == 0:
                self.left[k] = self.beta * self.left[k] + (1 - self.beta) * b @ b.T
                self.right[k] = self.beta * self.right[k] + (1 - self.beta) * b.T @ b
            if self.t % self.t2 == 0:
                self.left_root[k] = inverse_fourth_root(self.left[k], self.damping)
                self.right_root[k] = inverse_fourth_root(self.right[k], self.damping)
            pb = self.left_root[k] @ b @ self.right_root[k]
            if self.graft == "block":
                pb = pb * np.linalg.norm(b) / np.linalg.norm(pb)
            p[r.matrix, r.rows, r.columns] = pb
        if self.graft == "norm":
            p = p * np.linalg.norm(g) / np.linalg.norm(p)
        return self.base.step(x, p.reshape(g.shape), lr)


# -------------------------------------------------------------------- 4-bit Shampoo by eigenvectors, one step


@dataclass
class Settings:
    """Hyper-parameters of one step, in the paper's words."""

    t1: int
    t2: int
    rectify_stats: int
    rectify_roots: int
    beta: float
    damping: float
    bits: int
    block_size: int
    quant_block: int
    factor: str
    moments: str
    graft: str
    codebook: str
    betas: tuple[float, float]
    eps: float
    lr: float
    weight_decay: float


@dataclass
class Checked:
    """What the comparison of one step found: worst differences by kind, to be bounded by the test."""

    worst: dict[str, float]

    def note(self, kind: str, value: float) -> None:
        """Keep the worst; a NaN stays."""
        old = self.worst.get(kind, 0.0)
        self.worst[kind] = value if not value <= old else old


class Shampoo4:
    """Shampoo in 4 bits (2405.18144, docs/design.md), a step at a time, from the optimizer's own stored state.

    Rounding to 16 levels is discontinuous, so two arithmetics drift apart after one code that falls the other way.
    Each phase is therefore computed from the bytes that the optimizer had stored before the phase, and what it then
    stored is compared with what should have been stored: scales must be close, each code must be the nearest level
    up to the difference between float32 and float64.
    """

    def __init__(self, settings: Settings) -> None:
        self.s = settings

    def check_step(
        self, t: int, x: Array, g: Array, new_x: Array, before: Entry, after: Entry, checked: Checked
    ) -> None:
        """Follow step number t of one parameter from (x, before) to (new_x, after)."""
        s = self.s
        gradients, preconditioned = as_matrices(g), np.zeros(as_matrices(g).shape)
        seen: dict[tuple[int, int], int] = {}
        owned: list[tuple[Rect, str, int]] = []
        for rect in rects(x, s.block_size):
            row = seen.get(rect.shape, 0)
            seen[rect.shape] = row + 1
            owned.append((rect, f"{rect.shape[0]}x{rect.shape[1]}/", row))
        for rect, prefix, row in owned:
            b = gradients[rect.matrix, rect.rows, rect.columns]
            roots = []
            for side, gram in (("left.", b @ b.T), ("right.", b.T @ b)):
                key, order = prefix + side, gram.shape[0]
                if t % s.t1 == 0:
                    self._check_statistic(key, row, order, gram, before, after, checked)
                else:
                    checked.note("untouched", _changed(key, ("basis", "eigenvalues", "matrix"), row, before, after))
                if t % s.t2 == 0:
                    self._check_root(key, row, order, after, checked)
                else:
                    checked.note("untouched", _changed(key, ("root",), row, before, after))
                roots.append(self._root(key, row, order, after))
            pb = roots[0] @ b @ roots[1]
            if s.graft == "block":
                pb = pb * np.linalg.norm(b) / np.linalg.norm(pb)
            preconditioned[rect.matrix, rect.rows, rect.columns] = pb
        if s.graft == "norm":  # over the whole parameter, as the paper's code
            preconditioned *= np.linalg.norm(gradients) / np.linalg.norm(preconditioned)
        expected = as_matrices(x).copy()
        quantised = s.moments == "4bit" and x.size >= 4096
        for rect, prefix, row in owned:
            p = preconditioned[rect.matrix, rect.rows, rect.columns]
            part = expected[rect.matrix, rect.rows, rect.columns]
            update = self._check_moments(prefix, row, p, before, after, quantised, checked)
            part *= 1 - s.lr * s.weight_decay
            part -= s.lr * update
        difference = np.abs(expected.reshape(x.shape) - new_x).max() / s.lr
        checked.note("parameter", float(difference))

    # -- sides

    def _quantised(self, order: int) -> bool:
        return self.s.bits < 32 and order * order >= 4096

    def _levels(self) -> Sequence[float]:
        if self.s.bits == 4:
            return LEVELS[self.s.codebook]
        x = [-1 + 2 * j / 255 for j in range(256)]
        assert self.s.codebook == "linear2"
        return [0.0 if j == 127 else math.copysign(v * v, v) for j, v in enumerate(x)]

    def _columns(self, key: str, row: int, order: int, entry: Entry) -> Array:
        """A column-quantised matrix."""
        codes, scales = entry[key + ".codes"][row], entry[key + ".scales"][row]
        return decode_rows(codes, scales, self._levels(), self.s.quant_block, order, self.s.bits).T

    def _matrix(self, key: str, row: int, order: int, entry: Entry) -> Array:
        """A matrix with its diagonal in float32."""
        if not self._quantised(order):
            return entry[key + ".dense"][row].astype(np.float64)
        x = self._columns(key, row, order, entry)
        for i in range(order):
            x[i, i] = entry[key + ".diagonal"][row, i]
        return x

    def _basis(self, key: str, row: int, order: int, entry: Entry, rectify: int) -> Array:
        if not self._quantised(order):
            return entry[key + "basis.dense"][row].astype(np.float64)
        return bjorck(self._columns(key + "basis", row, order, entry), rectify)

    def _root(self, key: str, row: int, order: int, entry: Entry) -> Array:
        return self._matrix(key + "root", row, order, entry)

    def _check_statistic(
        self, key: str, row: int, order: int, gram: Array, before: Entry, after: Entry, checked: Checked
    ) -> None:
        s = self.s
        if s.factor == "direct":
            a = s.beta * self._matrix(key + "matrix", row, order, before) + (1 - s.beta) * gram
            self._check_matrix("statistic", key + "matrix", row, a, after, checked)
            return
        v = self._basis(key, row, order, before, s.rectify_stats)
        lam = before[key + "eigenvalues.dense"][row].astype(np.float64)
        if not lam.any():  # the first update
            lam = np.full(order, s.damping * np.trace(gram) / order)
        a = s.beta * v @ np.diag(lam) @ v.T + (1 - s.beta) * gram
        u, _ = np.linalg.qr(a @ v)
        new = np.maximum(np.diag(u.T @ a @ u), 0.0)
        stored = self._basis(key, row, order, after, 0)
        u = u * np.where((u * stored).sum(0) < 0, -1.0, 1.0)  # QR leaves each column's sign open
        cosines = (u * stored).sum(0) / np.linalg.norm(stored, axis=0)
        checked.note("basis angle", float(1 - cosines.min()))
        stored_lam = after[key + "eigenvalues.dense"][row].astype(np.float64)
        checked.note("eigenvalues", float(np.abs(stored_lam - new).max() / new.max()))
        if self._quantised(order):
            self._check_codes("basis", u.T, stored.T, checked)
        else:
            checked.note("basis", float(np.abs(u - stored).max()))

    def _check_root(self, key: str, row: int, order: int, after: Entry, checked: Checked) -> None:
        s = self.s
        if s.factor == "direct":
            root = inverse_fourth_root(self._matrix(key + "matrix", row, order, after), s.damping)
        else:
            v = self._basis(key, row, order, after, s.rectify_roots)
            lam = after[key + "eigenvalues.dense"][row].astype(np.float64)
            root = v @ np.diag((lam + s.damping * lam.max()) ** -0.25) @ v.T
        self._check_matrix("root", key + "root", row, root, after, checked)

    def _check_matrix(self, kind: str, key: str, row: int, x: Array, after: Entry, checked: Checked) -> None:
        order = x.shape[0]
        stored = self._matrix(key, row, order, after)
        if not self._quantised(order):
            checked.note(kind, float(np.abs(x - stored).max() / np.abs(x).max()))
            return
        checked.note(kind + " diagonal", float((np.abs(np.diag(x) - np.diag(stored)) / np.diag(x)).max()))
        off, stored = x.copy(), stored.copy()
        np.fill_diagonal(off, 0.0)
        np.fill_diagonal(stored, 0.0)
        self._check_codes(kind, off.T, stored.T, checked)

    def _check_codes(self, kind: str, rows: Array, stored: Array, checked: Checked) -> None:
        scale = scales_of_rows(rows, self.s.quant_block)
        checked.note(kind, excess_error(rows, stored, scale, self._levels()))

    # -- moments

    def _check_moments(
        self, prefix: str, row: int, p: Array, before: Entry, after: Entry, quantised: bool, checked: Checked
    ) -> Array:
        s = self.s
        b1, b2 = s.betas
        t = float(after[prefix + "steps.dense"][row])
        assert t == float(before[prefix + "steps.dense"][row]) + 1
        m = b1 * self._first(prefix, row, p.shape, before, quantised) + (1 - b1) * p
        v = b2 * self._second(prefix, row, p.shape, before, quantised) + (1 - b2) * p**2
        new_m = self._first(prefix, row, p.shape, after, quantised)
        new_v = self._second(prefix, row, p.shape, after, quantised)
        if quantised:
            flat, scales = m.reshape(1, -1), scales_of_rows(m.reshape(1, -1), 128)
            ended = np.abs(p.reshape(1, -1)) <= np.abs(flat) / 8
            rounded = neighbour(flat, new_m.reshape(1, -1), scales, DYNAMIC)
            checked.note("first", excess_error(np.where(ended, rounded, flat), new_m.reshape(1, -1), scales, DYNAMIC))
            checked.note("second", excess_error(v, new_v, scales_of_rank1(v), LINEAR0))
        else:
            checked.note("first", float(np.abs(m - new_m).max() / np.abs(m).max()))
            checked.note("second", float(np.abs(v - new_v).max() / v.max()))
        return (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + s.eps)

    def _first(self, prefix: str, row: int, shape: tuple[int, ...], entry: Entry, quantised: bool) -> Array:
        if not quantised:
            return entry[prefix + "first.dense"][row].astype(np.float64)
        codes, scales = entry[prefix + "first.codes"][row], entry[prefix + "first.scales"][row]
        return decode_rows(codes[None], scales[None], DYNAMIC, 128, math.prod(shape)).reshape(shape)

    def _second(self, prefix: str, row: int, shape: tuple[int, ...], entry: Entry, quantised: bool) -> Array:
        if not quantised:
            return entry[prefix + "second.dense"][row].astype(np.float64)
        m, n = shape
        codes = unpack(entry[prefix + "second.codes"][row], m * n, 4).reshape(m, n)
        out = np.zeros(shape)
        for i in range(m):
            for j in range(n):
                scale = min(entry[prefix + "second.rows"][row, i], entry[prefix + "second.columns"][row, j])
                out[i, j] = LINEAR0[codes[i, j]] * np.float64(scale)
        return out


def _changed(key: str, tensors: Sequence[str], row: int, before: Entry, after: Entry) -> float:
    """1.0 if anything of these tensors changed where nothing should."""
    names = [name for name in before if name.startswith(tuple(key + t for t in tensors))]
    return float(any(not np.array_equal(before[name][row], after[name][row]) for name in names))
