"""`plan`: what it promises from geometry is what live optimizers hold, ours and the others'."""

from __future__ import annotations

import json
import time
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers

import hf_shampoo4 as s4
from hf_shampoo4.cli import main
from hf_shampoo4.exceptions import OptionError
from hf_shampoo4.execution import build as building
from hf_shampoo4.execution.build import build
from hf_shampoo4.execution.waves import Wave
from hf_shampoo4.groups import is_of_matrices
from hf_shampoo4.integrations.trainer import OPTIMS
from hf_shampoo4.numerics.storage import nbytes
from hf_shampoo4.options import NAMES, Options
from hf_shampoo4.planning import shardings
from hf_shampoo4.planning.training_memory import Batch, TrainingMemory
from hf_shampoo4.sharding.exchange import Ranks
from hf_shampoo4.sharding.local_parameter import local_parameter
from hf_shampoo4.training.arguments import ModelArguments
from hf_shampoo4.training.model import build_model, load_model_config
from tests.support import used
from tests.support.allocated import Allocated
from tests.support.tiny import ROOT, llama

SMALL_GPT2 = {"model": "gpt2_124m", "model_overrides": "n_embd=96,n_layer=2,n_head=2,vocab_size=500"}


def stepped(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> torch.optim.Optimizer:
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of tensors in the state, without the scalar step counts that torch's AdamW keeps."""
    tensors = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.ndim)


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("arguments", [{"model": "llama_tiny"}, SMALL_GPT2], ids=["llama", "gpt2"])
def test_state_is_a_live_optimizers(arguments: dict[str, str], optim: str) -> None:
    model = build_model(ModelArguments(**arguments), 500)
    options = used({**OPTIMS[optim], "block_size": 96})
    made = s4.plan(model, **options)
    optimizer = stepped(model, s4.Shampoo4bit(s4.param_groups(model), **options))
    steps = sum(t.numel() * 4 for entry in optimizer.state.values() for k, t in entry.items() if not t.ndim)
    assert made.state.total == made.state.largest == held(optimizer) + steps
    assert made.parameters == sum(p.numel() for p in model.parameters())
    keys = [set(entry) for entry in optimizer.state.values()]
    assert made.preconditioned_tensors == sum(any("/failures" in key for key in entry) for entry in keys)


def test_geometry_alone_gives_what_the_module_gives() -> None:
    """By preset, by file, by configuration, by module: the same numbers."""
    path = ROOT / "configs" / "models" / "llama_tiny.json"
    module = build_model(ModelArguments(model="llama_tiny"), 4096)
    plans = [s4.plan("llama_tiny"), s4.plan(str(path)), s4.plan(module.config), s4.plan(module)]
    plans.append(s4.plan(module.to("meta")))
    figures = [{k: v for k, v in p.to_dict().items() if k != "model"} for p in plans]
    assert figures[0] == figures[1] == figures[2] == figures[4]
    of_a_gpu = {"wave", "working", "peak"}  # what is on a CPU has a CPU's waves
    assert {k for k in figures[0] if figures[0][k] != figures[3][k]} == of_a_gpu


def test_the_others_hold_what_is_said() -> None:
    model = llama()
    matrices = [p for group in s4.param_groups(model) if is_of_matrices(group) for _, p in group["params"]]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    others = s4.plan(model).others
    assert others["AdamW, 32-bit"].total == held(stepped(model, torch.optim.AdamW(model.parameters())))
    muon = [stepped(model, torch.optim.Muon(matrices)), stepped(model, torch.optim.AdamW(rest))]
    assert others["Muon"].total == sum(map(held, muon))
    eight = bitsandbytes.optim.AdamW8bit(model.parameters())
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(model.model.embed_tokens, "weight", {"optim_bits": 32})  # as the Trainer does
    codebooks = 2 * 256 * 4
    quantised = sum(p.numel() >= 4096 for p in model.parameters()) - 1
    assert others["AdamW, 8-bit"].total == held(stepped(model, eight)) - quantised * codebooks


def test_soap_on_one_matrix_is_counted_by_hand() -> None:
    made = s4.plan(torch.nn.Sequential(torch.nn.Linear(100, 20_000, bias=False), torch.nn.Linear(8, 16)))
    long, square, bias = 8 * 2_000_000 + 8 * 100**2, 8 * 128 + 8 * (8**2 + 16**2), 8 * 16
    assert made.others["SOAP"].total == long + square + bias


