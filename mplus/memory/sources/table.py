"""SourceTable: the sources of a stream, immutable; it shares pages with the tables it was made from."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.memory.sources.source import DTYPES, Columns, Source, check, decoded, encoded, joined

PAGE = 64
"""Entries that are copied at most when one of them changes."""


class Page:
    """Neighbouring entries of a table, by number in ascending order; as entries, as columns or both.

    Those of a file are decoded when they are first looked at.
    """

    __slots__ = ("_columns", "_entries", "_marks", "_read", "first")

    def __init__(self, first: int, entries: dict[int, Source] | None, read: Callable[[], dict[str, Tensor]]) -> None:
        """``read`` gives the columns."""
        self.first, self._entries, self._read = first, entries, read
        self._columns: dict[str, Tensor] | None = None
        self._marks: Marks | None = None

    @staticmethod
    def of(entries: dict[int, Source]) -> Page:
        """Return a page of at least one entry."""
        return Page(next(iter(entries)), entries, lambda: encoded(entries))

    @property
    def entries(self) -> dict[int, Source]:
        """The entries by number; not to be changed."""
        if self._entries is None:
            self._entries = decoded(self.columns())
        return self._entries

    def columns(self) -> dict[str, Tensor]:
        """Return the entries as columns (``mplus.memory.sources.source.DTYPES``)."""
        if self._columns is None:
            self._columns = self._read()
        return self._columns

    def marks(self) -> Marks:
        """Return what the entries say of expiry and pins, which every write asks for."""
        if self._marks is None:
            if self._entries is None:  # of a file: nothing is decoded where nothing is marked
                columns = self.columns()
                times = columns.get("expires", torch.empty(0)).nan_to_num(nan=math.inf).tolist()
                pinned = columns["number"][columns["pinned"]].tolist() if "pinned" in columns else []
            else:
                entries = self._entries.items()
                times = [entry.expires for _, entry in entries if entry.expires is not None]
                pinned = [number for number, entry in entries if entry.pinned]
            self._marks = Marks(min(times, default=math.inf), tuple(pinned))
        return self._marks


class Marks(NamedTuple):
    """The expiry and pins of the entries of a page.

    Attributes:
        expires: the earliest time at which an entry expires; infinite: none does.
        pinned: numbers of the entries that are pinned.
    """

    expires: float
    pinned: tuple[int, ...]


class Index(NamedTuple):
    """Numbers by name, shared between tables: an entry counts for a table that has that name under that number."""

    numbers: dict[str | None, int]
    built: list[bool]


@define(frozen=True, eq=False)
class SourceTable:
    """Sources in order of first writing, and by number: ``for source in table``, ``table[number]``.

    A number is given once: a source that is dropped leaves a gap. ``number in table`` tells whether there is one.

    Attributes:
        pages: the entries.
        next_number: the next number to give.
    """

    pages: tuple[Page, ...] = ()
    next_number: int = 0
    _count: int = 0
    _index: Index = field(factory=lambda: Index({}, []))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Source]:
        for page in self.pages:
            yield from page.entries.values()

    def items(self) -> Iterator[tuple[int, Source]]:
        """Yield number and source of every entry."""
        for page in self.pages:
            yield from page.entries.items()

    def get(self, number: int) -> Source | None:
        """Return the source of this number, if there is one."""
        place = self._place(number)
        return self.pages[place].entries.get(number) if place >= 0 else None

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.get(number) is not None

    def __getitem__(self, number: int) -> Source:
        found = self.get(number)
        if found is None:
            raise KeyError(number)
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SourceTable):
            return NotImplemented
        return self.next_number == other.next_number and list(self.items()) == list(other.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SourceTable({len(self)} sources, next number {self.next_number})"

    def find(self, name: str | None) -> int | None:
        """Return the number of the source of this name, in constant time but for the first call; None: there is none.

        Raises MemoryMismatchError where two have one name.
        """
        if not self._index.built:
            for number, source in self.items():
                if self._index.numbers.setdefault(source.name, number) != number:
                    raise MemoryMismatchError(f"names of sources must differ, got {source.name!r} twice")
            self._index.built.append(True)
        found = self._index.numbers.get(name)
        entry = None if found is None else self.get(found)
        return found if entry is not None and entry.name == name else None

    @property
    def earliest_expiry(self) -> float | None:
        """When the next source expires, in seconds since 1970 (UTC); None: none does."""
        found = min((page.marks().expires for page in self.pages), default=math.inf)
        return None if found == math.inf else found

    @property
    def pinned(self) -> Tensor:
        """``[p]`` int64, ascending: numbers of the sources that are pinned."""
        return torch.tensor([number for page in self.pages for number in page.marks().pinned], dtype=torch.int64)

    def written(
        self, name: str | None, tokens: int, time: float | None = None, chunks: int = 1
    ) -> tuple[SourceTable, int]:
        """Return this table with ``tokens`` more tokens, in ``chunks`` more chunks, under ``name``; and its number.

        ``time``: the present one, in seconds since 1970; None: it is not noted. That of the last text stays where there
        are no more tokens: text that waited comes into a chunk.
        """
        known = self.find(name)
        number = self.next_number if known is None else known
        entry = Source(name) if known is None else self[known]
        first = entry.time if entry.chunks or entry.time is not None else time
        last = time if tokens else entry.last_time
        tokens, chunks = entry.tokens + tokens, entry.chunks + chunks
        return self.having(number, evolve(entry, tokens=tokens, chunks=chunks, time=first, last_time=last)), number

    def having(self, number: int, source: Source) -> SourceTable:
        """Return this table with ``source`` under ``number``; one page is copied."""
        place = self._place(number)
        known = place >= 0 and number in self.pages[place].entries
        if known:
            page = Page.of({**self.pages[place].entries, number: source})
            pages = (*self.pages[:place], page, *self.pages[place + 1 :])
        else:
            pages = self._with_new(place, number, source)
        kept = bool(self._index.built) and not (known and self[number].name != source.name)
        # Indivisible, so of two futures of this table that give one name two numbers, one gets an index of its own.
        if kept and self._index.numbers.setdefault(source.name, number) != number:
            kept = False
        return SourceTable(
            pages,
            max(self.next_number, number + 1),
            self._count + (not known),
            self._index if kept else Index({}, []),
        )

    def _with_new(self, place: int, number: int, source: Source) -> tuple[Page, ...]:
        if place < 0:
            return (Page.of({number: source}), *self.pages)
        page = self.pages[place]
        if place == len(self.pages) - 1 and len(page.entries) >= PAGE and number > next(reversed(page.entries)):
            return (*self.pages, Page.of({number: source}))
        entries = {**page.entries, number: source}
        if number < next(reversed(page.entries)):
            entries = dict(sorted(entries.items()))
        return (*self.pages[:place], Page.of(entries), *self.pages[place + 1 :])

    def without(self, numbers: Iterable[int]) -> SourceTable:
        """Return this table but for some entries; their numbers are not given again."""
        gone = {number for number in numbers if number in self}
        if not gone:
            return self
        pages = []
        for page in self.pages:
            if gone.isdisjoint(page.entries):
                pages.append(page)
            elif left := {number: source for number, source in page.entries.items() if number not in gone}:
                pages.append(Page.of(left))
        return SourceTable(tuple(pages), self.next_number, self._count - len(gone))

    def changed_since(self, earlier: SourceTable) -> tuple[dict[int, Source], list[int]]:
        """Return entries that are new or changed since ``earlier``, and numbers that only ``earlier`` has."""
        same = {id(page) for page in earlier.pages} & {id(page) for page in self.pages}  # shared, hence unchanged
        before = {n: entry for page in earlier.pages if id(page) not in same for n, entry in page.entries.items()}
        now = {n: entry for page in self.pages if id(page) not in same for n, entry in page.entries.items()}
        changed = {number: entry for number, entry in now.items() if before.get(number) != entry}
        return changed, [number for number in before if number not in now]

    def column(self, name: str) -> Tensor:
        """Return one of the columns ``[n]`` that every table has; see ``mplus.memory.sources.source.DTYPES``."""
        return torch.cat([torch.empty(0, dtype=DTYPES[name]), *(page.columns()[name] for page in self.pages)])

    def tensors(self) -> dict[str, Tensor]:
        """Return all entries as tensors by name, for a file; columns that no entry needs are left out."""
        return joined([page.columns() for page in self.pages])

    @staticmethod
    def of(entries: Mapping[int, Source], next_number: int | None = None) -> SourceTable:
        """Return a table of these entries; ``next_number`` None: the one behind the last of them."""
        items = sorted(entries.items())
        pages = tuple(Page.of(dict(items[at : at + PAGE])) for at in range(0, len(items), PAGE))
        behind = items[-1][0] + 1 if items else 0
        return SourceTable(pages, behind if next_number is None else next_number, len(items))

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], next_number: int) -> SourceTable:
        """Make a table of what ``tensors`` returned; nothing is decoded yet.

        Raises:
            MemoryMismatchError: they do not fit together.
        """
        check(tensors, next_number)
        columns = Columns({name: tensor.clone() for name, tensor in tensors.items()})
        numbers = columns.tensors["number"]
        firsts = numbers[::PAGE].tolist()
        pages = tuple(
            Page(first, None, partial(columns.part, at * PAGE, (at + 1) * PAGE)) for at, first in enumerate(firsts)
        )
        return SourceTable(pages, next_number, len(numbers))

    def _place(self, number: int) -> int:
        """Return the position of the page that has this number, if one has; -1: it would come before the first."""
        return bisect_right(self.pages, number, key=lambda page: page.first) - 1
