"""First and second moments under any storage, and the direction of AdamW or SGD that they give, on stacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..numerics.blocks import State
from ..numerics.quantize import has_kernels, kernels, padded
from ..numerics.rounding import Noise, PreconditionerSpace, Rounding, Settling, Stochastic, to_bfloat16
from ..numerics.storage import Bitsandbytes, Blockwise, Dense, Factored, RankOne, Storage
from ..options import SECOND_CODEBOOKS, Options, auto_of
from .operations import ZIP_CODER, coding_workspace

BASES = {"adamw": "AdamW", "sgdm": "SGDM"}
"""What people call them."""

MOMENT_BLOCK = 128  # 2309.01507: smaller than 8-bit's 256, because outliers cost a 4-bit block more

VOCABULARY_BLOCK = 256  # of a vocabulary's 8-bit first moment, as bitsandbytes' and torchao's

ENDED = 1 / 8  # gradients of at most this times the first moment count as ended

FIRST_STREAM, SECOND_STREAM = 1, 2  # of a block's noise; 0 is the parameter's


@dataclass(frozen=True)
class MomentStep:
    """What the moments of a stack need to know of a step."""

    betas: tuple[float, float]
    eps: float
    steps: Tensor
    """float32 (B,), how many times each block has been updated, this one included."""
    noise: Noise | None = None
    """For stochastic rounding; None: 4-bit first moments stay where their gradients end, see `rounding.Settling`."""
    stochastic_first: bool = False
    """Round the first moment stochastically, where it is stored in 4 bits."""
    watch: Callable[[Tensor], None] | None = None
    """Is told the first moment, (B, *shape) float32, as it was before it was stored."""


class Moments(Protocol):
    """Which moments are kept, and how."""

    @property
    def first(self) -> Storage:
        """Of the first moment."""

    def storages(self) -> dict[str, Storage]:
        """Name -> storage of each moment."""

    def workspace(self, entries: int) -> int:
        """float32 numbers that a step takes at once for moments of so many entries, see operations.py."""


class Base(Moments, Protocol):
    """A first-order optimizer; its direction is computed from the moments *before* they are stored."""

    def direction(self, state: State, g: Tensor, at: MomentStep) -> Tensor:
        """The step without the learning rate and the weight decay.

        Args:
            g: (B, *shape) float32, the gradient or its preconditioned form; not changed.

        Returns:
            (B, *shape) float32, which may be a state buffer: not to be written to.
        """


@dataclass(frozen=True)
class Adam:
    """AdamW: the bias-corrected first moment over the root of the second."""

    first: Storage
    second: Storage
    zip_sr: bool = False
    """Round the second moment stochastically in preconditioner space (2610.12444)."""

    def storages(self) -> dict[str, Storage]:
        return {"first": self.first, "second": self.second}

    def workspace(self, entries: int) -> int:
        if isinstance(self.second, Bitsandbytes):
            return 17 * entries // 4
        if isinstance(self.second, Dense):  # of bfloat16 the noise of stochastic rounding
            return 2 * entries if self.second.dtype == torch.float32 else 13 * entries // 2
        if self.zip_sr:
            return 4 * entries + coding_workspace(entries, ZIP_CODER)
        return max(4 * entries, 3 * entries + coding_workspace(entries))

    def direction(self, state: State, g: Tensor, at: MomentStep) -> Tensor:
        """u = m / (sqrt(v) + eps), bias-corrected; the moments are stored after it was computed."""
        if self._fits_kernel(g.device) and not at.stochastic_first:
            return self._by_kernel(state, g, at)
        # m <- b1 m + (1 - b1) g
        m = self.first.read(state["first"]).lerp_(g, 1 - at.betas[0])
        u = self.over_second(state, m, g, at)
        write_first(self.first, state, m, at, g, ENDED)
        return u

    def over_second(self, state: State, m: Tensor, g: Tensor, at: MomentStep) -> Tensor:
        """The direction that a first moment (B, *shape) gives over the root of the second, brought up to date by g."""
        # v <- b2 v + (1 - b2) g^2
        v = self.second.read(state["second"]).mul_(at.betas[1]).addcmul_(g, g, value=1 - at.betas[1])
        # u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
        of_second = bias(at.betas[1], at.steps, v.dim())
        u = (m / bias(at.betas[0], at.steps, m.dim())).div_((v / of_second).sqrt_().add_(at.eps))
        if self.zip_sr and isinstance(self.second, Blockwise):
            uniform = _required(at.noise).uniform(SECOND_STREAM, v[0].numel())
            self.second.write(state["second"], v, PreconditionerSpace(uniform, of_second.flatten(1), at.eps))
        else:
            self.second.write(state["second"], _for_bfloat16(self.second, v, at.noise))
        return u

    def _fits_kernel(self, device: torch.device) -> bool:
        """Whether one pass of a kernel does all of `direction`: both moments in blocks, to the nearest level."""
        both = isinstance(self.first, Blockwise) and isinstance(self.second, Blockwise) and not self.zip_sr
        return both and has_kernels(device, MOMENT_BLOCK)

    def _by_kernel(self, state: State, g: Tensor, at: MomentStep) -> Tensor:
        """All of `direction` in one pass of a Triton kernel: (B, *shape) float32."""
        exact = torch.lerp(self.first.read(state["first"]), g, 1 - at.betas[0]) if at.watch else g
        moments = [
            kernels().Codes(*state[name].values(), *padded(storage.codebook, storage.bits, g.device))
            for name, storage in self.storages().items()
            if isinstance(storage, Blockwise)
        ]
        biases = (bias(at.betas[0], at.steps, 1), bias(at.betas[1], at.steps, 1))
        eden = isinstance(self.second, Blockwise) and self.second.fit == "eden"
        g, shape = g.flatten(1), g.shape
        settling = None if at.noise is None else Settling(g, ENDED, at.noise.multiply_shift(FIRST_STREAM))
        u = kernels().adamw(g, *moments, biases, at.betas, at.eps, 4, MOMENT_BLOCK, eden, settling).view(shape)
        if at.watch:
            at.watch(exact)
        return u


@dataclass(frozen=True)
class Sgdm:
    """`torch.optim.SGD` with momentum betas[0] and no dampening; betas[1] and eps are not used."""

    first: Storage
    nesterov: bool

    def storages(self) -> dict[str, Storage]:
        return {"first": self.first}

    def workspace(self, entries: int) -> int:
        return 2 * entries + coding_workspace(entries)

    def direction(self, state: State, g: Tensor, at: MomentStep) -> Tensor:
        # m <- mu m + g;  u = m, or with Nesterov's momentum g + mu m
        """u = m or, with Nesterov's momentum, g + mu m; (B, *shape) float32."""
        m = self.first.read(state["first"]).mul_(at.betas[0]).add_(g)
        write_first(self.first, state, m, at, g, (1 - at.betas[0]) * ENDED)
        return torch.add(g, m, alpha=at.betas[0]) if self.nesterov else m