@pytest.mark.parametrize(
    "options",
    [
        {}, {"algorithm": "soap"}, {"algorithm": "shampoo"}, {"algorithm": "shampoo", "factor": "cholesky"},
        {"algorithm": "elementwise"},
        {"algorithm": "shampoo", "moments": "4bit_zipsr", "block_size": 128},
    ],
    ids=str,
)  # fmt: skip
def test_working_memory_is_what_a_step_allocates(options: dict[str, Any]) -> None:
    """The estimate is above what is measured, and not far."""
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256, bias=False) for _ in range(4)])
    model.append(torch.nn.Linear(256, 640, bias=False))
    model.append(torch.nn.Linear(1000, 8, bias=False))  # an adapter: its long side's factor is far larger than it
    optimizer = s4.Shampoo4bit(model.parameters(), **used({**options, "stats_every": 1, "roots_every": 1}))
    stepped(model, optimizer)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with Allocated() as allocated:
        optimizer.step()
    working = s4.plan(model, **options).working.largest
    assert 0.4 * working < allocated.peak <= working


def live_ranks(model: torch.nn.Module, world: int, layout: Any, options: dict[str, Any]) -> list[list[Wave]]:
    """The waves that every rank of a real optimizer builds, without starting processes.

    Where parameters are is `layout`'s word; tests/integrations/test_launch.py asks real engines.
    """
    groups = []
    for group in s4.param_groups(model):
        own = {key: value for key, value in group.items() if key in NAMES}
        groups.append((Options(**{**options, **own}).carried_out(), group["params"]))
    where = {
        id(p): placement
        for _, named in groups
        for unit in layout.units(named)
        for (_, p), placement in zip(unit, layout.placements([tuple(p.shape) for _, p in unit]), strict=True)
    }
    steps = [[group] for group in groups] if layout.in_deepspeed else [groups]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "placement_of", lambda local, by_rank: where[id(local.parameter)])
        patch.setattr(Ranks, "gather", lambda self, value: [value] * self.world)
        built = [
            [
                of_group
                for step in steps
                for of_group in build(
                    [
                        (o, [local_parameter(n, p) for n, p in named], {n: tuple(p.shape) for n, p in named})
                        for o, named in step
                    ],
                    Ranks(r, world),
                )
            ]
            for r in range(world)
        ]
    return [[wave for of_group in rank for wave in of_group] for rank in built]


@pytest.mark.parametrize(
    ("world", "sharding", "options"),
    [
        (1, "ddp", {}), (3, "ddp", {}), (3, "ddp", {"shard_state": True}), (1, "fsdp2", {}), (3, "fsdp2", {}),
        (3, "fsdp2", {"wire": "bf16", "algorithm": "soap"}), (6, "hsdp", {}), (1, "zero1", {}), (3, "zero1", {}),
        (3, "zero2", {"algorithm": "kl_shampoo"}), (3, "zero3", {}),
    ],
    ids=str,
)  # fmt: skip
def test_every_rank_holds_and_sends_what_is_said(sharding: str, options: dict[str, Any], world: int) -> None:
    """Against the live stacks' bytes and, entry by entry, the pieces of the live routes."""
    options = {**options, "block_size": 48}
    model = build_model(ModelArguments(**SMALL_GPT2), 500)
    made = s4.plan(model, world, sharding, 3 if sharding == "hsdp" else None, **options)
    layout = shardings.sharding_of(sharding, world, 3 if sharding == "hsdp" else None)
    state, step, refresh = [], [], []
    for rank, found in enumerate(live_ranks(model, world, layout, options)):
        tensors = [[t for s in w.stacks for buffers in s.state.values() for t in buffers.values()] for w in found]
        state.append(sum(t.numel() * t.element_size() for own in tensors for t in own))
        average = most = 0
        for wave in found if world > 1 else ():
            gradient, update = (2, 2) if options.get("wire") == "bf16" else (4, 4)
            ((collect, send),) = [part.route for part in wave.parts]
            sent = sum(gradient * p.numel for r, ps in collect.out.items() if r != rank for p in ps)
            sent += sum(update * p.numel for r, ps in send.out.items() if r != rank for p in ps)
            average, most = average + sent, most + sent
            bases = 0
            for stack in wave.stacks if wave.replicated else ():
                mine = sum(wave.owners[block] == rank for block in stack.blocks)
                for name, storage in stack.algorithm.storages().items():
                    size = (world - 1) * mine * nbytes(storage)
                    most += size
                    average += 0 if "basis" in name else size
                    bases += size if "basis" in name else 0
            average += bases // 10  # a tenth of the bases is updated in each step
        step.append(average)
        refresh.append(most)
    for load, ranks in ((made.state, state), (made.wire_step, step), (made.wire_refresh, refresh)):
        assert (load.total, load.largest) == (sum(ranks), max(ranks))


@pytest.mark.slow
def test_a_cluster() -> None:
    """LLaMA-405B on 4,096 ranks: the work and the state are spread."""
    started = time.process_time()
    made = s4.plan("llama3_405b", world_size=4096, sharding="fsdp2")
    assert time.process_time() - started < 60
    assert made.balance < 1.5
    assert made.state.total / 4096 <= made.state.largest < 2 * made.state.total / 4096


