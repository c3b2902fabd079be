"""Reading and writing checkpoints: everything a memory holds, in files that a manifest names."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from attrs import define
from torch import Tensor

import mplus
from mplus.config import Component
from mplus.errors import MemoryFileError
from mplus.memory.directory.checkpoint_manifest import (
    JOURNAL,
    NEW_MANIFEST,
    ROWS,
    STATE,
    LiveManifest,
    StoreEntry,
    owner_in,
)
from mplus.memory.directory.journal import Journal, records
from mplus.memory.directory.record import apply
from mplus.memory.format.earlier import in_present_form
from mplus.memory.format.folder import MANIFEST
from mplus.memory.format.load import as_written, check_names, read_access_log, read_generator, read_index, read_state
from mplus.memory.format.rules import FURTHEST_BACK, check_values
from mplus.memory.format.save import Index, ManifestHeader, index_parts, layout_entry, stream_entry, stream_parts
from mplus.memory.state import StreamState, StreamView
from mplus.rows import NO_SOURCE
from mplus.stores import STORES
from mplus.stores.access_log import AccessLog
from mplus.stores.base import MemoryStore, StoreLayout
from mplus.stores.disk.block_file import BlockFile, write_blocks
from mplus.stores.disk.compaction import compact, files_of, plan_compaction
from mplus.stores.disk.files import FileSystem, Folder, PathAt
from mplus.stores.disk.safetensors_io import Part
from mplus.stores.disk.segment_source import FileLayer
from mplus.stores.disk.segments import RowSegment, SegmentedRows
from mplus.stores.disk.verified import Rule
from mplus.stores.mmap import MmapStore, mapped_store
from mplus.stores.stack import saved_stack


@define(eq=False)
class CheckpointContent:
    """Everything a memory in a directory holds, one entry for each stream; ``indexes`` may be left out."""

    states: list[StreamState]
    stores: list[MemoryStore]
    draws: list[Tensor]
    access_logs: Sequence[AccessLog | None]
    indexes: Sequence[Index] = ()

    @property
    def mapped(self) -> list[MmapStore]:
        """The store of mapped files inside each of the stores."""
        return [mapped_store(store) for store in self.stores]

    def views(self) -> list[StreamView]:
        """Return views of the streams."""
        return list(map(StreamView, self.states, self.stores, self.access_logs))


@define(eq=False)
class WrittenCheckpoint:
    """A checkpoint that is on disk, but for its manifest.

    Attributes:
        manifest: what it is to say.
        stores, layers: by stream, its store, and the same rows in the new files.
        journal: empty, to go on with.
        made: files that are new.
    """

    manifest: LiveManifest
    stores: list[MmapStore]
    layers: list[tuple[SegmentedRows, ...]]
    journal: Journal
    made: list[PathAt]

    def adopt_files(self) -> None:
        """Let the stores read the new files from now on."""
        for store, layers in zip(self.stores, self.layers, strict=True):
            store.layers = layers


class BlockTensors:
    """Tensors of a block file as ``read_state`` takes them; short-term rows stay mapped, and are not copied."""

    lasting: ClassVar[bool] = True

    def __init__(self, file: BlockFile) -> None:
        self.path = file.path
        self._file = file

    @property
    def names(self) -> Collection[str]:
        return self._file.spans.keys()

    def get(self, name: str) -> Tensor:
        """Return one tensor. Raises MemoryFileError when it is missing or not the one that was written."""
        return self._file.read(name)


# ---------------------------------------------------------------------- writing


def write_checkpoint(
    files: FileSystem,
    folder: Folder,
    owner: str,
    content: CheckpointContent,
    header: ManifestHeader,
    number: int,
    *,
    clean: bool,
) -> WrittenCheckpoint:
    """Write everything of a checkpoint but its manifest; on an error, nothing new is left.

    Args:
        files: does it.
        folder: the memory's.
        owner: its id.
        content: what to write; rows that are in the folder's files already stay there.
        header: of the manifest, what it says of the memory as a whole.
        number: of the checkpoint, larger than of any before.
        clean: also rewrite files that hold rows which were removed.
    """
    made: list[PathAt] = []
    journal = None
    try:
        layers, entries = [], []
        for store in content.mapped:
            own = store.layers
            for group in plan_compaction(own, clean=clean, home=folder):
                path = folder / ROWS.format(owner, secrets.token_hex(8))
                made.append(path)
                own, _ = compact(own, group, files, path)
            layers.append(own)
            rows = files_of(own)
            entries.append(StoreEntry(files=tuple(file.entry for file in rows), next_ids=tuple(store.next_ids)))
        path = _fresh(files, folder / STATE.format(owner, number))
        made.append(path)
        state = write_blocks(files, path, list(_state_parts(content, layers)))
        path = _fresh(files, folder / JOURNAL.format(owner, number))
        made.append(path)
        journal = Journal.create(files, path)
        layout = content.stores[0].layout
        manifest = LiveManifest(
            written_by=mplus.__version__,
            number=number,
            fingerprint=header.fingerprint,
            layout=layout_entry(layout),
            eviction=header.eviction,
            bytes_budget=header.bytes_budget,
            streams=tuple(stream_entry(view, i, header.mechanism) for i, view in enumerate(content.views())),
            state=state,
            stores=tuple(entries),
            journal=path.name,
            store=saved_stack(content.stores[0]),
        )
        return WrittenCheckpoint(manifest, content.mapped, layers, journal, made)
    except BaseException:
        if journal is not None:
            journal.close()
        remove(files, made)
        raise


def _state_parts(content: CheckpointContent, layers: Sequence[Sequence[SegmentedRows]]) -> Iterator[Part]:
    for number, (view, draw) in enumerate(zip(content.views(), content.draws, strict=True)):
        yield from stream_parts(number, view, draw)
        if content.indexes:
            yield from index_parts(number, content.indexes[number])
        files = files_of(layers[number])
        for layer, runs in enumerate(layers[number]):
            left = {id(run.source.file): run for run in runs.segments if isinstance(run.source, FileLayer)}
            for place, file in enumerate(files):
                run = left.get(id(file))  # None: this layer has no row in the file any more, and others have
                count = file.rows(f"{layer}.id")
                if (0 if run is None else run.count) < count:
                    live = torch.zeros(count, dtype=torch.bool)
                    if run is not None:
                        live[run.places] = True
                    yield Part.whole(live_name(number, place, layer), live)


def live_name(stream: int, file: int, layer: int) -> str:
    """Return the name of the state file's tensor with the rows that are left in a layer of a stream's file.

    There is none where all of them are.
    """
    return f"stream.{stream}.live.{file}.{layer}"


def publish(files: FileSystem, folder: Folder, owner: str, manifest: LiveManifest) -> None:
    """Put a manifest in place of the one there is: the instant in which a checkpoint begins to count."""
    path = _fresh(files, folder / NEW_MANIFEST.format(owner))
    handle = files.create(path)
    try:
        files.write(handle, manifest.to_json().encode())
        files.sync(handle)
    finally:
        files.close(handle)
    files.sync_folder(folder)  # the files it names, before anything names them
    files.rename(path, folder / MANIFEST)
    files.sync_folder(folder)


def _fresh(files: FileSystem, path: PathAt) -> PathAt:
    """Return ``path``, and remove what an unfinished checkpoint may have left there."""
    if path.exists():
        files.remove(path)
    return path


def remove(files: FileSystem, paths: Sequence[PathAt]) -> list[str]:
    """Remove files as far as that is possible; the next opening of the directory tries what is left again.

    Returns:
        Names of those that are still there.
    """
    left = []
    for path in paths:
        try:
            files.remove(path)
        except FileNotFoundError:
            continue
        except OSError:
            left.append(path.name)
    return left


def remove_others(
    files: FileSystem, folder: Folder, owner: str, manifest: LiveManifest, before: LiveManifest | None = None
) -> list[str]:
    """Remove files of other checkpoints, and return the names of those that could not be removed.

    These are the ones that ``before`` names, and those whose names have the memory's id: what else is in the folder is
    not known to be the memory's, and stays.
    """
    owners = {owner, *map(owner_in, manifest.files)} - {None}
    gone = {name for name in folder.names() if owner_in(name) in owners or (before and name in before.files)}
    return remove(files, [folder / name for name in sorted(gone - manifest.files)])


# ---------------------------------------------------------------------- reading


def read_checkpoint(
    folder: Path | Folder, manifest: LiveManifest, layout: StoreLayout, kind: Component
) -> CheckpointContent:
    """Read the manifest's checkpoint, without its journal; long-term rows are mapped, not read.

    Args:
        folder: the memory's.
        manifest: in it.
        layout: of the rows as they are read.
        kind: of store; innermost in it are mapped files.

    Raises:
        MemoryFileError: a file is missing, truncated, altered or does not fit the manifest.
    """
    file = BlockFile(folder / manifest.state.file, manifest.state)
    reader = in_present_form(BlockTensors(file), manifest.earlier)
    check_names(reader, manifest)
    states = [read_state(reader, number, entry, layout) for number, entry in enumerate(manifest.streams)]
    for number, state in enumerate(states):
        with as_written(f"{file.path}: stream {number}"):
            check_values(state)
    draws = [read_generator(reader, number).get_state() for number in range(len(states))]
    stores: list[MemoryStore] = []
    for number, entry in enumerate(manifest.stores):
        whole = STORES.build(kind, layout)
        store = mapped_store(whole)
        kept = store.layout
        rules = rules_of(manifest, number)
        opened = [BlockFile(folder / part.file, part, rules) for part in entry.files]
        store.layers = tuple(
            SegmentedRows(kept, tuple(_runs(file, opened, number, layer, kept))) for layer in range(layout.layers)
        )
        for runs in store.layers:
            if runs.segments:
                _ = runs.segments[-1].bounds  # what is appended must get larger ids; all others are looked at when read
        store.next_ids = list(entry.next_ids)
        counts = tuple(map(len, store.layers))
        if counts != manifest.streams[number].ltm:
            raise MemoryFileError(
                f"{folder}: the long-term rows of stream {number} must be {list(manifest.streams[number].ltm)} per "
                f"layer, got {list(counts)}"
            )
        stores.append(whole)
    access_logs = [read_access_log(reader, number, mapped_store(store)) for number, store in enumerate(stores)]
    indexes = [read_index(reader, number, layout.layers) for number in range(len(stores))]
    return CheckpointContent(states, stores, draws, access_logs, indexes)


def rules_of(manifest: LiveManifest, number: int) -> dict[str, Rule]:
    """Return the rules for ids, births and sources of a stream's long-term rows, removed ones included."""
    stream, found = manifest.streams[number], {}
    for layer, next_id in enumerate(manifest.stores[number].next_ids):
        found[f"{layer}.id"] = Rule(0, next_id - 1, ascending=True)
        found[f"{layer}.birth"] = Rule(-FURTHEST_BACK, stream.clock - 1)
        found[f"{layer}.source"] = Rule(NO_SOURCE, stream.next_source - 1)
    return found


