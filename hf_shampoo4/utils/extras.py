"""Optional packages: when one is missing, say which extra installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..exceptions import MissingPackage

# module -> the extra of pyproject.toml that brings it
EXTRAS = {
    **dict.fromkeys(
        ("transformers", "accelerate", "datasets", "tokenizers", "matplotlib", "rich", "tensorboard"), "train"
    ),
    **dict.fromkeys(("trl", "peft"), "trl"),
    **dict.fromkeys(("torchao", "pytorch_optimizer"), "race"),
    "bitsandbytes": "bnb",
    "deepspeed": "deepspeed",
    "sklearn": "vision",
    "heavyball": "bench",
    "triton": "triton",
}


@contextmanager
def named() -> Iterator[None]:
    """Turn "No module named 'transformers'" into a sentence that says what to do.

    Raises:
        MissingPackage: a package of `EXTRAS` cannot be imported; other import errors pass as they are.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        install = f"pip install 'hf-shampoo4[{EXTRAS[package]}]'"
        raise MissingPackage(f"this needs the package {package}, which is not installed: {install}") from error
