"""KL-Shampoo where gradients grow at once: steps go on at their usual length, as with a second moment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.growth import START, lengths, squared_moves
from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.preconditioners.bases import Jump

SHAPES = [(64, 96), (128, 32), (24, 96)]  # two bases, one on the right, one on the left


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by", [3.0, 1e2, 1e4, 1e8, 1e17])
def test_gradients_that_grow_move_as_before(shape: tuple[int, int], by: float, bits: int) -> None:
    options = {"bits": bits, **({"moments": "fp32"} if bits == 32 else {})}
    scale = min(1.0, 1e8 / by)
    found = lengths(squared_moves(shape, lambda t, g: g.mul_(scale * (1.0 if t < START else by)), 12, **options))
    assert all(0.6 < length < 1.6 for length in found), found


@pytest.mark.parametrize("shape", SHAPES)
def test_after_a_spike_steps_are_as_long_as_usual(shape: tuple[int, int]) -> None:
    found = lengths(squared_moves(shape, lambda t, g: g.mul_(100.0 if t == START else 1.0), 100))
    assert all(0.6 < length < 2.0 for length in found), found


@pytest.mark.parametrize("by", [1e-4, 1e-2, 1e2, 1e4])
def test_where_bases_are_updated_rarely_they_do_not_turn_to_what_is_faint(by: float) -> None:
    """After a spike, and where gradients shrink, steps were up to 7.5 times as long, in a direction of long ago."""
    options = {"refresh_warmup": 0, "stats_every": 10}

    def change(t: int, g: Tensor) -> Tensor:
        return g.mul_(by if t == START or (by < 1 and t > START) else 1.0)

    assert max(lengths(squared_moves((64, 96), change, 120, **options))) < 2.6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_row_or_a_column_that_comes_back_leaves_the_others_their_steps(shape: tuple[int, int], dim: int) -> None:
    squares = squared_moves(shape, lambda t, g: g.select(dim, 0).mul_(0.0 if t < START else 1.0), 12)
    others = lengths(squares.narrow(1 + dim, 1, shape[dim] - 1))
    assert all(0.7 < other < 1.3 for other in others), others


@pytest.mark.parametrize("columns", [1, 8])
def test_a_column_of_a_vocabulary_that_comes_back_leaves_the_others_their_steps(columns: int) -> None:
    """Of 300 rows ten have a gradient at every step, and most have none at any one."""

    def change(t: int, g: Tensor) -> Tensor:
        g[10:] *= torch.rand(290, 1, generator=torch.Generator().manual_seed(10_000 + t)) < 0.03
        return g[:, :columns].mul_(0.0 if t < START else 1.0)

    found = lengths(squared_moves((300, 16), change, 12, vocabulary=True)[:, :10, 8:])
    assert all(0.5 < length < 2 for length in found), found


def test_a_fit_goes_on_to_other_targets() -> None:
    """To a loss of 1e-8, and from there, with gradients 10,000 times as large, in as many steps again."""
    torch.manual_seed(0)
    x, first, second = torch.randn(512, 48), torch.randn(48, 64), torch.randn(48, 64)
    w = nn.Parameter(torch.zeros(48, 64))
    optimizer = Shampoo4bit([w], lr=0.3, weight_decay=0.0)
    losses = []
    for target in (first, second):
        for t in range(300):
            optimizer.param_groups[0]["lr"] = 0.3 * 0.97**t
            loss = (x @ (w - target)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[299] < 1e-7 * losses[0]
    assert losses[599] < 1e-7 * losses[300]


@pytest.mark.parametrize("weight", [0.02, 0.1])
def test_the_product_takes_in_what_a_second_moment_does(weight: float) -> None:
    rows, columns = torch.rand(3, 40).double() + 0.5, torch.rand(3, 50).double() + 0.5
    growth = torch.tensor([[1.0], [1e3], [1e9]]).double()
    jump = Jump.of(
        growth * rows / rows.mean(-1, keepdim=True), growth * columns / columns.mean(-1, keepdim=True), weight
    )
    left, right = jump.shares()
    assert left[0] == right[0] == jump.of_rows_alone()[0] == 1
    taken_in = weight * left * growth * weight * right * growth
    torch.testing.assert_close(taken_in[1:], weight * growth[1:])
