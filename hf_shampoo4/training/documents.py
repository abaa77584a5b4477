"""Documents to train on and documents held out: which split, and how many.

A document is held out by the hash of its path (standard library) or text, so the split depends on neither order nor
machine, and equal texts never lie on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigError
from .sources import PACKAGED, check_split, find_source, of_utf8, open_dataset

if TYPE_CHECKING:
    from datasets import Dataset

    from .arguments import ChatArguments, DataArguments
    from .sources import Documents, Source


def load_documents(data: DataArguments) -> tuple[Documents, Documents]:
    """The training and the validation documents, with a `text` column.

    Raises:
        ConfigError: the source does not exist, cannot be read, or has no such column; or validation would be on the
            training documents.
    """
    source = find_source(data.dataset)
    with of_utf8(source.name):
        train = _read(source, data.train_split, data)
    if validation := validation_source(source, train, data):
        with of_utf8(validation[0].name):
            held_out = _read(*validation, data)
    elif not data.streaming and len(train) < 2 / data.validation_fraction:
        train, held_out = _cut_each(train, data.validation_fraction)
    else:
        key = "path" if "path" in (train.column_names or ()) else "text"
        chosen = {"input_columns": key, "fn_kwargs": {"fraction": data.validation_fraction}}
        train, held_out = train.filter(_in_training, **chosen), train.filter(_held_out, **chosen)
    if data.max_train_documents is not None:
        train = train.take(data.max_train_documents)
    return train, held_out


def validation_source(
    source: Source, train: Documents, data: DataArguments | ChatArguments
) -> tuple[Source, str] | None:
    """Source and split to validate on; None: hold out a share of the training documents.

    Args:
        source: of the training documents.
        train: these, which know how many rows each split has.
        data: the settings.

    Raises:
        ConfigError: they are training data, or a part of these.
    """
    other, split = data.validation_dataset, data.validation_split
    if other is None and split is None:
        return None
    if other is None and not source.has_splits:
        print(f"dataset {source.name!r} has no split {split!r}: a share of it is held out instead", flush=True)
        return None
    found = find_source(other) if other else source
    chosen = split or (data.train_split if found.has_splits else "train")
    if shared := _shared(source, data.train_split, found, chosen, train):
        raise ConfigError(
            f"validation_dataset={other!r} with validation_split={split!r} {shared}: name another dataset or split, "
            "or leave both out (then a share of the documents is held out)"
        )
    return found, chosen


def _shared(source: Source, train_split: str, found: Source, split: str, train: Documents) -> str:
    """What validation would have of the training data, in words; '': nothing that can be known from names."""
    if (found, split) == (source, train_split):
        return "is the training data itself"
    if found == source:
        rows = {name: of_split.num_examples for name, of_split in (train.info.splits or {}).items()}
        return f"has rows of train_split={train_split!r}" if _overlap(train_split, split, rows) else ""
    files = source.files_of(train_split) & found.files_of(split)
    return f"has a file that is trained on, {min(files)!r}" if files else ""


def _overlap(one: str, other: str, rows: Mapping[str, int]) -> bool:
    """Whether two of a dataset's splits, slices ('train[:90%]') or sums of them have rows in common.

    Args:
        one: the first.
        other: the second.
        rows: how many each split has.
    """
    from datasets import ReadInstruction

    specs = ("+".join(rows) if spec == "all" else spec for spec in (one, other))
    try:
        first, second = (ReadInstruction.from_spec(spec).to_absolute(rows) for spec in specs)
    except ValueError:  # no such split: who opens it says so
        return False
    return any(a.splitname == b.splitname and max(a.from_, b.from_) < min(a.to, b.to) for a in first for b in second)


def _read(source: Source, split: str, data: DataArguments) -> Documents:
    from datasets import Dataset

    if source.name in PACKAGED:
        check_split(source, split)
        documents_of, version_of = PACKAGED[source.name]
        documents = Dataset.from_generator(
            documents_of, gen_kwargs=version_of(), cache_dir=str(data.cache / "datasets")
        )
        return documents.to_iterable_dataset() if data.streaming else documents
    documents = open_dataset(source, split, data.dataset_config, data.streaming)
    columns = documents.column_names or list(next(iter(documents), {}))  # a stream may not know them before it is read
    if data.text_column not in columns:
        raise ConfigError(f"dataset {source.name!r} has no column text_column={data.text_column!r}; "
                          f"its columns: {', '.join(columns)}")  # fmt: skip
    documents = documents.select_columns(data.text_column)
    documents = documents if data.text_column == "text" else documents.rename_column(data.text_column, "text")
    return _of_text(source.name, data.text_column, documents)


def _of_text(source: str, column: str, documents: Documents) -> Documents:
    """The documents without empty cells.

    Raises:
        ConfigError: the column holds no text.
    """
    kind = (documents.features or {}).get("text")
    if kind is not None and getattr(kind, "dtype", "") not in ("string", "large_string", "null"):
        raise ConfigError(f"dataset {source!r}: column text_column={column!r} holds {kind}, not text")
    full = documents.filter(_has_text, input_columns="text", fn_kwargs={"source": source, "column": column})
    if hasattr(documents, "__len__") and (empty := len(documents) - len(full)):
        print(f"dataset {source!r}: {empty} of {len(documents)} rows have no text and are left out", flush=True)
    return full


def _has_text(text: Any, source: str, column: str) -> bool:
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"dataset {source!r}: column text_column={column!r} holds {text!r}, not text")
    return bool(text)


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
