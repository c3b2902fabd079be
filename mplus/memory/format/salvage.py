"""Read what is sound of a stream in a damaged file, and say in sentences what is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.errors import MemoryFileError, MemoryMismatchError
from mplus.memory.format.entries import StreamEntry, state_class
from mplus.memory.format.load import read_generator, read_rows, read_sources, read_tail, read_texts, read_writes
from mplus.memory.format.rules import PIECE_ROWS, sound
from mplus.memory.format.tensors import Tensors
from mplus.memory.sources.source import Source
from mplus.memory.sources.table import SourceTable
from mplus.memory.sources.writes import WriteLog
from mplus.memory.state import StreamState
from mplus.memory.texts import Waiting
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout

T = TypeVar("T")


@define(eq=False)
class Salvaged:
    """The sound part of each stream of a damaged memory, and sentences on what was lost."""

    states: list[StreamState] = field(factory=list)
    stores: list[MemoryStore] = field(factory=list)
    draws: list[Tensor] = field(factory=list)
    lost: list[str] = field(factory=list)


def read_sound_state(
    file: Tensors,
    number: int,
    entry: StreamEntry,
    layout: StoreLayout,
    store: MemoryStore,
    lost: list[str],
    rows_in_place: Callable[[MemoryRows, int], MemoryRows],
    tensor_in_place: Callable[[str], Tensor],
) -> StreamState:
    """Read a stream, its rows with whatever values they have (see ``clean``).

    Args:
        file: with the stream's tensors; raises MemoryFileError for those that are damaged.
        number, entry: of the stream.
        layout: of its rows.
        store: its long-term rows, in whatever form they are kept.
        lost: gets what is not there any more.
        rows_in_place: of no rows of a layer, and how many it had: what stands in for them.
        tensor_in_place: what stands in for a tensor of the mechanism, by its name in the file.

    Raises:
        MemoryFileError: there are other lists of rows than those of a stream.
    """
    layout, mark = evolve(layout, expiry=False), f"stream.{number}.state."

    def part(name: str, layer: int, count: int) -> MemoryRows:
        prefix = f"stream.{number}.rows.{name}.{layer}"
        try:
            return _copied(read_rows(file, prefix, count, layout))
        except MemoryFileError as error:
            lost.append(f"{prefix}: all {count} rows ({error})")
            return rows_in_place(_empty(file, prefix, layout), count)

    rows = {name: [part(name, layer, n) for layer, n in enumerate(counts)] for name, counts in entry.rows.items()}
    tensors = {}
    for name in file.names:
        if name.startswith(mark):
            try:
                tensors[name.removeprefix(mark)] = file.get(name).clone()
            except MemoryFileError as error:
                lost.append(f"{name}: set to zero ({error})")
                tensors[name.removeprefix(mark)] = tensor_in_place(name)
    state = state_class(entry.mechanism)
    where = f"{file.path}: stream {number}"
    tensors, exchanged = state.mended(layout, rows, tensors)
    lost += [
        f"{what} ({where} must be what was written, and does not fit together: {error})" for what, error in exchanged
    ]
    chunks = [chunk for layer in range(store.layout.layers) for chunk in store.chunks(layer, "source")]
    held = [*(part.source for parts in rows.values() for part in parts), *(chunk.columns["source"] for chunk in chunks)]
    sources = _sources(file, number, entry, held, lost)
    numbers, nothing = sources.column("number"), tuple[Waiting, ...]()
    texts = _or_lost(lambda: read_texts(file, number, numbers), None, f"stream.{number}.text: {UNREADABLE}", lost)
    tail = _or_lost(lambda: read_tail(file, number, numbers), nothing, f"stream.{number}.tail: all of it", lost)
    unknown = f"stream.{number}.writes: which writes had what id"
    writes = _or_lost(lambda: read_writes(file, number, numbers), WriteLog(), unknown, lost)
    try:
        return state.from_parts(
            layout, rows, tensors, clock=entry.clock, sources=sources, texts=texts, tail=tail, writes=writes
        )  # fmt: skip
    except MemoryMismatchError as error:
        raise MemoryFileError(f"{file.path}: stream {number} does not fit together: {error}") from error


UNREADABLE = "what was written can be read, but not written again"


def read_sound_generator(file: Tensors, number: int, lost: list[str]) -> Tensor:
    """Read the state of the generator of a stream; of a new one where it is damaged."""
    try:
        return read_generator(file, number).get_state()
    except MemoryFileError as error:
        lost.append(f"stream.{number}.generator: begins anew ({error})")
        return torch.Generator().manual_seed(number).get_state()


def clean(number: int, state: StreamState, store: MemoryStore, lost: list[str]) -> StreamState:
    """Remove rows of impossible values, damaged ones among them, from a stream and its store."""
    known = state.sources.column("number")
    places = {name: [sound(part, state.clock, known) for part in parts] for name, parts in state.row_lists().items()}
    for name, kept in places.items():
        for layer, right in enumerate(kept):
            if not bool(right.all()):
                called = state.lists.get(name, name)
                lost.append(f"{int((~right).sum())} of {len(right)} {called} rows of layer {layer}, stream {number}")
    for layer in range(store.layout.layers):
        bad = [ids[~sound(store.gather(layer, ids), state.clock, known)] for ids in store.ids(layer).split(PIECE_ROWS)]
        if found := sum(map(len, bad)):
            lost.append(f"{found} long-term rows of impossible values in layer {layer}, stream {number}")
            store.remove(layer, torch.cat(bad))
    state, gone = state.kept(places).mended_with(store)
    lost += [f"{what}, stream {number}" for what in gone]
    return state


def _copied(rows: MemoryRows) -> MemoryRows:
    return MemoryRows.of({name: column.clone() for name, column in rows.columns().items()})


def _empty(file: Tensors, prefix: str, layout: StoreLayout) -> MemoryRows:
    """Return no rows, with the columns there are."""
    described = layout.columns()
    names = [name for name in described if name != "key" or f"{prefix}.key" in file.names]
    return MemoryRows.of({name: torch.empty(0, *described[name][0], dtype=described[name][1]) for name in names})


def _sources(file: Tensors, number: int, entry: StreamEntry, held: Sequence[Tensor], lost: list[str]) -> SourceTable:
    try:
        table = read_sources(file, number, entry)
        table.find(None)  # looks at all names
    except (MemoryFileError, MemoryMismatchError) as error:
        lost.append(f"stream.{number}.sources: what the sources are called ({error})")
        also = [_numbers(file, f"stream.{number}.{kind}.sources") for kind in ("text", "tail")]
        numbers = torch.cat([torch.empty(0, dtype=torch.int64), *held, *also]).unique().tolist()
        nameless = {
            number: Source(f"source {number}, name lost", 0, 1) for number in numbers if 0 <= number < entry.next_source
        }
        return SourceTable.of(nameless, entry.next_source)
    return table


def _numbers(file: Tensors, name: str) -> Tensor:
    try:
        found = file.get(name)
    except MemoryFileError:
        found = torch.empty(0)
    return found if found.dtype == torch.int64 and found.dim() == 1 else torch.empty(0, dtype=torch.int64)


def _or_lost(read: Callable[[], T], otherwise: T, what: str, lost: list[str]) -> T:
    try:
        return read()
    except MemoryFileError as error:
        lost.append(f"{what} ({error})")
        return otherwise
