"""Verify a saved memory from end to end, without a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import MemoryFileError, MemoryMismatchError
from mplus.memory.directory.offline import directory_faults
from mplus.memory.format.earlier import in_present_form
from mplus.memory.format.entries import StreamEntry, layout_from, state_class
from mplus.memory.format.folder import hold, lock
from mplus.memory.format.load import (
    as_written,
    check_names,
    read_generator,
    read_rows,
    read_sources,
    read_tail,
    read_texts,
    read_times,
    read_writes,
)
from mplus.memory.format.manifest import LIVE_FORMAT, Manifest, is_memory, read_manifest
from mplus.memory.format.rules import finite, rules
from mplus.memory.format.tensors import TensorReader, Tensors, digest_of_file
from mplus.rows import MemoryRows
from mplus.stores.base import StoreLayout


def verify(path: str | Path) -> list[str]:
    """Return the faults of the memory in the folder ``path``, a sentence each; none: it is sound.

    Reads every byte: the manifest, the checksums of the data file and of each tensor, and whether the values make
    sense (finite, written before the clock, from a known source).
    """
    try:
        folder = hold(path)
        if is_memory(folder, LIVE_FORMAT):
            return list(directory_faults(folder))
    except MemoryFileError as error:
        return [str(error)]
    held = lock(folder, shared=True)
    try:
        manifest = read_manifest(folder)
        with TensorReader(folder, manifest.data) as file:
            return data_faults(manifest, file)
    except MemoryFileError as error:
        return [str(error)]
    finally:
        held.release()


def data_faults(manifest: Manifest, data: TensorReader) -> list[str]:
    """Return the faults of the data file of a saved memory, a sentence each; every byte is read."""
    file = in_present_form(data, manifest.earlier)
    faults: list[str] = []
    digest = digest_of_file(file.path)
    if digest != manifest.data.sha256:
        faults.append(f"{file.path} must have the SHA-256 {manifest.data.sha256}, got {digest}: it was altered")
    superfluous = sorted(data.names_in_file() - manifest.data.tensors.keys())
    if superfluous:
        faults.append(f"{file.path} must hold only the tensors in the manifest, got {superfluous[0]!r} too")
    with _noting(faults):
        check_names(file, manifest)
    known: list[Tensor | None] = []
    for number, stream in enumerate(manifest.streams):
        known.append(None)
        try:
            sources = read_sources(file, number, stream)
            sources.find(None)
            known[number] = sources.column("number")
        except (MemoryFileError, MemoryMismatchError) as error:
            faults.append(f"{file.path}: the sources of stream {number} must be as they were written: {error}")
        _check_stream(file, number, stream, layout_from(manifest.layout), known[number], faults)
    for store in sorted({stream.store for stream in manifest.streams}):
        _check_store(file, store, manifest, known, faults)
    return faults


@contextmanager
def _noting(faults: list[str]) -> Iterator[None]:
    """Put the message of a MemoryFileError that is raised inside into ``faults``."""
    try:
        yield
    except MemoryFileError as error:
        faults.append(str(error))


def _check_store(
    file: Tensors, store: int, manifest: Manifest, known: Sequence[Tensor | None], faults: list[str]
) -> None:
    """Check the long-term rows of a store; ``known``: for each stream the numbers of its sources, if they are known."""
    sharing = [number for number, stream in enumerate(manifest.streams) if stream.store == store]
    # No row that streams share may be newer than the one that has written least, or of a source that one of them lacks.
    clock = min(manifest.streams[number].clock for number in sharing)
    parts = [numbers for number in sharing if (numbers := known[number]) is not None]
    numbers, streams = torch.cat([torch.empty(0, dtype=torch.int64), *parts]).unique(return_counts=True)
    common = numbers[streams == len(sharing)] if len(parts) == len(sharing) else None
    layout = layout_from(manifest.layout)
    for layer, count in enumerate(manifest.streams[sharing[0]].ltm):
        rows = _check_rows(file, f"store.{store}.{layer}", count, clock, common, layout, faults)
        if rows is not None and rows.columns().keys() != layout.columns().keys():
            faults.append(f"{file.path}: store.{store}.{layer} must have the columns {sorted(layout.columns())}")


def _check_stream(
    file: Tensors, number: int, stream: StreamEntry, layout: StoreLayout, known: Tensor | None, faults: list[str]
) -> None:
    """Check a stream but for sources and long-term rows; ``known``: numbers of its sources, if these are known."""
    rows: dict[str, list[MemoryRows | None]] = {}
    layout, tensors, mark = evolve(layout, expiry=False), {}, f"stream.{number}.state."
    for tier, counts in stream.rows.items():
        rows[tier] = [
            _check_rows(file, f"stream.{number}.rows.{tier}.{layer}", count, stream.clock, known, layout, faults)
            for layer, count in enumerate(counts)
        ]
    for name in file.names:
        if name.startswith(mark):
            with _noting(faults):
                tensors[name.removeprefix(mark)] = file.get(name)
    readable = {tier: [part for part in parts if part is not None] for tier, parts in rows.items()}
    if readable == rows:  # tensors are checked beside rows, so only where all of these can be read
        with _noting(faults), as_written(f"{file.path}: {mark}*"):
            state_class(stream.mechanism).from_parts(layout, readable, tensors, clock=stream.clock)
    for layer, count in enumerate(stream.ltm):
        if (name := f"stream.{number}.usage.{layer}") in file.names:
            with _noting(faults):
                read_times(file, name, count)
    # Each by itself, so that a fault in one part hides none in the others.
    if known is not None:
        with _noting(faults):
            read_texts(file, number, known)
        with _noting(faults):
            read_tail(file, number, known)
        with _noting(faults):
            read_writes(file, number, known)
    with _noting(faults):
        read_generator(file, number)


def _check_rows(
    file: Tensors, prefix: str, count: int, clock: int, known: Tensor | None, layout: StoreLayout, faults: list[str]
) -> MemoryRows | None:
    """Check the rows of one layer; returns them, or None where they cannot be read."""
    try:
        rows = read_rows(file, prefix, count, layout)
    except MemoryFileError as error:
        faults.append(str(error))
        return None
    faults += [
        f"{file.path}: {prefix} must have {rule}, {int((~kept).sum())} of its {count} rows break it"
        for rule, kept in (*finite(rows), *rules(rows, clock, known))
        if not bool(kept.all())
    ]
    return rows
