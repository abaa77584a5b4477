"""Whatever a user or a file says, the answer is right, or one clear error: `python -m tests.stress.fuzz --cases 10000`.

Each property takes what hypothesis makes up and either gets a result that it checks, or one of the errors that are
meant for people.  Anything else (an AttributeError deep inside, a hang, a wrong result) is a failure.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]

from hf_shampoo4 import Shampoo4bit  # noqa: E402
from hf_shampoo4.checkpointing.completeness import incomplete, last_complete  # noqa: E402
from hf_shampoo4.checkpointing.convert import described, read  # noqa: E402
from hf_shampoo4.exceptions import CheckpointError, OptionError  # noqa: E402
from hf_shampoo4.options import NAMES, PRESETS, Options, parse_optim_args, resolve, users_of, what_uses  # noqa: E402

# ------------------------------------------------------------------------------------------------------ what is odd

words = st.sampled_from([
    "", " ", "0", "1", "-1", "4", "64", "true", "false", "None", "nan", "inf", "-inf", "1e400", "0.5", "1e-6", "ü",
    "9" * 400, "shampoo", "soap", "kl_soap", "elementwise", "eigen", "cholesky_ef", "4bit", "4bit_zipsr", "fp32", "=",
    "none", "block", "64;32", ";", "1;-1", "paper_eigen", "~", "~nobody/x", "/", "/dev/zero", "/dev/stdin", ".", "..",
    "a\x00b", "a=b", "{}", "[1]", "!!python/object:os.system", "sgdm", "newton",
])  # fmt: skip
odd = st.one_of(
    words, st.text(max_size=8), st.integers(), st.floats(), st.booleans(), st.none(), st.binary(max_size=4),
    st.lists(st.integers(-3, 100), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([10**400, -(10**400), object(), Path("/"), torch.ones(2), torch.ones(()), float, 1j]),
)  # fmt: skip
names = st.one_of(
    st.sampled_from([*NAMES, "preset", "config"]), st.text(max_size=8), st.sampled_from(["lr", "block_sise"])
)
some_options = st.dictionaries(names, odd, max_size=3)


def sensible(name: str) -> st.SearchStrategy[Any]:
    """Mostly allowed values of an option."""
    hints = {
        "algorithm": ["shampoo", "soap", "kl_shampoo", "kl_soap", "elementwise"], "bits": [4, 8, 32],
        "factor": ["eigen", "direct", "cholesky", "cholesky_ef"], "base": ["adamw", "sgdm"],
        "moments": ["fp32", "bf16", "4bit", "4bit_factored", "4bit_eden", "4bit_zipsr"],
        "block_size": [1, 2, 7, 64, 1024], "quant_block": [0, 3, 16, 64], "stats_every": [1, 2], "roots_every": [1, 3],
        "graft": ["norm", "block", "none"], "root": ["eigh", "newton", "newton_db"], "stagger": [True, False],
        "matrix_view": ["auto", "flatten", "batch"], "refresh_warmup": [0, 2], "stochastic_rounding": [True],
        "diagnose_every": [1], "codebook": ["linear2", "dynamic", "nf4", "lloyd16"], "preset": list(PRESETS),
    }  # fmt: skip
    return st.sampled_from(hints[name])


usable = st.sampled_from(
    ["algorithm", "bits", "factor", "base", "moments", "block_size", "quant_block", "stats_every", "roots_every",
     "graft", "root", "stagger", "matrix_view", "refresh_warmup", "stochastic_rounding", "diagnose_every", "codebook",
     "preset"]
)  # fmt: skip
mixed_options = st.lists(usable, max_size=5, unique=True).flatmap(
    lambda chosen: st.fixed_dictionaries({name: sensible(name) for name in chosen})
)


def without_effect(options: dict[str, Any]) -> list[str]:
    """The options that have no effect with the others."""
    chosen = {**PRESETS.get(options.get("preset"), {}), **options}
    return [name for name in options if what_uses(name, chosen)]


def legal(options: dict[str, Any]) -> dict[str, Any]:
    """With Shampoo for what only that uses, unless another algorithm is there; without what is still not used."""
    if "algorithm" not in options and any("kl_shampoo" not in users_of(name) for name in options):
        options = {**options, "algorithm": "shampoo"}
    idle = without_effect(options)
    return {name: value for name, value in options.items() if name not in idle}


good_options = st.one_of(mixed_options.map(legal), mixed_options.map(legal), mixed_options.map(legal), mixed_options)
sides = st.sampled_from([0, 1, 2, 3, 5, 7, 13, 16, 17, 31, 64, 67])
shapes = st.lists(sides, max_size=5).map(tuple).filter(lambda shape: math.prod(shape) <= 20_000)
real = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.one_of(
    st.sampled_from(real), st.sampled_from(real),
    st.sampled_from([torch.complex64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]),
)  # fmt: skip

PEOPLES = (OptionError, CheckpointError, TypeError, ValueError)  # the two first are ValueErrors of ours


def says_something(error: Exception, *about: object) -> None:
    assert str(error).strip(), repr(error)
    assert len(str(error)) < 10_000, "an error that nobody reads"


# ------------------------------------------------------------------------------------------------------- properties


@given(st.lists(st.tuples(names, words), max_size=4), st.sampled_from([",", ", ", ",,", " "]))
def optim_args(items: list[tuple[str, str]], separator: str) -> None:
    """`--optim_args`: options that can be written down and read again, or an OptionError."""
    text = separator.join(f"{name}={value}" for name, value in items)
    try:
        found = parse_optim_args(text)
    except OptionError as error:
        says_something(error)
        return
    Options(**found)
    again = ",".join(f"{k}={';'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in found.items())
    assert parse_optim_args(again) == found


@given(some_options)
def python_options(given_options: dict[str, Any]) -> None:
    """Options in Python, of any type."""
    try:
        found = resolve(given_options)
    except OptionError as error:
        says_something(error)
        return
    assert found.keys() >= {name for name in given_options if name not in ("preset", "config")}
    Options(**found)


@given(mixed_options)
def unused_options(given_options: dict[str, Any]) -> None:
    """What has no effect is an OptionError; what is resolved stays as it is when it is resolved again."""
    try:
        found = resolve(given_options)
    except OptionError as error:
        says_something(error)
        return
    assert not without_effect(given_options)
    assert resolve(found) == found


yamls = st.one_of(
    st.dictionaries(names, odd, max_size=3).map(lambda d: "\n".join(f"{k}: {v}" for k, v in d.items())),
    st.text(max_size=30),
    st.binary(max_size=30),
    st.sampled_from([
        "!!python/object/apply:os.system ['touch /tmp/hf_shampoo4-owned']", "!!python/name:os.system ''", "[" * 3000,
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nbits: *c", "- 1", "1", "~", "bits: 4\nbits: 8", "? [1]\n: 2",
        "config: other.yaml", "preset: [1]", "block_size: 2001-01-01", "{1: 2}", "row_splits: [1, [2]]",
    ]),
)  # fmt: skip


@given(yamls)
def yaml_files(content: str | bytes) -> None:
    """`config=FILE`, and a configuration of `hf-shampoo4 train`."""
    from hf_shampoo4.training.config import read_config

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "options.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        for reading in (lambda: resolve({}, config=str(file)), lambda: read_config(file)):
            try:
                assert isinstance(reading(), dict)
            except OptionError as error:
                says_something(error)
    assert not os.path.exists("/tmp/hf_shampoo4-owned")


settings_of_a_run = st.dictionaries(
    st.one_of(st.sampled_from(["model", "dtype", "dataset", "seq_len", "vocab_size", "validation_fraction", "optim",
                               "optim_args", "max_steps", "learning_rate", "total_batch_size", "adam_beta1", "seed",
                               "resume_from_checkpoint", "model_overrides", "save_strategy", "streaming", "optm"]),
              st.text(max_size=5)),
    st.one_of(words, st.integers(-5, 5000), st.floats(-1, 1), st.booleans(), st.none(),
              st.sampled_from(["shampoo4bit", "soap4bit", "block_size=4", "bits=3", "float32", "llama_tiny"])),
    max_size=3,
)  # fmt: skip


@given(settings_of_a_run)
def run_configurations(chosen: dict[str, Any]) -> None:
    """Settings of a training: a checked configuration, or a ConfigError or OptionError."""
    from hf_shampoo4.training.pretrain import RunConfig, parse

    try:
        assert isinstance(parse({"output_dir": "/tmp/hf_shampoo4-nowhere", "report_to": "none", **chosen}), RunConfig)
    except OptionError as error:
        says_something(error)


@given(st.lists(st.tuples(shapes, dtypes), max_size=4), good_options, st.data())
def parameters(given_parameters: list[tuple[tuple[int, ...], torch.dtype]], options: dict[str, Any], data: Any) -> None:
    """Any shapes, types and groups: refused when the optimizer is made, or trained to finite numbers."""
    ps = []
    for shape, dtype in given_parameters:
        value = torch.ones(shape).to(dtype)
        ps.append(nn.Parameter(value, requires_grad=value.is_floating_point() or value.is_complex()))
    forms = {
        "plain": ps, "named": [(f"p{i}", p) for i, p in enumerate(ps)], "one": [{"params": ps}],
        "two": [{"params": ps[:1]}, {"params": ps[1:], **options}], "each": [{"params": p} for p in ps],
        "twice": [*ps, *ps[:1]], "spelt": [{"params": ps, "block_sise": 3}], "no params": [{"lr": 1.0}],
        "strings": ["a"], "a tensor": torch.ones(3), "none": [None], "empty": [],
    }  # fmt: skip
    form = data.draw(st.sampled_from([*(["plain", "named", "one", "two"] * 4), *forms]))
    try:
        optimizer = Shampoo4bit(forms[form], lr=0.01, **options)
    except (*PEOPLES, KeyError) as error:  # torch says KeyError of a group without params
        says_something(error)
        return
    live = [p for group in optimizer.param_groups for p in group["params"]]
    steps = 0
    for t in range(3):
        for i, p in enumerate(live):
            generator = torch.Generator().manual_seed(10 * t + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if p.requires_grad and (i + t) % 3 else None
        optimizer.step()
        steps += any(p.grad is not None for p in live)
    assert all(torch.isfinite(p.float()).all() for p in live)
    assert all(torch.isfinite(t.float()).all() for entry in optimizer.state.values() for t in entry.values())
    assert optimizer.param_groups[0]["step"] == steps
    twin = Shampoo4bit(
        optimizer.param_groups and [{**g, "params": g["params"]} for g in _bare(optimizer)], lr=0.01, **options
    )
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state.keys() == twin.state.keys()


def _bare(optimizer: Shampoo4bit) -> list[dict[str, Any]]:
    keys = ("params", "param_names", *NAMES)
    return [
        {key: group[key] for key in keys if key in group and key != "param_names"} for group in optimizer.param_groups
    ]


def _optimizer(**options: Any) -> Shampoo4bit:
    generator = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 70), (9,), (5, 6))]
    chosen = {"stats_every": 1, **options}
    return Shampoo4bit([("a", ps[0]), ("b", ps[1]), ("c", ps[2])], lr=0.01, **chosen)


def _trained(**options: Any) -> Shampoo4bit:
    optimizer = _optimizer(**options)
    for _ in range(2):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


def _saved(name: str) -> dict[str, Any]:
    if name not in _SAVED:
        made = _trained(**{"shampoo": {}, "soap": {"algorithm": "soap"}}[name])
        _SAVED[name] = made.state_dict()
    return copy.deepcopy(_SAVED[name])


_SAVED: dict[str, dict[str, Any]] = {}


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in nested dicts and lists."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] * bool(path) + [place for key, child in children for place in _places(child, (*path, key))]


def _damage(state_dict: dict[str, Any], data: Any) -> None:
    """Delete, replace, retype or cut off something somewhere."""
    *path, last = data.draw(st.sampled_from(_places(state_dict)))
    parent: Any = state_dict
    for key in path:
        parent = parent[key]
    value = parent[last]
    how = data.draw(st.sampled_from(["delete", "replace", "add", "change"]))
    if how == "delete":
        del parent[last]
    elif how == "replace":
        parent[last] = data.draw(odd)
    elif how == "add" and isinstance(value, dict):
        value[data.draw(st.sampled_from(["x", 0, 7, None, "64x70/left.more"]))] = data.draw(odd)
    elif isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
        changes = [value.float(), value.double(), value[:-1] if value.dim() else value[None], value[None],
                   value.to_sparse() if value.dim() else value, torch.empty_like(value, device="meta")]  # fmt: skip
        parent[last] = data.draw(st.sampled_from(changes))
    elif isinstance(value, (list, tuple)):
        parent[last] = type(value)(list(value)[:-1])
    else:
        parent[last] = [value]


@given(st.sampled_from(["shampoo", "soap"]), st.integers(1, 2), st.booleans(), st.data())
def checkpoints(name: str, times: int, by_name: bool, data: Any) -> None:
    """A damaged state dict, or another run's: refused and nothing changed, or loaded and trained on."""
    state_dict = _saved(name)
    if by_name:
        from hf_shampoo4.sharding.local_parameter import clean_name

        keys = {i: clean_name(n) for i, n in enumerate("abc")}
        state_dict["state"] = {keys[k]: v for k, v in state_dict["state"].items()}
        state_dict["param_groups"][0]["params"] = list(keys.values())
    for _ in range(times):
        if _places(state_dict):
            _damage(state_dict, data)
    optimizer = _optimizer() if data.draw(st.booleans()) else _trained()
    before = copy.deepcopy(optimizer.state_dict())
    try:
        optimizer.load_state_dict(state_dict)
    except CheckpointError as error:
        says_something(error)
        assert _equal(before, optimizer.state_dict())
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.isfinite(p).all() for group in optimizer.param_groups for p in group["params"])


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


