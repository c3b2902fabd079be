"""Reading documents from files of every kind and from datasets."""

from __future__ import annotations

import gzip
import json
import sys
import types

import pytest

from mplus.config import structure
from mplus.errors import ConfigError, InputError, MissingDependencyError
from mplus.training.data.documents import DocumentList, DocumentOptions, open_documents


def opened(**options):
    return open_documents(structure(DocumentOptions, options))


def texts(**options):
    return [document.text for document in opened(**options).iterate()]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.txt").write_text("second\nline", encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("first é".encode()))
    inner = tmp_path / "inner"
    inner.mkdir()
    lines = [{"text": "one", "body": "eins"}, {"text": "two\u2028lines", "body": "zwei"}]
    (inner / "c.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    (inner / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\r\n\r\n{"text": ""}\r\n'))
    (inner / "INDEX.tsv").write_text("not a document", encoding="utf-8")
    return tmp_path


def test_a_folder_is_searched_for_all_known_files_in_order(folder):
    found = opened(paths=str(folder))
    assert [document.text for document in found.iterate()] == [
        *("first é", "second\nline", "one", "two\u2028lines", "three", "")
    ]
    assert found.count == 6
    names = [document.name for document in found.iterate(2)]
    assert names == [
        str(folder / "inner" / name) for name in ("c.jsonl:1", "c.jsonl:2", "d.jsonl.gz:1", "d.jsonl.gz:3")
    ]


def test_paths_keep_their_order_and_a_file_counts_once(folder):
    paths = [str(folder / "b.txt"), str(folder / "*.txt*")]
    assert texts(paths=paths) == ["second\nline", "first é"]
    assert texts(paths=str(folder / "**" / "*.jsonl")) == ["one", "two\u2028lines"]


def test_a_relative_pattern(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert texts(paths="inner/c.*") == ["one", "two\u2028lines"]


def test_text_field_and_limit(folder):
    path = str(folder / "inner" / "c.jsonl")
    assert texts(paths=path, text_field="body") == ["eins", "zwei"]
    assert texts(paths=[path, str(folder / "b.txt")], limit=1) == ["one"]


def test_a_separator_makes_several_documents_of_a_file(tmp_path):
    file = tmp_path / "stories.md"
    file.write_bytes(b"\xef\xbb\xbfone\r\nmore\r\n<|end|>\r\ntwo<|end|>")
    found = opened(paths=str(file), format="text", separator="<|end|>")
    assert [(document.name, document.text) for document in found.iterate()] == [
        (f"{file}:1", "one\nmore"),
        (f"{file}:2", "two"),
        (f"{file}:3", ""),
    ]


def test_any_document_can_be_had_and_reading_begins_anywhere(folder):
    found = opened(paths=str(folder))
    assert isinstance(found, DocumentList)
    everything = list(found.iterate())
    assert [found[index] for index in range(6)] == everything
    assert all(list(found.iterate(start)) == everything[start:] for start in range(7))


def test_the_novel_that_comes_along():
    (novel,) = opened(shipped="novel").iterate()
    assert "Mistress Mary" in novel.text
    assert len(novel.text) > 100_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "documents come from one of paths, dataset and shipped, got none"),
        ({"paths": "a.txt", "shipped": "novel"}, "got paths and shipped"),
        ({"shipped": "stories"}, "shipped must be one of None, 'novel', got 'stories'"),
        ({"paths": [3]}, "paths must be a list of texts"),
        ({"paths": "a.txt", "streaming": True}, "streaming is for a Hugging Face dataset"),
        ({"paths": "a.txt", "limit": 0}, "limit must be a whole number of at least 1"),
        ({"paths": "a.txt", "format": "csv"}, "format must be one of"),
        ({"paths": "nowhere/*.txt"}, "paths must name files that exist, and 'nowhere/\\*.txt' names none"),
        ({"path": "a.txt"}, "'path' is not a field of DocumentOptions; did you mean 'paths'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        opened(**options)


def test_a_file_of_no_known_ending_needs_a_format(folder):
    with pytest.raises(ConfigError, match="format must be 'text' or 'jsonl' for a file that ends in neither"):
        opened(paths=str(folder / "inner" / "*"))
    assert texts(paths=str(folder / "inner" / "INDEX.tsv"), format="text") == ["not a document"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "a.txt must be UTF-8, got byte 0xe9 at 3"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], "a.txt.gz must be a whole gzip file"),
        ("a.txt.gz", b"no gzip", "a.txt.gz must be a whole gzip file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl:2 must be one JSON object"),
        ("a.jsonl", b'{"body": "a", "id": 3}', r"a.jsonl:1 must have its text in the field 'text' .*got 'body', 'id'"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1 must have its text in the field 'text'"),
        ("a.jsonl", b"[1]", "a.jsonl:1 must have its text in the field 'text' .*got list"),
        ("a.jsonl", b"\n", "the data set is empty: no document in .*a.jsonl"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        opened(paths=str(tmp_path / name))


class Table:
    """Stands in for a loaded dataset."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def to_iterable_dataset(self):
        return Iterable(self.rows)


class Iterable:
    """Stands in for a streamed dataset."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def skip(self, count):
        return Iterable(self.rows[count:])

    def take(self, count):
        return Iterable(self.rows[:count])


@pytest.fixture
def asked(monkeypatch):
    """A package ``datasets`` of ours; what it was asked for."""
    calls = []
    rows = [{"text": name, "n": 0} for name in ("one", "two", "three")]

    def load_dataset(*args, **options):
        calls.append((args, options))
        if args[0] == "missing":
            raise FileNotFoundError("no dataset there")
        return Iterable(rows) if options["streaming"] else Table(rows)

    package = types.ModuleType("datasets")
    package.IterableDataset, package.load_dataset = Iterable, load_dataset
    package.load_from_disk = lambda folder: calls.append(folder) or Table(rows)
    monkeypatch.setitem(sys.modules, "datasets", package)
    return calls


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_loaded_or_streamed(asked, streaming):
    found = opened(dataset="some/set", subset="part", split="validation", streaming=streaming)
    assert asked == [(("some/set", "part"), {"split": "validation", "streaming": streaming})]
    assert [document.text for document in found.iterate()] == ["one", "two", "three"]
    assert [document.name for document in found.iterate(1)] == ["some/set:1", "some/set:2"]
    assert [document.text for document in found.iterate(2)] == ["three"]
    assert found.count == (None if streaming else 3)
    assert texts(dataset="some/set", streaming=streaming, limit=2) == ["one", "two"]


def test_data_files_and_folders_of_a_dataset(asked, tmp_path):
    opened(dataset="json", paths=["a.jsonl", "b.jsonl"])
    assert asked[-1][1]["data_files"] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    assert texts(dataset=str(tmp_path), streaming=True) == ["one", "two", "three"]
    assert asked[-1] == str(tmp_path)


def test_what_is_wrong_with_a_dataset_is_said(asked):
    with pytest.raises(ConfigError, match="dataset 'missing' cannot be loaded: no dataset there"):
        opened(dataset="missing")
    with pytest.raises(InputError, match=r"some/set:0 must have its text in the field 'body'.*got 'text', 'n'"):
        texts(dataset="some/set", text_field="body")


def test_a_dataset_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mplus\[train\]'"):
        opened(dataset="some/set")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_real_package(tmp_path, streaming, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("datasets", reason="the extra 'train' is not installed")
    lines = "".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(5))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    found = opened(dataset="json", paths=str(tmp_path / "a.jsonl"), streaming=streaming)
    assert [document.text for document in found.iterate(1)] == [f"text {n}" for n in range(1, 5)]
    assert [document.text for document in found.iterate()] == [f"text {n}" for n in range(5)]
    with pytest.raises(ConfigError, match="cannot be loaded"):
        opened(dataset="json", paths=str(tmp_path / "b.jsonl"))
