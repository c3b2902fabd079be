"""Recover what is sound of a damaged directory, row by row.

Damaged rows are kept in place, with an impossible birth, while the journal is replayed: its records know rows by their
places. They are taken out at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mplus.config import Component
from mplus.errors import MemoryFileError
from mplus.memory.directory.checkpoint import check_layer, live_name
from mplus.memory.directory.checkpoint_manifest import LiveManifest
from mplus.memory.directory.journal import recover_records
from mplus.memory.directory.record import apply
from mplus.memory.format.earlier import in_present_form, renamed
from mplus.memory.format.entries import layout_from
from mplus.memory.format.load import COLUMNS
from mplus.memory.format.salvage import Salvaged, clean, read_sound_generator, read_sound_state
from mplus.rows import MemoryRows
from mplus.stores import STORES
from mplus.stores.base import StoreLayout
from mplus.stores.disk.block_file import BlockFile
from mplus.stores.disk.files import Folder
from mplus.stores.mmap import MmapStore, mapped_store
from mplus.stores.stack import stack_of

DAMAGED = -(2**62)
"""Birth of a row that is not what was written."""
PIECE_ROWS = 2**14


class _Forgiving(MmapStore):
    """A store from which rows may be removed that are not there (any more)."""

    def remove(self, layer: int, ids: Tensor) -> None:
        super().remove(layer, ids[torch.isin(ids, self.ids(layer))])


class _Marking:
    """Tensors of the state file; damaged rows have the birth ``DAMAGED``."""

    lasting: ClassVar[bool] = True

    def __init__(self, file: BlockFile, layout: StoreLayout) -> None:
        self.path, self._file = file.path, file
        self._columns = (*COLUMNS, *(name for name, _, _ in layout.extra))

    @property
    def names(self) -> Collection[str]:
        return self._file.spans.keys()

    def get(self, name: str) -> Tensor:
        """Return columns of rows whatever they are, all else as it was written.

        Raises MemoryFileError where it is damaged.
        """
        prefix, _, column = name.rpartition(".")
        if ".rows." not in renamed(name) or column not in self._columns:
            return self._file.read(name)
        tensor = self._file.unchecked(name).clone()
        if column == "birth" and tensor.dtype == torch.int64:
            tensor[~_sound(self._file, prefix, self._file.rows(name), self._columns)] = DAMAGED
        return tensor

    def zeros_like(self, name: str) -> Tensor:
        """Return zeros in place of a tensor that was damaged, by its present name."""
        names = {renamed(own): own for own in self._file.spans}
        return torch.zeros_like(self._file.unchecked(names[name]))


def _marked(nothing: MemoryRows, count: int) -> MemoryRows:
    """Return ``count`` damaged rows, for which those behind them keep their positions."""
    columns = {name: column.new_zeros(count, *column.shape[1:]) for name, column in nothing.columns().items()}
    return MemoryRows.of({**columns, "birth": torch.full((count,), DAMAGED)})


def _sound(file: BlockFile, prefix: str, rows: int, names: Iterable[str]) -> Tensor:
    """Return ``[rows]`` bool: the rows that are what was written, in columns of ``rows`` rows."""
    sound = torch.ones(rows, dtype=torch.bool)
    for name in ("id", *names):
        if f"{prefix}.{name}" in file.spans and file.rows(f"{prefix}.{name}") == rows:
            sound &= file.sound_rows(f"{prefix}.{name}")
    return sound


def salvage(folder: Path | Folder, manifest: LiveManifest) -> Salvaged:
    """Read all that is sound.

    Raises:
        MemoryFileError: the structure of the state file is damaged.
        UnknownNameError, PluginError, ConfigError: there is no such store as the manifest names.
    """
    found, layout = Salvaged(), layout_from(manifest.layout)
    mapped: list[MmapStore] = []
    file = BlockFile(folder / manifest.state.file, manifest.state)
    marking = _Marking(file, layout)
    reader = in_present_form(marking, manifest.earlier)
    for number, entry in enumerate(manifest.streams):
        found.stores.append(STORES.build(stack_of(Component.of(manifest.store)), layout))
        mapped.append(_store(folder, manifest, number, file, mapped_store(found.stores[-1]).layout, found.lost))
        state = read_sound_state(reader, number, entry, layout, mapped[-1], found.lost, _marked, marking.zeros_like)
        found.states.append(state)
        found.draws.append(read_sound_generator(reader, number, found.lost))
    _replay(folder, manifest, found, mapped, layout)
    # Records are replayed on bare mapped files; only now do the stores that the manifest names take these over.
    for store, rows in zip(found.stores, mapped, strict=True):
        mapped_store(store).layers = rows.layers
    for number, (state, store) in enumerate(zip(found.states, found.stores, strict=True)):
        found.states[number] = clean(number, state, store, found.lost)
    return found


def _replay(
    folder: Path | Folder, manifest: LiveManifest, found: Salvaged, mapped: Sequence[MmapStore], layout: StoreLayout
) -> None:
    """Make the changes in the journal, each of them wholly, up to the first that cannot be made."""
    path, count = folder / manifest.journal, 0
    before = list(found.states), list(found.draws), [store.layers for store in mapped]
    try:
        for payload in recover_records(path):
            apply(payload, found.states, mapped, found.draws, layout, f"{path}: record {count}", manifest.version)
            before = list(found.states), list(found.draws), [store.layers for store in mapped]
            count += 1
    except MemoryFileError as error:
        found.lost.append(f"what was written after the first {count} chunks of the journal ({error})")
        found.states[:], found.draws[:], layers = before
        for store, kept in zip(mapped, layers, strict=True):
            store.layers = kept


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
            try:
                rows = check_layer(file, layer, layout)
                live = _live(state, live_name(stream, place, layer), rows, lost)
            except MemoryFileError as error:
                lost.append(f"long-term rows of layer {layer}, stream {stream}: all that were in one file ({error})")
                continue
            sound = _sound(file, f"{layer}", rows, layout.columns())
            sound &= _ascending(file.unchecked(f"{layer}.id"), store.next_ids[layer], sound & live)
            sound &= file.unchecked(f"{layer}.id") < manifest.stores[stream].next_ids[layer]
            if gone := int((live & ~sound).sum()):
                lost.append(
                    f"{file.path}: {gone} of {int(live.sum())} long-term rows of layer {layer}, stream {stream}"
                )
            for places in (live & sound).nonzero().squeeze(1).split(PIECE_ROWS):
                columns = {name: file.unchecked(f"{layer}.{name}")[places] for name in layout.columns()}
                store.append_as(layer, file.unchecked(f"{layer}.id")[places], MemoryRows.of(columns))
    # No id is given twice: those of rows that are lost are passed over.
    store.next_ids = list(manifest.stores[stream].next_ids)
    return store


def _live(state: BlockFile, name: str, rows: int, lost: list[str]) -> Tensor:
    """Return ``[rows]`` bool: the rows that were not removed, as far as it is known.

    Raises MemoryFileError: unknown.
    """
    if name not in state.spans:
        return torch.ones(rows, dtype=torch.bool)
    live = state.unchecked(name)
    if live.shape != (rows,) or live.dtype != torch.bool:
        raise MemoryFileError(f"{state.path}: tensor {name!r} must be bool {[rows]}, got {list(live.shape)}")
    known = state.sound_rows(name)
    if not bool(known.all()):
        lost.append(f"{state.path}: {name}; rows of which nobody knows whether they were removed are left out")
    return live & known


def _ascending(ids: Tensor, least: int, usable: Tensor) -> Tensor:
    """Return ``[n]`` bool: the ``usable`` ids from ``least`` on that are larger than all usable ones before them."""
    # An id that is not usable stands below all others, so that it makes none behind it look out of order.
    known = ids.masked_fill(~(usable & (ids >= least)), least - 1)
    behind = known.cummax(0).values
    before = torch.cat([torch.tensor([least - 1]), behind[:-1]]) if len(ids) else behind
    return known > before
