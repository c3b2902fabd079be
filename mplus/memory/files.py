"""Saving a memory to a folder and reading it back.

Format version 1 is a folder with ``manifest.json`` (``mplus.memory.manifest``) and the safetensors file it names. Its
tensors are ``stream.<i>.<stm|pending>.<layer>.<column>``, ``stream.<i>.newest.<layer>`` (where rows have no hidden
states), ``stream.<i>.counter.<name>``, ``stream.<i>.generator`` and
``store.<i>.<layer>.<column>``. Ids of long-term rows are not kept: the store that a memory is read into gives new ones,
in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

import mplus
from mplus.config import Component
from mplus.errors import MemoryFileError
from mplus.memory.engine import Engine
from mplus.memory.folder import (
    DATA,
    MANIFEST,
    check_free,
    flush,
    lock,
    prepare,
    remove_others,
    rename,
    temporary,
    writable,
)
from mplus.memory.manifest import (
    DataEntry,
    LayoutEntry,
    Manifest,
    StreamEntry,
    check_belongs,
    is_memory,
    name_of,
    read_manifest,
)
from mplus.memory.memory import Memory
from mplus.memory.stream import StreamState, StreamView
from mplus.memory.tensors import Part, TensorReader, write_tensors
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout, StoreView
from mplus.stores.build import build_eviction, build_store
from mplus.stores.eviction import EvictionPolicy

PIECE_BYTES = 2**26
"""Long-term rows are taken out of their store so many bytes at a time."""

COLUMNS = ("hidden", "birth", "source", "key", "expiry", "projected")


def save(
    folder: str | Path,
    views: Sequence[StreamView],
    draws: Sequence[Tensor],
    engine: Engine,
    eviction: EvictionPolicy,
) -> None:
    """Write one memory; an older one in ``folder`` stays whole until this one is on disk.

    Args:
        folder: created with its parents where it does not exist.
        views: the streams.
        draws: state of each stream's generator.
        engine: the decoder, for its fingerprint.
        eviction: the memory's policy.

    Raises:
        MemoryFileError: ``folder`` cannot be written, or holds something that is not a memory.
    """
    folder = Path(folder)
    numbers = _store_numbers(views)
    prepare(folder)
    handle = lock(folder)
    try:
        check_free(folder, is_memory(folder))
        _replace(folder, views, draws, numbers, engine, eviction)
    finally:
        os.close(handle)


def _replace(
    folder: Path,
    views: Sequence[StreamView],
    draws: Sequence[Tensor],
    numbers: Sequence[int],
    engine: Engine,
    eviction: EvictionPolicy,
) -> None:
    with writable(folder), temporary(folder) as rows, temporary(folder) as head:
        with rows.open("xb") as file:
            digest, entries = write_tensors(file, list(_parts(views, draws, numbers)))
            size = file.tell()
            flush(file)
        name = DATA.format(digest[:32])
        manifest = Manifest(
            written_by=mplus.__version__,
            fingerprint=engine.fingerprint(),
            layout=_layout_entry(views[0].store.layout),
            eviction=Component(eviction.name, attrs.asdict(eviction.options)).plain(),
            streams=tuple(map(_stream_entry, views, numbers)),
            data=DataEntry(file=name, bytes=size, sha256=digest, tensors=entries),
        )
        with head.open("xb") as file:
            file.write(manifest.to_json().encode())
            flush(file)
        rename(rows, name)
        rename(head, MANIFEST)
        remove_others(folder, name)


def load(
    folder: str | Path,
    engine: Engine,
    *,
    tokenizer: Any = None,
    store: Component | None = None,
    eviction: Component | None = None,
    device: torch.device | str | None = None,
) -> Memory:
    """Read a memory for the decoder behind ``engine``; one tensor at a time, each checked against the manifest.

    Args:
        folder: as given to ``save``.
        engine: must have the fingerprint that the memory was saved with.
        tokenizer: lets ``Memory.write`` take text.
        store: where long-term rows go; default: as the config says.
        eviction: default: the policy the memory had.
        device: where rows are kept; default: where the decoder's embedding is.

    Raises:
        MemoryFileError: missing, truncated, altered, foreign, or newer file.
        MemoryMismatchError: made by another model, adapter, dtype or config.
    """
    folder = Path(folder)
    handle = lock(folder, shared=True)
    try:
        manifest = read_manifest(folder)
        layout = engine.layout
        check_belongs(manifest, engine.fingerprint(), layout.dtype, folder)
        # Rows stay what they were, whatever new memories of this decoder hold.
        layout = attrs.evolve(
            layout, projected_size=manifest.layout.projected_size, keeps_hidden=manifest.layout.keeps_hidden
        )
        if device is not None:
            layout = attrs.evolve(layout, device=torch.device(device))
        with TensorReader(folder, manifest.data) as file:
            kind = store or engine.config.store
            required = manifest.layout.required
            stores = {entry.store: _read_store(file, entry, kind, layout, required) for entry in manifest.streams}
            states = [
                _read_state(file, number, entry, layout, required) for number, entry in enumerate(manifest.streams)
            ]
            generators = [read_generator(file, number) for number in range(len(states))]
    finally:
        os.close(handle)
    return Memory(
        engine,
        states,
        [stores[entry.store] for entry in manifest.streams],
        generators,
        build_eviction(eviction or Component.of(manifest.eviction)),
        tokenizer,
    )


# ---------------------------------------------------------------------- out of a memory


def _store_numbers(views: Sequence[StreamView]) -> list[int]:
    """Number of each stream's store: streams that share one have the same."""
    first: dict[int, int] = {}
    return [first.setdefault(id(view.store), number) for number, view in enumerate(views)]


