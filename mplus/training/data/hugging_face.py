"""Documents of a Hugging Face dataset, loaded or streamed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from mplus.errors import ConfigError, MissingDependencyError
from mplus.training.data.documents import Document, DocumentList, DocumentOptions, Documents, text_of


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
        return StreamedDataset(data, options)
    return DocumentList(_Rows(data, options))


def _load(datasets: Any, options: DocumentOptions) -> Any:
    name = options.dataset or ""
    folder = Path(name)
    if (folder / "state.json").is_file():
        data = datasets.load_from_disk(str(folder))
    elif (folder / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(str(folder))[options.split]
    else:
        files = {"data_files": list(options.paths)} if options.paths else {}
        return datasets.load_dataset(name, options.subset, split=options.split, streaming=options.streaming, **files)
    return data.to_iterable_dataset() if options.streaming else data


class _Rows(Sequence[Document]):
    """Rows of a loaded dataset as documents."""

    def __init__(self, data: Any, options: DocumentOptions) -> None:
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

    def __init__(self, data: Any, options: DocumentOptions) -> None:
        self._data, self._options = data, options

    def iterate(self, start: int = 0) -> Iterator[Document]:
        data = self._data if self._options.limit is None else self._data.take(self._options.limit)
        for index, record in enumerate(data.skip(start) if start else data, start):
            yield _document(record, index, self._options)


def _document(record: Any, index: int, options: DocumentOptions) -> Document:
    name = f"{options.dataset}:{index}"
    return Document(name, text_of(dict(record), options.text_field, name))
