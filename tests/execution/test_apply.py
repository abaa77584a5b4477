"""Who updates the blocks of parameters that every rank has whole: what each computes and sends, and what auto takes."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import hf_shampoo4 as s4
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.execution import apply, build
from hf_shampoo4.execution.apply import Machine, all_is_shorter
from hf_shampoo4.execution.equal_replicas import EqualReplicas
from hf_shampoo4.execution.waves import Part, Wave
from hf_shampoo4.options import Options
from hf_shampoo4.planning.launches import LaunchCounter
from hf_shampoo4.planning.shardings import planned_groups, sharding_of
from hf_shampoo4.preconditioners.schedule import due
from hf_shampoo4.sharding.local_parameter import local_parameter
from hf_shampoo4.utils.ceilings import Ceilings, ceilings_of, ceilings_of_device
from tests.support.many_ranks import Alone
from tests.support.many_ranks import late_steps as late_steps_of

LATE = 1000  # updates, from which on bases are updated once in ten steps
PERIOD = 10
H100 = "NVIDIA H100 80GB HBM3"


def model(device: str = "cpu", layers: int = 3, width: int = 96) -> nn.Module:
    with torch.device(device):
        found = nn.Module()
        found.embed_tokens = nn.Embedding(8 * width, width)
        found.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        found.up = nn.Linear(width, 3 * width, bias=False)
    return found


def waves_of(m: nn.Module, rank: int, world: int, **options: Any) -> list[tuple[Options, Wave]]:
    groups = []
    for group in s4.param_groups(m):
        own = {key: value for key, value in group.items() if key in s4.options.NAMES}
        chosen = Options(**{**options, **own}).carried_out()
        named = group["params"]
        local = [local_parameter(name, p) for name, p in named]
        groups.append((chosen, local, {name: tuple(p.shape) for name, p in named}))
    built = build.build(groups, Alone(rank, world))
    return [(chosen, wave) for (chosen, *_), waves in zip(groups, built, strict=True) for wave in waves]


def late_steps(options: Options, wave: Wave) -> list[tuple[int, list[Part]]]:
    """Number of updates and parts of each step of a period."""
    found = []
    for updates in range(LATE, LATE + PERIOD):
        for member in wave.members:
            member.updates = updates
        found.append((updates, wave.parts_of_step(range(len(wave.members)), options)))
    return found


@pytest.mark.parametrize("options", [{}, {"algorithm": "shampoo", "stagger": True}, {"stagger": False}], ids=str)
def test_a_block_is_its_owners_when_it_is_refreshed_and_every_ranks_else(options: dict[str, Any]) -> None:
    for chosen, wave in waves_of(model(), 1, 2, block_size=48, apply="all", **options):
        assert wave.all_apply
        for updates, parts in late_steps(chosen, wave):
            blocks = [block for part in parts for block in part.blocks]
            assert sorted(blocks) == list(range(len(wave.owners)))
            shared = {block for part in parts if part.ranks.world == 2 for block in part.blocks}
            refreshed = {
                stack.blocks[i]
                for stack in wave.stacks
                for rows in due(stack.algorithm, chosen, [updates] * len(stack.blocks), stack.phases).values()
                for some in rows.values()
                for i in some
            }
            if chosen.algorithm == "shampoo":  # norms go over whole parameters
                members = {wave.member_of[block] for block in refreshed}
                refreshed = {block for block, m in enumerate(wave.member_of) if m in members}
            assert shared == refreshed


def sent_in_a_period(options: Options, wave: Wave) -> int:
    total = 0
    for updates, parts in late_steps(options, wave):
        for member in wave.members:
            member.updates = updates
        for part in [part for part in parts if part.ranks.world > 1]:
            pieces = [p for rank, ps in part.route.send.out.items() if rank != part.ranks.rank for p in ps]
            total += 4 * sum(p.numel for p in pieces)
            rows = wave.changed_rows(part.blocks, options).get(part.ranks.rank, [])
            total += (part.ranks.world - 1) * sum(found.form.nbytes for found in rows)
    return total


@pytest.mark.parametrize("options", [{}, {"algorithm": "shampoo", "stagger": True}, {"algorithm": "soap"}], ids=str)
def test_what_travels_in_a_late_step_is_what_plan_says(options: dict[str, Any]) -> None:
    world = 3
    made = s4.plan(model(), world, block_size=48, apply="all", **options)
    sent = [
        sum(sent_in_a_period(*found) for found in waves_of(model(), rank, world, block_size=48, apply="all", **options))
        for rank in range(world)
    ]
    assert made.apply == "all"
    assert made.wire_all.largest == pytest.approx(max(sent) / PERIOD, abs=5)
    assert made.wire_all.total == pytest.approx(sum(sent) / PERIOD, abs=15)
    assert made.wire_all.largest < made.wire_step.largest / 3


def takes_all(width: int, layers: int, world: int, ceilings: Ceilings) -> bool:
    layout = sharding_of("ddp", world, None)
    groups = [group.shared_out for group in planned_groups(model("meta", layers, width), {}, layout)]
    return all_is_shorter(groups, world, ceilings)


def test_auto_takes_all_for_small_models_on_slow_links_and_owners_else() -> None:
    h100, over_pcie = ceilings_of("h100"), dataclasses.replace(ceilings_of("4090"), link=30e9)
    ethernet = dataclasses.replace(h100, network=1.25e9)
    assert not takes_all(768, 12, 8, h100)
    assert takes_all(768, 12, 64, ethernet)
    assert takes_all(512, 24, 8, over_pcie)
    assert not takes_all(4096, 24, 8, over_pcie)  # products into the bases outweigh what travels
    assert not takes_all(256, 2, 8, over_pcie)  # so small that launches are all there is


def test_the_closed_form_is_what_a_rank_launches_more() -> None:
    pytest.importorskip("triton")
    m, world = nn.Sequential(*model("meta", 24, 256).layers), 4
    owners, everybody = (late_steps_of(m, world, True, apply=name).summary(PERIOD) for name in ("owners", "all"))
    said = s4.plan(m, world).all_against_owners
    assert said is not None
    assert everybody["bytes"] - owners["bytes"] == pytest.approx(
        said.bytes + said.rotated, rel=0.45
    )  # 67 an entry; 53 of llama_60m's
    multiplied = sum(everybody["products"].values()) - sum(owners["products"].values())
    assert multiplied == pytest.approx(sum(said.products.values()), rel=0.15)
    assert abs(everybody["launches"] - owners["launches"] - said.launches) < 200


def test_comparing_all_bits_takes_a_hundredth_of_a_step_and_nobody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "_refuse_sharing", lambda _: None)  # meta tensors have no addresses
    m = nn.Sequential(*model("meta", 24, 256).layers)
    waves = [wave for _, wave in waves_of(m, 0, 4, apply="all")]
    with LaunchCounter() as counter:
        EqualReplicas().digest(waves)  # on a device whose numbers cannot be asked for
    cost = counter.found.summary(1)
    assert cost["launches"] < 60
    assert cost["bytes"] / sum(p.numel() for p in m.parameters()) < 11  # a late step moves 70
    assert EqualReplicas().digest([wave for _, wave in waves_of(m, 0, 4, apply="owners")]) is None


def test_bits_are_compared_after_the_first_steps_ever_more_rarely_and_after_a_failure() -> None:
    checks, found = EqualReplicas(), list[int]()
    waves = [wave for _, wave in waves_of(nn.Sequential(nn.Linear(4, 4)), 0, 2, apply="all")]
    for step in range(300):
        if checks.digest(waves) is not None:
            found.append(step)
        with checks.step():
            pass
    assert found == [0, 1, 2, 4, 8, 16, 32, 64, 97, 128, 194, 256, 291]
    with contextlib.suppress(MemoryError), checks.step():
        raise MemoryError
    assert checks.digest(waves) is not None


def test_what_comes_of_many_ranks_takes_as_many_launches_as_of_few() -> None:
    m = nn.Sequential(*model("meta", 24, 96).layers)
    few, many = (late_steps_of(m, world, False, 3, apply="owners").totals()["apply"] for world in (2, 12))
    assert many["launches"] <= few["launches"]


def test_a_run_goes_by_the_table_and_takes_owners_where_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs are told by name and by how many of the ranks are on one host; the CPU is none."""
    m = model("meta", 48, 768)
    assert ceilings_of_device(H100) == ceilings_of("h100")
    for devices, gpus, world, expected in (
        ((H100,), 8, 8, False), ((H100,), 1, 64, True), ((H100,), 8, 64, True), (("some GPU",), 1, 64, False),
        ((), 1, 64, False),
    ):  # fmt: skip
        groups = [group.shared_out for group in planned_groups(m, {}, sharding_of("ddp", world, None))]
        ranks = [Machine(devices, f"host {rank // gpus}") for rank in range(world)]
        assert set(apply.all_apply(groups, ranks)) == {expected}
        newer = ranks[0]._replace(versions="torch 3")
        assert not any(apply.all_apply(groups, [newer, *ranks[1:]]))
    monkeypatch.setattr(build, "this_machine", lambda _: Machine((H100,), "here"))
    monkeypatch.setattr(build, "_refuse_sharing", lambda _: None)  # meta tensors have no addresses
    monkeypatch.setattr(apply, "all_is_shorter", lambda *_: True)
    assert all(wave.all_apply for _, wave in waves_of(m, 0, 64))
    assert not any(wave.all_apply for _, wave in waves_of(m, 0, 64, shard_state=True))
    assert not any(wave.all_apply for _, wave in waves_of(m, 0, 64, apply="owners"))
    assert not any(wave.all_apply for _, wave in waves_of(m, 0, 1, apply="all"))


