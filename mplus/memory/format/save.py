"""Saving a memory to a folder (``mplus.memory.format.load`` reads it back).

Format version 3 is a folder with ``manifest.json`` (``mplus.memory.format.manifest``) and the safetensors file it
names. Its tensors are, of stream i (what is in brackets need not be there):

- ``stream.<i>.rows.<list>.<layer>.<column>``: the lists of rows of the mechanism but for the long-term ones;
- ``stream.<i>.state.<name>``: its other tensors;
- ``stream.<i>.sources.<column>``: the table of sources (``mplus.memory.sources.table``);
- [``stream.<i>.text.<name>``]: the texts that are kept;
- [``stream.<i>.tail.<name>``]: text that waits for more;
- [``stream.<i>.writes.<column>``]: writes that were given an id (``mplus.memory.sources.writes``);
- [``stream.<i>.usage.<layer>``]: when rows were last retrieved;
- ``stream.<i>.generator``.

``store.<i>.<layer>.<column>`` are long-term rows, [``store.<i>.<layer>.index.<name>``] what the retriever's index is
made of. A tensor of another name, or a field of the manifest that is not known, is refused. Ids of long-term rows are
not kept: the store that a memory is read into gives new ones, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

import attrs
from attrs import define
from torch import Tensor

import mplus
from mplus.config import Component, JsonValue
from mplus.errors import MemoryFileError
from mplus.eviction.base import EvictionPolicy
from mplus.memory.budget import Budget
from mplus.memory.engine import Engine
from mplus.memory.format.entries import ColumnEntry, DataEntry, LayoutEntry, StreamEntry, name_of
from mplus.memory.format.folder import (
    DATA,
    MANIFEST,
    TEMPORARY_NAME,
    check_free,
    create,
    flush,
    lock,
    prepare,
    remove,
    rename,
    temporary,
)
from mplus.memory.format.manifest import Manifest, is_memory, mechanism_in, read_manifest
from mplus.memory.format.tensors import write_tensors
from mplus.memory.sources.forget import without_unused_sources
from mplus.memory.state import StreamState, StreamView
from mplus.memory.texts import tail_tensors
from mplus.memory.transaction import Streams
from mplus.memory.weights_state import made_with
from mplus.stores.base import Column, StoreLayout, StoreView
from mplus.stores.disk.files import FileSystem, Folder, open_file, read_file, writable
from mplus.stores.disk.safetensors_io import Part

PIECE_BYTES = 2**26
"""Long-term rows are taken out of their store so many bytes at a time."""


@define(frozen=True, kw_only=True)
class ManifestHeader:
    """The entries of a manifest that say what a memory belongs to and how large it may be: see ``Manifest``."""

    fingerprint: dict[str, JsonValue]
    eviction: JsonValue
    bytes_budget: int | None = None
    capacity: int | None = None
    text_capacity: int | None = None

    @property
    def mechanism(self) -> str:
        """The name of the mechanism."""
        return Component.of(mechanism_in(self.fingerprint)).name

    @staticmethod
    def of(engine: Engine, eviction: EvictionPolicy, budget: Budget, states: Sequence[StreamState]) -> ManifestHeader:
        """Return the header for a memory that ``engine`` wrote, with the streams ``states``."""
        return ManifestHeader(
            fingerprint={**engine.fingerprint(), **made_with(state.weights for state in states)},
            eviction=Component(eviction.name, attrs.asdict(eviction.options)).plain(),
            bytes_budget=budget.bytes,
            capacity=budget.capacity,
            text_capacity=budget.text_tokens(engine.mechanism),
        )


Index = Sequence[Mapping[str, Tensor]]
"""Per layer, what the retriever's index of one store is made of."""


def saved_content(
    streams: Streams,
) -> tuple[Sequence[StreamView], Sequence[Tensor], ManifestHeader, Sequence[Index]]:
    """Return what a file says of streams, as they are at the call: see ``save``. Writers wait for an instant only."""
    with streams.state_lock:
        _, views = streams.versioned_snapshot()
        draws = streams.draws()
    header = ManifestHeader.of(streams.engine, streams.eviction, streams.budget, [view.state for view in views])
    return views, draws, header, [streams.engine.mechanism.index_tensors(view.store) for view in views]


