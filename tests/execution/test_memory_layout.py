"""Parameters and gradients that lie in memory in any way: as torch.optim.AdamW, and nothing beside them is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.execution.build import build
from hf_shampoo4.options import Options
from hf_shampoo4.sharding.exchange import Ranks
from hf_shampoo4.sharding.local_parameter import local_parameter, overlapping
from tests.stress.soak import ALGORITHMS, WIDTHS
from tests.support.reference import PROPERTY

Fill = Callable[[tuple[int, ...]], Tensor]


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> Callable[[Fill], tuple[Tensor, Tensor]]:
    """A view of `shape` in a larger storage: dimensions permuted and sliced, a slot of one more, negated perhaps."""
    order = draw(st.permutations(range(len(shape))))
    before = [draw(st.integers(0, 2)) for _ in shape]
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in shape]
    after = [draw(st.integers(0, 2)) for _ in shape]
    slots, slot = draw(st.sampled_from([(1, 0), (1, 0), (2, 1), (3, 0)]))
    negative = draw(st.booleans())

    def cut(fill: Fill) -> tuple[Tensor, Tensor]:
        sides = [b + n * s + a for b, n, s, a in zip(before, shape, steps, after, strict=True)]
        storage = fill((*[sides[d] for d in order], slots))
        inverse = sorted(range(len(order)), key=lambda i: order[i])
        view = storage[..., slot].permute(inverse)
        view = view[tuple(slice(b, b + n * s, s) for b, n, s in zip(before, shape, steps, strict=True))]
        return storage, torch._neg_view(view) if negative else view

    return cut


shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@settings(PROPERTY, max_examples=25)
@given(st.data(), st.lists(shapes, min_size=1, max_size=3), st.sampled_from([torch.float32, torch.float64]))
def test_any_view_is_trained_as_adamw_trains_a_copy_of_it(data: st.DataObject, sizes: list, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def fill(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    cut = [data.draw(cuts(shape))(fill) for shape in sizes]
    gradients = [data.draw(cuts(shape)) for shape in sizes]
    ours = [nn.Parameter(view) for _, view in cut]
    theirs = [nn.Parameter(view.detach().resolve_neg().contiguous().clone()) for view in ours]
    expected = [storage.clone() for storage, _ in cut]
    a = Shampoo4bit(ours, lr=0.1, weight_decay=0.1, algorithm="elementwise", moments="fp32")
    b = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for p, q, gradient in zip(ours, theirs, gradients, strict=True):
            p.grad = gradient(fill)[1]
            q.grad = p.grad.resolve_neg().contiguous()
        a.step()
        b.step()
    for p, q, (storage, view), before in zip(ours, theirs, cut, expected, strict=True):
        torch.testing.assert_close(p.detach().resolve_neg(), q.detach(), rtol=2e-6, atol=2e-6)
        here, there = (t.as_strided(view.shape, view.stride(), view.storage_offset()) for t in (before, storage))
        here.copy_(there)
        assert torch.equal(before, storage)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "a slot of the last dimension": lambda x: torch.stack([x, x], -1)[..., 0],
    "a corner": lambda x: nn.functional.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "negative": lambda x: torch._neg_view(-x),
}
SHAPES = [(70, 40), (6, 4, 3, 5), (3, 8, 16), (33,)]


def trained(options: dict, of_weights: Callable[[Tensor], Tensor], of_gradients: Callable[[Tensor], Tensor]) -> list:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ps = [nn.Parameter(of_weights(w) if w.dim() > 1 else w) for w in weights]
    optimizer = Shampoo4bit(ps, lr=0.01, weight_decay=0.1, **options)
    for _ in range(3):
        for p in ps:
            g = torch.randn(p.shape, generator=generator)
            p.grad = of_gradients(g) if g.dim() > 1 else g
        optimizer.step()
    return [p.detach().resolve_neg() for p in ps]


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "elementwise"])
def test_every_algorithm_gives_the_same_bits_in_any_layout(name: str) -> None:
    often = {"roots_every": 1} if "roots_every" in ALGORITHMS[name] else {}
    options = {**ALGORITHMS[name], **WIDTHS["4-bit"], **often, "stats_every": 1}
    expected = trained(options, torch.clone, torch.clone)
    for layout, of_weights in LAYOUTS.items():
        found = trained(options, of_weights, LAYOUTS["every other column"])
        assert all(map(torch.equal, found, expected)), layout
    found = trained(options, torch.clone, LAYOUTS["transposed"])
    assert all(map(torch.equal, found, expected))


def test_channels_last_and_expanded_gradients_are_read_as_they_are_meant() -> None:
    conv, copy = (
        nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.ones(4, 3, 2, 2)),
    )
    matrix, like = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    conv.grad = torch.randn(4, 3, 2, 2)
    copy.grad = conv.grad.to(memory_format=torch.channels_last)
    matrix.grad, like.grad = torch.tensor(2.0).expand(4, 4), torch.full((4, 4), 2.0)
    Shampoo4bit([conv, matrix], lr=0.1).step()
    Shampoo4bit([copy, like], lr=0.1).step()
    assert torch.equal(conv, copy)
    assert torch.equal(matrix, like)
    assert conv.is_contiguous(memory_format=torch.channels_last)


def test_two_parameters_in_the_same_memory_are_both_trained() -> None:
    """A decoder whose weight is the encoder's, transposed."""

    def trained_by(optimizer: Callable[..., torch.optim.Optimizer], **options: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(64, 96, generator=generator)
        ps = [nn.Parameter(w), nn.Parameter(w.t()), nn.Parameter(w[:, ::2])]
        made = optimizer(ps, lr=0.1, weight_decay=0.1, **options)
        for _ in range(3):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator)
            made.step()
        return w

    ours = trained_by(Shampoo4bit, algorithm="elementwise", moments="fp32")
    torch.testing.assert_close(ours, trained_by(torch.optim.AdamW), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_parameters_of_one_shape_in_the_same_memory_are_both_trained(dtype: torch.dtype) -> None:
    """As `nn.Parameter(encoder.weight)` is: what changes all of a shape at once would lose one of the changes."""
    w = torch.ones(4, 6, dtype=dtype)
    ps = [nn.Parameter(w), nn.Parameter(torch.ones(4, 6, dtype=dtype)), nn.Parameter(w)]
    for p in ps:
        p.grad = torch.ones_like(p)
    Shampoo4bit(ps, lr=0.125, weight_decay=0.0, algorithm="elementwise").step()
    assert (w == 0.75).all()
    assert (ps[1] == 0.875).all()


def test_an_expanded_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\) has one number in several places \(expand\): clone\(\) it"):
        Shampoo4bit([nn.Parameter(torch.ones(4).expand(4, 4))])


def test_parameters_in_the_same_memory_are_found() -> None:
    def found(*views: Tensor) -> tuple[str, str] | None:
        return next(overlapping([local_parameter(str(i), nn.Parameter(view)) for i, view in enumerate(views)]), None)

    w = torch.zeros(8, 6)
    assert found(w, w.t()) == ("0", "1")
    assert found(torch.zeros(2), w[:, ::2], torch.zeros(0), w[3]) == ("1", "3")
    assert found(w[:, ::2], w[:, 1::2]) is None
    assert found(w[:4], w[4:], torch.zeros(8, 6)) is None


def test_owners_refuse_parameters_in_the_same_memory() -> None:
    """Each would send its parameter without the other's update."""

    class Alike(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value] * self.world

    w = torch.zeros(8, 6)
    local = [local_parameter("encoder", nn.Parameter(w)), local_parameter("decoder", nn.Parameter(w.t()))]
    shapes = {one.name: one.shape for one in local}
    with pytest.raises(ValueError, match="parameters 'encoder' and 'decoder' share memory"):
        build([(Options(), local, shapes)], Alike(0, 2))