@given(st.sampled_from(["optimizer.pt", "optimizer.bin"]), st.data())
def checkpoint_files(file: str, data: Any) -> None:
    """`hf-shampoo4 checkpoint inspect` of a file that is cut off, overwritten, or somebody else's."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / file
        state_dict = _saved("shampoo")
        if data.draw(st.booleans()):
            _damage(state_dict, data)
        try:
            torch.save(state_dict, path)
        except Exception:  # what cannot be saved is nobody's checkpoint
            return
        content = path.read_bytes()
        cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
        path.write_bytes(content[:cut] + data.draw(st.binary(max_size=4)))
        try:
            lines = "\n".join(described(read(Path(name))))
            assert "group" in lines
        except (OptionError, CheckpointError) as error:
            says_something(error)


STATE = {"global_step": 4, "stateful_callbacks": {"Shampoo4bitCallback": {"attributes": {"world_size": 2,
         "local_world_size": 2}}}, "log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]}  # fmt: skip


@given(st.data())
def checkpoint_folders(data: Any) -> None:
    """Which checkpoint is whole, and what a run has logged, of folders with anything in them."""
    from hf_shampoo4.exceptions import ConfigError
    from hf_shampoo4.training.run_page import page, read_run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint-4"
        folder.mkdir()
        state = copy.deepcopy(STATE)
        if data.draw(st.booleans()):
            *path, last = data.draw(st.sampled_from(_places(state)))
            parent: Any = state
            for key in path:
                parent = parent[key]
            parent[last] = data.draw(
                st.sampled_from([None, [], {}, "x", -1, 1e308, [1], {"a": 1}, True, "<script>", 1e400])
            )
        (folder / "trainer_state.json").write_text(json.dumps(state))
        for file in data.draw(st.lists(st.sampled_from(
            ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "rng_state.pth",
             "model.safetensors.index.json", "trainer_state.json", "optimizer_0", "global_step4"]
        ), max_size=6)):  # fmt: skip
            (folder / file).write_bytes(data.draw(st.binary(max_size=20)))
        assert isinstance(incomplete(folder), str)
        assert last_complete(Path(name))[0] in (None, folder)
        try:
            html = page([read_run(Path(name))])
        except ConfigError as error:
            says_something(error)
        else:
            assert "<script" not in html


PROPERTIES: dict[str, tuple[Callable[..., None], float]] = {
    "optim_args": (optim_args, 0.2), "python_options": (python_options, 0.1), "unused_options": (unused_options, 0.1),
    "yaml_files": (yaml_files, 0.15),
    "run_configurations": (run_configurations, 0.05), "parameters": (parameters, 0.15),
    "checkpoints": (checkpoints, 0.15), "checkpoint_files": (checkpoint_files, 0.05),
    "checkpoint_folders": (checkpoint_folders, 0.05),
}  # fmt: skip
"""Name -> what to call, and its share of the cases."""


def attempt(name: str, cases: int, repeat: bool) -> None:
    """Try a property with so many cases; `repeat`: the same ones every time."""
    found, _ = PROPERTIES[name]
    settings(
        max_examples=max(cases, 1), deadline=None, derandomize=repeat, database=None,
        suppress_health_check=list(HealthCheck),
    )(found)()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="in all")
    parser.add_argument("--only", default=",".join(PROPERTIES))
    given_arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1")
    failed, began = [], time.monotonic()
    for name in given_arguments.only.split(","):
        cases = round(given_arguments.cases * PROPERTIES[name][1])
        start = time.process_time()
        try:
            attempt(name, cases, repeat=False)
        except Exception as error:
            failed.append(name)
            for one in getattr(error, "exceptions", [error]):  # hypothesis groups what is different
                notes = "\n".join(getattr(one, "__notes__", []))
                print(f"{name}: FAILED: {type(one).__name__}: {one}\n{notes}", flush=True)
        print(f"{name}: {cases} cases, {time.process_time() - start:.0f} s of CPU", flush=True)
    print(f"{given_arguments.cases} cases, {time.monotonic() - began:.0f} s, failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
