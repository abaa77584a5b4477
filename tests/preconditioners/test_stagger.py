"""Refreshes spread over a period: every block as often as before and no later, the same in every run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_shampoo4
from hf_shampoo4.execution import build
from hf_shampoo4.execution.blocking import phases_of
from hf_shampoo4.options import Options, resolve
from hf_shampoo4.preconditioners import moments
from hf_shampoo4.preconditioners.eigenbasis import Eigenbasis
from hf_shampoo4.preconditioners.schedule import due
from hf_shampoo4.sharding.exchange import Ranks
from hf_shampoo4.sharding.local_parameter import local_parameter
from tests.support import used

ALGORITHMS: list[dict[str, Any]] = [
    {"algorithm": "shampoo"},
    {"algorithm": "shampoo", "factor": "cholesky_ef", "stats_every": 2},
    {"algorithm": "soap", "refresh_warmup": 2},
    {"algorithm": "kl_shampoo", "refresh_warmup": 0, "bits": 32, "moments": "fp32"},
]
each = pytest.mark.parametrize("options", ALGORITHMS, ids=lambda o: f"{o['algorithm']}{o.get('factor', '')}")
COUNT, EVERY = 7, 4


def optimizer(names: list[int], **options: Any) -> hf_shampoo4.Shampoo4bit:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(72, 80, generator=generator)) for _ in range(COUNT)]
    named = [(f"layer{i}", parameters[i]) for i in names]
    often = {"stats_every": EVERY, "roots_every": EVERY, "stagger": True}
    return hf_shampoo4.Shampoo4bit(named, lr=1e-2, **used({**often, **options}))


def step(opt: hf_shampoo4.Shampoo4bit, number: int) -> None:
    for name, p in zip(opt.param_groups[0]["param_names"], opt.param_groups[0]["params"], strict=True):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * number + int(name[5:])))
    opt.step()


def result(opt: hf_shampoo4.Shampoo4bit) -> dict[str, torch.Tensor]:
    group = opt.param_groups[0]
    return {name: p.detach() for name, p in zip(group["param_names"], group["params"], strict=True)}


def updated(options: Options, step: int, phases: list[float]) -> list[int]:
    """Blocks that are refreshed at a step, if all have a gradient at every one."""
    return sorted(
        i for rows in due(Eigenbasis, options, [step] * len(phases), phases).get("basis", {}).values() for i in rows
    )


def test_every_block_once_in_a_period_and_not_later_than_all_together() -> None:
    phases, options = [0.0, 0.25, 0.99, 0.3], Options(refresh_warmup=0)
    staggered = [updated(options, step, phases) for step in range(1, 21)]
    assert sorted(row for rows in staggered[:10] for row in rows) == [0, 1, 2, 3]
    assert staggered[:10] == staggered[10:]
    together = Options(refresh_warmup=0, stagger=False)
    assert updated(together, 10, phases) == [0, 1, 2, 3]
    assert not updated(together, 3, phases)


def test_blocks_of_other_numbers_of_updates_are_due_in_other_steps() -> None:
    options = Options(refresh_warmup=2, stagger=False, stats_every=3)
    assert due(Eigenbasis, options, [1, 2, 3, 5, 6, 7, 300], [0.0] * 7) == {"basis": {1: [0, 1, 2], 3: [4, 6]}}


@each
def test_a_parameter_is_refreshed_by_its_own_updates(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One with a gradient on every fourth step, never on one that 4 divides, is trained as if it were alone.

    Another one has a gradient at every step: blocks of one stack are updated at other intervals.  Saved in between.
    """

    monkeypatch.setattr(moments, "ENDED", -1.0)  # noise is of the group's step

    def made(names: list[int]) -> hf_shampoo4.Shampoo4bit:
        return optimizer(names, stagger=False, **options)

    pair, alone = made([0, 1]), [made([0]), made([1])]
    for number in range(1, 6 * EVERY):
        for p in pair.param_groups[0]["params"]:
            p.grad = None
        for name, opt in enumerate(alone):
            if name == 0 or number % EVERY == 1:
                step(opt, number)
                pair.param_groups[0]["params"][name].grad = opt.param_groups[0]["params"][0].grad
        pair.step()
        if number == 3 * EVERY:
            again = made([0, 1])
            for p, q in zip(result(again).values(), result(pair).values(), strict=True):
                p.copy_(q)
            again.load_state_dict(pair.state_dict())
            pair = again
    for opt in alone:
        for name, p in result(opt).items():
            torch.testing.assert_close(result(pair)[name], p, rtol=1e-4, atol=1e-5)


