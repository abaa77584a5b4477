"""What a step launches, counted on the meta device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from hf_shampoo4 import Shampoo4bit, param_groups
from hf_shampoo4.execution.blocking import blocks_of
from hf_shampoo4.options import Options
from hf_shampoo4.planning.launches import Launch, LaunchCounter, steps_of


class Model(nn.Module):
    def __init__(self, layers: int = 2, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(1024, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1024, bias=False)


def on_meta(**sizes: int) -> nn.Module:
    with torch.device("meta"):
        return Model(**sizes)


def test_operations_are_counted_with_their_bytes_and_views_and_allocations_are_not() -> None:
    a, b = torch.empty(3, 4, device="meta"), torch.empty(4, 5, device="meta")
    elsewhere = torch.zeros(7)
    with LaunchCounter() as counter:
        c = a @ b
        c.T.add_(1.0)
        torch.empty_like(c).copy_(c)
        torch.mul(c, c, out=c)
        a[torch.empty(2, dtype=torch.long, device="meta")]
        elsewhere + 1
    found = counter.found.launches()
    assert found[Launch("mm", 4 * (12 + 20 + 15), 2 * 3 * 4 * 5, "float32", written=4 * 15)] == 1
    assert found[Launch("add_", 2 * 4 * 15)] == 1
    assert found[Launch("copy_", 2 * 4 * 15, written=4 * 15)] == 1
    assert found[Launch("index", 2 * 4 * 8 + 8 * 2, written=4 * 8)] == 1
    assert counter.found.total() == 5
    assert counter.found.summary()["products"] == {"float32": 120}


def test_fused_adamw_reads_its_gradients_and_writes_three_tensors_in_place() -> None:
    p = nn.Parameter(torch.ones(10))
    p.grad = torch.ones(10)
    optimizer = torch.optim.AdamW([p], fused=True)
    optimizer.step()
    with LaunchCounter("cpu") as counter:
        optimizer.step()
    found = {launch.operation: launch for launch in counter.found.launches()}["_fused_adamw_"]
    assert found.bytes - 4 == 28 * 10  # and the number of the step
    assert found.written == 0


def test_an_update_that_bitsandbytes_computes_in_python_is_counted_by_its_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # what the Trainer said of embeddings in another test is kept for the first parameter of any optimizer, and by ids
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    monkeypatch.setattr(manager, "pid2config", {})
    monkeypatch.setattr(manager, "index2config", {})
    p = nn.Parameter(torch.ones(64, 128))
    p.grad = torch.ones(64, 128)
    optimizer = bitsandbytes.optim.AdamW8bit([p])
    optimizer.step()
    with LaunchCounter("cpu") as counter:
        optimizer.step()
    found = Counter({launch.operation: n for launch, n in counter.found.launches().items()})
    assert found["bitsandbytes::dequantize_blockwise"] == found["bitsandbytes::quantize_blockwise"] == 2
    assert found["addcdiv_"] == 1
    assert not any("optimizer_update" in name for name in found)
    coded = [launch for launch in counter.found.launches() if launch.operation == "bitsandbytes::quantize_blockwise"]
    assert coded[0].numbers == 64 * 128


def test_what_is_expanded_is_read_once_and_what_is_decomposed_is_told() -> None:
    row = torch.empty(1, 8, device="meta").expand(100, 8)
    stack = torch.empty(6, 16, 16, device="meta")
    with LaunchCounter() as counter:
        row + 1
        torch.linalg.qr(stack)
    (added, qr) = counter.found.launches()
    assert added.bytes == 4 * (8 + 800)
    assert (qr.operation, qr.order, qr.matrices) == ("linalg_qr", 16, 6)


@pytest.mark.parametrize("options", [{}, {"algorithm": "soap"}, {"algorithm": "shampoo"}, {"algorithm": "elementwise"}])
def test_a_step_of_every_algorithm_is_counted_and_every_launch_is_of_a_known_part(options: dict[str, Any]) -> None:
    steps = steps_of(on_meta(), options, triton=False)
    late, every = steps["late"].summary(), steps["all"].summary()
    assert 0 < late["launches"] <= every["launches"]
    assert "other" not in steps["all"].totals()
    assert (late == every) == (options.get("algorithm") == "elementwise")


def test_products_are_those_of_the_closed_form_and_rotations_have_their_precision() -> None:
    model = on_meta()
    counted = steps_of(model, {"stagger": False, "rotation_precision": "tf32"}, triton=False)["late"]
    kinds = [("words.weight", True), ("layers.0.weight", False), ("layers.1.weight", False), ("head.weight", True)]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    blocks = [
        b for name, of in kinds for b in blocks_of(shapes[name], Options(vocabulary=of, stagger=False).carried_out())
    ]
    said = sum(block.algorithm.work()["step"].products for block in blocks)
    products = counted.summary()["products"]
    assert sum(products.values()) == pytest.approx(said, rel=0.02)
    assert products["tf32"] > 0.9 * said


class Layer(nn.Module):
    """LLaMA-130M's matrices and norms."""

    def __init__(self, width: int = 768, inner: int = 2048) -> None:
        super().__init__()
        self.attention = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.gate = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))


