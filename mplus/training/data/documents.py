"""Documents to train on: text files, JSONL, gz, folders, Hugging Face datasets, and what comes with mplus."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol, cast, overload

from attrs import define, field

from mplus.config import JsonValue, flag, one_of, whole
from mplus.errors import ConfigError, InputError, MissingDependencyError
from mplus.training.data.options import as_texts, text, texts

SHIPPED = {"novel": Path(__file__).parents[2] / "data" / "novels" / "Burnett_Garden_1911.txt.gz"}
"""Data that comes with mplus, by name."""


@define(frozen=True)
class Document:
    """One text and where it comes from (``"novels/a.txt"``, ``"stories.jsonl:12"``)."""

    name: str
    text: str


@define(frozen=True, kw_only=True)
class DocumentOptions:
    """Where documents come from: ``paths``, ``dataset`` or ``shipped``.

    Attributes:
        paths: files, folders (searched with all they hold, for ``.txt`` and ``.jsonl``, also ``.gz``) and patterns
            such as ``"novels/*.txt.gz"``. With ``dataset``: its data files.
        format: "text", "jsonl", or "auto" to go by each file's ending.
        separator: what stands between the documents of a text file; None: a file is one document.
        text_field: field of a JSONL line, or column of a dataset, that holds the text.
        dataset: name of a Hugging Face dataset, a folder written by its ``save_to_disk``, or a builder such as "json".
        subset, split: which part of the dataset.
        streaming: read the dataset as it comes rather than load it first.
        shipped: data that comes with mplus: "novel".
        limit: take only the first so many documents.
    """

    paths: tuple[str, ...] = field(default=(), converter=as_texts, validator=texts)
    format: Literal["auto", "text", "jsonl"] = field(default="auto", validator=one_of("auto", "text", "jsonl"))
    separator: str | None = field(default=None, validator=text)
    text_field: str = field(default="text", validator=text)
    dataset: str | None = field(default=None, validator=text)
    subset: str | None = field(default=None, validator=text)
    split: str = field(default="train", validator=text)
    streaming: bool = field(default=False, validator=flag)
    shipped: str | None = field(default=None, validator=one_of(None, *SHIPPED))
    limit: int | None = field(default=None, validator=whole(1, optional=True))

    def __attrs_post_init__(self) -> None:
        given = [name for name in ("paths", "dataset", "shipped") if getattr(self, name)]
        if not given or ("shipped" in given and len(given) > 1):
            raise ConfigError(
                f"documents come from one of paths, dataset and shipped, got {' and '.join(given) or 'none'}"
            )
        if self.streaming and not self.dataset:
            raise ConfigError("streaming is for a Hugging Face dataset: set dataset, or leave streaming out")


class Documents(ABC):
    """Documents in a fixed order, numbered from 0, that can be read again from any of them on."""

    count: int | None
    """How many there are; None: known only after reading them all."""

    @abstractmethod
    def iterate(self, start: int = 0) -> Iterator[Document]:
        """Yield document ``start`` and all after it."""


class DocumentList(Documents):
    """Documents of which any can be had at once."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self.count: int = len(documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index]

    def iterate(self, start: int = 0) -> Iterator[Document]:
        return (self._documents[index] for index in range(start, self.count))


def text_of(record: JsonValue, text_field: str, name: str) -> str:
    """Return the text of a record. Raises InputError when the record has no such field or it holds no text."""
    found = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(found, str):
        fields = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{name} must have its text in the field {text_field!r} (text_field), got {fields or 'none'}")
    return found


SUFFIXES = {".txt": "text", ".jsonl": "jsonl"}
"""Endings, also with ``.gz`` behind, of the files taken from a folder."""


def open_documents(options: DocumentOptions) -> Documents:
    """Return the documents that ``options`` name. Files are read whole; datasets as the package ``datasets`` does it.

    Raises:
        ConfigError: a path that names nothing, or a file whose format is not known.
        InputError: a file that cannot be read as what it is, a record without text, or no document at all.
        MissingDependencyError: a dataset, and ``datasets`` is not installed.
    """
    found = DocumentList(_read_files(options)) if options.dataset is None else open_dataset(options)
    if found.count == 0:
        raise InputError(f"the data set is empty: no document in {options.dataset or ', '.join(options.paths)}")
    return found


def _read_files(options: DocumentOptions) -> list[Document]:
    files = [SHIPPED[options.shipped]] if options.shipped else find_files(options.paths, options.format)
    found: list[Document] = []
    for file in files:
        kind = options.format if options.format != "auto" else _format(file)
        found.extend(_jsonl(file, options.text_field) if kind == "jsonl" else _texts(file, options.separator))
        if options.limit is not None and len(found) >= options.limit:
            return found[: options.limit]
    return found


