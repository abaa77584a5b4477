"""How a stacked tensor is kept between steps.

A storage is a frozen description; the tensors it describes, its *buffers*, live in the optimizer's state.  Dim 0 of
every buffer is the block, so a parameter's share of a stack is a slice of dim 0.

    storage = Blockwise((256, 256), "linear2", bits=4, block=64, columns=True)
    buffers = storage.allocate(8, device)          # {"codes": uint8 (8, 256, 128), "scales": float32 (8, 256, 4)}
    storage.write(buffers, x)                      # x: (8, 256, 256)
    storage.read(buffers)                          # float32 (8, 256, 256)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from .blocks import Buffers
from .quantize import Fit, dequantize_block, dequantize_rank1, packed_length, quantize_block, quantize_rank1
from .rounding import Rounding

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

SMALL = 4096  # tensors with fewer elements are not worth quantising (bitsandbytes' and torchao's rule too)


class Storage(Protocol):
    """What every storage offers."""

    def layout(self) -> Layout:
        """Buffer name -> (shape without the block dimension, dtype)."""

    def write(self, buffers: Buffers, x: Tensor) -> None:
        """Store x (B, *shape) in place."""

    def read(self, buffers: Buffers) -> Tensor:
        """The stored tensor, (B, *shape).  It may *be* a buffer: change it only to write it back."""


def allocate(storage: Storage, blocks: int, device: torch.device | str) -> Buffers:
    """Zeroed buffers for a stack of `blocks`."""
    return {
        name: torch.zeros((blocks, *shape), dtype=dtype, device=device)
        for name, (shape, dtype) in storage.layout().items()
    }


def write_good(storage: Storage, buffers: Buffers, x: Tensor, good: Tensor) -> None:
    """Store the blocks of x (B, *shape) that are `good`, bool (B,); the others keep what they have, bit for bit."""
    if isinstance(storage, (Blockwise, DoubleQuantized)):
        new = storage.encoded(x)
    else:
        new = {name: torch.empty_like(buffer) for name, buffer in buffers.items()}
        storage.write(new, x)
    for name, buffer in buffers.items():
        torch.where(good.view(-1, *[1] * (buffer.dim() - 1)), new[name], buffer, out=buffer)


def nbytes(storage: Storage) -> int:
    """Bytes that one block takes."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in storage.layout().values())


def roundtrip(storage: Storage, x: Tensor) -> Tensor:
    """What reading gives after x (B, *shape) has been written."""
    buffers = allocate(storage, x.shape[0], x.device)
    storage.write(buffers, x)
    return storage.read(buffers)


def transposed(x: Tensor) -> Tensor:
    """(B, m, n) -> (B, n, m), contiguous; x itself if its transpose is."""
    if x.mT.is_contiguous() or x.device.type != "cpu":
        return x.mT.contiguous()
    # torch has a fast transposition for single matrices only: 5x at order 1024
    y = x.new_empty(x.mT.shape)
    for target, matrix in zip(y, x, strict=True):
        target.copy_(matrix.mT)
    return y


