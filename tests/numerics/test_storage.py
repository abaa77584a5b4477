"""How stacked tensors are kept: shapes, bytes, round trips, and that a slice of dim 0 is a storage of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_shampoo4.numerics.quantize import Fit, dequantize_block, dequantize_rank1, quantize_block, quantize_rank1
from hf_shampoo4.numerics.storage import (
    Blockwise,
    Dense,
    DoubleQuantized,
    OffDiagonal,
    RankOne,
    Storage,
    allocate,
    nbytes,
    roundtrip,
    transposed,
    write_good,
)
from tests.support.reference import PROPERTY

ODD, SQUARE = (7, 13), (65, 65)
STORAGES: dict[str, Storage] = {
    "dense": Dense(ODD),
    "bf16": Dense(ODD, torch.bfloat16),
    "scalar": Dense(()),
    "blockwise": Blockwise(ODD, "dynamic", 4, 32),
    "blockwise 8": Blockwise(ODD, "dynamic", 8, 32),
    "vector": Blockwise((29,), "linear0", 4, 8),
    "columns": Blockwise(ODD, "linear2", 4, 4, columns=True),
    "columns 8": Blockwise(ODD, "linear2", 8, 4, columns=True),
    "double": DoubleQuantized(Blockwise(ODD, "lloyd16", 4, 4, columns=True, fit="least_squares")),
    "off-diagonal": OffDiagonal(Blockwise(SQUARE, "linear2", 4, 64, columns=True)),
    "rank-1": RankOne(ODD, "linear0", 4),
    "rank-1 8": RankOne(ODD, "dynamic_unsigned", 8),
}
each = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES.keys())


def shape(storage: Storage) -> tuple[int, ...]:
    return storage.shape  # type: ignore[attr-defined]


def sample(storage: Storage, blocks: int) -> torch.Tensor:
    x = torch.randn(blocks, *shape(storage))
    return x.abs() if getattr(storage, "codebook", "") in ("linear0", "dynamic_unsigned") else x


@each
def test_allocate_follows_layout(storage: Storage) -> None:
    buffers = allocate(storage, 3, "cpu")
    assert {name: ((3, *s), dtype) for name, (s, dtype) in storage.layout().items()} == {
        name: (tuple(b.shape), b.dtype) for name, b in buffers.items()
    }
    assert all(not b.any() for b in buffers.values())
    assert 3 * nbytes(storage) == sum(b.untyped_storage().nbytes() for b in buffers.values())


@each
def test_fresh_buffers_read_as_zeros(storage: Storage) -> None:
    assert not storage.read(allocate(storage, 2, "cpu")).any()


@each
def test_write_is_in_place_and_leaves_its_input(storage: Storage) -> None:
    buffers = allocate(storage, 3, "cpu")
    pointers = {name: b.data_ptr() for name, b in buffers.items()}
    x = sample(storage, 3)
    before = x.clone()
    storage.write(buffers, x)
    assert torch.equal(x, before)
    assert pointers == {name: b.data_ptr() for name, b in buffers.items()}
    read = storage.read(buffers)
    assert read.shape == x.shape
    assert read.dtype == torch.float32


@each
def test_rows_of_a_stack_are_independent(storage: Storage) -> None:
    """Writing a slice of rows is the slice of writing: what batching, checkpoints and resharding rest on."""
    x = sample(storage, 5)
    together = allocate(storage, 5, "cpu")
    storage.write(together, x)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        apart = allocate(storage, rows.stop - rows.start, "cpu")
        storage.write(apart, x[rows])
        for name in together:
            assert torch.equal(apart[name], together[name][rows])
        assert torch.equal(storage.read(apart), storage.read(together)[rows])
        view = {name: b[rows] for name, b in together.items()}
        assert torch.equal(storage.read(view), storage.read(together)[rows])
        storage.write(view, x[rows])
    for name, buffer in together.items():
        assert torch.equal(buffer, storage_of(storage, x)[name])


def storage_of(storage: Storage, x: torch.Tensor) -> dict[str, torch.Tensor]:
    buffers = allocate(storage, len(x), "cpu")
    storage.write(buffers, x)
    return buffers


@each
def test_writing_what_was_read_changes_nothing(storage: Storage) -> None:
    if getattr(storage, "codebook", "") == "dynamic":
        pytest.skip("dynamic has no -1: a block whose extreme is negative shrinks")
    buffers = storage_of(storage, sample(storage, 2))
    before = {name: b.clone() for name, b in buffers.items()}
    read = storage.read(buffers).clone()
    storage.write(buffers, storage.read(buffers))
    close = 1e-6 if isinstance(storage, DoubleQuantized) else 0  # its scales are fitted anew, in float32
    torch.testing.assert_close(storage.read(buffers), read, rtol=close, atol=0)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, before[name], rtol=close if buffer.is_floating_point() else 0, atol=0)


def test_dense_reads_what_was_written() -> None:
    x = torch.randn(2, *ODD)
    assert torch.equal(STORAGES["dense"].read(storage_of(STORAGES["dense"], x)), x)
    assert torch.equal(STORAGES["bf16"].read(storage_of(STORAGES["bf16"], x)), x.bfloat16().float())
    counter = Dense((), torch.int32)
    assert counter.read(allocate(counter, 2, "cpu")).dtype == torch.int32


def test_dense_bf16_read_is_no_buffer_and_float32_may_be() -> None:
    x = torch.randn(2, *ODD)
    buffers = storage_of(STORAGES["bf16"], x)
    STORAGES["bf16"].read(buffers).zero_()
    assert buffers["dense"].any()


def test_blockwise_flat_scales_run_along_rows_of_memory() -> None:
    x = torch.randn(2, *ODD)
    storage = STORAGES["blockwise"]
    expected = dequantize_block(*quantize_block(x.reshape(2, -1), "dynamic", 4, 32), "dynamic", 4, 32, 91)
    assert torch.equal(storage.read(storage_of(storage, x)), expected.view(2, *ODD))
    assert storage.layout() == {"codes": ((46,), torch.uint8), "scales": ((3,), torch.float32)}


def test_blockwise_columns_share_scales_down_a_column() -> None:
    x = torch.randn(2, *ODD)
    storage = STORAGES["columns"]
    buffers = storage_of(storage, x)
    assert storage.layout() == {"codes": ((13, 4), torch.uint8), "scales": ((13, 2), torch.float32)}
    assert torch.equal(buffers["scales"][..., 0], x[:, :4].abs().amax(1))
    assert torch.equal(buffers["scales"][..., 1], x[:, 4:].abs().amax(1))
    changed = x.clone()
    changed[:, :, 5] *= 7
    others = [j for j in range(13) if j != 5]
    assert torch.equal(storage.read(storage_of(storage, changed))[..., others], storage.read(buffers)[..., others])


@pytest.mark.parametrize("fit", ["largest", "least_squares"])
def test_double_quantised_scales_are_squares_of_255ths(fit: Fit) -> None:
    """Of the column's largest scale; between the roots of two neighbours the nearer."""
    x = torch.randn(3, 40, 24) * torch.rand(3, 1, 24) * torch.rand(3, 40, 1) ** 4
    x[1, :, 3] = 0
    x[2, :, 4] *= 1e-42 / x[2, :, 4].abs().amax()
    exact = Blockwise((40, 24), "lloyd16", 4, 16, columns=True, fit=fit)
    double, one = storage_of(DoubleQuantized(exact), x), storage_of(exact, x)
    assert torch.equal(double["codes"], one["codes"])
    largest = one["scales"].amax(-1, keepdim=True)
    assert torch.equal(double["largest"], largest)
    root = (one["scales"].double() / largest.double().clamp_min(1e-300)).sqrt()
    assert ((double["scales"] / 255 - root).abs() <= 0.5001 / 255).all()
    read = DoubleQuantized(exact).read(double)
    assert not read[1, :, 3].any()
    assert read[2, :, 4].any()
    torch.testing.assert_close(read, exact.read(one), atol=float(largest.max()) / 200, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rest", [0.5, 0.1, 0.02])
def test_what_a_column_holds_beside_one_large_entry_is_kept(bits: int, rest: float) -> None:
    """A basis begins as the identity and changes little by little: no less is kept than with float32 scales of 64."""
    x = rest * torch.nn.functional.normalize(torch.randn(1, 1024, 64), dim=1)
    x[0, torch.arange(64), torch.arange(64)] += (1 - rest**2) ** 0.5
    name = "lloyd16" if bits == 4 else "linear2"
    double = DoubleQuantized(Blockwise((1024, 64), name, bits, 16, columns=True, fit="least_squares"))
    usual = Blockwise((1024, 64), "nf4" if bits == 4 else "linear2", bits, 64, columns=True)
    error, of_usual = ((roundtrip(storage, x) - x).norm() for storage in (double, usual))
    assert error < (1.0 if bits == 4 else 2.0) * of_usual


@PROPERTY
@given(st.integers(1, 60), st.integers(0, 2**31), st.floats(0, 6))
def test_least_squares_scales_err_least(length: int, seed: int, spread: float) -> None:
    """No other scale of a block errs less with the same levels; against float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, length, generator=generator) * 10 ** (-spread * torch.rand(1, length, generator=generator))
    fitted_to, usual = (
        roundtrip(Blockwise((length,), "lloyd16", 4, 16, fit=fit), x) for fit in ("least_squares", "largest")
    )
    for start in range(0, length, 16):
        block, fitted, plain = (t[:, start : start + 16].double() for t in (x, fitted_to, usual))
        best = plain * (block * plain).sum() / (plain * plain).sum()
        torch.testing.assert_close(fitted, best, rtol=1e-5, atol=1e-6)
        assert (fitted - block).norm() <= (plain - block).norm() * (1 + 1e-5)


def test_a_basis_is_rounded_with_an_error_of_7_per_cent() -> None:
    """At 4.5 bits an entry; with nf4, blocks of 64 and float32 scales, as many, it is 9."""
    u = torch.linalg.qr(torch.randn(2, 256, 256))[0]
    basis = DoubleQuantized(Blockwise((256, 256), "lloyd16", 4, 16, columns=True, fit="least_squares"))
    usual = Blockwise((256, 256), "nf4", 4, 64, columns=True)
    assert (roundtrip(basis, u) - u).norm() / u.norm() == pytest.approx(0.0717, abs=5e-4)
    assert (roundtrip(usual, u) - u).norm() / u.norm() == pytest.approx(0.092, abs=1e-3)
    assert nbytes(basis) == nbytes(usual) + 4 * 256
    eye = torch.eye(256).expand(2, -1, -1)
    assert torch.equal(roundtrip(basis, eye), eye)


def test_good_blocks_alone_are_written() -> None:
    storage = STORAGES["double"]
    x, y = sample(storage, 3), sample(storage, 3)
    buffers = storage_of(storage, x)
    before = {name: b.clone() for name, b in buffers.items()}
    write_good(storage, buffers, y, torch.tensor([True, False, True]))
    for name, new in storage_of(storage, y).items():
        assert torch.equal(buffers[name][[0, 2]], new[[0, 2]])
        assert torch.equal(buffers[name][1], before[name][1])


def test_off_diagonal_keeps_the_diagonal_and_its_scales_apart() -> None:
    storage = STORAGES["off-diagonal"]
    x = torch.randn(2, *SQUARE) + 1e4 * torch.eye(65)
    read = storage.read(storage_of(storage, x))
    assert torch.equal(read.diagonal(dim1=1, dim2=2), x.diagonal(dim1=1, dim2=2))
    off = ~torch.eye(65, dtype=torch.bool)
    assert (read - x)[:, off].abs().max() < 0.5  # a diagonal inside the scale would leave errors of 1e3
    assert nbytes(storage) == 65 * 4 + 65 * 33 + 65 * 2 * 4


@pytest.mark.parametrize("n", [5, 13, 64])
def test_transposed_copies_only_what_must_be(n: int) -> None:
    x = torch.randn(3, 64, n)
    assert torch.equal(transposed(x), x.mT)
    assert transposed(x).is_contiguous()
    assert transposed(x.mT.contiguous().mT).is_contiguous()
    assert torch.equal(transposed(x[:, ::2]), x[:, ::2].mT)
    assert torch.equal(transposed(x[:1].expand(2, -1, -1)), x[:1].mT.expand(2, -1, -1))


def test_rank_one_is_the_quantisers() -> None:
    x = torch.rand(3, *ODD)
    storage = STORAGES["rank-1"]
    expected = dequantize_rank1(*quantize_rank1(x, "linear0", 4), "linear0", 4)
    assert torch.equal(storage.read(storage_of(storage, x)), expected)


def test_bytes_of_the_usual_shapes() -> None:
    """4 bits and a float32 scale for 64 (128) entries: 0.5625 (0.53125) bytes an entry."""
    assert nbytes(Blockwise((1024, 1024), "linear2", 4, 64, columns=True)) == 0.5625 * 2**20
    assert nbytes(Blockwise((1024, 1024), "dynamic", 4, 128)) == 0.53125 * 2**20
    assert nbytes(RankOne((1024, 1024), "linear0", 4)) == 2**19 + 2 * 4096
    assert nbytes(Dense((1024, 1024))) == 2**22
