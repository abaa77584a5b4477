"""Flat parameters, the forms of saved state, and the state in a folder of its own; in one process."""

from __future__ import annotations

import copy
import errno
import json
import resource
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import hf_shampoo4 as s4
from hf_shampoo4 import Shampoo4bit
from hf_shampoo4.checkpointing import optimizer_folder
from hf_shampoo4.checkpointing.command import main
from hf_shampoo4.checkpointing.convert import by_position, described, read
from hf_shampoo4.checkpointing.formats import PACKED, join, pack, unflattened, unpack
from hf_shampoo4.checkpointing.optimizer_folder import sealed
from hf_shampoo4.exceptions import CheckpointError
from hf_shampoo4.execution.state_layout import is_partial
from hf_shampoo4.sharding.deepspeed import deepspeed_parameters
from hf_shampoo4.sharding.local_parameter import Range, check_trainable

SHAPES = {"weight": (70, 40), "bias": (9,), "experts": (3, 20, 30)}
OPTIONS = {"algorithm": "shampoo", "stats_every": 2, "roots_every": 2, "block_size": 32, "lr": 1e-2}


def model(flat: bool = False) -> nn.ParameterDict:
    """Random parameters; `flat`: as FSDP1 leaves them to a rank that is alone."""
    generator = torch.Generator().manual_seed(0)
    found = nn.ParameterDict()
    for name, shape in SHAPES.items():
        p = nn.Parameter(torch.randn(shape, generator=generator))
        if flat:
            p = nn.Parameter(p.detach().flatten())
            p._fsdp_flattened = True
            p._hf_shampoo4_range = (shape, Range(0, p.numel()))
        found[name] = p
    return found


def optimizer_of(parameters: nn.ParameterDict, **options: object) -> Shampoo4bit:
    return Shampoo4bit(parameters.named_parameters(), **{**OPTIONS, **options})


def train(parameters: nn.ParameterDict, optimizer: Shampoo4bit, steps: range) -> list[torch.Tensor]:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for name, shape in SHAPES.items():
            p = parameters[name]
            p.grad = torch.randn(shape, generator=generator).view_as(p)
        optimizer.step()
    return [p.detach().flatten().clone() for p in parameters.values()]


def test_a_flat_parameter_is_trained_by_its_shape() -> None:
    whole, flat = model(), model(flat=True)
    expected = train(whole, optimizer_of(whole), range(4))
    assert all(map(torch.equal, train(flat, optimizer_of(flat), range(4)), expected))


def test_the_state_of_flat_parameters_is_packed_and_loads_everywhere() -> None:
    flat = model(flat=True)
    optimizer = optimizer_of(flat)
    train(flat, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"] == {}
    assert isinstance(saved["param_groups"][0][PACKED], bytes)
    start = {name: p.detach().clone() for name, p in flat.items()}
    expected = train(flat, optimizer, range(3, 6))
    for like_fsdp1 in (True, False):
        parameters = model(like_fsdp1)
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(start[name].view_as(p))
        again = optimizer_of(parameters)
        again.load_state_dict(saved)
        assert PACKED not in again.param_groups[0]
        assert all(map(torch.equal, train(parameters, again, range(3, 6)), expected))


def test_packed_and_unpacked() -> None:
    entries = {"b": {"x": torch.arange(3)}, "a": {"y": torch.zeros(2, dtype=torch.uint8)}}
    whole = {"state": entries, "param_groups": [{"params": ["a"], "lr": 1.0}, {"params": ["b"], "lr": 2.0}]}
    again = unpack(pack(whole))
    assert again["param_groups"] == whole["param_groups"]
    assert torch.equal(again["state"]["b"]["x"], torch.arange(3))
    assert again["state"]["a"]["y"].dtype == torch.uint8
    assert unpack(whole) is whole


def test_parts_are_joined_in_order_and_a_missing_block_is_told() -> None:
    first = {
        "4x4/left": torch.tensor([[2.0], [0.0]]),
        "4x4/blocks": torch.tensor([2, 0]),
        "4x2/blocks": torch.tensor([]),
    }
    second = {"4x4/left": torch.tensor([[1.0]]), "4x4/blocks": torch.tensor([1]), "4x2/blocks": torch.tensor([0]),
              "4x2/left": torch.tensor([[7.0]])}  # fmt: skip
    assert is_partial(first)
    whole = join("p", [first, second])
    assert not is_partial(whole)
    assert whole["4x4/left"].flatten().tolist() == [0, 1, 2]
    assert whole["4x2/left"].flatten().tolist() == [7]
    with pytest.raises(CheckpointError, match=r"state of 'p': 4x4/left has blocks \[0, 2\], some are missing"):
        join("p", [first])


def test_what_fsdp1_hides_is_refused_with_what_to_do() -> None:
    p = nn.Parameter(torch.zeros(12))
    p._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"pass hf_shampoo4.param_groups\(model\)"):
        Shampoo4bit([p], algorithm="elementwise")
    p._is_flat_param = True
    with pytest.raises(ValueError, match="use_orig_params=True"):
        check_trainable(p)


