"""No operation without use: what a step computes is what its closed form says, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.execution.blocking import blocks_of
from hf_shampoo4.options import Options
from hf_shampoo4.preconditioners.algorithms import intervals
from hf_shampoo4.preconditioners.operations import amortised, product, qr_work, total
from tests.support.allocated import Allocated


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


def stepped(shape: tuple[int, ...], steps: int = 2, **options: Any) -> Shampoo4bit:
    """An optimizer of one parameter that has its state and a gradient for the next step."""
    optimizer = optimizer_of([nn.Parameter(torch.zeros(shape))], **options)
    for _ in range(steps):
        step(optimizer)
    return optimizer


def optimizer_of(parameters: list[nn.Parameter], **options: Any) -> Shampoo4bit:
    if options.get("algorithm") not in ("shampoo", "elementwise"):
        options = {"refresh_warmup": 0, **options}
    return Shampoo4bit(parameters, **options)


def step(optimizer: Shampoo4bit) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize("algorithm", ["soap", "kl_shampoo", "kl_soap"])
@pytest.mark.parametrize(("shape", "vocabulary"), [((520, 8), False), ((8, 520), False), ((520, 8), True)])
def test_nothing_of_rows_by_rows_of_a_side_without_a_basis(
    algorithm: str, shape: tuple[int, int], vocabulary: bool
) -> None:
    optimizer = stepped(shape, algorithm=algorithm, vocabulary=vocabulary, stats_every=1)
    with Shapes() as shapes:
        optimizer.step()
    assert any(seen.count(8) > 1 for seen in shapes.seen)
    assert not any(seen.count(520) > 1 for seen in shapes.seen)


SHAPES = {
    "square": ((160, 160), False),
    "blocks": ((200, 200), False),
    "oblong": ((96, 256), False),
    "tall": ((256, 96), False),
    "vocabulary": ((4096, 64), True),
    "lora": ((8, 512), False),
    "experts": ((4, 96, 64), False),
}
ALGORITHMS = {
    **{name: {"algorithm": name} for name in ("soap", "kl_shampoo", "kl_soap")},
    "kl_shampoo, cholesky_qr": {"algorithm": "kl_shampoo", "orthogonalise": "cholesky_qr"},
    "kl_shampoo, 32 bits": {"algorithm": "kl_shampoo", "bits": 32, "moments": "fp32"},
    "eigen": {"algorithm": "shampoo", "roots_every": 3, "rectify_roots": 2},
    "direct": {"algorithm": "shampoo", "roots_every": 3, "factor": "direct"},
    "cholesky_ef": {"algorithm": "shampoo", "roots_every": 3, "factor": "cholesky_ef"},
}


CASES = [
    (shape, algorithm)
    for shape, (_, vocabulary) in SHAPES.items()
    for algorithm, options in ALGORITHMS.items()
    if not vocabulary or options["algorithm"] != "shampoo"  # which leaves vocabularies to AdamW
]


@pytest.mark.parametrize(("shape", "algorithm"), CASES)
def test_a_step_takes_the_products_that_the_closed_form_says(shape: str, algorithm: str) -> None:
    """QR, eigh and Cholesky, which torch does not count, are apart in the form."""
    size, vocabulary = SHAPES[shape]
    given = {"vocabulary": vocabulary, "block_size": 160, "stagger": False, **ALGORITHMS[algorithm], "stats_every": 3}
    optimizer = stepped(size, steps=1, **given)
    options = Options.of(optimizer.param_groups[0])
    work = [block.algorithm.work() for block in blocks_of(size, options)]
    for refreshes in ([], intervals(options)):
        said = total(of_block[part] for of_block in work for part in ("step", *refreshes))
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        assert counter.get_total_flops() == pytest.approx(said.products, rel=0.02)


def test_staggered_blocks_take_on_average_what_the_closed_form_says() -> None:
    optimizer = stepped((300, 200), steps=1, block_size=100, stats_every=4)
    options = Options.of(optimizer.param_groups[0])
    said = total(amortised(block.algorithm.work(), intervals(options)) for block in blocks_of((300, 200), options))
    with FlopCounterMode(display=False) as counter:
        for _ in range(4):
            optimizer.step()
    assert counter.get_total_flops() == pytest.approx(4 * said.products, rel=0.02)


def test_the_closed_form_by_hand() -> None:
    """KL-Shampoo of 96 x 128 at every 10th step: rotations, squares, statistics, the moment, Bjorck and U Q."""
    (block,) = blocks_of((96, 128), Options())
    m, n = 96, 128
    step = 2 * (2 * m * m * n + 2 * m * n * n) + 2 * m * n
    update = 2 * (2 * m * m * n + 2 * m * n * n) + 3 * 2 * (m**3 + n**3)
    found = block.algorithm.work()
    assert (found["step"].products, found["basis"].products) == (step, update)
    assert found["basis"].factorised == qr_work(96).factorised + qr_work(128).factorised
    assert amortised(found, intervals(Options())).products == pytest.approx(step + update / 10, abs=1)
    assert product(2, 3, 5).products == 60


ROOMS = [
    ("kl_shampoo", (512, 512)), ("kl_shampoo", (320, 960)), ("soap", (512, 512)), ("soap", (960, 320)),
    ("kl_shampoo, 32 bits", (512, 512)),
    ("kl_shampoo, cholesky_qr", (512, 512)), ("kl_shampoo, cholesky_qr", (320, 960)),
    ("soap, 32 bits", (320, 960)), ("eigen", (512, 512)), ("direct", (320, 960)),
    ("cholesky_ef", (512, 512)), ("adamw", (512, 512)), ("adamw, 32 bits", (512, 512)), ("adamw, zip", (512, 512)),
    ("lora", (16, 20000)),
]  # fmt: skip
FLOAT32 = {"bits": 32, "moments": "fp32"}
TREATED: dict[str, dict[str, Any]] = {
    **ALGORITHMS,
    "soap, 32 bits": {"algorithm": "soap", **FLOAT32},
    "adamw": {"algorithm": "elementwise"},
    "adamw, 32 bits": {"algorithm": "elementwise", "moments": "fp32"},
    "adamw, zip": {"algorithm": "elementwise", "moments": "4bit_zipsr"},
    "lora": {"algorithm": "soap"},
}


@pytest.mark.parametrize(("name", "shape"), ROOMS)
def test_a_step_takes_the_memory_that_the_closed_form_says(name: str, shape: tuple[int, int]) -> None:
    """Of two blocks, beside which lie copies of their gradients, in one stack."""
    given = dict(TREATED[name])
    if given["algorithm"] != "elementwise":
        given |= {"stagger": False, "stats_every": 3}
    parameters = [nn.Parameter(torch.zeros(shape)) for _ in range(2)]
    optimizer = optimizer_of(parameters, **given)
    step(optimizer)
    options = Options.of(optimizer.param_groups[0])
    workspace = blocks_of(shape, options)[0].algorithm.workspace(2)
    for refreshes in ([], [*intervals(options)]):
        with Allocated() as allocated:
            optimizer.step()
        found = allocated.peak / 4 - sum(p.numel() for p in parameters)
        assert found == pytest.approx(max(workspace[part] for part in ("step", *refreshes)), rel=0.12)


def test_options_are_checked_when_they_change_and_not_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    check = Options.__post_init__
    monkeypatch.setattr(Options, "__post_init__", lambda self: (checked.append(self), check(self)))
    optimizer = stepped((32, 32), stats_every=7)
    checked.clear()
    optimizer.step()
    assert not checked
    optimizer.param_groups[0]["stats_every"] = 9
    optimizer.step()
    assert [options.stats_every for options in checked] == [9]
    optimizer.param_groups[0]["stats_every"] = 0
    with pytest.raises(OptionError, match="stats_every=0 is not allowed"):
        optimizer.step()
