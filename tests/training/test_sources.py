"""What a name of data stands for, folders above all, and validation that is training data under another name."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.training.arguments import ChatArguments, DataArguments
from hf_shampoo4.training.documents import load_documents
from hf_shampoo4.training.finetune import load_examples
from hf_shampoo4.training.sources import find_source, open_dataset

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: {0}
  - split: test
    path: {1}
---
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_SHAMPOO4_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(folder: Path, *names: str, rows: int = 50) -> Path:
    """Files of a folder, the name of each in its texts: rows of JSONL or CSV, or two lines."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [f"{name} {i}" for i in range(rows)]
        written = {
            ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
            ".csv": "\n".join(["text", *texts]),
            ".tsv": "\n".join(["text\tid", *(f"{text}\t0" for text in texts)]),
        }
        path.write_text(written.get(path.suffix, f"{name}\nsecond line"))
    return folder


def texts_of(folder: Path, split: str = "train") -> list[str]:
    return sorted(open_dataset(find_source(str(folder)), split)["text"])


def first_words(folder: Path, split: str = "train") -> set[str]:
    return {text.split()[0] for text in texts_of(folder, split)}


# ---------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a.txt", "b.txt", "c.jsonl"), r"\(2 .txt, 1 .jsonl\): name one kind by a glob such as '.*/\*\*/\*.txt'"),
        (("a.txt", "b.csv", "c.csv"), r"\(2 .csv, 1 .txt\)"),
        (("a.csv", "b.jsonl"), r"\(1 .csv, 1 .jsonl\)"),
        (("a.txt", "b.txt", "sub/c.zip"), r"\(2 .txt, 1 .zip\)"),
        (("README.md", "a.txt", "b"), r"\(1 .txt, 1 without an ending\)"),
        (("README.md", "a.jsonl", "b.tar"), r"\(1 .jsonl, 1 .tar\)"),
    ],
)
def test_a_folder_of_several_kinds_is_refused(names, said, tmp_path):
    with pytest.raises(ConfigError, match=r"has files of several kinds " + said + ".*, or make a folder for each$"):
        find_source(str(write(tmp_path, *names)))


def test_the_glob_of_that_message_reads_one_kind(tmp_path):
    write(tmp_path, "a.txt", "sub/b.txt", "c.jsonl")
    with pytest.raises(ConfigError) as caught:
        find_source(f"{tmp_path}/")
    glob = str(caught.value).split("such as '")[1].split("'")[0]
    assert texts_of(Path(glob)) == ["a.txt\nsecond line", "sub/b.txt\nsecond line"]


def test_what_is_about_a_folder_is_no_data_of_it(tmp_path):
    beside = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", ".gitattributes", ".DS_Store", "dataset_infos.json")
    write(tmp_path, *beside, ".git/a.jsonl", ".cache/train/b.jsonl", "__pycache__/a.pyc", "plot.png")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert first_words(write(tmp_path, "a.jsonl")) == {"a.jsonl"}


def test_a_readme_beside_files_that_we_do_not_know_is_not_all_that_is_read(tmp_path):
    assert first_words(write(tmp_path, "README.md", "LICENSE.txt", "a.tsv")) == {"a.tsv"}


def test_a_folder_of_md_files_is_texts_with_its_readme(tmp_path):
    assert first_words(write(tmp_path, "README.md", "a.md", ".git/b.md", "LICENSE")) == {"README.md", "a.md"}


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("train/a.jsonl", "test/a.jsonl")])
def test_a_folder_of_rows_has_the_splits_of_its_names(names, tmp_path):
    write(tmp_path, *names, "README.md")
    assert first_words(tmp_path) == {names[0]}
    assert first_words(tmp_path, "test") == {names[1]}
    assert len(texts_of(tmp_path, "train[:10%]+test[:1]")) == 6


@pytest.mark.parametrize("names", [("a.jsonl", "b.jsonl"), ("a.txt", "b.txt")])
def test_a_card_says_which_files_are_which_split(names, tmp_path):
    """Texts too, whole; other files are no matter then."""
    write(tmp_path, *names).joinpath("README.md").write_text(CARD.format(*names))
    assert first_words(tmp_path) == {names[0]}
    assert first_words(tmp_path, "test") == {names[1]}
    assert len(texts_of(tmp_path)) == (50 if "jsonl" in names[0] else 1)


def test_brackets_in_names_are_no_patterns(tmp_path):
    """`datasets` left such files of a folder out."""
    assert first_words(write(tmp_path / "a [1]", "a[b].txt", "c.txt")) == {"a[b].txt", "c.txt"}
    assert first_words(write(tmp_path / "b [2]", "train-[b].jsonl", "test.jsonl")) == {"train-[b].jsonl"}


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    Dataset.from_dict({"text": ["a", "b", "c"]}).select([0, 2]).save_to_disk(tmp_path / "one")
    load_from_disk(tmp_path / "one").map(lambda row: {"text": row["text"] * 2})  # leaves a cache beside the data
    assert texts_of(tmp_path / "one") == ["a", "c"]
    assert texts_of(tmp_path / "one", "train[:1]") == ["a"]
    stream = open_dataset(find_source(str(tmp_path / "one")), "train", streaming=True)
    assert [row["text"] for row in stream] == ["a", "c"]