def test_what_deepspeed_spreads_in_ways_that_cannot_be_followed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    p, flat = nn.Parameter(torch.zeros(4, 3)), torch.zeros(12)
    p._z3_optimizer = SimpleNamespace(swap_optimizer=True)
    with pytest.raises(ValueError, match=r"offloaded to NVMe.*set .*\"cpu\""):
        deepspeed_parameters(flat, [("p", p)])
    p._z3_optimizer = SimpleNamespace(swap_optimizer=False, fp32_partitioned_groups_flat=[torch.zeros(12)])
    with pytest.raises(ValueError, match="none of DeepSpeed's sub-groups"):
        deepspeed_parameters(flat, [("p", p)])
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 8 if group is None else 2)
    expert = nn.Parameter(torch.zeros(4, 3))
    expert._dp_group = "experts"
    with pytest.raises(ValueError, match=r"over 2 of 8 ranks .*use ZeRO over all ranks, or FSDP2"):
        deepspeed_parameters(flat, [("expert", expert)])


@pytest.fixture
def side(tmp_path: Path) -> Path:
    parameters = model()
    optimizer = optimizer_of(parameters)
    with pytest.raises(RuntimeError, match="known after the first step"):
        s4.save_optimizer(optimizer, tmp_path / "side")
    train(parameters, optimizer, range(3))
    s4.save_optimizer(optimizer, tmp_path / "side")
    with pytest.raises(FileExistsError, match="holds an optimizer already"):
        s4.save_optimizer(optimizer, tmp_path / "side")
    torch.save([p.detach() for p in parameters.values()], tmp_path / "parameters")
    torch.save(train(parameters, optimizer, range(3, 6)), tmp_path / "after")
    return tmp_path / "side"