def check_layer(file: BlockFile, layer: int, layout: StoreLayout) -> int:
    """Return the number of rows in a layer of a file. Raises MemoryFileError unless they look as ``layout`` says."""
    rows = file.rows(f"{layer}.id")
    for name, (shape, dtype) in {"id": ((), torch.int64), **layout.columns()}.items():
        span = file.span(f"{layer}.{name}")
        if span.dtype != dtype or span.shape != (rows, *shape):
            raise MemoryFileError(
                f"{file.path}: tensor '{layer}.{name}' must be {dtype} {[rows, *shape]}, "
                f"got {span.dtype} {list(span.shape)}"
            )
    return rows


def _runs(
    state: BlockFile, opened: Sequence[BlockFile], stream: int, layer: int, layout: StoreLayout
) -> Iterator[RowSegment]:
    for place, file in enumerate(opened):
        rows = check_layer(file, layer, layout)
        name = live_name(stream, place, layer)
        live = torch.ones(rows, dtype=torch.bool)
        if name in state.spans:
            live = state.read(name).clone()
        if live.shape != (rows,) or live.dtype != torch.bool:
            raise MemoryFileError(f"{state.path}: tensor {name!r} must be bool {[rows]}, got {list(live.shape)}")
        left = live.nonzero().squeeze(1)
        if len(left):
            first, last = int(left[0]), int(left[-1]) + 1
            whole = len(left) == last - first
            yield RowSegment(FileLayer(file, layer), first, last, None if whole else live[first:last], len(left))


def replay(
    folder: Path | Folder, manifest: LiveManifest, content: CheckpointContent, layout: StoreLayout
) -> tuple[int, int]:
    """Repeat the changes in the journal.

    Returns:
        Bytes and number of its finished records.

    Raises:
        MemoryFileError: a record is damaged, or describes no change of this memory.
    """
    path, size, count = folder / manifest.journal, 0, 0
    for payload, end in records(path):
        where = f"{path}: record {count}"
        apply(payload, content.states, content.mapped, content.draws, layout, where, manifest.version)
        size, count = end, count + 1
    return size, count
