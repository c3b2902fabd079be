"""Reading a saved memory: from its folder to streams and stores."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import evolve
from torch import Tensor

from mplus.config import Component
from mplus.errors import MemoryFileError, MemoryMismatchError
from mplus.eviction import EVICTION
from mplus.memory.budget import Budget
from mplus.memory.copying import check_device
from mplus.memory.engine import Engine
from mplus.memory.format.columns import check_columns
from mplus.memory.format.earlier import in_present_form
from mplus.memory.format.entries import StreamEntry, state_class
from mplus.memory.format.folder import hold, lock
from mplus.memory.format.manifest import Belonging, Manifest, check_belongs, read_manifest
from mplus.memory.format.rules import check_fits, check_rows, check_values
from mplus.memory.format.structure import LARGEST
from mplus.memory.format.tensors import TensorReader, Tensors
from mplus.memory.recompute import keeps_chunks, with_weights
from mplus.memory.sources.clock import Clock
from mplus.memory.sources.source import DTYPES as SOURCE_COLUMNS
from mplus.memory.sources.table import SourceTable
from mplus.memory.sources.writes import WRITE_DTYPES, WriteLog
from mplus.memory.state import StreamState
from mplus.memory.texts import NAMES, TAIL_NAMES, Texts, Waiting, generator_in, tail_from
from mplus.memory.transaction import Streams
from mplus.rows import MemoryRows
from mplus.stores import STORES
from mplus.stores.access_log import NEVER, AccessLog
from mplus.stores.base import MemoryStore, StoreLayout

COLUMNS = ("hidden", "birth", "source", "key", "expiry", "projected")
OF_STREAM = re.compile(
    r"stream\.(?P<stream>\d{1,9})\."
    rf"(rows\.(?P<list>\w+)\.(?P<layer>\d{{1,9}})\.(?P<column>\w+)|state\.[\w.]+|sources\.({'|'.join(SOURCE_COLUMNS)})"
    rf"|text\.({'|'.join(NAMES)})|tail\.({'|'.join(TAIL_NAMES)})|writes\.({'|'.join(WRITE_DTYPES)})|usage\.\d+|live\.\d+\.\d+|generator)"
)
OF_STORE = re.compile(r"store\.(?P<store>\d{1,9})\.\d+\.\w+(\.\w+)*")
"""Names of tensors."""


def load_streams(
    folder: str | Path,
    engine: Engine,
    store: Component | None,
    eviction: Component | None,
    bytes_budget: int | str | None,
    device: torch.device | str | None,
    clock: Clock | None = None,
) -> Streams:
    """Read a memory for the decoder behind ``engine``; one tensor at a time, each checked against the manifest.

    Args:
        folder: as given to ``save``.
        engine: must have the fingerprint that the memory was saved with.
        store: where long-term rows go; None: as the config says.
        eviction: None: the policy the memory had.
        bytes_budget: None: the budget the memory had, else that of the config.
        device: where rows are kept; None: where the decoder's embedding is.
        clock: of the memory; None: that of the computer.

    Raises:
        MemoryFileError: missing, truncated, altered, foreign, or newer file.
        MemoryMismatchError: made by another model, adapter, dtype or config.
    """
    here = hold(folder)
    held = lock(here, shared=True)
    try:
        manifest = read_manifest(here)
        facts = engine.fingerprint(manifest.fingerprint)
        check_belongs(manifest, facts, engine.layout, folder, any_weights=keeps_chunks(engine))
        with TensorReader(here, manifest.data) as opened:
            return streams_of(manifest, opened, folder, engine, store, eviction, bytes_budget, device, clock)
    finally:
        held.release()
        here.close()


def streams_of(
    manifest: Manifest,
    data: TensorReader,
    where: str | Path,
    engine: Engine,
    store: Component | None,
    eviction: Component | None,
    bytes_budget: int | str | None,
    device: torch.device | str | None,
    clock: Clock | None = None,
) -> Streams:
    """Return the streams of a memory of this decoder; the other arguments are those of ``load_streams``.

    Args:
        manifest: of it.
        data: the file that the manifest names, open.
        where: the memory is, in messages.
    """
    layout, mechanism = engine.layout, engine.mechanism
    policy = EVICTION.build(eviction or Component.of(manifest.eviction))
    # Rows stay what they were, whatever new memories of this decoder hold.
    layout = evolve(
        layout,
        projected_size=manifest.layout.projected_size,
        keeps_hidden=manifest.layout.keeps_hidden,
        expiry=layout.expiry or policy.lifetime is not None,
        device=layout.device if device is None else check_device(device),
    )
    file = in_present_form(data, manifest.earlier)
    check_names(file, manifest)
    lifetime = mechanism.lifetime(policy)
    states, stores, generators = read_streams(file, manifest, layout, store or engine.config.store, lifetime)
    with as_written(f"{where}"):
        check_fits(states, engine, layout)
    access_logs = [read_access_log(file, n, one) for n, one in enumerate(stores)] if policy.needs_access_log else []
    for entry, own in zip(manifest.streams, stores, strict=True):
        mechanism.load_index(own, read_index(file, entry.store, layout.layers))
    states = with_weights(states, stores, manifest.fingerprint, engine, where)
    wanted = manifest.bytes_budget if bytes_budget is None else bytes_budget
    budget = Budget.of(wanted, engine.config, mechanism, stores[0], len(states))
    return Streams(engine, states, stores, generators, policy, budget, access_logs, clock=clock)


def read_streams(
    file: Tensors, manifest: Manifest, layout: StoreLayout, kind: Component, lifetime: float | None = None
) -> tuple[list[StreamState], list[MemoryStore], list[torch.Generator]]:
    """Read everything in a data file.

    Args:
        file: open.
        manifest: beside it.
        layout: of the rows that are wanted; ``expiry`` may differ from the file's.
        kind: of store that long-term rows go to.
        lifetime: what rows that the file gives none get, where the layout has ``expiry``.

    Raises:
        MemoryFileError: the file does not hold what the manifest says.
    """
    entries = manifest.streams
    states = [read_state(file, number, entry, layout) for number, entry in enumerate(entries)]
    for number, state in enumerate(states):
        with as_written(f"{file.path}: stream {number}"):
            check_values(state)
    made: dict[int, MemoryStore] = {}
    for state, entry in zip(states, entries, strict=True):
        if entry.store not in made:
            expires = None
            if lifetime is not None and layout.expiry and not manifest.layout.expiry:  # their lifetime begins now
                expires = [lifetime + float(value) for value in state.expiry_clock(layout.layers)]
            made[entry.store] = _read_store(file, entry, kind, layout, expires)
        _check_stored(made[entry.store], state, f"{file.path}: store.{entry.store}")
    return (
        states,
        [made[entry.store] for entry in entries],
        [read_generator(file, number) for number in range(len(entries))],
    )


def check_names(file: Tensors, manifest: Belonging) -> None:
    """Raise MemoryFileError where a file holds a tensor that no such memory has."""
    streams, columns = manifest.streams, {*COLUMNS, *(column.name for column in manifest.layout.extra)}
    for name in file.names:
        found = OF_STREAM.fullmatch(name)
        if found is not None and int(found["stream"]) < len(streams):
            parts = streams[int(found["stream"])].rows.get(found["list"] or "", ())
            if found["list"] is None or (int(found["layer"]) < len(parts) and found["column"] in columns):
                continue
        if found is None and (store := OF_STORE.fullmatch(name)) and int(store["store"]) < len(streams):
            continue
        raise MemoryFileError(
            f"{file.path} must hold only tensors of a memory of {len(streams)} streams, got {name!r}: it was altered, "
            "or written by a newer mplus"
        )


def read_rows(file: Tensors, prefix: str, count: int, layout: StoreLayout) -> MemoryRows:
    """Read the rows of one layer.

    Raises MemoryFileError unless there are ``count`` and they look as ``layout`` says.
    """
    names = (*COLUMNS, *(name for name, _, _ in layout.extra))
    columns = {name: file.get(f"{prefix}.{name}") for name in names if f"{prefix}.{name}" in file.names}
    with as_written(f"{file.path}"):
        check_columns(columns, layout, prefix)
    if len(columns["birth"]) != count:
        raise MemoryFileError(f"{file.path}: {prefix} must have {count} rows, got {len(columns['birth'])}")
    return MemoryRows.of(columns)


@contextmanager
def as_written(where: str) -> Iterator[None]:
    """Raise MemoryFileError, which says where, for a MemoryMismatchError that is raised inside."""
    try:
        yield
    except MemoryMismatchError as error:
        raise MemoryFileError(f"{where} must be what was written, and does not fit together: {error}") from error


def read_state(file: Tensors, number: int, entry: StreamEntry, layout: StoreLayout) -> StreamState:
    """Read a stream but for its long-term rows; values are still to be checked (``mplus.memory.format.rules``).

    Raises MemoryFileError where the file does not hold what ``entry`` says.
    """
    form = evolve(layout, expiry=False)
    rows = {
        name: [
            _kept(read_rows(file, f"stream.{number}.rows.{name}.{layer}", count, form), layout, file)
            for layer, count in enumerate(counts)
        ]
        for name, counts in entry.rows.items()
    }
    # A view of a file that is closed soon is copied; one of a file that stays open is not.
    tensors = {name: value if file.lasting else value.clone() for name, value in read_all(file, number, "state")}
    sources = read_sources(file, number, entry)
    numbers = sources.column("number")
    texts, tail = read_texts(file, number, numbers), read_tail(file, number, numbers)
    writes = read_writes(file, number, numbers)
    try:
        return state_class(entry.mechanism).from_parts(
            layout, rows, tensors, clock=entry.clock, sources=sources, texts=texts, tail=tail, writes=writes
        )
    except MemoryMismatchError as error:
        raise MemoryFileError(f"{file.path}: stream {number} does not fit together: {error}") from error


def read_all(file: Tensors, number: int, kind: str) -> list[tuple[str, Tensor]]:
    """Read all tensors ``stream.<number>.<kind>.<name>``, with ``<name>``. Raises MemoryFileError as ``get``."""
    prefix = f"stream.{number}.{kind}."
    return [(name.removeprefix(prefix), file.get(name)) for name in file.names if name.startswith(prefix)]


def read_sources(file: Tensors, number: int, entry: StreamEntry) -> SourceTable:
    """Read the sources of a stream. Raises MemoryFileError unless they are as ``entry`` says."""
    try:
        table = SourceTable.from_tensors(dict(read_all(file, number, "sources")), entry.next_source)
    except MemoryMismatchError as error:
        raise MemoryFileError(f"{file.path}: stream.{number}.sources is not as it was written: {error}") from error
    if len(table) != entry.sources:
        raise MemoryFileError(f"{file.path}: stream.{number} must have {entry.sources} sources, got {len(table)}")
    return table


def _kept(rows: MemoryRows, layout: StoreLayout, file: Tensors) -> MemoryRows:
    """Return rows that outlast the file."""
    copy = not file.lasting
    return MemoryRows.of({name: column.to(layout.device, copy=copy) for name, column in rows.columns().items()})


def _read_store(
    file: Tensors,
    entry: StreamEntry,
    component: Component,
    layout: StoreLayout,
    expires: list[float] | None,
) -> MemoryStore:
    store = STORES.build(component, layout)
    for layer, count in enumerate(entry.ltm):
        prefix = f"store.{entry.store}.{layer}"
        rows = read_rows(file, prefix, count, evolve(layout, expiry=True))
        if not layout.expiry:
            rows = rows.replace(expiry=None)
        elif expires is not None:
            rows = rows.replace(expiry=torch.full((count,), expires[layer], dtype=torch.float64))
        try:
            store.append(layer, rows)
        except ValueError as error:
            raise MemoryFileError(f"{file.path}: {prefix} does not fit this memory: {error}") from error
    return store


def _check_stored(store: MemoryStore, state: StreamState, where: str) -> None:
    """Raise MemoryFileError unless the rows of a store, all of them in memory, can be those of a stream."""
    known = state.sources.column("number")
    for layer in range(store.layout.layers):
        for piece in store.chunks(layer, "birth", "source"):
            rows = MemoryRows.of(piece.columns)
            rows = rows if piece.live is None else rows.select(piece.live)
            with as_written(where):
                check_rows(rows, state.clock, known, f"layer {layer}")


def read_generator(file: Tensors, number: int) -> torch.Generator:
    """Read the generator of a stream. Raises MemoryFileError: there is none."""
    name = f"stream.{number}.generator"
    try:
        return generator_in(file.get(name).clone())
    except MemoryMismatchError as error:
        raise MemoryFileError(f"{file.path}: {name!r} {error}") from error


def read_texts(file: Tensors, number: int, known: Tensor) -> Texts | None:
    """Read the kept texts of a stream with the sources ``known``, or None where none were kept.

    Raises MemoryFileError unless they make sense.
    """
    names = {name: f"stream.{number}.text.{name}" for name in NAMES}
    if not any(name in file.names for name in names.values()):
        return None
    try:
        needed = {name: tensor for name, tensor in names.items() if name != "short" or tensor in file.names}
        texts = Texts.from_tensors({name: file.get(tensor) for name, tensor in needed.items()}, known)
    except MemoryMismatchError as error:
        raise MemoryFileError(
            f"{file.path}: stream.{number}.text must hold texts as they were kept: {error}"
        ) from error
    return texts


def read_tail(file: Tensors, number: int, known: Tensor) -> tuple[Waiting, ...]:
    """Read the text of a stream that waits for more. Raises MemoryFileError unless it makes sense."""
    names = {name: f"stream.{number}.tail.{name}" for name in TAIL_NAMES}
    if not any(name in file.names for name in names.values()):
        return ()
    try:
        return tail_from({name: file.get(tensor) for name, tensor in names.items()}, known)
    except MemoryMismatchError as error:
        raise MemoryFileError(f"{file.path}: stream.{number}.tail must hold text as it was kept: {error}") from error


def read_writes(file: Tensors, number: int, known: Tensor) -> WriteLog:
    """Read the writes to a stream that were given an id. Raises MemoryFileError unless they make sense."""
    try:
        return WriteLog.from_tensors(dict(read_all(file, number, "writes")), known)
    except MemoryMismatchError as error:
        raise MemoryFileError(f"{file.path}: stream.{number}.writes is not as it was written: {error}") from error


def read_access_log(file: Tensors, number: int, store: MemoryStore) -> AccessLog:
    """Read when the rows of a stream were last retrieved, as far as the file says.

    Raises MemoryFileError as ``get``.
    """
    access_log = AccessLog()
    for layer in range(store.layout.layers):
        name = f"stream.{number}.usage.{layer}"
        if name in file.names:
            access_log.set_times(layer, store.ids(layer), read_times(file, name, store.count(layer)))
    return access_log


def read_times(file: Tensors, name: str, count: int) -> Tensor:
    """Read when each of ``count`` rows was last retrieved. Raises MemoryFileError as ``get``."""
    times = file.get(name)
    if times.shape != (count,) or times.dtype != torch.int64:
        raise MemoryFileError(f"{file.path}: {name!r} must have a time for each of {count} rows")
    if not bool(((times == NEVER) | (times >= 0) & (times <= LARGEST)).all()):
        raise MemoryFileError(f"{file.path}: {name!r} must have times from 0 to {LARGEST}")
    return times


def read_index(file: Tensors, store: int, layers: int) -> list[dict[str, Tensor]]:
    """Read the tensors of the retriever's index of a store, layer by layer; {} where none was saved."""
    found = []
    for layer in range(layers):
        prefix = f"store.{store}.{layer}.index."
        names = [name for name in file.names if name.startswith(prefix)]
        found.append({name.removeprefix(prefix): file.get(name).clone() for name in names})
    return found
