"""Text for pretraining: the settings, the tokenizer, and packing into sequences of one length."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch

from ..exceptions import ConfigError, reason
from .arguments import DataArguments, ModelArguments
from .documents import load_documents

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from .sources import Documents

END_OF_TEXT, MASK = "<|endoftext|>", "<|mask|>"
BPE = "bpe"  # as `DataArguments.tokenizer`: one of our own
TOKENIZER_SAMPLE = 50_000_000  # characters of training text that a BPE is trained on: more hardly changes its merges
STREAM_SHUFFLE = 10_000  # documents that a stream is shuffled within
JOINED = 100  # sequences, at least, that documents are joined for: what is left at the end, less than one, is dropped


@dataclass(frozen=True)
class TextData:
    """Packed sequences (column `input_ids`, `seq_len` long) and the tokenizer that made them."""

    train: Union[Dataset, Passes]
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
    packed = functools.partial(pack, tokenizer=tokenizer, data=data, rows=together(train, data.seq_len))
    packed_train = packed(train)
    packed_validation = pack(validation, tokenizer, data, together(validation, data.seq_len))
    packed_validation = _fixed_sample(packed_validation, data)
    for split, sequences in (("training", packed_train), ("validation", packed_validation)):
        if next(iter(sequences), None) is None:
            raise ConfigError(f"dataset {data.dataset!r}: its {split} split is shorter than one sequence "
                              f"of seq_len={data.seq_len} tokens")  # fmt: skip
    if data.streaming:
        packed_train = Passes(train, packed, seed)
    else:
        print(
            f"text: {len(packed_train):,} sequences of {data.seq_len} tokens to train on ({len(train):,} documents), "
            f"{len(packed_validation):,} to validate on ({len(validation):,} documents held out)",
            flush=True,
        )
    if data.mask_fraction and tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    if data.mask_fraction:
        packed_validation = masked_once(packed_validation, tokenizer.mask_token_id, data.mask_fraction)
    return TextData(packed_train, packed_validation, tokenizer)


# ---------------------------------------------------------------------------------------------------- tokenizer


def known_tokenizer(data: DataArguments, model: ModelArguments, checkpoint: str | None) -> DataArguments:
    """The settings with the tokenizer of the weights that a training begins with, if it begins with some.

    A BPE that is trained on other text gives the same tokens other numbers, which these weights do not know.

    Args:
        data: what is asked for.
        model: whose weights they are, with `init_from_pretrained`.
        checkpoint: the folder that the training goes on from; None: it is new.

    Raises:
        ConfigError: there is no such tokenizer, or `data` asks for another one.
    """
    if checkpoint:
        return replace(data, tokenizer=_of_checkpoint(data, Path(checkpoint)))
    if not model.init_from_pretrained or data.tokenizer != BPE:
        return data
    try:
        _say(model.model, open_tokenizer(model.model), data)
    except ConfigError as error:
        why = reason(error.__cause__ or error)
        raise ConfigError(f"init_from_pretrained: model {model.model!r} comes without a tokenizer that can be used "
                          f"({why}): name the one that it was trained with by --tokenizer") from error  # fmt: skip
    return replace(data, tokenizer=model.model)


def _of_checkpoint(data: DataArguments, checkpoint: Path) -> str:
    """The tokenizer that lies in a checkpoint, or in its run's folder."""
    asked = data.tokenizer
    folder = next((folder for folder in (checkpoint, checkpoint.parent) if (folder / "tokenizer.json").is_file()), None)
    if folder is None and asked != BPE:
        return asked
    if folder is None:
        raise ConfigError(f"there is no tokenizer.json in {str(checkpoint)!r} or its run's folder: name the tokenizer "
                          "that it was trained with by --tokenizer (a BPE of this machine's is one of the folders in "
                          f"{data.cache / 'tokenizers'})")  # fmt: skip
    kept = open_tokenizer(str(folder))
    if asked != BPE and not open_tokenizer(asked).get_vocab().items() <= kept.get_vocab().items():
        raise ConfigError(f"tokenizer {asked!r} numbers tokens otherwise than that of {str(folder)!r}, with which the "
                          "weights were trained: leave it out, or begin a new training")  # fmt: skip
    if asked == BPE and kept.vocab_size > data.vocab_size:
        raise ConfigError(f"vocab_size={data.vocab_size}, but the tokenizer of {str(folder)!r}, with which the weights "
                          f"were trained, has {kept.vocab_size} tokens: set that, or begin a new training")  # fmt: skip
    _say(str(folder), kept, data)
    return str(folder)


def _say(source: str, taken: PreTrainedTokenizerBase, data: DataArguments) -> None:
    other = data.tokenizer == BPE and taken.vocab_size != data.vocab_size  # a short text may have given no more
    unused = f", not vocab_size={data.vocab_size:,}, which is for a new one" if other else ""
    print(f"tokenizer: that of {source}, {taken.vocab_size:,} tokens{unused}", flush=True)


