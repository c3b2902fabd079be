"""Documents to train on: where they come from, and the collections they are read as."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import define, field

from mplus.config import flag, one_of, whole
from mplus.errors import ConfigError, InputError
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


def text_of(record: Any, text_field: str, name: str) -> str:
    """Return the text of a record. Raises InputError when the record has no such field or it holds no text."""
    found = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(found, str):
        fields = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{name} must have its text in the field {text_field!r} (text_field), got {fields or 'none'}")
    return found
