"""What is sound in a directory, row by row.

Damaged rows are kept in place, with an impossible birth, while the journal is replayed: its records know rows by their
places. They are taken out at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import attrs
import torch
from attrs import define, field
from torch import Tensor

from mplus.config import Component
from mplus.errors import MemoryFileError
from mplus.memory.durable.checkpoint import live_name
from mplus.memory.durable.delta import apply
from mplus.memory.durable.journal import recovered
from mplus.memory.durable.kinds import innermost, kind_of
from mplus.memory.durable.manifest import LiveManifest
from mplus.memory.earlier import in_present_form
from mplus.memory.files import layout_from
from mplus.memory.source import Source
from mplus.memory.sources import SourceTable
from mplus.memory.stream import StreamState
from mplus.memory.tensors import Tensors
from mplus.memory.unpacking import COLUMNS, read_generator, read_state
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout
from mplus.stores.build import build_store
from mplus.stores.disk.blocks import BlockFile
from mplus.stores.disk.folder import Folder
from mplus.stores.mmap import MmapStore

DAMAGED = -(2**62)
"""Birth of a row that is not what was written."""
PIECE_ROWS = 2**14


@define(eq=False)
class Salvaged:
    """What is left, of each stream, and what was lost, in sentences."""

    states: list[StreamState] = field(factory=list)
    stores: list[MemoryStore] = field(factory=list)
    draws: list[Tensor] = field(factory=list)
    lost: list[str] = field(factory=list)


class _Forgiving(MmapStore):
    """Lets rows be removed that are not there (any more)."""

    def remove(self, layer: int, ids: Tensor) -> None:
        super().remove(layer, ids[torch.isin(ids, self.ids(layer))])


class _Marking:
    """The state file, damaged rows marked, other damaged tensors replaced."""

    lasting: ClassVar[bool] = True

    def __init__(self, file: BlockFile, lost: list[str]) -> None:
        self.path, self._file, self._lost = file.path, file, lost
        texts, self.nameless = self._damaged(".text."), self._damaged(".sources.")
        self._gone = {
            name
            for name in file.stretches
            if name.partition(".text.")[0] in texts or name.partition(".sources.")[0] in self.nameless
        }
        lost += [f"{self.path}: the kept texts of {stream}" for stream in sorted(texts)]
        lost += [f"{self.path}: what the sources of {stream} are called" for stream in sorted(self.nameless)]

    def _damaged(self, mark: str) -> set[str]:
        """Streams of which a tensor with this mark in its name is damaged."""
        names = [name for name in self._file.stretches if mark in name]
        return {name.partition(mark)[0] for name in names if not self._is_sound(name)}

    def source_numbers(self, stream: str) -> list[Tensor]:
        """Those that rows and texts of a stream have, ones that were not written perhaps among them."""
        names = [name for name in self._file.stretches if name.startswith(f"{stream}.")]
        return [self._file.unchecked(name) for name in names if name.endswith((".source", ".text.sources"))]

    @property
    def tensors(self) -> Mapping[str, object]:
        return {name: where for name, where in self._file.stretches.items() if name not in self._gone}

    def get(self, name: str) -> Tensor:
        tensor = self._file.unchecked(name).clone()
        prefix, _, column = name.rpartition(".")
        if column == "birth":
            tensor[~_sound(self._file, prefix, tensor.shape[0])] = DAMAGED
        elif column not in COLUMNS and not self._is_sound(name):
            if ".newest." in name:
                self._lost.append(f"{self.path}: {name}, all of it; the next write reads fewer rows")
                return tensor[:0]
            self._lost.append(f"{self.path}: {name}, set to what it is in a new memory")
            return torch.Generator().manual_seed(0).get_state() if column == "generator" else torch.zeros_like(tensor)
        return tensor

    def _is_sound(self, name: str) -> bool:
        try:
            self._file.read(name)
        except MemoryFileError:
            return False
        return True


class _Renamed:
    """A file of which the sources of some streams are others."""

    def __init__(self, file: Tensors, sources: Mapping[int, SourceTable]) -> None:
        self.path, self.lasting, self._file = file.path, file.lasting, file
        self._made = {
            f"stream.{number}.sources.{name}": column
            for number, table in sources.items()
            for name, column in table.tensors().items()
        }

    @property
    def tensors(self) -> Mapping[str, object]:
        return {**self._file.tensors, **self._made}

    def get(self, name: str) -> Tensor:
        return self._made[name] if name in self._made else self._file.get(name)


def sources_in(store: MemoryStore) -> list[Tensor]:
    """Numbers of sources of the rows in a store, with repeats."""
    pieces = [piece for layer in range(store.layout.layers) for piece in store.pieces(layer, "source")]
    return [piece.columns["source"] for piece in pieces]


def nameless(held: Sequence[Tensor], next_number: int) -> SourceTable:
    """A table of the sources with the numbers in ``held``, whose names nobody knows any more."""
    numbers = torch.cat([torch.empty(0, dtype=torch.int64), *held]).unique().tolist()
    known = [number for number in numbers if 0 <= number < next_number]
    return SourceTable.of({number: Source(f"source {number}, name lost", 0, 1) for number in known}, next_number)


def _sound(file: BlockFile, prefix: str, rows: int, names: Iterable[str] = COLUMNS) -> Tensor:
    sound = torch.ones(rows, dtype=torch.bool)
    for name in ("id", *names):
        if f"{prefix}.{name}" in file.stretches:
            sound &= file.sound_rows(f"{prefix}.{name}")
    return sound


def salvage(folder: Path | Folder, manifest: LiveManifest) -> Salvaged:
    """All that is sound.

    Raises:
        MemoryFileError: the structure of the state file is damaged.
        UnknownNameError, PluginError, ConfigError: there is no such store as the manifest names.
    """
    found, layout = Salvaged(), layout_from(manifest.layout)
    mapped: list[MmapStore] = []
    file = BlockFile(folder / manifest.state.file, manifest.state)
    marking = _Marking(file, found.lost)
    tables: dict[int, SourceTable] = {}
    for number, entry in enumerate(manifest.streams):
        found.stores.append(build_store(kind_of(Component.of(manifest.store)), layout))
        mapped.append(_store(folder, manifest, number, file, innermost(found.stores[-1]).layout, found.lost))
        if (stream := f"stream.{number}") in marking.nameless:
            numbers = [*marking.source_numbers(stream), *sources_in(mapped[-1])]
            tables[number] = nameless(numbers, entry.next_source)
    reader = _Renamed(in_present_form(marking, manifest.earlier), tables)
    for number, entry in enumerate(manifest.streams):
        own = attrs.evolve(entry, sources=len(tables[number])) if number in tables else entry
        found.states.append(read_state(reader, number, own, layout, manifest.layout.required))
        found.draws.append(read_generator(reader, number).get_state())
    path, count = folder / manifest.journal, 0
    try:
        for payload in recovered(path):
            apply(payload, found.states, mapped, found.draws, layout, f"{path}: record {count}", manifest.version)
            count += 1
    except MemoryFileError as error:
        found.lost.append(f"what was written after the first {count} chunks of the journal ({error})")
    for store, rows in zip(found.stores, mapped, strict=True):
        innermost(store).layers = rows.layers
    found.states[:] = [_cleaned(number, state, found.lost) for number, state in enumerate(found.states)]
    return found


def _store(
    folder: Path | Folder, manifest: LiveManifest, stream: int, state: BlockFile, layout: StoreLayout, lost: list[str]
) -> MmapStore:
    store = _Forgiving(layout)
    for place, entry in enumerate(manifest.stores[stream].files):
        try:
            file = BlockFile(folder / entry.file, entry)
        except MemoryFileError as error:
            lost.append(f"long-term rows of stream {stream}: all that were in one file ({error})")
            continue
        for layer in range(layout.layers):
            sound = _sound(file, f"{layer}", file.rows(f"{layer}.id"), layout.columns())
            name = live_name(stream, place, layer)
            live = torch.ones_like(sound)
            if name in state.stretches:
                live = state.unchecked(name) & state.sound_rows(name)
                if not bool(state.sound_rows(name).all()):
                    lost.append(
                        f"{state.path}: {name}; rows of which nobody knows whether they were removed are left out"
                    )
            if gone := int((live & ~sound).sum()):
                lost.append(
                    f"{file.path}: {gone} of {int(live.sum())} long-term rows of layer {layer}, stream {stream}"
                )
            for places in (live & sound).nonzero().squeeze(1).split(PIECE_ROWS):
                columns = {name: file.unchecked(f"{layer}.{name}")[places] for name in layout.columns()}
                store.append_as(layer, file.unchecked(f"{layer}.id")[places], MemoryRows.of(columns))
    store.next_ids = list(manifest.stores[stream].next_ids)
    return store


def _cleaned(number: int, state: StreamState, lost: list[str]) -> StreamState:
    """Without damaged rows."""
    stm, pending, newest = list(state.stm), list(state.pending), list(state.newest)
    for layer, rows in enumerate(state.stm):
        kept = rows.birth != DAMAGED
        if not bool(kept.all()):
            lost.append(f"{int((~kept).sum())} of {len(rows)} short-term rows of layer {layer}, stream {number}")
            stm[layer] = rows.select(kept)
            if newest:
                newest[layer] = state.kept(layer, kept)
    for layer, rows in enumerate(state.pending):
        kept = rows.birth != DAMAGED
        if not bool(kept.all()):
            lost.append(f"{int((~kept).sum())} of {len(rows)} pending rows of layer {layer}, stream {number}")
            pending[layer] = rows.select(kept)
    return attrs.evolve(state, stm=tuple(stm), pending=tuple(pending), newest=tuple(newest))
