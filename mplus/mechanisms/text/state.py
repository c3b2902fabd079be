"""EntryState: the entries of one stream of a memory of text."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Self, Unpack, cast, overload

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import MemoryMismatchError
from mplus.memory.merging.incoming import Incoming
from mplus.memory.state import StateFields, StreamState
from mplus.memory.writing.update import Fields
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout

BLOCK_BYTES = 2**14
"""A block of entries that has grown to so many bytes is closed: a journal holds a block anew whenever it grows."""
BLOCK = "block."
"""Begins the name of a block's tensor; behind it stands the number of its first entry in the stream."""


@define(frozen=True)
class Entry:
    """One thing that a memory of text keeps.

    Attributes:
        fields: its texts: one of a note, three of a triple.
        source: name of the source it was written from, or None.
        birth: its number in the order of writing.
    """

    fields: Fields
    source: str | None
    birth: int


@define(frozen=True, eq=False)
class Block:
    """Entries that lie in one tensor.

    Attributes:
        entries: their fields.
        tensor: ``[n]`` uint8, the same as JSON in UTF-8.
    """

    entries: tuple[Fields, ...]
    tensor: Tensor

    @staticmethod
    def of(entries: Sequence[Fields]) -> Block:
        """Return the block of some entries."""
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        return Block(tuple(entries), torch.frombuffer(bytearray(text), dtype=torch.uint8))

    @staticmethod
    def read(name: str, tensor: Tensor) -> Block:
        """Return the block in a tensor that was read. Raises MemoryMismatchError: it holds no entries."""
        plain: Any = None
        if tensor.dtype == torch.uint8 and tensor.dim() == 1:
            with suppress(ValueError, RecursionError):  # what is no JSON is no list of entries either
                plain = json.loads(bytes(tensor.cpu().numpy()).decode("utf-8", "surrogatepass"))
        sound = isinstance(plain, list) and all(isinstance(one, list) and one for one in plain)
        if not sound or not all(isinstance(text, str) for one in plain for text in one):
            raise MemoryMismatchError(f"{name} must hold entries as they were written, lists of texts in JSON")
        return Block(tuple(tuple(one) for one in plain), tensor)


def blocks_of(entries: Iterable[Fields], before: Sequence[Block] = ()) -> tuple[Block, ...]:
    """Return ``before`` and behind it blocks of ``entries``; a last block that is not full takes some of them."""
    blocks = list(before)
    last = list(blocks.pop().entries) if blocks and len(blocks[-1].tensor) < BLOCK_BYTES else []
    size = sum(len(text) for one in last for text in one)
    for one in entries:
        if size >= BLOCK_BYTES:
            blocks.append(Block.of(last))
            last, size = [], 0
        last.append(one)
        size += sum(map(len, one))
    return tuple([*blocks, Block.of(last)] if last else blocks)