def test_all_is_refused_where_owners_alone_have_the_state_and_on_unlike_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(OptionError, match="option apply='all' is not allowed: it must be auto or owners with shard"):
        Options(apply="all", shard_state=True)
    with pytest.raises(OptionError, match="option apply='each' is not allowed: it must be one of auto, owners, all"):
        s4.Shampoo4bit([nn.Parameter(torch.zeros(2, 2))], apply="each")
    layout = sharding_of("fsdp2", 2, None)
    cut = [group.shared_out for group in planned_groups(model(), {"apply": "all"}, layout)]
    with pytest.raises(OptionError, match="auto or owners where ranks have a part of the parameters"):
        apply.all_apply(cut, [Machine((), "")] * 2)
    with pytest.raises(OptionError, match="auto or owners where ranks have a part of the parameters"):
        s4.plan(model(), 2, "fsdp2", apply="all")
    assert not any(
        apply.all_apply([(dataclasses.replace(o, apply="auto"), found) for o, found in cut], [Machine((), "")] * 2)
    )
    whole = [group.shared_out for group in planned_groups(model(), {"apply": "all"}, sharding_of("ddp", 2, None))]
    with pytest.raises(
        OptionError, match=r"auto or owners on unlike GPUs or CPUs, which round differently.*NVIDIA A100"
    ):
        apply.all_apply(whole, [Machine((H100,), ""), Machine(("NVIDIA A100-SXM4-80GB",), "")])
    here = apply.this_machine([torch.device("cpu")])
    monkeypatch.setattr(apply, "multiplies_bfloat16", lambda: "bfloat16" not in here.devices[0])
    with pytest.raises(OptionError, match=r"on unlike GPUs or CPUs, which round differently.*with bfloat16 products"):
        apply.all_apply(whole, [here, apply.this_machine([torch.device("cpu")])])


def test_ranks_must_have_the_same_versions_where_their_bits_must_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    here = apply.this_machine([torch.device("cpu")])
    assert here.versions == f"hf_shampoo4 {s4.__version__}, torch {torch.__version__}"
    monkeypatch.setattr(torch, "__version__", "2.99")
    there = apply.this_machine([torch.device("cpu")])
    assert there.host == here.host
    whole = [group.shared_out for group in planned_groups(model(), {"apply": "all"}, sharding_of("ddp", 2, None))]
    with pytest.raises(OptionError, match=r"on unlike versions.*: ranks \[0\];.*2\.99: ranks \[1\]"):
        apply.all_apply(whole, [here, there])
    assert all(apply.all_apply(whole, [here, here]))
    triton = [machine._replace(kernels="Triton 3.9.0") for machine in (here, there)]
    with pytest.warns(UserWarning, match=r"ranks build different kernels \(Triton 3.*torch 2\.99: ranks \[1\]"):
        assert not apply.agree_on_kernels(triton)
    assert apply.agree_on_kernels([here, here])