@dataclass(frozen=True)
class Dense:
    """As it is, in `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def layout(self) -> Layout:
        return {"dense": (self.shape, self.dtype)}

    def write(self, buffers: Buffers, x: Tensor) -> None:
        if x is not buffers["dense"]:
            buffers["dense"].copy_(x)

    def read(self, buffers: Buffers) -> Tensor:
        stored = buffers["dense"]
        return stored.float() if self.dtype.is_floating_point else stored


@dataclass(frozen=True)
class Blockwise:
    """Codes with one float32 scale for `block` consecutive entries, row-major or down each matrix's columns."""

    shape: tuple[int, ...]
    codebook: str
    bits: int
    block: int
    columns: bool = False
    fit: Fit = "largest"
    """Of the scales, see `quantize_block`."""

    @property
    def _rows(self) -> tuple[int, ...]:
        """Shape of the rows that are quantised one by one: (L,) flat, or (n, m) for the columns of an (m, n)."""
        return (self.shape[1], self.shape[0]) if self.columns else (math.prod(self.shape),)

    def layout(self) -> Layout:
        *lead, length = self._rows
        return {
            "codes": ((*lead, packed_length(length, self.bits)), torch.uint8),
            "scales": ((*lead, -(-length // self.block)), torch.float32),
        }

    def write(self, buffers: Buffers, x: Tensor, rounding: Rounding | None = None) -> None:
        """As every storage's; `rounding` chooses between neighbouring levels, on rows as they are quantised."""
        for name, new in self.encoded(x, rounding).items():
            buffers[name].copy_(new)

    def encoded(self, x: Tensor, rounding: Rounding | None = None) -> Buffers:
        """What `write` stores, in buffers of its own."""
        rows = transposed(x) if self.columns else x.flatten(1)
        codes, scales = quantize_block(rows, self.codebook, self.bits, self.block, rounding, self.fit)
        return {"codes": codes, "scales": scales}

    def read(self, buffers: Buffers) -> Tensor:
        rows = dequantize_block(
            buffers["codes"], buffers["scales"], self.codebook, self.bits, self.block, self._rows[-1],
            buffers.get("largest"),
        )  # fmt: skip
        return rows.transpose(-1, -2) if self.columns else torch.unflatten(rows, 1, self.shape)


@dataclass(frozen=True)
class DoubleQuantized:
    """Small blocks: their scales, which would outweigh what they gain, are 8-bit shares of the largest in their row.

    As the scales of QLoRA (2305.14314, "double quantization").  A share is (j / 255)^2: a basis begins as the identity,
    and what its columns learn first is small beside their 1.
    """

    of: Blockwise

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def layout(self) -> Layout:
        of = self.of.layout()
        scales, _ = of["scales"]
        return {**of, "scales": (scales, torch.uint8), "largest": ((*scales[:-1], 1), torch.float32)}

    def write(self, buffers: Buffers, x: Tensor) -> None:
        for name, new in self.encoded(x).items():
            buffers[name].copy_(new)

    def encoded(self, x: Tensor) -> Buffers:
        """What `write` stores, in buffers of its own."""
        exact = self.of.encoded(x)
        largest = exact["scales"].amax(-1, keepdim=True)
        shares = exact["scales"].div_(torch.where(largest > 0, largest, 1.0)).sqrt_().mul_(255).round_()
        return {**exact, "scales": shares.to(torch.uint8), "largest": largest}

    def read(self, buffers: Buffers) -> Tensor:
        return self.of.read(buffers)


@dataclass(frozen=True)
class OffDiagonal:
    """A square matrix: its diagonal in float32, the rest column-block-wise (2405.18144, section 3.2)."""

    rest: Blockwise

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rest.shape

    def layout(self) -> Layout:
        return {"diagonal": ((self.shape[0],), torch.float32), **self.rest.layout()}

    def write(self, buffers: Buffers, x: Tensor) -> None:
        rest = x.clone(memory_format=torch.contiguous_format)
        diagonal = rest.diagonal(dim1=-2, dim2=-1)
        buffers["diagonal"].copy_(diagonal)
        diagonal.zero_()
        self.rest.write(buffers, rest)

    def read(self, buffers: Buffers) -> Tensor:
        x = self.rest.read(buffers)
        x.diagonal(dim1=-2, dim2=-1).copy_(buffers["diagonal"])
        return x


@dataclass(frozen=True)
class Triangles:
    """A square matrix: its diagonal in float32, its strict triangles block-wise, each with its own scales (2412.10663).

    The lower triangle is taken column by column, the upper one row by row, so that what is kept in the upper one is
    the transpose of something lower triangular; a block of entries runs on into the next column.  Both triangles have
    k (k - 1) codes, one matrix of them; with `upper=False` the upper one is not kept and reads as zeros.
    """

    order: int
    codebook: str
    bits: int
    block: int
    upper: bool

    @property
    def _entries(self) -> int:
        return self.order * (self.order - 1) // 2

    def layout(self) -> Layout:
        triangles = 2 if self.upper else 1
        return {
            "diagonal": ((self.order,), torch.float32),
            "codes": ((triangles, packed_length(self._entries, self.bits)), torch.uint8),
            "scales": ((triangles, -(-self._entries // self.block)), torch.float32),
        }

    def write(self, buffers: Buffers, x: Tensor) -> None:
        i, j = torch.triu_indices(self.order, self.order, 1, device=x.device)
        triangles = [x[:, j, i], x[:, i, j]] if self.upper else [x[:, j, i]]
        codes, scales = quantize_block(torch.stack(triangles, 1), self.codebook, self.bits, self.block)
        buffers["diagonal"].copy_(x.diagonal(dim1=-2, dim2=-1))
        buffers["codes"].copy_(codes)
        buffers["scales"].copy_(scales)

    def read(self, buffers: Buffers) -> Tensor:
        triangles = dequantize_block(
            buffers["codes"], buffers["scales"], self.codebook, self.bits, self.block, self._entries
        )
        i, j = torch.triu_indices(self.order, self.order, 1, device=triangles.device)
        x = torch.diag_embed(buffers["diagonal"])
        x[:, j, i] = triangles[:, 0]
        if self.upper:
            x[:, i, j] = triangles[:, 1]
        return x


@dataclass(frozen=True)
class RankOne:
    """Codes of a matrix, entry (i, j) scaled by the smaller of row i's and column j's absmax (2309.01507, 4.2)."""

    shape: tuple[int, ...]
    codebook: str
    bits: int

    def layout(self) -> Layout:
        m, n = self.shape
        return {
            "codes": ((packed_length(m * n, self.bits),), torch.uint8),
            "rows": ((m,), torch.float32),
            "columns": ((n,), torch.float32),
        }

    def write(self, buffers: Buffers, x: Tensor) -> None:
        codes, rows, columns = quantize_rank1(x, self.codebook, self.bits)
        buffers["codes"].copy_(codes)
        buffers["rows"].copy_(rows)
        buffers["columns"].copy_(columns)

    def read(self, buffers: Buffers) -> Tensor:
        return dequantize_rank1(buffers["codes"], buffers["rows"], buffers["columns"], self.codebook, self.bits)


@dataclass(frozen=True)
class Factored:
    """A non-negative matrix as the outer product of its row and column means (Adafactor, 1804.04235).

    A moving average of a matrix that is kept so has the moving averages of its row and column means: Adafactor's.
    """

    shape: tuple[int, ...]

    def layout(self) -> Layout:
        m, n = self.shape
        return {"rows": ((m,), torch.float32), "columns": ((n,), torch.float32)}

    def write(self, buffers: Buffers, x: Tensor) -> None:
        m, n = self.shape
        # divided first: the sum of squares that are finite may not be
        buffers["rows"].copy_((x / n).sum(-1))
        buffers["columns"].copy_((x / m).sum(-2))

    def read(self, buffers: Buffers) -> Tensor:
        rows, columns = buffers["rows"], buffers["columns"]
        mean = (rows / self.shape[0]).sum(-1, keepdim=True)
        share = rows / mean.clamp_(min=torch.finfo(torch.float32).tiny)
        return share.unsqueeze(-1) * columns.unsqueeze(-2)


@dataclass(frozen=True)
class Bitsandbytes:
    """8-bit codes and scales as bitsandbytes' own optimizers keep them: its blockwise functions and dynamic codes.

    Raises:
        ImportError: bitsandbytes is not installed (the extra `bnb`).
    """

    shape: tuple[int, ...]
    signed: bool

    BLOCK = 256

    def __post_init__(self) -> None:
        if find_spec("bitsandbytes") is None:
            raise ImportError(
                "8-bit moments (moments=8bit) are stored by bitsandbytes, which is not installed: "
                "pip install 'hf-shampoo4[bnb]', or choose another of the moments, such as 4bit"
            )

    def layout(self) -> Layout:
        length = math.prod(self.shape)
        return {"codes": ((length,), torch.uint8), "scales": ((-(-length // self.BLOCK),), torch.float32)}

    def write(self, buffers: Buffers, x: Tensor) -> None:
        from bitsandbytes.functional import quantize_blockwise

        codes, quantised = quantize_blockwise(self._padded(x.flatten(1)), self._code(x.device), blocksize=self.BLOCK)
        buffers["codes"].copy_(codes[:, : buffers["codes"].shape[1]])
        buffers["scales"].copy_(quantised.absmax.view_as(buffers["scales"]))

    def read(self, buffers: Buffers) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        codes, code = self._padded(buffers["codes"]), self._code(buffers["codes"].device)
        x = dequantize_blockwise(codes, absmax=buffers["scales"].flatten(), code=code, blocksize=self.BLOCK)
        return x[:, : buffers["codes"].shape[1]].unflatten(1, self.shape)

    def _padded(self, rows: Tensor) -> Tensor:
        """bitsandbytes' blocks run through a tensor from end to end: fill each row's last one."""
        return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % self.BLOCK)).contiguous()

    def _code(self, device: torch.device) -> Tensor:
        return _bitsandbytes_code(self.signed, device)


@cache
def _bitsandbytes_code(signed: bool, device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=signed).to(device)