def test_an_optimizer_that_accelerate_has_wrapped_is_the_one_in_it(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    parameters = model()
    optimizer = optimizer_of(parameters)
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    train(parameters, optimizer, range(3))
    s4.save_optimizer(wrapped, tmp_path / "side")
    assert s4.metrics(wrapped) == s4.metrics(optimizer)
    other = accelerate.Accelerator(cpu=True).prepare(optimizer_of(parameters, lr=0.5))
    s4.load_optimizer(other, tmp_path / "side")
    assert other.param_groups[0]["lr"] == OPTIONS["lr"]


@pytest.mark.parametrize("converted", [False, True])
def test_the_state_in_a_folder_of_its_own(side: Path, converted: bool) -> None:
    parameters = model()
    with torch.no_grad():
        for p, kept in zip(parameters.values(), torch.load(side.parent / "parameters"), strict=True):
            p.copy_(kept)
    optimizer = optimizer_of(parameters, lr=0.5)
    if converted:
        main(["convert", str(side), "--output", str(side.parent / "optimizer.pt")])
        optimizer.load_state_dict(torch.load(side.parent / "optimizer.pt", weights_only=True, mmap=True))
    else:
        s4.load_optimizer(optimizer, side)
        with pytest.raises(RuntimeError, match="make one before it is saved again"):
            optimizer.state_dict()
    assert optimizer.param_groups[0]["lr"] == OPTIONS["lr"]
    assert optimizer.param_groups[0]["step"] == 3
    after = train(parameters, optimizer, range(3, 6))
    assert all(map(torch.equal, after, torch.load(side.parent / "after")))


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("converted", [False, True])
def test_what_was_frozen_there_or_is_frozen_here(there: bool, converted: bool, tmp_path: Path) -> None:
    """Frozen there, it begins afresh here; frozen here, its state is kept and saved again."""

    def step(parameters: nn.ParameterDict, optimizer: Shampoo4bit, frozen: bool) -> None:
        parameters["experts"].requires_grad_(not frozen)
        for name, p in parameters.items():
            p.grad = None if frozen and name == "experts" else torch.ones_like(p)
        optimizer.step()

    parameters = model()
    parameters["experts"].requires_grad_(not there)
    optimizer = optimizer_of(parameters)
    step(parameters, optimizer, frozen=there)
    s4.save_optimizer(optimizer, tmp_path / "side")
    again = model()
    again["experts"].requires_grad_(there)
    other = optimizer_of(again)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if converted:
            main(["convert", str(tmp_path / "side"), "--output", str(tmp_path / "optimizer.pt")])
            other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        else:
            s4.load_optimizer(other, tmp_path / "side")
    afresh = [str(w.message).partition(", as")[0] for w in said if "start afresh" in str(w.message)]
    told = "1 of the parameters that are trained ('experts') start afresh: the checkpoint has no state of them"
    assert afresh == [told] * there
    step(again, other, frozen=not there)
    step(again, other, frozen=False)
    entries = {name: other.state[p] for name, p in again.items()}
    steps = {name: int(e[key].max()) for name, e in entries.items() for key in e if "steps" in key}
    assert steps == {"weight": 3, "bias": 3, "experts": 2}
    s4.save_optimizer(other, tmp_path / "again")
    assert set(read(tmp_path / "again")["state"]) == set(SHAPES)


def test_a_folder_that_does_not_fit_is_refused(side: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="written with bits=4, this run has bits=8"):
        s4.load_optimizer(optimizer_of(model(), bits=8), side)
    with pytest.raises(FileNotFoundError, match=r"has no groups.json: .* or half of one"):
        s4.load_optimizer(optimizer_of(model()), side.parent)
    monkeypatch.setitem(SHAPES, "weight", (70, 41))
    with pytest.raises(
        CheckpointError, match=r"of another model: parameter 'weight' is \[70, 40\] there and \[70, 41\]"
    ):
        s4.load_optimizer(optimizer_of(model()), side)


def test_a_block_that_is_missing_is_told_at_the_next_step(side: Path) -> None:
    content = json.loads((side / "groups.json").read_text())
    content["groups"][0]["parameters"]["weight"] = [102, 40]  # as if the file were of a run with three more blocks
    (side / "groups.json").write_text(json.dumps(sealed(content["groups"], content["checksums"], content["metadata"])))
    SHAPES["weight"] = (102, 40)
    try:
        parameters = model()
        optimizer = optimizer_of(parameters)
        s4.load_optimizer(optimizer, side)
        with pytest.raises(CheckpointError, match=r"lacks \d+ blocks' tensors"):
            train(parameters, optimizer, range(3, 4))
    finally:
        SHAPES["weight"] = (70, 40)
    next(side.glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="cannot be read: FileNotFoundError"):
        read(side)


def flip(file: Path, at: float) -> None:
    """Turn one bit of a file; `at` is in [0, 1)."""
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["*.distcp", ".metadata", "groups.json"])
def test_one_turned_bit_is_found_wherever_the_folder_is_read(side: Path, kind: str) -> None:
    (file,) = side.glob(kind)
    whole, start = file.read_bytes(), 0
    if kind == "*.distcp":  # not the zip archives' own words around the tensors, which nothing depends on
        start = whole.index(
            next(row.numpy().tobytes() for row in stepped().named_blocks().values() if row.nbytes > 1000)
        )
    for at in range(3):
        flip(file, (start + at * 300) / len(whole))
        with pytest.raises(CheckpointError, match=f"{file.name}|cannot be read"):
            main(["inspect", str(side)])
        with pytest.raises(CheckpointError, match=f"{file.name}|cannot be read"):
            load_and_step(side)
        file.write_bytes(whole)
    load_and_step(side)