def _layout_entry(layout: StoreLayout) -> LayoutEntry:
    return LayoutEntry(
        layers=layout.layers,
        hidden_size=layout.hidden_size,
        key_size=layout.key_size,
        expiry=layout.expiry,
        dtype=name_of(layout.dtype),
        projected_size=layout.projected_size,
        keeps_hidden=layout.keeps_hidden,
    )


def _stream_entry(view: StreamView, store: int) -> StreamEntry:
    state = view.state
    return StreamEntry(
        clock=state.clock,
        sources=state.sources,
        stm=tuple(map(len, state.stm)),
        pending=tuple(map(len, state.pending)),
        ltm=tuple(map(view.store.count, range(view.store.layout.layers))),
        store=store,
    )


def _parts(views: Sequence[StreamView], draws: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[Part]:
    for i, (view, draw) in enumerate(zip(views, draws, strict=True)):
        state = view.state
        for tier, layers in (("stm", state.stm), ("pending", state.pending)):
            for layer, rows in enumerate(layers):
                for column, tensor in rows.columns().items():
                    yield _whole(f"stream.{i}.{tier}.{layer}.{column}", tensor)
        for layer, hidden in enumerate(state.newest):
            yield _whole(f"stream.{i}.newest.{layer}", hidden)
        for name, counter in state.counters.items():
            yield _whole(f"stream.{i}.counter.{name}", counter)
        yield _whole(f"stream.{i}.generator", draw)
    for number, store in {number: view.store for number, view in zip(numbers, views, strict=True)}.items():
        for layer in range(store.layout.layers):
            count = store.count(layer)
            for column, (shape, dtype) in store.layout.columns().items():
                pieces = partial(_pieces, store, layer, column)
                yield Part(f"store.{number}.{layer}.{column}", dtype, (count, *shape), pieces)


def _whole(name: str, tensor: Tensor) -> Part:
    return Part(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def _pieces(store: StoreView, layer: int, column: Any) -> Iterable[Tensor]:
    if column not in ("hidden", "projected"):
        values = store.column(layer, column)
        return [] if values is None else [values]
    step = max(1, PIECE_BYTES // store.layout.row_bytes)
    return (store.gather(layer, ids).columns()[column] for ids in store.ids(layer).split(step))


# ---------------------------------------------------------------------- into a memory


def read_rows(file: TensorReader, prefix: str, count: int, required: Sequence[str]) -> MemoryRows:
    """The rows of one layer. Raises MemoryFileError unless there are ``count`` in every column, ``required`` or not."""
    columns = {column: f"{prefix}.{column}" for column in COLUMNS if f"{prefix}.{column}" in file.data.tensors}
    for column in required:
        columns.setdefault(column, f"{prefix}.{column}")  # missing: the reader says so
    rows = {column: file.get(name) for column, name in columns.items()}
    for column, values in rows.items():
        if values.shape[:1] != (count,):
            raise MemoryFileError(f"{file.path}: {columns[column]!r} must have {count} rows, got {list(values.shape)}")
    return MemoryRows.of(rows)


def _read_state(
    file: TensorReader, number: int, entry: StreamEntry, layout: StoreLayout, required: Sequence[str]
) -> StreamState:
    def tier(name: str, counts: Sequence[int]) -> tuple[MemoryRows, ...]:
        found = []
        for layer, count in enumerate(counts):
            rows = read_rows(file, f"stream.{number}.{name}.{layer}", count, required)
            found.append(_copied(rows, layout))
        return tuple(found)

    prefix = f"stream.{number}.counter."
    counters = {
        name.removeprefix(prefix): file.get(name).clone() for name in file.data.tensors if name.startswith(prefix)
    }
    newest: tuple[Tensor, ...] = ()
    if not layout.keeps_hidden:
        names = [f"stream.{number}.newest.{layer}" for layer in range(layout.layers)]
        newest = tuple(file.get(name).to(layout.device, copy=True) for name in names)
    return StreamState(
        newest=newest,
        stm=tier("stm", entry.stm),
        pending=tier("pending", entry.pending),
        clock=entry.clock,
        sources=entry.sources,
        counters=counters,
    )


def _copied(rows: MemoryRows, layout: StoreLayout) -> MemoryRows:
    """Rows that no longer depend on the file."""
    return MemoryRows.of({name: column.to(layout.device, copy=True) for name, column in rows.columns().items()})


def _read_store(
    file: TensorReader, entry: StreamEntry, component: Component, layout: StoreLayout, required: Sequence[str]
) -> MemoryStore:
    store = build_store(component, layout)
    for layer, count in enumerate(entry.ltm):
        prefix = f"store.{entry.store}.{layer}"
        rows = read_rows(file, prefix, count, required)
        try:
            store.append(layer, rows)
        except ValueError as error:
            raise MemoryFileError(f"{file.path}: {prefix} does not fit this memory: {error}") from error
    return store


def read_generator(file: TensorReader, number: int) -> torch.Generator:
    """The generator of a stream."""
    generator = torch.Generator()
    name = f"stream.{number}.generator"
    try:
        generator.set_state(file.get(name).clone())
    except (RuntimeError, TypeError) as error:
        raise MemoryFileError(f"{file.path}: {name!r} must be the state of a torch.Generator: {error}") from error
    return generator