def test_a_large_model_takes_seconds() -> None:
    """LLaMA-405B: from the published sizes, without its weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
        num_attention_heads=128, num_key_value_heads=8,
    )  # fmt: skip
    made = s4.plan(config)
    assert made.parameters == 405_853_388_800
    assert 0.8 < made.bytes_per_parameter(made.state) < 0.9


def test_the_command_writes_table_json_and_picture(tmp_path, capsys) -> None:
    command = [
        "plan",
        "llama_tiny",
        "--world-size",
        "2",
        "--optim_args",
        "block_size=64",
        "--output_dir",
        str(tmp_path),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "shampoo4bit, the fullest rank" in printed
    saved = json.loads((tmp_path / "plan.json").read_text())
    made = s4.plan("llama_tiny", world_size=2, block_size=64)
    assert saved == json.loads(json.dumps(made.to_dict()))
    assert str(made) in printed
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert saved["state"]["total"] == 2 * saved["state"]["largest"]
    assert saved["copies"] == 2
    assert saved["largest_block"] == [4096, 128]  # of the embedding


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sharding": "magic"},
            "sharding='magic' is not allowed: it must be one of ddp, fsdp2, hsdp, zero1, zero2, zero3",
        ),
        ({"sharding": "fsdp2", "shards": 2}, "shards=2 is for sharding='hsdp'"),
        ({"sharding": "hsdp", "world_size": 6, "shards": 4}, "shards=4 is not allowed: it must divide world_size=6"),
        ({"world_size": 0}, "world_size=0 is not allowed"),
        ({"block_sizes": 3}, "did you mean 'block_size'"),
        ({"model_or_config": "no_such_model"}, "no_such_model"),
        ({"model_or_config": torch.nn.Linear(1, 5)}, "nothing to precondition"),
        ({"model_or_config": transformers.T5Config()}, "type t5 without architectures is of no causal language model"),
    ],
)
def test_errors_name_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        s4.plan(**{"model_or_config": "llama_tiny", **arguments})


def kept_for_backward(model: torch.nn.Module, batch: Batch) -> int:
    """Bytes of a real forward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    ids = torch.zeros((batch.sequences, batch.tokens), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


@pytest.mark.parametrize("arguments", [{"model": "llama_tiny"}, SMALL_GPT2], ids=["llama", "gpt2"])
def test_activations_are_estimated_to_a_twentieth_of_a_real_forward_pass(arguments: dict[str, str]) -> None:
    batch, config = Batch(2, 64), load_model_config(ModelArguments(**arguments))
    found = s4.plan(config, batch=batch).training
    model = build_model(ModelArguments(**arguments), config.vocab_size).train()
    assert found.activations == pytest.approx(kept_for_backward(model, batch), rel=0.05)
    assert found.weights == found.gradients == 4 * sum(p.numel() for p in model.parameters())
    again = s4.plan(config, batch=Batch(2, 64, checkpointing=True)).training
    assert again.activations < 0.8 * found.activations


def test_weights_and_gradients_by_sharding_and_type() -> None:
    n = s4.plan("llama_tiny").parameters
    expected = {  # bytes a parameter of a rank: weights, gradients
        "ddp": (2, 2), "fsdp2": (2 / 4, 2 / 4),
        "zero1": (2 + 4 / 4, 2), "zero2": (2 + 4 / 4, 2 / 4), "zero3": (6 / 4, 2 / 4),
    }  # fmt: skip
    for sharding, (weights, gradients) in expected.items():
        found = s4.plan("llama_tiny", 4, sharding, dtype="bfloat16").training
        assert found.weights == pytest.approx(weights * n, rel=1e-4), sharding
        assert found.gradients == pytest.approx(gradients * n, rel=1e-4), sharding


def test_adapters_alone_are_trained_with_lora() -> None:
    found = s4.plan("llama_tiny", lora=8, batch=Batch(1, 32))
    assert found.parameters < 0.2 * s4.plan("llama_tiny").parameters
    assert found.training.gradients == 4 * found.parameters
    assert found.training.weights > 10 * found.training.gradients / 4
    assert found.model == "llama_tiny, LoRA of rank 8"


def test_all_together_is_the_worse_of_two_moments() -> None:
    memory = TrainingMemory("float32", 10, 20, Batch(1, 1), 100)
    assert memory.peak(5, 50) == 135
    assert memory.peak(5, 200) == 235


def test_the_command_says_what_a_whole_training_takes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dtype", "bfloat16", "--lora", "4", "--batch", "2", "--seq_len", "32", "--gradient_checkpointing"]
    assert main(["plan", "llama_tiny", *words]) == 0
    said = capsys.readouterr().out
    assert "activations (estimate), 2 x 32, gradient checkpointing" in said
    assert "all together with shampoo4bit" in said
    assert "all together with AdamW, 8-bit" in said
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "llama_tiny", "--batch", "0"])
    with pytest.raises(OptionError, match="a module has them"):
        s4.plan(llama(), batch=Batch(1, 1))