def test_convert_never_asks_for_the_only_state_to_be_deleted(side: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", str(side)])
    for _ in range(2):  # beside the folder's own state: another file's name is what helps
        with pytest.raises(FileExistsError, match=r"optimizer.pt exists and is kept: choose another --output"):
            main(["convert", str(side)])
    capsys.readouterr()
    alone = side.parent / "alone"
    alone.mkdir()
    (side / "optimizer.pt").rename(alone / "optimizer.pt")
    before = (alone / "optimizer.pt").read_bytes()
    main(["convert", str(alone)])
    main(["convert", str(alone), "--output", str(alone / "optimizer.pt")])
    assert "is the whole state already (read and checked): there is nothing to convert" in capsys.readouterr().out
    assert (alone / "optimizer.pt").read_bytes() == before


def test_a_folder_without_an_optimizer_is_told_from_its_checkpoints_and_from_a_file(tmp_path: Path) -> None:
    for name, said in (("nowhere", "does not exist"), ("a.pt", "is a file: give the folder"), ("run", "checkpoint-5")):
        (tmp_path / "run" / "checkpoint-5").mkdir(parents=True, exist_ok=True)
        (tmp_path / "a.pt").touch()
        with pytest.raises(FileNotFoundError, match=said):
            main(["inspect", str(tmp_path / name)])


def test_one_turned_bit_is_found_in_what_convert_has_written(side: Path) -> None:
    main(["convert", str(side)])
    file = side / "optimizer.pt"
    (side / "groups.json").unlink()
    whole = torch.load(file, weights_only=True)
    optimizer = optimizer_of(model())
    optimizer.load_state_dict(whole)
    for damage, message in (
        (lambda d: d["state"][0]["23x20/failures.dense"][2:3].bitwise_xor_(8),
         "the state of parameter 0 is not"),
        (lambda d: d["param_groups"][0].update(lr=0.02), "the groups' options is not"),
        (lambda d: d["state"].pop(1), "the state of parameter 1 is not"),
        (lambda d: d.update(state=3), "damaged checkpoint: AttributeError"),
    ):  # fmt: skip
        damaged = torch.load(file, weights_only=True)
        damage(damaged)
        with pytest.raises(CheckpointError, match=message):
            optimizer.load_state_dict(damaged)
    flip(file, file.read_bytes().index(next(iter(whole["state"][2].values())).numpy().tobytes()) / file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"optimizer.pt is not what was written, by the checksum of '.optimizer"):
        main(["inspect", str(side)])  # torch's own checksums, which any file of torch.save has


def stepped() -> s4.Shampoo4bit:
    """What `side` has saved."""
    parameters = model()
    optimizer = optimizer_of(parameters)
    train(parameters, optimizer, range(3))
    return optimizer


def load_and_step(side: Path) -> None:
    parameters = model()
    optimizer = optimizer_of(parameters)
    s4.load_optimizer(optimizer, side)
    train(parameters, optimizer, range(3, 4))


def test_a_step_whose_state_cannot_be_read_is_not_made_and_can_be_tried_again(side: Path) -> None:
    (file,) = side.glob("*.distcp")
    whole = file.read_bytes()
    parameters = model()
    with torch.no_grad():
        for p, kept in zip(parameters.values(), torch.load(side.parent / "parameters"), strict=True):
            p.copy_(kept)
    optimizer = optimizer_of(parameters)
    s4.load_optimizer(optimizer, side)
    file.unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="cannot be read"):
            train(parameters, optimizer, range(3, 4))
    file.write_bytes(whole)
    after = train(parameters, optimizer, range(3, 6))
    assert all(map(torch.equal, after, torch.load(side.parent / "after")))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_group_that_comes_later_begins_afresh(side: Path, steps: int) -> None:
    parameters = model()
    optimizer = optimizer_of(parameters)
    s4.load_optimizer(optimizer, side)
    train(parameters, optimizer, range(3, 3 + steps))
    shutil.rmtree(side)
    new = nn.Parameter(torch.ones(8, 8))
    optimizer.add_param_group({"params": [("new", new)]})
    new.grad = torch.ones(8, 8)
    train(parameters, optimizer, range(3 + steps, 5 + steps))
    assert int(optimizer.state[new]["8x8/steps.dense"]) == 2


def test_a_disk_that_is_full_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    optimizer = stepped()
    with monkeypatch.context() as patched:
        patched.setattr(optimizer_folder, "write_json", full)
        with pytest.raises(CheckpointError, match=r"folder was not completed: OSError: \[Errno 28\] No space"):
            s4.save_optimizer(optimizer, tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="no optimizer saved by save_optimizer, or half of one"):
        s4.load_optimizer(optimizer, tmp_path / "folder")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the largest file that this process may write
    try:
        with pytest.raises(CheckpointError, match=r"folder was not completed: OSError: .*File too large"):
            s4.save_optimizer(optimizer, tmp_path / "folder")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    s4.save_optimizer(optimizer, tmp_path / "folder")  # the same folder, once there is room
    load_and_step(tmp_path / "folder")


def test_inspect_a_side_folder(side: Path) -> None:
    lines = "\n".join(described(read(side)))
    assert "3 parameters, step 3" in lines
    assert set(by_position(read(side))["state"]) == {0, 1, 2}


def test_what_every_rank_saved_whole_is_joined_as_it_is() -> None:
    """As DeepSpeed's files are where a converted checkpoint was loaded and saved again before a step."""
    whole = {"64x64/steps.dense": torch.arange(3)}
    assert join("w", [whole, dict(whole)]) == whole


@pytest.mark.parametrize("named", [True, False])
def test_a_flattened_state_dict_of_torch_s_is_read(named: bool) -> None:
    model = nn.ModuleDict({"a": nn.Linear(40, 70), "b": nn.Linear(70, 20)})
    groups = [list(model.a.named_parameters("a")), list(model.b.named_parameters("b"))]
    params = [{"params": group if named else [p for _, p in group], "block_size": 32 + 32 * i}
              for i, group in enumerate(groups)]  # fmt: skip
    optimizer = Shampoo4bit(params, **{**OPTIONS, "block_size": 32})
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    found, expected = by_position(unflattened(dict(flat))), optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    for key, entry in expected["state"].items():
        assert found["state"][key].keys() == entry.keys()
        assert all(torch.equal(found["state"][key][name], t) for name, t in entry.items())
    assert unflattened(expected) is expected
