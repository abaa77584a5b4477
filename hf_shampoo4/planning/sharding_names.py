"""How ranks may share a model, by name; nothing is imported for it."""

from __future__ import annotations

SHARDINGS = {
    "ddp": "every rank holds the whole model",
    "fsdp2": "every rank holds some rows of every parameter, and the state of the blocks it owns",
    "hsdp": "the ranks of a group share the rows of every parameter, and all ranks the state of the blocks they own",
    "zero1": "every rank holds a range of all float32 weights (DeepSpeed), and the state of the blocks it owns",
    "zero2": "every rank holds a range of all float32 weights (DeepSpeed), and the state of the blocks it owns",
    "zero3": "every rank holds a range of every parameter (DeepSpeed), and the state of the blocks it owns",
}
