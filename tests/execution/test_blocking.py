"""What the shape alone decides: how a parameter is seen, and what a number of it costs."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from hf_shampoo4.execution.blocking import blocks_of, in_waves, meta_has_memory, wave_elements
from hf_shampoo4.options import Options
from hf_shampoo4.state_report import block_bytes

SKINNY = [
    (1, 197, 768), (1, 64, 64, 768), (1, 1, 8192), (10, 1, 1, 4096), (1, 8192), (8192, 1), (8192, 1, 1), (2, 4096),
    (4, 4096), (1536, 4), (8, 256, 1024), (10_000,),
]  # fmt: skip


@pytest.mark.parametrize("moments", ["4bit", "4bit_factored"])
@pytest.mark.parametrize("shape", SKINNY, ids=str)
def test_four_bit_moments_take_less_than_eight_bit_ones_in_every_shape(shape: tuple[int, ...], moments: str) -> None:
    blocks = blocks_of(shape, Options(algorithm="elementwise", moments=moments))
    assert sum(block.numel for block in blocks) == math.prod(shape)
    assert block_bytes(blocks) / math.prod(shape) < 2


def test_a_kernel_of_a_convolution_is_one_matrix_also_in_a_list_of_parameters() -> None:
    assert {b.view.count for shape in [(768, 48, 128), (512, 256, 16)] for b in blocks_of(shape, Options())} == {1}
    assert block_bytes(blocks_of((768, 48, 128), Options())) / (768 * 48 * 128) < 2


def test_a_wave_is_small_on_a_cpu_and_takes_a_sixteenth_of_a_gpus_memory() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert wave_elements(cpu) == 1 << 24
    assert wave_elements(meta) == 80 * 10**9 // (44 * 8)
    assert wave_elements(meta, 4.4) == 10**8
    assert wave_elements(meta, 0.1) == wave_elements(cpu, 100.0) == 1 << 24
    with meta_has_memory(24 * 10**9):
        assert wave_elements(cpu) == 1 << 24
        assert wave_elements(meta) * 44 * 8 <= 24 * 10**9 < (wave_elements(meta) + 1) * 44 * 8
    with meta_has_memory(10**9):
        assert wave_elements(meta) == 1 << 24


class Kept(NamedTuple):
    kind: str
    numel: int
    shard_count: int
    room: int


def test_a_wave_holds_as_many_parameters_as_have_room_on_a_rank() -> None:
    found = list(in_waves([Kept("a", 4, 1, 10), Kept("b", 9, 1, 10), Kept("a", 6, 1, 10), Kept("a", 1, 1, 10)]))
    assert [[p.numel for p in wave] for wave in found] == [[4, 6], [1], [9]]
    assert len(list(in_waves([Kept("a", 4, 2, 10)] * 5))) == 1
