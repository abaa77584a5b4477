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
from typing import Protocol

import torch
from torch import Tensor

from .quantize import dequantize_block, dequantize_rank1, packed_length, quantize_block, quantize_rank1

Buffers = dict[str, Tensor]
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


def nbytes(storage: Storage) -> int:
    """Bytes that one block takes."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in storage.layout().values())


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

    def write(self, buffers: Buffers, x: Tensor) -> None:
        rows = x.transpose(-1, -2) if self.columns else x.flatten(1)
        codes, scales = quantize_block(rows, self.codebook, self.bits, self.block)
        buffers["codes"].copy_(codes)
        buffers["scales"].copy_(scales)

    def read(self, buffers: Buffers) -> Tensor:
        rows = dequantize_block(
            buffers["codes"], buffers["scales"], self.codebook, self.bits, self.block, self._rows[-1]
        )
        return rows.transpose(-1, -2) if self.columns else rows.unflatten(1, self.shape)


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
        diagonal = x.diagonal(dim1=-2, dim2=-1)
        buffers["diagonal"].copy_(diagonal)
        self.rest.write(buffers, x - torch.diag_embed(diagonal))

    def read(self, buffers: Buffers) -> Tensor:
        x = self.rest.read(buffers)
        x.diagonal(dim1=-2, dim2=-1).copy_(buffers["diagonal"])
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
