"""From the data file of a saved memory to streams and stores."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mplus.config import Component
from mplus.errors import MemoryFileError, MemoryMismatchError
from mplus.memory.entries import StreamEntry
from mplus.memory.manifest import Manifest
from mplus.memory.source import DTYPES as SOURCE_COLUMNS
from mplus.memory.sources import SourceTable
from mplus.memory.stream import StreamState
from mplus.memory.tensors import Tensors
from mplus.memory.texts import NAMES, TAIL_NAMES, Texts, Waiting, tail_from
from mplus.rows import MemoryRows
from mplus.stores.base import MemoryStore, StoreLayout
from mplus.stores.build import build_store
from mplus.stores.usage import Usage

COLUMNS = ("hidden", "birth", "source", "key", "expiry", "projected")
OF_STREAM = re.compile(
    r"stream\.(?P<stream>\d{1,9})\."
    rf"(rows\.(?P<list>\w+)\.(?P<layer>\d{{1,9}})\.({'|'.join(COLUMNS)})|state\.[\w.]+|sources\.({'|'.join(SOURCE_COLUMNS)})"
    rf"|text\.({'|'.join(NAMES)})|tail\.({'|'.join(TAIL_NAMES)})|usage\.\d+|live\.\d+\.\d+|generator)"
)
OF_STORE = re.compile(r"store\.(?P<store>\d{1,9})\.\d+\.\w+(\.\w+)*")
"""Names of tensors."""


def read_streams(
    file: Tensors, manifest: Manifest, layout: StoreLayout, kind: Component, lifetime: float | None = None
) -> tuple[list[StreamState], list[MemoryStore], list[torch.Generator]]:
    """What is in a data file.

    Args:
        file: open.
        manifest: beside it.
        layout: of the rows that are wanted; ``expiry`` may differ from the file's.
        kind: of store that long-term rows go to.
        lifetime: what rows that the file gives none get, where the layout has ``expiry``.

    Raises:
        MemoryFileError: the file does not hold what the manifest says.
    """
    required, entries = manifest.layout.required, manifest.streams
    states = [read_state(file, number, entry, layout, required) for number, entry in enumerate(entries)]
    made: dict[int, MemoryStore] = {}
    for state, entry in zip(states, entries, strict=True):
        if entry.store not in made:
            expires = None if manifest.layout.expiry else _expires(state, layout, lifetime)
            made[entry.store] = _read_store(file, entry, kind, layout, required, expires)
    return (
        states,
        [made[entry.store] for entry in entries],
        [read_generator(file, number) for number in range(len(entries))],
    )


def check_names(file: Tensors, streams: Sequence[StreamEntry]) -> None:
    """Raise MemoryFileError where a file holds a tensor that no such memory has."""
    for name in file.tensors:
        found = OF_STREAM.fullmatch(name)
        if found is not None and int(found["stream"]) < len(streams):
            parts = streams[int(found["stream"])].rows.get(found["list"] or "", ())
            if found["list"] is None or int(found["layer"]) < len(parts):
                continue
        if found is None and (store := OF_STORE.fullmatch(name)) and int(store["store"]) < len(streams):
            continue
        raise MemoryFileError(
            f"{file.path} must hold only tensors of a memory of {len(streams)} streams, got {name!r}: it was altered, "
            "or written by a newer mplus"
        )


def read_rows(file: Tensors, prefix: str, count: int, required: Sequence[str]) -> MemoryRows:
    """The rows of one layer. Raises MemoryFileError unless there are ``count`` in every column, ``required`` or not."""
    columns = {column: f"{prefix}.{column}" for column in COLUMNS if f"{prefix}.{column}" in file.tensors}
    for column in required:
        columns.setdefault(column, f"{prefix}.{column}")  # missing: the reader says so
    rows = {column: file.get(name) for column, name in columns.items()}
    for column, values in rows.items():
        if values.shape[:1] != (count,):
            raise MemoryFileError(f"{file.path}: {columns[column]!r} must have {count} rows, got {list(values.shape)}")
    return MemoryRows.of(rows)


def read_state(
    file: Tensors, number: int, entry: StreamEntry, layout: StoreLayout, required: Sequence[str]
) -> StreamState:
    """A stream, but for its long-term rows. Raises MemoryFileError where the file does not hold what ``entry`` says."""
    rows = {
        name: [
            _kept(read_rows(file, f"stream.{number}.rows.{name}.{layer}", count, required), layout, file)
            for layer, count in enumerate(counts)
        ]
        for name, counts in entry.rows.items()
    }
    tensors = {name: value if file.lasting else value.clone() for name, value in read_all(file, number, "state")}
    sources = read_sources(file, number, entry)
    numbers = sources.column("number")
    texts, tail = read_texts(file, number, numbers), read_tail(file, number, numbers)
    try:
        return StreamState.from_parts(layout, rows, tensors, clock=entry.clock, sources=sources, texts=texts, tail=tail)
    except MemoryMismatchError as error:
        raise MemoryFileError(f"{file.path}: stream {number} does not fit together: {error}") from error


def read_all(file: Tensors, number: int, kind: str) -> list[tuple[str, Tensor]]:
    """All tensors ``stream.<number>.<kind>.<name>``, by this name. Raises MemoryFileError as ``get``."""
    prefix = f"stream.{number}.{kind}."
    return [(name.removeprefix(prefix), file.get(name)) for name in file.tensors if name.startswith(prefix)]


def read_sources(file: Tensors, number: int, entry: StreamEntry) -> SourceTable:
    """The sources of a stream. Raises MemoryFileError unless they are as ``entry`` says."""
    try:
        table = SourceTable.from_tensors(dict(read_all(file, number, "sources")), entry.next_source)
    except MemoryMismatchError as error:
        raise MemoryFileError(f"{file.path}: stream.{number}.sources is not as it was written: {error}") from error
    if len(table) != entry.sources:
        raise MemoryFileError(f"{file.path}: stream.{number} must have {entry.sources} sources, got {len(table)}")
    return table


def _kept(rows: MemoryRows, layout: StoreLayout, file: Tensors) -> MemoryRows:
    """Rows that last when the file is closed."""
    copy = not file.lasting
    return MemoryRows.of({name: column.to(layout.device, copy=copy) for name, column in rows.columns().items()})


def _expires(state: StreamState, layout: StoreLayout, lifetime: float | None) -> list[float] | None:
    """When rows of each layer expire whose lifetime begins now; None: they do not."""
    if not layout.expiry or lifetime is None:
        return None
    elapsed = state.counters.get("decayed", torch.zeros(layout.layers))
    return [lifetime + float(value) for value in elapsed]


def _read_store(
    file: Tensors,
    entry: StreamEntry,
    component: Component,
    layout: StoreLayout,
    required: Sequence[str],
    expires: list[float] | None,
) -> MemoryStore:
    store = build_store(component, layout)
    for layer, count in enumerate(entry.ltm):
        prefix = f"store.{entry.store}.{layer}"
        rows = read_rows(file, prefix, count, required)
        if not layout.expiry:
            rows = rows.replace(expiry=None)
        elif expires is not None:
            rows = rows.replace(expiry=torch.full((count,), expires[layer], dtype=torch.float64))
        try:
            store.append(layer, rows)
        except ValueError as error:
            raise MemoryFileError(f"{file.path}: {prefix} does not fit this memory: {error}") from error
    return store


def read_generator(file: Tensors, number: int) -> torch.Generator:
    """The generator of a stream."""
    generator = torch.Generator()
    name = f"stream.{number}.generator"
    try:
        generator.set_state(file.get(name).clone())
    except (RuntimeError, TypeError) as error:
        raise MemoryFileError(f"{file.path}: {name!r} must be the state of a torch.Generator: {error}") from error
    return generator


def read_texts(file: Tensors, number: int, known: Tensor) -> Texts | None:
    """The kept texts of a stream with the sources ``known``, or None where none were kept.

    Raises MemoryFileError unless they make sense.
    """
    names = {name: f"stream.{number}.text.{name}" for name in NAMES}
    if not any(name in file.tensors for name in names.values()):
        return None
    try:
        texts = Texts.from_tensors({name: file.get(tensor) for name, tensor in names.items()}, known)
        torch.Generator().set_state(texts.generator)
    except (RuntimeError, TypeError, MemoryMismatchError) as error:
        raise MemoryFileError(
            f"{file.path}: stream.{number}.text must hold texts as they were kept: {error}"
        ) from error
    return texts


def read_tail(file: Tensors, number: int, known: Tensor) -> tuple[Waiting, ...]:
    """The text of a stream that waits for more. Raises MemoryFileError unless it makes sense."""
    names = {name: f"stream.{number}.tail.{name}" for name in TAIL_NAMES}
    if not any(name in file.tensors for name in names.values()):
        return ()
    try:
        return tail_from({name: file.get(tensor) for name, tensor in names.items()}, known)
    except MemoryMismatchError as error:
        raise MemoryFileError(f"{file.path}: stream.{number}.tail must hold text as it was kept: {error}") from error


def read_usage(file: Tensors, number: int, store: MemoryStore) -> Usage:
    """When the rows of a stream were last retrieved, as far as the file says. Raises MemoryFileError as ``get``."""
    usage = Usage()
    for layer in range(store.layout.layers):
        name = f"stream.{number}.usage.{layer}"
        if name in file.tensors:
            times, ids = file.get(name), store.ids(layer)
            if times.shape != ids.shape or times.dtype != torch.int64:
                raise MemoryFileError(f"{file.path}: {name!r} must have a time for each of {len(ids)} rows")
            usage.replace(layer, ids, times)
    return usage


def read_index(file: Tensors, store: int, layers: int) -> list[dict[str, Tensor]]:
    """Per layer, what the retriever's index of a store was made of; {} where none was saved."""
    found = []
    for layer in range(layers):
        prefix = f"store.{store}.{layer}.index."
        names = [name for name in file.tensors if name.startswith(prefix)]
        found.append({name.removeprefix(prefix): file.get(name).clone() for name in names})
    return found
