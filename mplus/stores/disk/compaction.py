"""Moving runs of rows to new files: which ones, so that there are few files and little is written twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from attrs import define
from torch import Tensor

from mplus.stores.disk.block_file import BlockFile, FileEntry, write_blocks
from mplus.stores.disk.files import FileSystem, Folder, PathAt
from mplus.stores.disk.safetensors_io import Part
from mplus.stores.disk.segment_source import FileLayer, SegmentSource
from mplus.stores.disk.segments import RowSegment, SegmentedRows

LARGEST_MERGED = 2**30
"""Bytes of rows from which a file is not merged with its neighbours any more."""
PIECE_BYTES = 2**24


@define(frozen=True, eq=False)
class _FileRows:
    """All runs, of whatever layer, in one file; or all that are in memory."""

    keys: frozenset[int]
    left: int
    held: int
    folder: Folder | None
    in_memory: bool


def file_of(source: SegmentSource) -> BlockFile | None:
    """Return the file a source's rows are in."""
    return source.file if isinstance(source, FileLayer) else None


def files_of(layers: Sequence[SegmentedRows]) -> list[BlockFile]:
    """Return the files that rows are in, those with lower ids first."""
    return [file for file in _order(layers) if file is not None]


def plan_compaction(
    layers: Sequence[SegmentedRows], *, clean: bool = False, home: Folder | None = None
) -> list[frozenset[int]]:
    """Return groups of files (by ``id`` of ``BlockFile``; ``id(None)``: memory) to write anew as one file each.

    The rows in memory always go to a file. With them goes the newest file while it is not larger than what is behind
    it (as in a binary counter: a row is rewritten about log2(n) times), and any file less than half of which is left.

    Args:
        layers: the rows.
        clean: also rewrite every file with rows that were removed.
        home: also rewrite every file that is not in this folder; None: they may be anywhere.
    """
    tally = [_file_rows(layers, file) for file in _order(layers)]
    groups: list[frozenset[int]] = []
    last = len(tally)
    if tally and tally[-1].in_memory:
        last -= 1
        group, size = tally[last].keys, tally[last].left
        while last and tally[last - 1].left <= min(size, LARGEST_MERGED):
            last -= 1
            group, size = group | tally[last].keys, size + tally[last].left
        groups.append(group)

    def goes(file: _FileRows) -> bool:
        away = home is not None and file.folder is not home
        return away or (file.left < file.held if clean else 2 * file.left < file.held)

    return [file.keys for file in tally[:last] if goes(file)] + groups


def _order(layers: Sequence[SegmentedRows]) -> list[BlockFile | None]:
    """Return files from the oldest rows to the newest, None for memory: files are written for all layers at a time."""
    below: dict[int, set[int]] = {}
    named: dict[int, BlockFile | None] = {}
    for runs in layers:
        files = list({id(file_of(run.source)): file_of(run.source) for run in runs.segments}.values())
        for place, file in enumerate(files):
            named[id(file)] = file
            below.setdefault(id(file), set()).update(id(other) for other in files[:place])
    order: list[BlockFile | None] = []
    while below:
        key = next(key for key, before in below.items() if not before & below.keys())  # nothing left is older
        del below[key]
        order.append(named[key])
    return sorted(order, key=lambda file: file is None)  # memory last, also where no layer has both


def _file_rows(layers: Sequence[SegmentedRows], file: BlockFile | None) -> _FileRows:
    width = layers[0].layout.row_bytes + 8
    left = sum(run.count for runs in layers for run in runs.segments if file_of(run.source) is file)
    held = left
    if file is not None:
        held = sum(file.rows(name) for name in file.spans if name.endswith(".id"))
    folder = file.path.folder if file is not None and isinstance(file.path, PathAt) else None
    return _FileRows(frozenset([id(file)]), left * width, held * width, folder, file is None)


def compact(
    layers: Sequence[SegmentedRows], group: frozenset[int], files: FileSystem, path: Path | PathAt, *, sync: bool = True
) -> tuple[tuple[SegmentedRows, ...], FileEntry]:
    """Write the rows of a group to a new file at ``path``, and give the same rows and ids with that in their place.

    Raises:
        OSError, MemoryFileError: as ``write_blocks``; there is no such file then.
    """
    chosen = [[run for run in runs.segments if id(file_of(run.source)) in group] for runs in layers]
    parts = [part for layer, runs in enumerate(chosen) for part in _parts(layer, runs, layers[layer])]
    entry = write_blocks(files, path, parts, sync=sync)
    try:
        file = BlockFile(path, entry)
    except BaseException:
        files.remove(path)
        raise
    return tuple(_replaced(runs, chosen[layer], file, layer) for layer, runs in enumerate(layers)), entry


def _parts(layer: int, runs: Sequence[RowSegment], whole: SegmentedRows) -> Iterator[Part]:
    count = sum(run.count for run in runs)
    described = {"id": ((), torch.int64), **whole.layout.columns()}
    for name, (shape, dtype) in described.items():
        step = max(1, PIECE_BYTES // max(1, torch.Size(shape).numel() * dtype.itemsize))

        def pieces(name: str = name, step: int = step) -> Iterator[Tensor]:
            for run in runs:
                for places in run.places.split(step):
                    yield run.source.take(name, places)

        yield Part(f"{layer}.{name}", dtype, (count, *shape), pieces)


def _replaced(runs: SegmentedRows, chosen: Sequence[RowSegment], file: BlockFile, layer: int) -> SegmentedRows:
    if not chosen:
        return runs
    count = sum(run.count for run in chosen)
    gone, new = {id(run) for run in chosen}, RowSegment(FileLayer(file, layer), 0, count, None, count)
    at = next(place for place, run in enumerate(runs.segments) if id(run) in gone)
    rest = [run for run in runs.segments if id(run) not in gone]
    return SegmentedRows(runs.layout, (*rest[:at], new, *rest[at:]))
