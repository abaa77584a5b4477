"""What training takes before anything is rented: `hf-shampoo4 plan`, as text, JSON and a picture.

From geometry alone: neither the weights of the model nor a GPU are needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ..integrations.trainer import OPTIMS, optim_options
from ..training.arguments import DTYPES
from ..utils.ceilings import ceilings_of
from ..utils.files import check_writable, write_json
from ..utils.hub import offline_without_network
from ..utils.numbers import number, require_with, whole
from .sharding_names import SHARDINGS

SEQ_LEN, TOKENS, UTILISATION = 2048, 1 << 19, 0.4


def main(arguments: Sequence[str]) -> None:
    """`hf-shampoo4 plan`."""
    chosen = _parser().parse_args(arguments)
    if chosen.output_dir:
        check_writable(chosen.output_dir)
    of_gpu = {name: getattr(chosen, name) for name in ("ceilings", "tokens_per_step", "utilisation")}
    require_with("--gpu CARD", chosen.gpu is not None, **of_gpu)
    checkpointing = chosen.gradient_checkpointing
    require_with("--batch N", chosen.batch is not None, seq_len=chosen.seq_len, gradient_checkpointing=checkpointing)
    ceilings = ceilings_of(chosen.gpu, chosen.ceilings) if chosen.gpu else None
    offline_without_network()
    from ..execution.blocking import meta_has_memory
    from .estimate import Described, plan_of
    from .picture import draw
    from .training_memory import Batch

    options = optim_options(chosen.optim, chosen.optim_args)
    batch = Batch(chosen.batch, chosen.seq_len or SEQ_LEN, checkpointing) if chosen.batch is not None else None
    described = Described(chosen.model, chosen.dtype, chosen.lora, batch)
    with meta_has_memory(ceilings.capacity) if ceilings else nullcontext():
        made, model = plan_of(described, chosen.world_size, chosen.sharding, chosen.shards, ceilings, **options)
    print(made)
    content = made.to_dict()
    if ceilings:
        from .step_time import predict

        prediction = predict(model, made, ceilings, chosen.tokens_per_step or TOKENS, chosen.utilisation or UTILISATION)
        print(f"\n{prediction}")
        content["prediction"] = prediction.to_dict()
    if chosen.output_dir:
        write_json(chosen.output_dir / "plan.json", content)
        draw(made, chosen.output_dir / "plan.png")
        print(f"\n{chosen.output_dir / 'plan.json'}, {chosen.output_dir / 'plan.png'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-shampoo4 plan", description=__doc__)
    add = parser.add_argument
    add("model", help="a preset of configs/models, a config.json, a folder or a hub name")
    add("--world-size", "--world_size", type=whole(1), default=1, metavar="N", help="ranks (default: 1)")
    add("--sharding", choices=SHARDINGS, default="ddp", help="how the ranks share the model (default: ddp)")
    add("--shards", type=whole(1), metavar="N", help="under hsdp, ranks that share one copy of the model (default: 8)")
    add("--optim", choices=OPTIMS, default="shampoo4bit", help="as in --optim of a training (default: shampoo4bit)")
    add("--optim_args", "--optim-args", help='as in a training: "block_size=512,preset=paper_eigen"')
    add("--dtype", choices=DTYPES, default="float32", help="of weights and gradients (default: float32)")
    add(
        "--lora",
        type=whole(0),
        default=0,
        metavar="R",
        help="adapters of rank R on all linear layers are trained alone",
    )
    add("--batch", type=whole(1), metavar="N", help="sequences of a rank at a time: estimates the activations")
    add(
        "--seq_len",
        "--seq-len",
        type=whole(1),
        metavar="T",
        help=f"tokens of a sequence, with --batch (default: {SEQ_LEN})",
    )
    add(
        "--gradient_checkpointing",
        "--gradient-checkpointing",
        action="store_true",
        help="recompute layers, with --batch",
    )
    add("--gpu", metavar="CARD", help="predict the optimizer's time there: h100, h200, a100, b200 or 4090")
    tokens = f"of a step over all ranks, for --gpu (default: {TOKENS:,})"
    add("--tokens-per-step", "--tokens_per_step", type=whole(1), metavar="N", help=tokens)
    add("--utilisation", type=number(0, 1), help=f"of the card by the model, for --gpu (default: {UTILISATION})")
    add("--ceilings", type=Path, metavar="FILE", help="numbers of cards, in the form of utils/cards.yaml")
    add("--output_dir", "--output-dir", type=Path, help="write plan.json and plan.png there")
    return parser
