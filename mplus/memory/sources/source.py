"""Source: a text by its name, and sources as tensors, with a column for each of their fields."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import torch
from attrs import define, field
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.memory.format.structure import LARGEST
from mplus.memory.sources.clock import FIRST, LAST
from mplus.memory.sources.text_columns import check_texts, coded, texts_in


@define(frozen=True)
class Source:
    """A text, or part of one, that was written under one name.

    Attributes:
        name: what the caller called it; None for text written without a source.
        tokens: text tokens written.
        chunks: chunks written; 0, and no tokens: everything was forgotten but the name
            (``Memory.forget(keep_name=True)``).
        time: when its first text was written, in seconds since 1970 (UTC); None: by an mplus that did not note it.
        expires: when it is to be forgotten, likewise.
        pinned: it is not to be forgotten by itself.
        write_id: what the caller called the write that it came with.
        last_time: when its last text was written, likewise.
    """

    name: str | None
    tokens: int = 0
    chunks: int = 0
    time: float | None = None
    expires: float | None = None
    pinned: bool = False
    write_id: str | None = None
    last_time: float | None = None

    @property
    def is_written(self) -> bool:
        """Return whether there is text under it, in chunks or waiting; else only its name is kept."""
        return bool(self.chunks or self.tokens)


class SourceMarks(TypedDict, total=False):
    """Fields of a ``Source`` that a write may set besides counts and its own time."""

    time: float | None
    last_time: float | None
    expires: float | None
    pinned: bool
    write_id: str | None


OPTIONAL = ("time", "expires", "pinned", "write_id", "write_id_length", "last_time")
"""Columns that are there only if an entry needs them."""

DTYPES = {
    "number": torch.int64,
    "tokens": torch.int64,
    "chunks": torch.int64,
    "name": torch.uint8,
    "name_length": torch.int64,
    "time": torch.float64,
    "expires": torch.float64,
    "pinned": torch.bool,
    "write_id": torch.uint8,
    "write_id_length": torch.int64,
    "last_time": torch.float64,
}
"""Columns of a table: a value for each entry, but for the texts, which are UTF-8, one behind the other, with as many
bytes as their lengths say; -1: None. In ``TIMES``, NaN is None."""

TEXTS = ("name", "write_id")
TIMES = ("time", "expires", "last_time")
UNUSED = {**dict.fromkeys(TIMES, torch.nan), "pinned": False, "write_id_length": -1}


def encoded(entries: Mapping[int, Source]) -> dict[str, Tensor]:
    """Return entries as columns."""
    sources = list(entries.values())
    columns = {
        "number": torch.tensor(list(entries), dtype=torch.int64),
        "tokens": torch.tensor([source.tokens for source in sources], dtype=torch.int64),
        "chunks": torch.tensor([source.chunks for source in sources], dtype=torch.int64),
    }
    columns["name"], columns["name_length"] = coded([source.name for source in sources])
    for name in TIMES:
        values = [getattr(source, name) for source in sources]
        if any(value is not None for value in values):
            filled = [torch.nan if value is None else value for value in values]
            columns[name] = torch.tensor(filled, dtype=torch.float64)
    if any(source.pinned for source in sources):
        columns["pinned"] = torch.tensor([source.pinned for source in sources])
    if any(source.write_id is not None for source in sources):
        columns["write_id"], columns["write_id_length"] = coded([source.write_id for source in sources])
    return columns


def decoded(columns: Mapping[str, Tensor]) -> dict[int, Source]:
    """Return the entries that ``encoded`` was given."""
    numbers = columns["number"].tolist()

    def times(name: str) -> Sequence[float | None]:
        if name not in columns:
            return [None] * len(numbers)
        return [None if math.isnan(value) else value for value in columns[name].tolist()]

    rows = zip(
        texts_in(columns["name"], columns["name_length"]),
        columns["tokens"].tolist(),
        columns["chunks"].tolist(),
        times("time"),
        times("expires"),
        columns["pinned"].tolist() if "pinned" in columns else [False] * len(numbers),
        texts_in(columns["write_id"], columns["write_id_length"]) if "write_id" in columns else [None] * len(numbers),
        times("last_time"),
        strict=True,
    )
    return {number: Source(*row) for number, row in zip(numbers, rows, strict=True)}


def joined(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate columns; optional ones are filled up where some parts have them."""
    parts = list(parts)
    found = {}
    for name, dtype in DTYPES.items():
        if name in OPTIONAL and not any(name in part for part in parts):
            continue
        pieces = [torch.empty(0, dtype=dtype)]
        for part in parts:
            missing = 0 if name in TEXTS else len(part["number"])
            pieces.append(part[name] if name in part else torch.full((missing,), UNUSED.get(name, 0), dtype=dtype))
        found[name] = torch.cat(pieces)
    return found


@define(frozen=True, eq=False)
class Columns:
    """Columns of a whole table."""

    tensors: Mapping[str, Tensor]
    _ends: dict[str, Tensor] = field(factory=dict)

    def part(self, begin: int, end: int) -> dict[str, Tensor]:
        """Return the columns of entries ``begin .. end-1``, as views."""
        found = {name: column[begin:end] for name, column in self.tensors.items() if name not in TEXTS}
        for name in TEXTS:
            if name in self.tensors:
                if name not in self._ends:
                    self._ends[name] = self.tensors[f"{name}_length"].clamp(min=0).cumsum(0)
                ends = self._ends[name]
                last = min(end, len(ends)) - 1
                found[name] = self.tensors[name][int(ends[begin - 1]) if begin else 0 : int(ends[last])]
        return found


def check(columns: Mapping[str, Tensor], next_number: int) -> None:
    """Raise MemoryMismatchError unless these are columns of one table."""
    _check_shapes(columns)
    numbers = columns["number"]
    if bool((numbers.diff() <= 0).any()) or bool(((numbers < 0) | (numbers >= next_number)).any()):
        raise MemoryMismatchError(f"sources.number must grow from 0 to below {next_number}")
    for name in ("tokens", "chunks"):
        if bool(((columns[name] < 0) | (columns[name] > LARGEST)).any()):
            raise MemoryMismatchError(f"sources.{name} must be from 0 to {LARGEST}, got another number")
    for name in TIMES:
        if name in columns and bool(((columns[name] < FIRST) | (columns[name] > LAST)).any()):  # NaN is neither
            raise MemoryMismatchError(f"sources.{name} must be times in the years 1 to 8999")
    for name in TEXTS:
        if name in columns:
            check_texts(f"sources.{name}", columns[name], columns[f"{name}_length"])


def _check_shapes(columns: Mapping[str, Tensor]) -> None:
    unknown = sorted(columns.keys() - DTYPES.keys())
    missing = sorted(DTYPES.keys() - columns.keys() - set(OPTIONAL))
    if ("write_id" in columns) != ("write_id_length" in columns):
        missing.append("write_id or write_id_length")
    if unknown or missing:
        raise MemoryMismatchError(f"sources must have the columns there are, got {unknown} too and lack {missing}")
    count = columns["number"].shape[:1]
    for name, column in columns.items():
        if column.dtype != DTYPES[name] or column.dim() != 1 or (name not in TEXTS and column.shape != count):
            raise MemoryMismatchError(
                f"sources.{name} must be {DTYPES[name]} [n], got {column.dtype} {list(column.shape)} for {list(count)}"
            )