@dataclass(frozen=True)
class Momentum:
    """A first moment alone: KL-Shampoo's, whose eigenvalues take the second one's place."""

    first: Storage

    def storages(self) -> dict[str, Storage]:
        return {"first": self.first}

    def workspace(self, entries: int) -> int:
        return 0 if isinstance(self.first, Dense) else coding_workspace(entries)


def make_base(shape: tuple[int, ...], options: Options, quantise: bool) -> Base:
    """The base of blocks of `shape` with the moments that the options name.

    | moments | first | second |
    |---|---|---|
    | fp32, bf16 | as it is | as it is |
    | 8bit | bitsandbytes, block 256 | bitsandbytes, block 256 |
    | 4bit (2309.01507) | dynamic, block 128 | linear0, rank-1 scales |
    | 4bit_factored (2309.01507) | dynamic, block 128 | row and column means, as Adafactor |
    | 4bit_eden (2610.12444) | nf4, block 128 | dynamic0, block 128, scales corrected (ZE-EDEN) |
    | 4bit_zipsr (2610.12444) | nf4, block 128 | dynamic_unsigned, block 128, rounded in preconditioner space (ZIP-SR) |

    Vectors have no rows and columns: their second moment is block-wise (2309.01507, section 4.2), as is a matrix's of
    so few rows or columns that a float32 for each would take more than 8 bits an entry.

    Args:
        quantise: whether the parameter has at least 4,096 elements; else 8- and 4-bit moments are float32.

    Raises:
        ImportError: 8-bit moments without bitsandbytes.
    """
    if options.base == "sgdm":
        return Sgdm(_storages(shape, options, quantise)[0], options.nesterov)
    return _adam(shape, options, quantise)


def make_moments(shape: tuple[int, ...], options: Options, quantise: bool, second: bool) -> Adam | Momentum:
    """Those of the eigenbasis family, stored as `make_base` says.

    The first moment is stored whitened, and so without outliers: nf4.

    A 4-bit first moment of embeddings or the output head without a second one (KL-Shampoo) has 8 bits, dynamic, block
    256, unless `first_codebook` asks for another: 4 bits lose half of what preconditioning them gains.
    """
    if second:
        return _adam(shape, options, quantise)
    first, _ = _storages(shape, options, quantise)
    in_8_bits = options.vocabulary and isinstance(first, Blockwise) and options.first_codebook == "auto"
    return Momentum(Blockwise(shape, "dynamic", 8, VOCABULARY_BLOCK) if in_8_bits else first)