def save(
    folder: str | Path,
    views: Sequence[StreamView],
    draws: Sequence[Tensor],
    header: ManifestHeader,
    indexes: Sequence[Index] = (),
    file_mode: int | None = None,
) -> None:
    """Write one memory; an older one in ``folder`` stays whole until this one is on disk.

    Args:
        folder: created with its parents where it does not exist.
        views: the streams.
        draws: state of each stream's generator.
        header: of the manifest, what it says of the memory as a whole.
        indexes: of each stream's store, if there are.
        file_mode: permission bits of the files; None: those of the save that is there, else their owner's alone.

    Raises:
        MemoryFileError: ``folder`` cannot be written, or holds something that is not a memory.
    """
    numbers = store_numbers([view.store for view in views])
    here = prepare(Path(folder), file_mode)
    held = lock(here)
    try:
        check_place(here)
        replace(here, views, draws, numbers, header, indexes)
    finally:
        held.release()
        here.close()


def check_place(folder: Folder) -> None:
    """Raise MemoryFileError unless a memory can be saved in ``folder``: it is empty, or there is one."""
    check_free(folder, is_memory(folder), _leftovers(folder))


def _leftovers(folder: Folder) -> set[str]:
    """Return names of files that interrupted saves left: temporary ones, and data files that they name."""
    with writable(folder):
        found = {name for name in folder.names() if TEMPORARY_NAME.fullmatch(name)}
        for name in sorted(found):
            begins = b""
            with suppress(OSError), os.fdopen(open_file(folder / name), "rb") as file:
                begins = file.read(2)
            if begins == b"{\n":  # a manifest, and not rows, which are too many to be read at once
                with suppress(MemoryFileError):
                    found.add(read_manifest(folder, name).data.file)
    return found


def replace(
    folder: Folder,
    views: Sequence[StreamView],
    draws: Sequence[Tensor],
    numbers: Sequence[int],
    header: ManifestHeader,
    indexes: Sequence[Index] = (),
) -> list[str]:
    """Replace the memory in a folder that is locked.

    Args:
        folder, views, draws, header, indexes: as for ``save``.
        numbers: of each stream's store.

    Returns:
        Names of files of the memory that was there before which could not be removed.
    """
    others = _leftovers(folder)
    views = [without_unused_sources(view) for view in views]
    with writable(folder), temporary(folder) as rows, temporary(folder) as head, temporary(folder) as before:
        with create(rows) as file:
            digest, entries = write_tensors(file, saved_parts(views, draws, numbers, indexes))
            size = file.tell()
            flush(file)
        name = DATA.format(digest[:32])
        manifest = manifest_of(views, numbers, header, DataEntry(file=name, bytes=size, sha256=digest, tensors=entries))
        with create(head) as file:
            file.write(manifest.to_json().encode())
            flush(file)
        with suppress(MemoryFileError):  # one that is damaged names nothing that is known to be a memory's
            others.add(read_manifest(folder).data.file)
            with create(before) as file:
                file.write(read_file(folder / MANIFEST))
                flush(file)
        FileSystem().sync_folder(folder)  # wherever a crash comes from here on, manifests name the new and the old rows
        rename(rows, name)
        rename(head, MANIFEST)
        return remove(folder, others - {name})


# ---------------------------------------------------------------------- out of a memory


def store_numbers(stores: Sequence[StoreView]) -> list[int]:
    """Return the number of each stream's store; streams that share one have the same."""
    first: dict[int, int] = {}
    return [first.setdefault(id(store), number) for number, store in enumerate(stores)]


def layout_entry(layout: StoreLayout) -> LayoutEntry:
    """Return the manifest's entry for the layout of rows."""
    return LayoutEntry(
        layers=layout.layers,
        hidden_size=layout.hidden_size,
        key_size=layout.key_size,
        expiry=layout.expiry,
        dtype=name_of(layout.dtype),
        projected_size=layout.projected_size,
        keeps_hidden=layout.keeps_hidden,
        extra=tuple(ColumnEntry(name=name, shape=shape, dtype=name_of(dtype)) for name, shape, dtype in layout.extra),
        key_dtype=None if layout.key_dtype is None else name_of(layout.key_dtype),
    )