def load_tokenizer(data: DataArguments, train: Documents) -> PreTrainedTokenizerBase:
    """The tokenizer asked for; a BPE is trained on (the first 50 million characters of) the training documents.

    Raises:
        ConfigError: as `open_tokenizer`.
    """
    if data.tokenizer == BPE:
        return _trained_bpe(list(_sample(train["text"] if not data.streaming else _texts(train))), data)
    return open_tokenizer(data.tokenizer)


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """One that is there, by its folder or its name on the hub.

    Raises:
        ConfigError: no such tokenizer, or one without an end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # of a type that transformers makes without any file
            raise ValueError("it has no tokens but special ones")
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {name!r} cannot be loaded ({reason(error)}); "
                          "allowed: 'bpe', a folder, or a hub name") from error  # fmt: skip
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ConfigError(f"tokenizer {name!r} must be a fast one with an end-of-text (EOS) token")
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


def pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, data: DataArguments, rows: int) -> Documents:
    """Documents joined by the end-of-text token and cut into sequences; a dataset on disk is cached by `datasets`.

    Args:
        documents, tokenizer, data: what is packed, and how.
        rows: documents that are joined at a time (`together`).
    """
    settings = {
        "tokenizer_json": tokenizer.backend_tokenizer.to_str(),  # text, unlike a tokenizer, hashes the same every run
        "eos": tokenizer.eos_token_id,
        "seq_len": data.seq_len,
        "code": inspect.getsource(pack_texts),  # of which `datasets` knows the name alone
    }
    columns = documents.column_names or ["text"]
    batch = {"batched": True, "batch_size": rows, "fn_kwargs": settings, "remove_columns": columns}
    if data.streaming:
        return documents.map(pack_texts, **batch)
    return documents.map(pack_texts, num_proc=data.preprocessing_workers, desc="Packing", **batch)


def together(documents: Documents, seq_len: int) -> int:
    """Documents to join at a time: 1,000, and of short ones so many that they fill `JOINED` sequences."""
    lengths = [len(document["text"]) for document in documents.take(1000)]
    characters = JOINED * seq_len * 4  # a token is 4 characters of English with a large vocabulary, elsewhere fewer
    return max(1000, math.ceil(characters * len(lengths) / max(1, sum(lengths))))


def pack_texts(
    batch: dict[str, list[Any]], tokenizer_json: str, eos: int, seq_len: int, code: str = ""
) -> dict[str, Any]:
    """One batch of documents as sequences of exactly `seq_len` tokens; what is left at its end is dropped.

    `code` is there to be part of the cache's key.
    """
    import numpy as np

    encodings = _tokenizer(tokenizer_json).encode_batch_fast(batch["text"], add_special_tokens=False)
    stream = np.concatenate([np.asarray([*encoding.ids, eos], dtype=np.int32) for encoding in encodings])
    whole = len(stream) // seq_len
    return {"input_ids": list(stream[: whole * seq_len].reshape(whole, seq_len))}


class Passes(torch.utils.data.IterableDataset[Any]):
    """A stream that begins anew where it ends, in another order.

    To the Trainer it is one pass, as long as `max_steps`.  Of passes that end it would leave the micro-batches of an
    unfinished step in the next gradient, and it would resume at the beginning of a pass.

    Args:
        documents: a stream that gives one sequence at least.
        packed: documents -> sequences, of a pass.
        seed: of the first pass's order; the next ones have the numbers after it.
    """

    def __init__(
        self, documents: IterableDataset, packed: Callable[[IterableDataset], IterableDataset], seed: int
    ) -> None:
        self.documents, self.packed, self.seed = documents, packed, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for seed in count(self.seed):
            shuffled = self.documents.shuffle(seed=seed, buffer_size=STREAM_SHUFFLE)
            some = False
            for sequence in self.packed(shuffled):
                some = True
                yield sequence
            if not some:  # of more workers than the stream has files, one has nothing to read
                return


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

    tokens = torch.from_numpy(np.asarray([row["input_ids"] for row in sequences], dtype=np.int64))
    return {"input_ids": tokens, "labels": tokens.clone()}


def masked(sequences: list[dict[str, Any]], mask: int, fraction: float) -> dict[str, Tensor]:
    """A batch for a masked language model: labels are the tokens that are hidden, and -100 (not counted) elsewhere.

    What is hidden follows from the batch's tokens: every optimizer has the same to guess, a resumed run too, and a
    sequence that comes again, among others, hides others.  Rows that bring their labels (`masked_once`) keep them.

    Args:
        sequences: packed ones.
        mask: the token in place of a hidden one.
        fraction: of each sequence's tokens that are hidden; one at least.
    """
    tokens = collate(sequences)["input_ids"]
    if "labels" in sequences[0]:
        return {"input_ids": tokens, "labels": torch.tensor([row["labels"] for row in sequences])}
    places = torch.arange(1, tokens.numel() + 1).view(tokens.shape)
    return _hide(tokens, mask, fraction, int((tokens * places).sum()))


def masked_once(validation: Dataset, mask: int, fraction: float) -> Dataset:
    """The sequences with their labels, hidden by their place among them: the same in every evaluation of every run."""

    def hide(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {name: x.tolist() for name, x in _hide(torch.tensor(row["input_ids"]), mask, fraction, index).items()}

    return validation.map(hide, with_indices=True, desc="Masking")


def _hide(tokens: Tensor, mask: int, fraction: float, seed: int) -> dict[str, Tensor]:
    count = max(1, round(fraction * tokens.shape[-1]))
    ranks = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1).argsort(-1)
    hidden = ranks < count
    return {"input_ids": tokens.masked_fill(hidden, mask), "labels": tokens.masked_fill(~hidden, -100)}