def _adam(shape: tuple[int, ...], options: Options, quantise: bool) -> Adam:
    return Adam(*_storages(shape, options, quantise), zip_sr=quantise and options.moments == "4bit_zipsr")


def radial_bias(exact: Tensor, stored: Tensor) -> Tensor:
    """<Q(m) - m, m> / |m|^2 of each block: how much storing shrinks (< 0) or stretches m along itself (2610.12444).

    Args:
        exact: (B, ...) before it was stored.
        stored: (B, ...) as it is read back.

    Returns:
        float64 (B,); 0 for a block of zeros.
    """
    exact, error = exact.double().flatten(1), (stored.double() - exact.double()).flatten(1)
    return (error * exact).sum(1) / exact.square().sum(1).clamp_(min=torch.finfo(torch.float64).tiny)


def unmoved(before: Tensor, after: Tensor, bits: int) -> Tensor:
    """Share of codes that an update left where they were: near 1, a moment has stalled (2603.16731).

    Args:
        before: uint8 (B, bytes), codes of a stack before a step (a clone: state is written in place).
        after: the same after it.
        bits: of a code; 4-bit codes are two to a byte.

    Returns:
        float32 (B,).
    """
    changed = before ^ after
    halves = [changed] if bits == 8 else [changed >> 4, changed & 15]
    return torch.stack([half == 0 for half in halves]).float().mean(0).flatten(1).mean(1)


def _storages(shape: tuple[int, ...], options: Options, quantise: bool) -> tuple[Storage, Storage]:
    recipe = options.moments
    if recipe == "bf16":
        return Dense(shape, torch.bfloat16), Dense(shape, torch.bfloat16)
    if recipe == "fp32" or not quantise:
        return Dense(shape), Dense(shape)
    if recipe == "8bit":
        return Bitsandbytes(shape, signed=True), Bitsandbytes(shape, signed=False)
    modern = recipe in ("4bit_eden", "4bit_zipsr")
    default = "nf4" if modern else auto_of(options.algorithm, "first_codebook")
    first = Blockwise(shape, default if options.first_codebook == "auto" else options.first_codebook, 4, MOMENT_BLOCK)
    has_sides = len(shape) == 2 and 4 * sum(shape) <= math.prod(shape)
    if recipe == "4bit_factored" and has_sides:
        return first, Factored(shape)
    default = SECOND_CODEBOOKS.get(recipe, ("linear0",))[0]
    levels = default if options.second_codebook == "auto" else options.second_codebook
    if recipe == "4bit" and has_sides:
        return first, RankOne(shape, levels, 4)
    return first, Blockwise(shape, levels, 4, MOMENT_BLOCK, fit="eden" if recipe == "4bit_eden" else "largest")


def _for_bfloat16(storage: Storage, v: Tensor, noise: Noise | None) -> Tensor:
    """Round stochastically what goes to bfloat16: to nearest, v - 0.001 v is v again and v never decays."""
    if noise is None or not isinstance(storage, Dense) or storage.dtype != torch.bfloat16:
        return v
    return to_bfloat16(v, noise.bits(SECOND_STREAM, v[0].numel()).view_as(v))


def write_first(storage: Storage, state: State, exact: Tensor, at: MomentStep, g: Tensor, ended: float) -> None:
    """Store a first moment, (B, *shape) float32.

    Args:
        g: (B, *shape), the gradient that it was brought up to date by.
        ended: see `rounding.Settling`.
    """
    if isinstance(storage, Blockwise) and storage.bits == 4:
        rounding: Rounding | None = None
        if at.stochastic_first and at.noise is not None:
            rounding = Stochastic(at.noise.uniform(FIRST_STREAM, exact[0].numel()))
        elif at.noise is not None and not (ended == 0 and has_no_zero(g)):
            rounding = Settling(g.flatten(1), ended, at.noise.multiply_shift(FIRST_STREAM))
        storage.write(state["first"], exact, rounding)
    else:
        storage.write(state["first"], exact)
    if at.watch:
        at.watch(exact)


def has_no_zero(g: Tensor) -> bool:
    """Whether no gradient is zero, on a CPU; another device would be waited for to know it: False."""
    return g.device.type == "cpu" and bool(g.all())


def _required(noise: Noise | None) -> Noise:
    if noise is None:
        raise ValueError("ZIP-SR rounds stochastically: direction() needs `noise`")
    return noise


def bias(beta: float, steps: Tensor, dim: int) -> Tensor:
    """1 - beta^t, shaped to broadcast over (B, *shape); expm1 keeps its digits when beta is near 1."""
    found = -torch.expm1(steps * math.log(beta)) if beta > 0 else torch.ones_like(steps)
    return found.view(-1, *[1] * (dim - 1))