def test_splits_of_save_to_disk_have_the_names_they_were_saved_with(tmp_path):
    """`datasets` put all that are not called train, test or validation into one."""
    splits = {name: Dataset.from_dict({"text": [name]}) for name in ("mine", "yours")}
    DatasetDict(splits).save_to_disk(tmp_path)
    assert texts_of(tmp_path, "yours") == ["yours"]
    with pytest.raises(ConfigError, match=r"Unknown split \"train\". Should be one of \['mine', 'yours'\]"):
        texts_of(tmp_path)
    os.remove(tmp_path / "mine" / "state.json")
    with pytest.raises(ConfigError, match=r"by save_to_disk, but is not whole \(.*state.json.*\): save it"):
        find_source(str(tmp_path))


def test_a_folder_is_walked_through_once(tmp_path, monkeypatch):
    walks, rglob = [], Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: walks.append(path) or rglob(path, pattern))
    load_documents(DataArguments(str(write(tmp_path, "a.txt", "b.txt")), validation_split="test"))
    assert len([path for path in walks if path == tmp_path.resolve()]) == 1


# ---------------------------------------------------------------------------------------------------- validation


def load(kind: type, dataset: str, other: str | None, **splits: str):
    settings = kind(dataset=dataset, validation_dataset=other, **splits)
    return load_documents(settings) if kind is DataArguments else load_examples(settings)


KINDS = pytest.mark.parametrize("kind", [DataArguments, ChatArguments])


@KINDS
@pytest.mark.parametrize(
    ("dataset", "other"),
    [
        ("rows/a.jsonl", "./rows/a.jsonl"),
        ("rows/a.jsonl", "texts/../rows/a.jsonl"),
        ("rows/a.jsonl", "~/rows/a.jsonl"),
        ("rows/a.jsonl", "rows/*.jsonl"),
        ("rows/a.jsonl", "link.jsonl"),
        ("rows/a.jsonl", "rows"),
        ("rows", "rows/a.jsonl"),
        ("texts/*.txt", "texts"),
        ("splits", "splits/train.jsonl"),
    ],
)
def test_files_that_are_trained_on_are_not_validated_on(kind, dataset, other, tmp_path, monkeypatch):
    write(tmp_path, "rows/a.jsonl", "texts/b.txt", "splits/train.jsonl", "splits/test.jsonl")
    (tmp_path / "link.jsonl").symlink_to("rows/a.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"is the training data itself: |has a file that is trained on, '/.*': name"):
        load(kind, dataset, other)


@KINDS
def test_a_folder_under_another_name_is_the_same(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, "data/train.jsonl", "data/test.jsonl"))
    (tmp_path / "link").symlink_to("data")
    with pytest.raises(ConfigError, match="validation_split=None is the training data itself: name another"):
        load(kind, "data", "./link/")
    train, held_out = load(kind, "data", "link", validation_split="test")
    assert (len(train), len(held_out)) == (50, 50)
    assert len(load(kind, "data/train.jsonl", "data/test.jsonl")[1]) == 50
    assert len(load(kind, "data", "data/test.jsonl")[1]) == 50


@pytest.mark.parametrize(
    ("trained", "validated"),
    [
        ("train", "train[:5%]"),
        ("train[:5%]", "train"),
        ("train+test", "test"),
        ("all", "test"),
        ("train[:90%]", "train[80%:]"),
        ("train[:30]", "train[-21:]"),
        ("train[:10%]", "train[4:]"),
    ],
)
def test_slices_with_rows_in_common_are_refused(trained, validated, tmp_path):
    folder = str(write(tmp_path, "train.jsonl", "test.jsonl"))
    with pytest.raises(ConfigError, match=r"has rows of train_split='.*': name another dataset or split"):
        load(DataArguments, folder, None, train_split=trained, validation_split=validated)


@KINDS
@pytest.mark.parametrize(
    ("trained", "validated"),
    [
        ("train[:90%]", "train[90%:]"),
        ("train[:30]", "train[-20:]"),
        ("train[:10%]", "train[5:]"),
        ("train", "test[:10%]"),
    ],
)
def test_slices_without_rows_in_common_are_read(kind, trained, validated, tmp_path):
    folder = str(write(tmp_path, "train.jsonl", "test.jsonl"))
    train, held_out = load(kind, folder, None, train_split=trained, validation_split=validated)
    assert not set(train["text"]) & set(held_out["text"])
    with pytest.raises(ConfigError, match="has rows of train_split"):
        load(kind, folder, None, train_split=trained, validation_split="all")


def test_a_split_that_is_not_there_is_named_by_who_opens_it(tmp_path):
    folder = str(write(tmp_path, "train.jsonl", "test.jsonl"))
    for split, said in (("dev", 'Unknown split "dev"'), ("train[:5", "Unrecognized instruction format")):
        with pytest.raises(ConfigError, match=said):
            load(DataArguments, folder, None, validation_split=split)


def test_a_packaged_text_is_not_its_own_validation():
    with pytest.raises(ConfigError, match="is the training data itself"):
        load_documents(DataArguments("stdlib", validation_dataset="stdlib"))