def find_files(paths: Sequence[str], format: str = "auto") -> list[Path]:  # noqa: A002 - the name of the option
    """Return the files that ``paths`` name, in this order, sorted within a folder or pattern, each once.

    Raises:
        ConfigError: a path names nothing, or under "auto" a file of no known ending is named.
    """
    found: dict[Path, None] = {}
    for path in paths:
        given = Path(path).expanduser()
        if given.is_dir():
            files = sorted(file for file in given.rglob("*") if file.is_file() and _format(file) is not None)
        elif given.is_file():
            files = [given]
        else:
            # Path.glob takes relative patterns only.
            root = Path(given.anchor)
            matching = root.glob(str(given.relative_to(root) if given.anchor else given))
            files = sorted(file for file in matching if file.is_file())
        if not files:
            raise ConfigError(f"paths must name files that exist, and {path!r} names none")
        for file in files:
            if format == "auto" and _format(file) is None:
                raise ConfigError(
                    f"format must be 'text' or 'jsonl' for a file that ends in neither {' nor '.join(SUFFIXES)} "
                    f"(nor with .gz behind), as {str(file)!r}"
                )
            found[file] = None
    return list(found)


def _format(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def _content(file: Path) -> str:
    try:
        data = file.read_bytes()
        if file.suffix.lower() == ".gz":
            data = gzip.decompress(data)
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} must be UTF-8, got byte {error.object[error.start]:#x} at {error.start}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file} must be a whole gzip file: {error}") from error
    return content.replace("\r\n", "\n")


def _texts(file: Path, separator: str | None) -> Iterator[Document]:
    content = _content(file)
    if separator is None:
        yield Document(str(file), content)
        return
    for number, part in enumerate(content.split(separator), 1):
        yield Document(f"{file}:{number}", part.strip())


def _jsonl(file: Path, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(_content(file).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}:{number} must be one JSON object: {error}") from error
            yield Document(f"{file}:{number}", text_of(record, text_field, f"{file}:{number}"))


def open_dataset(options: DocumentOptions) -> Documents:
    """Return the dataset that ``options`` name.

    Raises:
        MissingDependencyError: ``datasets`` is not installed.
        ConfigError: ``datasets`` cannot find or read it; its message is in ours.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "datasets":
            raise
        raise MissingDependencyError(
            "data of a Hugging Face dataset needs the package 'datasets', which is not installed: "
            "pip install 'mplus[train]'",
            name="datasets",
        ) from error
    try:
        data = _load(datasets, options)
    except (OSError, ValueError, KeyError) as error:  # what datasets raises for names, parts and files it cannot find
        raise ConfigError(f"dataset {options.dataset!r} cannot be loaded: {error}") from error
    if isinstance(data, datasets.IterableDataset):
        return StreamedDataset(cast("_Streamed", data), options)
    return DocumentList(_Rows(cast("_Loaded", data), options))


class _Streamed(Protocol):
    """A dataset that comes piece by piece, of the package ``datasets``."""

    def __iter__(self) -> Iterator[Mapping[str, JsonValue]]: ...
    def take(self, count: int) -> _Streamed: ...
    def skip(self, count: int) -> _Streamed: ...


class _Loaded(Protocol):
    """A dataset of which any record can be had at once."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, JsonValue]: ...


def _load(datasets: ModuleType, options: DocumentOptions) -> _Loaded | _Streamed:
    name = options.dataset or ""
    folder = Path(name)
    if (folder / "state.json").is_file():
        data = datasets.load_from_disk(str(folder))
    elif (folder / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(str(folder))[options.split]
    else:
        files = {"data_files": list(options.paths)} if options.paths else {}
        data = datasets.load_dataset(name, options.subset, split=options.split, streaming=options.streaming, **files)
        return cast("_Loaded | _Streamed", data)
    return cast("_Loaded | _Streamed", data.to_iterable_dataset() if options.streaming else data)


class _Rows(Sequence[Document]):
    """Rows of a loaded dataset as documents."""

    def __init__(self, data: _Loaded, options: DocumentOptions) -> None:
        self._data, self._options = data, options

    def __len__(self) -> int:
        return len(self._data) if self._options.limit is None else min(len(self._data), self._options.limit)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | Sequence[Document]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return _document(self._data[index], index, self._options)


class StreamedDataset(Documents):
    """A dataset that comes piece by piece; going back to a place reads from the beginning, or skips what it can."""

    count: int | None = None

    def __init__(self, data: _Streamed, options: DocumentOptions) -> None:
        self._data, self._options = data, options

    def iterate(self, start: int = 0) -> Iterator[Document]:
        data = self._data if self._options.limit is None else self._data.take(self._options.limit)
        for index, record in enumerate(data.skip(start) if start else data, start):
            yield _document(record, index, self._options)


def _document(record: Mapping[str, JsonValue], index: int, options: DocumentOptions) -> Document:
    name = f"{options.dataset}:{index}"
    return Document(name, text_of(dict(record), options.text_field, name))
