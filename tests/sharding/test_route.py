"""Routes against a dense copy of the parameter, over random shapes, worlds and placements; no processes."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given

from hf_shampoo4.sharding.dtensor import sharded
from hf_shampoo4.sharding.geometry import MatrixView, matrix_view, partition
from hf_shampoo4.sharding.placement import Layout, Placement, Split, ranges, whole
from hf_shampoo4.sharding.route import BlockedParameter, Transfer, route
from tests.support.reference import PROPERTY
from tests.support.regions import entries

shapes = st.one_of(
    st.tuples(st.integers(1, 30)),
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    st.tuples(st.integers(1, 4), st.integers(2, 7), st.integers(16, 18)),
)


@st.composite
def placements(draw: st.DrawFn, world: int) -> Placement:
    shape, every = draw(shapes), tuple(range(world))
    kind = draw(st.sampled_from(["whole", "rows", "columns", "fused", "hybrid", "meshes", "range"]))
    if kind == "rows":
        return sharded(shape, Layout((every,), (world,), (Split(0, 1),)))
    if kind == "columns":
        return sharded(shape, Layout((every,), (world,), (Split(len(shape) - 1, 1),)))
    if kind == "fused":
        return sharded(shape, Layout((every,), (world,), (Split(len(shape) - 1, draw(st.integers(1, 3))),)))
    if kind == "hybrid" and world % 2 == 0:
        return sharded(shape, Layout((every,), (2, world // 2), (None, Split(0, 1))))
    if kind == "meshes" and world % 2 == 0:
        return sharded(shape, Layout((every[::2], every[1::2]), (world // 2,), (Split(0, 1),)))
    if kind == "range":
        numel = int(np.prod(shape))
        cuts = sorted(draw(st.lists(st.integers(0, numel), min_size=world - 1, max_size=world - 1)))
        return ranges(shape, list(zip([0, *cuts], [*cuts, numel], strict=True)))
    return whole(shape, world)


@st.composite
def waves(draw: st.DrawFn) -> tuple[int, list[BlockedParameter]]:
    world = draw(st.integers(1, 6))
    cuts = []
    for _ in range(draw(st.integers(1, 3))):
        placement = draw(placements(world))
        rows = placement.shape[0] if len(placement.shape) > 1 else 1
        view = matrix_view(placement.shape) or MatrixView(1, rows, int(np.prod(placement.shape)) // rows)
        rects = partition(view, draw(st.integers(2, 9)))
        owners = draw(st.lists(st.integers(0, world - 1), min_size=len(rects), max_size=len(rects)))
        cuts.append(BlockedParameter(placement, view, rects, owners))
    return world, cuts


def flat_of(cut: BlockedParameter, full: torch.Tensor, rank: int) -> torch.Tensor:
    """The entries of the full parameter that a rank holds, by the region's definition."""
    return full.flatten()[torch.from_numpy(entries(cut.placement.shard_of[rank].region))]


def exchanged(transfers: list[Transfer], read, write) -> None:
    """What the all-to-all does, rank by rank; both ends must name the same pieces in the same order."""
    for receiver, side in enumerate(transfers):
        for sender, pieces in side.into.items():
            sent = transfers[sender].out.get(receiver, [])
            assert [(p.member, p.block, p.rows, p.columns) for p in sent] == [
                (p.member, p.block, p.rows, p.columns) for p in pieces
            ]
            for a, b in zip(sent, pieces, strict=True):
                write(receiver, b, read(sender, a))
        for sender, other in enumerate(transfers):
            assert bool(other.out.get(receiver)) == bool(side.into.get(sender))
            assert not side.is_local or sender == receiver or not other.out.get(receiver)


@PROPERTY
@given(waves())
def test_owners_get_whole_blocks_and_holders_get_them_back(wave: tuple[int, list[BlockedParameter]]) -> None:
    world, cuts = wave
    routes = [route(rank, world, cuts) for rank in range(world)]
    full = [torch.arange(1.0, 1 + int(np.prod(cut.placement.shape))) for cut in cuts]
    blocks = [
        (f.view(c.view.count, c.view.rows, c.view.columns)[r.matrix, r.r0 : r.r1, r.c0 : r.c1], owner)
        for f, c in zip(full, cuts, strict=True)
        for r, owner in zip(c.rects, c.owners, strict=True)
    ]
    flats = [[flat_of(cut, f, rank) for cut, f in zip(cuts, full, strict=True)] for rank in range(world)]
    collected = [torch.zeros_like(block) for block, _ in blocks]

    def into_block(rank: int, piece, value: torch.Tensor) -> None:
        assert rank == blocks[piece.block][1]
        assert (piece.of_block(collected[piece.block]) == 0).all()  # from one holder only
        piece.of_block(collected[piece.block]).copy_(value)

    exchanged([r.collect for r in routes], lambda rank, piece: piece.of_flat(flats[rank][piece.member]), into_block)
    assert all(torch.equal(there, block) for there, (block, _) in zip(collected, blocks, strict=True))

    returned = [[torch.zeros_like(flat) for flat in held] for held in flats]
    exchanged(
        [r.send for r in routes],
        lambda rank, piece: piece.of_block(collected[piece.block]),
        lambda rank, piece, value: piece.of_flat(returned[rank][piece.member]).copy_(value),
    )
    for held, back in zip(flats, returned, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(held, back, strict=True))


@PROPERTY
@given(waves(), st.data())
def test_traffic_is_what_the_owner_does_not_hold(wave: tuple[int, list[BlockedParameter]], data: st.DataObject) -> None:
    world, cuts = wave
    blocks = [(cut, rect, owner) for cut in cuts for rect, owner in zip(cut.rects, cut.owners, strict=True)]
    wanted = data.draw(st.sets(st.integers(0, len(blocks) - 1)) if blocks else st.just(set()))
    sent, expected = np.zeros(2), np.zeros(2)
    for rank in range(world):
        for k, side in enumerate(route(rank, world, cuts)):
            part = side.of_blocks(wanted)
            sent[k] += sum(p.numel for to, pieces in part.out.items() if to != rank for p in pieces)
    for cut, rect, owner in (blocks[k] for k in wanted):
        dense = np.zeros((cut.view.count, cut.view.rows, cut.view.columns), dtype=bool)
        dense[rect.matrix, rect.r0 : rect.r1, rect.c0 : rect.c1] = True
        entries = torch.from_numpy(dense)
        expected[0] += dense.sum() - int(flat_of(cut, entries, owner).sum())
        others = (rank for rank in range(world) if rank != owner)
        expected[1] += sum(int(flat_of(cut, entries, rank).sum()) for rank in others)
    np.testing.assert_array_equal(sent, expected)


def test_hybrid_sharding_collects_within_the_owner_s_shard_group() -> None:
    placement = sharded((8, 8), Layout(((0, 1, 2, 3),), (2, 2), (None, Split(0, 1))))
    cut = BlockedParameter(placement, MatrixView(1, 8, 8), partition(MatrixView(1, 8, 8), 4), [3, 3, 3, 3])
    assert set(route(3, 4, [cut]).collect.into) == {2, 3}
    assert set(route(3, 4, [cut]).send.out) == {0, 1, 2, 3}