@define(frozen=True, eq=False, kw_only=True)
class EntryState(StreamState):
    """The entries of one stream, oldest first: a row of each, with its birth and source, and its texts in blocks.

    Everything is on the CPU, whatever the device of the decoder.

    Example:
        >>> [entry.fields for entry in memory.states[0].entries()]
        [('The key is under the blue stone.',)]

    Attributes:
        rows: of the only layer there is, one for each entry.
        blocks: their texts.
    """

    lists: ClassVar[Mapping[str, str]] = {"entries": "entries"}

    rows: MemoryRows
    blocks: tuple[Block, ...] = ()
    _entries: list[tuple[Entry, ...]] = field(factory=list, init=False)

    @classmethod
    def empty(cls) -> Self:
        """Return the state of a stream to which nothing was written."""
        return cls(rows=MemoryRows.empty(0))

    def __len__(self) -> int:
        return len(self.rows)

    def entries(self) -> tuple[Entry, ...]:
        """Return all entries, oldest first."""
        if not self._entries:
            names = {number: source.name for number, source in self.sources.items()}
            facts = zip(self.rows.source.tolist(), self.rows.birth.tolist(), self._fields(), strict=True)
            self._entries.append(tuple(Entry(texts, names.get(number), birth) for number, birth, texts in facts))
        return self._entries[0]

    def text_of(self, number: int) -> str:
        """Return the entries of one source, a line each, their fields divided by tabs."""
        own = zip(self.rows.source.tolist(), self._fields(), strict=True)
        return "\n".join("\t".join(fields) for source, fields in own if source == number)

    def of_source(self, name: str | None) -> Sequence[Entry]:
        """Return the entries of one source, oldest first; nothing is done until one of them is looked at."""
        return LazyEntries(lambda: tuple(entry for entry in self.entries() if entry.source == name))

    def with_entries(self, new: Sequence[Fields], source: int) -> Self:
        """Return this state with further entries, of a source with this number, and the clock moved on."""
        if not new:
            return self
        births = torch.arange(self.clock, self.clock + len(new))
        rows = MemoryRows.cat([self.rows, MemoryRows(None, births, torch.full_like(births, source))])
        return evolve(self, rows=rows, blocks=blocks_of(new, self.blocks), clock=self.clock + len(new))

    def merged(self, other: Incoming) -> Self:
        """Return this state with the entries of another stream between its own, in order of writing."""
        theirs = cast("EntryState", other.view.state)
        births = torch.cat([other.order.own(self.rows.birth), other.order.other(theirs.rows.birth)])
        fields, order = [*self._fields(), *theirs._fields()], births.argsort()
        (rows,) = other.merged("entries", (self.rows,), (theirs.rows,), self)
        blocks = blocks_of(fields[place] for place in order.tolist())
        return evolve(self, rows=rows, blocks=blocks, clock=other.order.clock)

    def row_lists(self) -> dict[str, tuple[MemoryRows, ...]]:
        return {"entries": (self.rows,)}

    def with_rows(self, rows: Mapping[str, Sequence[MemoryRows]]) -> Self:
        return evolve(self, rows=rows["entries"][0])

    def tensors(self) -> dict[str, Tensor]:
        firsts = [0]
        for block in self.blocks:
            firsts.append(firsts[-1] + len(block.entries))
        return {f"{BLOCK}{first}": block.tensor for first, block in zip(firsts, self.blocks, strict=False)}

    @classmethod
    def from_parts(
        cls,
        layout: StoreLayout,
        rows: Mapping[str, Sequence[MemoryRows]],
        tensors: Mapping[str, Tensor],
        **others: Unpack[StateFields],
    ) -> Self:
        cls.check_lists(layout, rows)
        state = cls(rows=rows["entries"][0], blocks=tuple(_read(tensors)), **others)
        found = sum(len(block.entries) for block in state.blocks)
        if found != len(state.rows) or list(state.tensors()) != sorted(tensors, key=_first):
            raise MemoryMismatchError(
                f"{len(state.rows)} entries must have as many texts, in blocks one behind the other, got {found} in "
                f"{', '.join(tensors) or 'none'}"
            )
        if bool((state.rows.birth.diff() <= 0).any()):
            raise MemoryMismatchError("entries must lie in the order in which they were written")
        return state

    def kept(self, places: Mapping[str, Sequence[Tensor]]) -> Self:
        (at,) = places["entries"]
        chosen = at.nonzero().squeeze(1) if at.dtype == torch.bool else at
        if len(chosen) == len(self) and torch.equal(chosen, torch.arange(len(self))):
            return self
        fields = self._fields()
        blocks = blocks_of(fields[place] for place in chosen.tolist())
        return evolve(self, rows=self.rows.select(chosen), blocks=blocks)

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Self:
        """Return this state: entries have no dtype, and stay on the CPU."""
        return self

    @property
    def pass_key(self) -> Hashable:
        """Nothing: streams share no pass."""
        return ()

    @classmethod
    def mended(
        cls, layout: StoreLayout, rows: Mapping[str, Sequence[MemoryRows]], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[tuple[str, MemoryMismatchError]]]:
        """Put entries without texts in the place of blocks that were damaged; ``mended_with`` takes them out."""
        count = len(rows["entries"][0]) if rows.get("entries") else 0
        names = sorted((name for name in tensors if 0 <= _first(name) < count), key=_first)
        firsts = [*map(_first, names), count]
        sound: dict[str, Tensor] = {}
        lost: list[tuple[str, MemoryMismatchError]] = []
        for name, first, behind in zip(names, firsts[:-1], firsts[1:], strict=True):
            try:
                found = len(Block.read(name, tensors[name]).entries)
                fault = MemoryMismatchError(f"{name} must hold {behind - first} entries, got {found}")
            except MemoryMismatchError as error:
                found, fault = -1, error
            sound[name] = tensors[name]
            if found != behind - first:
                sound[name] = Block.of([LOST] * (behind - first)).tensor
                lost.append((f"{behind - first} entries", fault))
        if firsts[0] > 0:
            sound = {f"{BLOCK}0": Block.of([LOST] * firsts[0]).tensor, **sound}
        return sound, lost

    def mended_with(self, store: MemoryStore) -> tuple[Self, list[str]]:
        """Take out entries whose texts were lost."""
        kept = torch.tensor([one != LOST for one in self._fields()], dtype=torch.bool)
        gone = int((~kept).sum())
        if not gone:
            return self, []
        return self.kept({"entries": [kept]}), [f"{gone} of {len(kept)} entries, whose texts are lost"]

    def _fields(self) -> list[Fields]:
        return [one for block in self.blocks for one in block.entries]


@define(eq=False)
class LazyEntries(Sequence[Entry]):
    """Entries that are made when one of them is looked at: every write has them at hand, and few look.

    Attributes:
        make: makes them.
    """

    make: Callable[[], tuple[Entry, ...]]
    _made: tuple[Entry, ...] | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self._all())

    @overload
    def __getitem__(self, place: int) -> Entry: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Entry]: ...

    def __getitem__(self, place: int | slice) -> Entry | Sequence[Entry]:
        return self._all()[place]

    def _all(self) -> tuple[Entry, ...]:
        if self._made is None:
            self._made = self.make()
        return self._made


LOST: Fields = ("",)
"""Stands in for the texts of an entry that were damaged; no mechanism can write it."""


def _first(name: str) -> int:
    """Return the number of the first entry of a block by its name; -1 for another name."""
    number = name.removeprefix(BLOCK)
    return int(number) if name.startswith(BLOCK) and number.isdecimal() and str(int(number)) == number else -1


def _read(tensors: Mapping[str, Tensor]) -> Iterable[Block]:
    for name in sorted(tensors, key=_first):
        if _first(name) < 0:
            raise MemoryMismatchError(f"a memory of text must have the tensors {BLOCK}<number>, got {name!r}")
        yield Block.read(name, tensors[name])