def stream_entry(view: StreamView, store: int, mechanism: str) -> StreamEntry:
    """Return the manifest's entry for a stream of a mechanism, whose store has this number."""
    state = view.state
    return StreamEntry(
        mechanism=mechanism,
        clock=state.clock,
        sources=len(state.sources),
        next_source=state.sources.next_number,
        rows={name: tuple(map(len, parts)) for name, parts in state.row_lists().items()},
        ltm=tuple(map(view.store.count, range(view.store.layout.layers))),
        store=store,
    )


def manifest_of(
    views: Sequence[StreamView], numbers: Sequence[int], header: ManifestHeader, data: DataEntry
) -> Manifest:
    """Return the manifest of a memory; arguments as of ``replace``, ``data``: its file of tensors."""
    return Manifest(
        written_by=mplus.__version__,
        fingerprint=header.fingerprint,
        layout=layout_entry(views[0].store.layout),
        eviction=header.eviction,
        bytes_budget=header.bytes_budget,
        capacity=header.capacity,
        text_capacity=header.text_capacity,
        streams=tuple(stream_entry(view, n, header.mechanism) for view, n in zip(views, numbers, strict=True)),
        data=data,
    )


def saved_parts(
    views: Sequence[StreamView], draws: Sequence[Tensor], numbers: Sequence[int], indexes: Sequence[Index] = ()
) -> list[Part]:
    """Return all tensors of a memory; arguments as of ``replace``."""
    saved = dict(zip(numbers, indexes, strict=False))  # there may be no indexes
    index = [part for number, tensors in saved.items() for part in index_parts(number, tensors)]
    return [*_parts(views, draws, numbers), *index]


def _parts(views: Sequence[StreamView], draws: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[Part]:
    for i, (view, draw) in enumerate(zip(views, draws, strict=True)):
        yield from stream_parts(i, view, draw)
    for number, store in {number: view.store for number, view in zip(numbers, views, strict=True)}.items():
        for layer in range(store.layout.layers):
            count = store.count(layer)
            for column, (shape, dtype) in store.layout.columns().items():
                pieces = partial(_pieces, store, layer, column)
                yield Part(f"store.{number}.{layer}.{column}", dtype, (count, *shape), pieces)


def index_parts(number: int, index: Index) -> Iterator[Part]:
    """Yield the tensors of the retriever's index of a store."""
    for layer, tensors in enumerate(index):
        for name, tensor in tensors.items():
            yield Part.whole(f"store.{number}.{layer}.index.{name}", tensor)


def stream_parts(number: int, view: StreamView, draw: Tensor) -> Iterator[Part]:
    """Yield all tensors of a stream but its long-term rows."""
    for name, tensor in _of_stream(view):
        yield Part.whole(f"stream.{number}.{name}", tensor)
    yield Part.whole(f"stream.{number}.generator", draw)


def _of_stream(view: StreamView) -> Iterator[tuple[str, Tensor]]:
    state = view.state
    for name, parts in state.row_lists().items():
        for layer, rows in enumerate(parts):
            for column, tensor in rows.columns().items():
                yield f"rows.{name}.{layer}.{column}", tensor
    found = {
        "state": state.tensors(),
        "sources": state.sources.tensors(),
        "text": {} if state.texts is None else state.texts.tensors(),
        "tail": tail_tensors(state.tail),
        "writes": state.writes.tensors(),
    }
    for kind, tensors in found.items():
        for name, tensor in tensors.items():
            yield f"{kind}.{name}", tensor
    if view.access_log is not None:
        for layer in range(view.store.layout.layers):
            yield f"usage.{layer}", view.access_log.times(layer, view.store.ids(layer))


def _pieces(store: StoreView, layer: int, column: str) -> Iterable[Tensor]:
    further = {name for name, _, _ in store.layout.extra}
    if column not in {"hidden", "projected", *further}:
        values = store.column(layer, cast("Column", column))
        return [] if values is None else [values]
    step = max(1, PIECE_BYTES // store.layout.row_bytes)
    return (store.gather(layer, ids).columns()[column] for ids in store.ids(layer).split(step))
