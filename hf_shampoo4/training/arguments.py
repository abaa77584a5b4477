"""The settings of this project, beside those of the libraries that train: dataclasses, and nothing that takes time."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..exceptions import ConfigError
from .sources import ALLOWED, ELSEWHERE

CACHE_ENV = "HF_SHAMPOO4_CACHE"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """Which model, and how it differs from its configuration file."""

    model: str = field(
        default="llama_tiny",
        metadata={"help": "A preset of configs/models, a config.json, a folder or a hub name; '' with `model_type`."},
    )
    model_type: str | None = field(
        default=None, metadata={"help": "With model='': a transformers model type at its defaults, e.g. gpt2."}
    )
    model_overrides: str = field(
        default="", metadata={"help": "Changes of the configuration: 'hidden_size=128,num_hidden_layers=4'."}
    )
    init_from_pretrained: bool = field(
        default=False, metadata={"help": "Load the weights of `model` (a folder or hub name) instead of drawing them."}
    )
    dtype: str = field(default="float32", metadata={"help": f"Type of the parameters: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    tie_word_embeddings: bool | None = field(default=None, metadata={"help": "One matrix for embedding and head."})

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not allowed: it must be one of {', '.join(DTYPES)}")


@dataclass
class DataArguments:
    """Which text, which tokenizer, which length."""

    dataset: str = field(default="stdlib", metadata={"help": f"Training text; {ALLOWED}."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of a hub dataset to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to validate on; default: documents held out of the training split."}
    )
    validation_dataset: str | None = field(
        default=None, metadata={"help": "Another source of validation text, named like `dataset`."}
    )
    validation_fraction: float = field(default=0.05, metadata={"help": "Share of the documents held out."})
    text_column: str = field(default="text", metadata={"help": "Column of the text in JSON, parquet and hub datasets."})
    streaming: bool = field(default=False, metadata={"help": "Read while training instead of before it."})
    max_train_documents: int | None = field(default=None, metadata={"help": "Use the first N documents only."})
    max_validation_sequences: int | None = field(
        default=None, metadata={"help": "Validate on N sequences drawn once from the held-out ones (streams: 1024)."}
    )
    tokenizer: str = field(
        default="bpe",
        metadata={
            "help": "'bpe': byte-level BPE trained on the training text, or that of the weights to begin with; or a "
            "name or a folder."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Size of the vocabulary of the trained BPE."})
    seq_len: int = field(default=256, metadata={"help": "Tokens of a sequence."})
    mask_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the tokens to hide and to predict: a masked language model; 0: the next token."},
    )
    preprocessing_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    cache_dir: str | None = field(
        default=None, metadata={"help": f"Folder of tokenizers and packed text; default ${CACHE_ENV} or ~/.cache."}
    )

    def __post_init__(self) -> None:
        _require(0.0 < self.validation_fraction < 1.0, "validation_fraction", self.validation_fraction, "in (0, 1)")
        _require(0.0 <= self.mask_fraction < 1.0, "mask_fraction", self.mask_fraction, "in [0, 1)")
        _require(self.seq_len >= 2, "seq_len", self.seq_len, ">= 2")
        for name in ("max_train_documents", "max_validation_sequences", "preprocessing_workers"):
            _require_1(name, getattr(self, name))
        _require(self.vocab_size >= 257, "vocab_size", self.vocab_size, ">= 257 (256 bytes and the end of a text)")

    @property
    def cache(self) -> Path:
        """The cache folder (created)."""
        chosen = self.cache_dir or os.environ.get(CACHE_ENV) or Path.home() / ".cache" / "hf_shampoo4"
        folder = Path(chosen).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass
class ChatArguments:
    """Which conversations."""

    dataset: str = field(metadata={"help": f"Examples to learn, e.g. JSONL with a column `messages`: {ELSEWHERE}."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of a hub dataset to train on."})
    validation_dataset: str | None = field(default=None, metadata={"help": "Examples to validate on."})
    validation_split: str | None = field(default=None, metadata={"help": "Split of a hub dataset to validate on."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Without those two: share of the examples held out (0: none)."}
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Use the first N examples only."})

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ConfigError(f"validation_fraction={self.validation_fraction!r} is not allowed: it must be in [0, 1)")
        _require_1("max_train_examples", self.max_train_examples)


@dataclass
class RunArguments:
    """What `TrainingArguments` does not say."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train into a folder that is not empty; the old run's checkpoints and results are deleted."},
    )
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "Sequences of an optimizer step over all processes; sets gradient_accumulation_steps."},
    )

    def __post_init__(self) -> None:
        _require_1("total_batch_size", self.total_batch_size)


def _require_1(name: str, value: int | None) -> None:
    _require(value is None or value >= 1, name, value, ">= 1, or left out")


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r} is not allowed: it must be {allowed}")