@each
def test_a_block_does_not_depend_on_those_beside_it(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refreshed with some blocks of its stack, with others, or alone: as 1-block stacks, where there is no part."""
    phases = {f"layer{i}": [i / COUNT] for i in range(COUNT)}
    monkeypatch.setattr(build, "phases_of", lambda counts: {name: phases[name] for name in counts})
    together, alone = optimizer(list(range(COUNT)), **options), [optimizer([i], **options) for i in range(COUNT)]
    for number in range(1, 2 * EVERY + 2):
        for opt in (together, *alone):
            step(opt, number)
    for opt in alone:
        for name, p in result(opt).items():
            torch.testing.assert_close(result(together)[name], p, rtol=1e-4, atol=1e-5)


@each
def test_a_resume_repeats_it(options: dict[str, Any]) -> None:
    straight = optimizer(list(range(COUNT)), **options)
    for number in range(1, EVERY):
        step(straight, number)
    resumed = optimizer(list(range(COUNT)), **options)
    for p, q in zip(result(resumed).values(), result(straight).values(), strict=True):
        p.copy_(q)
    resumed.load_state_dict(straight.state_dict())
    for number in range(EVERY, 2 * EVERY):
        step(straight, number)
        step(resumed, number)
    for name, p in result(straight).items():
        assert torch.equal(result(resumed)[name], p), name


def test_a_period_of_one_step_is_the_same_with_and_without() -> None:
    pair = [optimizer(list(range(COUNT)), algorithm="shampoo", stats_every=1, roots_every=1, stagger=s) for s in (0, 1)]
    for number in range(1, 4):
        for opt in pair:
            step(opt, number)
    for p, q in zip(*(result(opt).values() for opt in pair), strict=True):
        assert torch.equal(p, q)


class Alike(Ranks):
    """Ranks that all say what this one says."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world


def test_replicas_are_sent_a_basis_when_it_was_updated_and_the_rest_at_every_step() -> None:
    options = Options(algorithm="kl_shampoo", stats_every=EVERY, refresh_warmup=0)
    local = [local_parameter(f"layer{i}", torch.nn.Parameter(torch.randn(72, 80))) for i in range(COUNT)]
    ((wave,),) = build.build([(options, local, {one.name: one.shape for one in local})], Alike(0, 2))
    (stack,), everything = wave.stacks, range(COUNT)
    rows: dict[int, torch.Tensor] = {
        id(buffer): torch.arange(COUNT) for buffers in stack.state.values() for buffer in buffers.values()
    }
    seen: list[int] = []
    for number in range(1, EVERY + 1):
        for member in wave.members:
            member.updates = number
        changes, expected = wave.changed_rows(everything, options), set(updated(options, number, stack.phases))
        assert set(changes) == set(wave.owners) == {0, 1}
        names = {id(buffer): name for name, buffers in stack.state.items() for buffer in buffers.values()}
        changed: dict[str, set[int]] = {}
        for owner, of_owner in changes.items():
            for buffer, index, _ in of_owner:
                found = set(rows[id(buffer)][index].tolist())
                assert {wave.owners[stack.blocks[row]] for row in found} == {owner}
                changed.setdefault(names[id(buffer)], set()).update(found)
        assert changed.pop("left.basis", set()) == changed.pop("right.basis", set()) == expected
        assert changed == {name: set(everything) for name in stack.state if "basis" not in name}
        seen += expected
    assert sorted(seen) == sorted(everything)  # once a period


OTHERS: list[dict[str, Any]] = [
    *(
        {"algorithm": "shampoo", "stats_every": 3, "roots_every": 6, "factor": f}
        for f in ("eigen", "direct", "cholesky")
    ),
    {"algorithm": "soap", "refresh_warmup": 2},
    {"algorithm": "elementwise"},
]


@pytest.mark.parametrize("options", OTHERS, ids=lambda o: f"{o['algorithm']}{o.get('factor', '')}")
def test_nothing_changes_but_what_is_said_to(options: dict[str, Any]) -> None:
    """What is sent to replicas, against what a step has changed, tensor by tensor and block by block."""
    opt = optimizer(list(range(COUNT)), **options)
    step(opt, 1)
    ((wave,),) = [opt.waves()]
    ((tensors),) = [stack.state for stack in wave.stacks]
    for number in range(2, 14):
        before = {name: {n: buffer.clone() for n, buffer in buffers.items()} for name, buffers in tensors.items()}
        step(opt, number)
        said = {id(b): torch.zeros(COUNT, dtype=torch.bool) for buffers in tensors.values() for b in buffers.values()}
        for buffer, index, _ in wave.changed_rows(range(COUNT), Options.of(opt.param_groups[0]))[0]:
            said[id(buffer)][index] = True
        for name, buffers in tensors.items():
            for n, buffer in buffers.items():
                changed = (buffer != before[name][n]).reshape(COUNT, -1).any(-1)
                assert not (changed & ~said[id(buffer)]).any(), (number, name)


def test_bases_are_staggered_and_the_papers_shampoo_is_not() -> None:
    assert Options(**resolve({})).stagger
    assert not Options(**resolve({"algorithm": "shampoo"})).stagger
    assert Options(**resolve({"algorithm": "shampoo", "stagger": True})).stagger


def test_neighbours_are_refreshed_together_as_many_in_each_step() -> None:
    phases = [phase for of_one in phases_of({"a": 3, "b": 0, "c": 37}).values() for phase in of_one]
    rows_of = [updated(Options(refresh_warmup=0), step, phases) for step in range(1, 11)]
    assert sorted(len(rows) for rows in rows_of) == [4] * 10
    assert all(rows == list(range(rows[0], rows[-1] + 1)) for rows in rows_of)
    assert rows_of[9] == [0, 1, 2, 3]


def test_a_group_of_another_algorithm_has_that_one_s_default() -> None:
    p = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(4)]
    groups = [{"params": p[:1]}, {"params": p[1:2], "algorithm": "shampoo"}]
    mixed = hf_shampoo4.Shampoo4bit(groups)
    assert [(g["stagger"], g["factor_beta"]) for g in mixed.param_groups] == [(True, 0.9), (False, 0.95)]
    groups = [{"params": p[2:3]}, {"params": p[3:], "algorithm": "soap"}]
    mixed = hf_shampoo4.Shampoo4bit(groups, algorithm="shampoo", factor_beta=0.8)
    assert [(g["stagger"], g["factor_beta"]) for g in mixed.param_groups] == [(False, 0.8), (True, 0.8)]
