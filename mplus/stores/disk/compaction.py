"""Moving runs of rows to new files: which ones, so that there are few files and little is written twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from attrs import define
from torch import Tensor

from mplus.stores.disk.block_file import BlockFile, FileEntry, write_blocks
from mplus.stores.disk.filesystem import FileSystem
from mplus.stores.disk.folder import Folder, PathAt
from mplus.stores.disk.safetensors_io import Part
from mplus.stores.disk.segment_source import Holder, LayerOfFile
from mplus.stores.disk.segments import Run, Runs

LARGEST_MERGED = 2**30
"""Bytes of rows from which a file is not merged with its neighbours any more."""
PIECE_BYTES = 2**24


@define(frozen=True, eq=False)
class _Stratum:
    """All runs, of whatever layer, in one file; or all that are in memory."""

    keys: frozenset[int]
    left: int
    held: int
    folder: Folder | None
    in_memory: bool


def file_of(holder: Holder) -> BlockFile | None:
    """The file a holder's rows are in."""
    return holder.file if isinstance(holder, LayerOfFile) else None


def files_of(layers: Sequence[Runs]) -> list[BlockFile]:
    """The files that rows are in, those with lower ids first."""
    return [file for file in _order(layers) if file is not None]


def plan(layers: Sequence[Runs], *, clean: bool = False, home: Folder | None = None) -> list[frozenset[int]]:
    """Groups of files (by ``id`` of the ``BlockFile``; ``id(None)`` is the memory) to write anew as one file each.

    The rows in memory always go to a file. With them goes the newest file while it is not larger than what is behind
    it (as in a binary counter: a row is rewritten about log2(n) times), and any file less than half of which is left.

    Args:
        layers: the rows.
        clean: also rewrite every file with rows that were removed.
        home: also rewrite every file that is not in this folder; None: they may be anywhere.
    """
    strata = [_stratum(layers, file) for file in _order(layers)]
    groups: list[frozenset[int]] = []
    last = len(strata)
    if strata and strata[-1].in_memory:
        last -= 1
        group, size = strata[last].keys, strata[last].left
        while last and strata[last - 1].left <= min(size, LARGEST_MERGED):
            last -= 1
            group, size = group | strata[last].keys, size + strata[last].left
        groups.append(group)

    def goes(stratum: _Stratum) -> bool:
        away = home is not None and stratum.folder is not home
        return away or (stratum.left < stratum.held if clean else 2 * stratum.left < stratum.held)

    return [stratum.keys for stratum in strata[:last] if goes(stratum)] + groups


def _order(layers: Sequence[Runs]) -> list[BlockFile | None]:
    """Files from the oldest rows to the newest, None for memory: files are written for all layers at a time."""
    below: dict[int, set[int]] = {}
    named: dict[int, BlockFile | None] = {}
    for runs in layers:
        files = list({id(file_of(run.holder)): file_of(run.holder) for run in runs.runs}.values())
        for place, file in enumerate(files):
            named[id(file)] = file
            below.setdefault(id(file), set()).update(id(other) for other in files[:place])
    order: list[BlockFile | None] = []
    while below:
        key = next(key for key, before in below.items() if not before & below.keys())
        del below[key]
        order.append(named[key])
    return sorted(order, key=lambda file: file is None)  # memory last, also where no layer has both


def _stratum(layers: Sequence[Runs], file: BlockFile | None) -> _Stratum:
    width = layers[0].layout.row_bytes + 8
    left = sum(run.count for runs in layers for run in runs.runs if file_of(run.holder) is file)
    held = left
    if file is not None:
        held = sum(file.rows(name) for name in file.stretches if name.endswith(".id"))
    folder = file.path.folder if file is not None and isinstance(file.path, PathAt) else None
    return _Stratum(frozenset([id(file)]), left * width, held * width, folder, file is None)


def rewritten(
    layers: Sequence[Runs], group: frozenset[int], files: FileSystem, path: Path | PathAt, *, sync: bool = True
) -> tuple[tuple[Runs, ...], FileEntry]:
    """Write the rows of a group to a new file at ``path``, and give the same rows and ids with that in their place.

    Raises:
        OSError, MemoryFileError: as ``write_blocks``; there is no such file then.
    """
    chosen = [[run for run in runs.runs if id(file_of(run.holder)) in group] for runs in layers]
    parts = [part for layer, runs in enumerate(chosen) for part in _parts(layer, runs, layers[layer])]
    entry = write_blocks(files, path, parts, sync=sync)
    try:
        file = BlockFile(path, entry)
    except BaseException:
        files.remove(path)
        raise
    return tuple(_replaced(runs, chosen[layer], file, layer) for layer, runs in enumerate(layers)), entry


def _parts(layer: int, runs: Sequence[Run], whole: Runs) -> Iterator[Part]:
    count = sum(run.count for run in runs)
    described = {"id": ((), torch.int64), **whole.layout.columns()}
    for name, (shape, dtype) in described.items():
        step = max(1, PIECE_BYTES // max(1, torch.Size(shape).numel() * dtype.itemsize))

        def pieces(name: str = name, step: int = step) -> Iterator[Tensor]:
            for run in runs:
                for places in run.places.split(step):
                    yield run.holder.take(name, places)

        yield Part(f"{layer}.{name}", dtype, (count, *shape), pieces)


def _replaced(runs: Runs, chosen: Sequence[Run], file: BlockFile, layer: int) -> Runs:
    if not chosen:
        return runs
    count = sum(run.count for run in chosen)
    gone, new = {id(run) for run in chosen}, Run(LayerOfFile(file, layer), 0, count, None, count)
    at = next(place for place, run in enumerate(runs.runs) if id(run) in gone)
    rest = [run for run in runs.runs if id(run) not in gone]
    return Runs(runs.layout, (*rest[:at], new, *rest[at:]))
