"""Verify a saved memory from end to end, without a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from attrs import evolve
from torch import Tensor

from mplus.errors import MemoryFileError, MemoryMismatchError
from mplus.memory.directory.check import directory_faults
from mplus.memory.format.earlier import in_present_form
from mplus.memory.format.entries import StreamEntry, layout_from, state_class
from mplus.memory.format.folder import hold, lock
from mplus.memory.format.load import (
    check,
    check_names,
    read_generator,
    read_rows,
    read_sources,
    read_tail,
    read_texts,
    read_times,
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
            return list(_faults(manifest, file, in_present_form(file, manifest.earlier)))
    except MemoryFileError as error:
        return [str(error)]
    finally:
        held.release()


def _faults(manifest: Manifest, data: TensorReader, file: Tensors) -> Iterator[str]:
    """``file`` is the data file in its present form."""
    digest = digest_of_file(file.path)
    if digest != manifest.data.sha256:
        yield f"{file.path} must have the SHA-256 {manifest.data.sha256}, got {digest}: it was altered"
    superfluous = sorted(data.names() - manifest.data.tensors.keys())
    if superfluous:
        yield f"{file.path} must hold only the tensors in the manifest, got {superfluous[0]!r} too"
    yield from _fault(check_names, file, manifest.streams)
    known: list[Tensor | None] = []
    for number, stream in enumerate(manifest.streams):
        known.append(None)
        try:
            sources = read_sources(file, number, stream)
            sources.find(None)
            known[number] = sources.column("number")
        except (MemoryFileError, MemoryMismatchError) as error:
            yield f"{file.path}: the sources of stream {number} must be as they were written: {error}"
        yield from _stream(file, number, stream, layout_from(manifest.layout), known[number])
    for store in sorted({stream.store for stream in manifest.streams}):
        sharing = [number for number, stream in enumerate(manifest.streams) if stream.store == store]
        first = manifest.streams[sharing[0]]
        clock = min(manifest.streams[number].clock for number in sharing)
        parts = [numbers for number in sharing if (numbers := known[number]) is not None]
        numbers, streams = torch.cat([torch.empty(0, dtype=torch.int64), *parts]).unique(return_counts=True)
        common = numbers[streams == len(sharing)] if len(parts) == len(sharing) else None
        layout = layout_from(manifest.layout)
        for layer, count in enumerate(first.ltm):
            found: list[MemoryRows] = []
            yield from _rows(file, f"store.{store}.{layer}", count, clock, common, layout, found)
            if found and found[0].columns().keys() != layout.columns().keys():
                yield f"{file.path}: store.{store}.{layer} must have the columns {sorted(layout.columns())}"


def _stream(
    file: Tensors, number: int, stream: StreamEntry, layout: StoreLayout, known: Tensor | None
) -> Iterator[str]:
    """``known``: numbers of its sources; None: these cannot be read."""
    rows: dict[str, list[MemoryRows]] = {}
    layout, tensors, mark = evolve(layout, expiry=False), {}, f"stream.{number}.state."
    for tier, counts in stream.rows.items():
        found = rows.setdefault(tier, [])
        for layer, count in enumerate(counts):
            prefix = f"stream.{number}.rows.{tier}.{layer}"
            yield from _rows(file, prefix, count, stream.clock, known, layout, found)
    for name in file.tensors:
        if name.startswith(mark):
            try:
                tensors[name.removeprefix(mark)] = file.get(name)
            except MemoryFileError as error:
                yield str(error)
    if all(len(found) == len(stream.rows[tier]) for tier, found in rows.items()):
        yield from _fault(
            check,
            partial(state_class(stream.mechanism).from_parts, layout, clock=stream.clock),
            rows,
            tensors,
            where=f"{file.path}: {mark}*",
        )
    for layer, count in enumerate(stream.ltm):
        if (name := f"stream.{number}.usage.{layer}") in file.tensors:
            yield from _fault(read_times, file, name, count)
    if known is not None:
        yield from _fault(read_texts, file, number, known)
        yield from _fault(read_tail, file, number, known)
    yield from _fault(read_generator, file, number)


def _fault(read: Callable[..., object], *what: object, **named: object) -> Iterator[str]:
    """Return the message of the error that ``read(*what)`` raises, if any."""
    try:
        read(*what, **named)
    except MemoryFileError as error:
        yield str(error)


def _rows(
    file: Tensors,
    prefix: str,
    count: int,
    clock: int,
    known: Tensor | None,
    layout: StoreLayout,
    found: list[MemoryRows],
) -> Iterator[str]:
    """Yield faults of the rows of one layer; put the rows into ``found`` if they can be read."""
    try:
        rows = read_rows(file, prefix, count, layout)
    except MemoryFileError as error:
        yield str(error)
        return
    found.append(rows)
    for rule, kept in (*finite(rows), *rules(rows, clock, known)):
        if not bool(kept.all()):
            yield f"{file.path}: {prefix} must have {rule}, {int((~kept).sum())} of its {count} rows break it"
