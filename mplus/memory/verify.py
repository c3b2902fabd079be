"""Checking a saved memory from end to end, without a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mplus.errors import MemoryFileError
from mplus.memory.durable.faults import faults
from mplus.memory.folder import hold, lock
from mplus.memory.manifest import LIVE_FORMAT, LayoutEntry, Manifest, StreamEntry, is_memory, read_manifest
from mplus.memory.tensors import TensorReader, digest_of_file
from mplus.memory.unpacking import read_generator, read_rows, read_texts
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
            return list(_faults(manifest, file))
    except MemoryFileError as error:
        return [str(error)]
    finally:
        held.release()


def _faults(manifest: Manifest, file: TensorReader) -> Iterator[str]:
    digest = digest_of_file(file.path)
    if digest != manifest.data.sha256:
        yield f"{file.path} must have the SHA-256 {manifest.data.sha256}, got {digest}: it was altered"
    superfluous = sorted(file.names() - manifest.data.tensors.keys())
    if superfluous:
        yield f"{file.path} must hold only the tensors in the manifest, got {superfluous[0]!r} too"
    for number, stream in enumerate(manifest.streams):
        yield from _stream(file, number, stream, manifest.layout)
    for store in sorted({stream.store for stream in manifest.streams}):
        sharing = [stream for stream in manifest.streams if stream.store == store]
        for layer, count in enumerate(sharing[0].ltm):
            yield from _rows(file, f"store.{store}.{layer}", count, sharing, manifest.layout.required)


def _stream(file: TensorReader, number: int, stream: StreamEntry, layout: LayoutEntry) -> Iterator[str]:
    for tier, counts in (("stm", stream.stm), ("pending", stream.pending)):
        for layer, count in enumerate(counts):
            yield from _rows(file, f"stream.{number}.{tier}.{layer}", count, [stream], layout.required)
    for name in file.data.tensors:
        if name.startswith(tuple(f"stream.{number}.{kind}." for kind in ("counter", "newest", "usage"))):
            yield from _fault(file.get, name)
    yield from _fault(read_texts, file, number, len(stream.sources))
    yield from _fault(read_generator, file, number)


def _fault(read: Callable[..., object], *what: object) -> Iterator[str]:
    """What ``read(*what)`` says against the file, if anything."""
    try:
        read(*what)
    except MemoryFileError as error:
        yield str(error)


def _rows(
    file: TensorReader, prefix: str, count: int, streams: Sequence[StreamEntry], required: Sequence[str]
) -> Iterator[str]:
    try:
        rows = read_rows(file, prefix, count, required)
    except MemoryFileError as error:
        yield str(error)
        return
    for rule, wrong in _broken(rows, max(stream.clock for stream in streams), max(len(s.sources) for s in streams)):
        if wrong:
            yield f"{file.path}: {prefix} must have {rule}, {wrong} of its {count} rows break it"


def _broken(rows: MemoryRows, clock: int, sources: int) -> Iterator[tuple[str, int]]:
    """Rules, and how many rows break each."""
    for name in ("hidden", "key", "projected"):
        column = rows.columns().get(name)
        if column is not None:
            pieces = column.split(PIECE_ROWS)  # the test takes as much room as what it looks at
            yield f"finite values in {name!r}", sum(int((~piece.isfinite().all(1)).sum()) for piece in pieces)
    yield f"births below the clock, {clock}", int((rows.birth >= clock).sum())
    known = (rows.source >= NO_SOURCE) & (rows.source < sources)
    yield f"sources from {NO_SOURCE} to {sources - 1}", int((~known).sum())
