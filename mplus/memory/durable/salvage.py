"""What is sound in a directory, row by row.

Damaged rows are kept in place, with an impossible birth, while the journal is replayed: its records know rows by their
places. They are taken out at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from mplus.memory.files import layout_from
from mplus.memory.stream import StreamState
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

        texts = [name for name in file.stretches if ".text." in name]
        damaged = {name.partition(".text.")[0] for name in texts if not self._is_sound(name)}
        self._gone = {name for name in texts if name.partition(".text.")[0] in damaged}
        lost += [f"{self.path}: the kept texts of {stream}" for stream in sorted(damaged)]

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
    reader = _Marking(file, found.lost)
    for number, entry in enumerate(manifest.streams):
        found.states.append(read_state(reader, number, entry, layout, manifest.layout.required))
        found.draws.append(read_generator(reader, number).get_state())
        found.stores.append(build_store(kind_of(Component.of(manifest.store)), layout))
        mapped.append(_store(folder, manifest, number, file, innermost(found.stores[-1]).layout, found.lost))
    path, count = folder / manifest.journal, 0
    try:
        for payload in recovered(path):
            apply(payload, found.states, mapped, found.draws, layout, f"{path}: record {count}")
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
