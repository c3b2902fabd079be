"""Checking a saved memory from end to end, without a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mplus.errors import MemoryFileError, MemoryMismatchError
from mplus.memory.durable.faults import faults
from mplus.memory.earlier import in_present_form
from mplus.memory.entries import LayoutEntry, StreamEntry
from mplus.memory.folder import hold, lock
from mplus.memory.manifest import LIVE_FORMAT, Manifest, is_memory, read_manifest
from mplus.memory.tensors import TensorReader, Tensors, digest_of_file
from mplus.memory.unpacking import check_names, read_generator, read_rows, read_sources, read_tail, read_texts
from mplus.rows import NO_SOURCE, MemoryRows

PIECE_ROWS = 1024


def verify(path: str | Path) -> list[str]:
    """Faults of the memory in the folder ``path``, saved or living there, one sentence each; none: it is sound.

    Reads every byte: the manifest, the checksums of the data file and of each tensor, and whether the values make
    sense (finite, written before the clock, from a known source).
    """
    try:
        folder = hold(path)
        if is_memory(folder, LIVE_FORMAT):
            return list(faults(folder))
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
        yield from _stream(file, number, stream, manifest.layout, known[number])
    for store in sorted({stream.store for stream in manifest.streams}):
        sharing = [number for number, stream in enumerate(manifest.streams) if stream.store == store]
        first = manifest.streams[sharing[0]]
        clock = max(manifest.streams[number].clock for number in sharing)
        for layer, count in enumerate(first.ltm):
            parts = [numbers for number in sharing if (numbers := known[number]) is not None]
            numbers = torch.cat(parts) if len(parts) == len(sharing) else None
            yield from _rows(file, f"store.{store}.{layer}", count, clock, numbers, manifest.layout.required)


def _stream(
    file: Tensors, number: int, stream: StreamEntry, layout: LayoutEntry, known: Tensor | None
) -> Iterator[str]:
    """``known``: numbers of its sources; None: these cannot be read."""
    for tier, counts in stream.rows.items():
        for layer, count in enumerate(counts):
            prefix = f"stream.{number}.rows.{tier}.{layer}"
            yield from _rows(file, prefix, count, stream.clock, known, layout.required)
    for name in file.tensors:
        if name.startswith(tuple(f"stream.{number}.{kind}." for kind in ("state", "usage"))):
            yield from _fault(file.get, name)
    if known is not None:
        yield from _fault(read_texts, file, number, known)
        yield from _fault(read_tail, file, number, known)
    yield from _fault(read_generator, file, number)


def _fault(read: Callable[..., object], *what: object) -> Iterator[str]:
    """What ``read(*what)`` says against the file, if anything."""
    try:
        read(*what)
    except MemoryFileError as error:
        yield str(error)


def _rows(
    file: Tensors, prefix: str, count: int, clock: int, known: Tensor | None, required: Sequence[str]
) -> Iterator[str]:
    try:
        rows = read_rows(file, prefix, count, required)
    except MemoryFileError as error:
        yield str(error)
        return
    for rule, wrong in _broken(rows, clock, known):
        if wrong:
            yield f"{file.path}: {prefix} must have {rule}, {wrong} of its {count} rows break it"


def _broken(rows: MemoryRows, clock: int, known: Tensor | None) -> Iterator[tuple[str, int]]:
    """Rules, and how many rows break each; ``known``: numbers of sources."""
    for name in ("hidden", "key", "projected"):
        column = rows.columns().get(name)
        if column is not None:
            pieces = column.split(PIECE_ROWS)  # the test takes as much room as what it looks at
            yield f"finite values in {name!r}", sum(int((~piece.isfinite().all(1)).sum()) for piece in pieces)
    yield f"births below the clock, {clock}", int((rows.birth >= clock).sum())
    if known is not None:
        yield "sources that the stream has", int(((rows.source != NO_SOURCE) & ~torch.isin(rows.source, known)).sum())