class Llama(nn.Module):
    def __init__(self, layers: int, words: int = 32_000, width: int = 768) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, words, bias=False)


def late_launches(layers: int, triton: bool) -> int:
    with torch.device("meta"):
        model = Llama(layers)
    return steps_of(model, {}, triton)["late"].total()


def test_a_late_step_of_llama_130m_takes_few_launches_and_twice_the_layers_hardly_more() -> None:
    pytest.importorskip("triton")
    with_kernels, without = (late_launches(12, triton) for triton in (True, False))
    assert with_kernels <= 600
    # 96 of them are of first moments that settle, 244 of gradients that may have grown: the kernels have both in them
    assert without <= 1450
    assert late_launches(24, True) <= 1.1 * with_kernels
    assert late_launches(24, False) <= 1.1 * without


@pytest.mark.parametrize("options", [{"stagger": False, "refresh_warmup": 0}, {"algorithm": "elementwise"}])
def test_what_a_cpu_does_is_what_is_counted_for_it(options: dict[str, Any]) -> None:
    """Where no gradient is zero: to know that, or to round what has ended, is work too."""
    said = steps_of(on_meta(), options, triton=False, device="cpu")["late"].summary()
    model = on_meta().to_empty(device="cpu")
    optimizer = Shampoo4bit(param_groups(model), **options)
    for _ in range(4):
        for p in model.parameters():
            nn.init.normal_(p)
            p.grad = torch.randn_like(p)
        with LaunchCounter("cpu") as counter:
            optimizer.step()
    for name in ("launches", "bytes"):
        assert counter.found.summary()[name] == pytest.approx(said[name], rel=0.1)


def test_triton_kernels_count_once_and_nothing_is_run() -> None:
    pytest.importorskip("triton")
    model = on_meta()
    without, kernels = (steps_of(model, {}, triton)["late"] for triton in (False, True))
    names = {launch.operation for launch in kernels.launches() if launch.operation.startswith("triton")}
    assert {"triton dequantize", "triton moment"} <= names
    assert kernels.total() < without.total()
    assert all(p.grad is None for p in model.parameters())


def test_a_late_step_of_llama_130m_moves_at_most_120_bytes_a_parameter() -> None:
    pytest.importorskip("triton")
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(32_000, 768),
                "attention": nn.ModuleList(nn.Linear(768, 768, bias=False) for _ in range(4 * 12)),
                "up": nn.ModuleList(nn.Linear(768, 2048, bias=False) for _ in range(2 * 12)),
                "down": nn.ModuleList(nn.Linear(2048, 768, bias=False) for _ in range(12)),
                "norms": nn.ModuleList(nn.LayerNorm(768) for _ in range(25)),
                "lm_head": nn.Linear(768, 32_000, bias=False),
            }
        )
    count = sum(p.numel() for p in model.parameters())
    late = steps_of(model, {}, triton=True)["late"]
    assert late.summary()["bytes"] <= 120 * count
