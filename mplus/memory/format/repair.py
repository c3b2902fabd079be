"""Repair: save what is sound of a damaged memory, without a decoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mplus.errors import InputError, MemoryFileError
from mplus.memory.directory.checkpoint_manifest import read_live_manifest
from mplus.memory.directory.recovery import salvage
from mplus.memory.format.earlier import in_present_form, renamed
from mplus.memory.format.entries import DTYPES, StreamEntry, TensorEntry, layout_from
from mplus.memory.format.folder import hold, lock
from mplus.memory.format.load import read_rows
from mplus.memory.format.manifest import LIVE_FORMAT, Manifest, is_memory, read_manifest
from mplus.memory.format.salvage import Salvaged, clean, read_sound_generator, read_sound_state
from mplus.memory.format.save import ManifestHeader, save
from mplus.memory.format.tensors import TensorReader, Tensors
from mplus.memory.state import StreamView
from mplus.stores.base import StoreLayout
from mplus.stores.disk.files import Folder, writable
from mplus.stores.mmap import MmapStore


def repair(path: str | Path, out: str | Path) -> list[str]:
    """Save what checksums prove good of the memory in ``path`` as a new memory in ``out``; ``path`` stays as it is.

    Rows are kept whose every column is what was written; of a saved memory, which has a checksum per column and not per
    block, layers. When rows were last retrieved is not kept. ``Memory.load`` reads the result.

    Args:
        path: a folder written by ``Memory.save``, or a directory in which a memory lives.
        out: a folder that is empty or does not exist.

    Returns:
        What was lost, a sentence each; none: everything is there.

    Raises:
        MemoryFileError: nothing can be saved, because the manifest or the structure of the file with the short-term
            rows is damaged; or ``out`` cannot be written, or holds something.
    """
    folder, out = hold(path), Path(out)
    with writable(out):
        out = out.absolute()
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise MemoryFileError(
            f"{out} must be empty or not exist yet, to put a repaired memory there: choose another path"
        )
    if is_memory(folder, LIVE_FORMAT):
        live = read_live_manifest(folder)
        found, budget = salvage(folder, live), live.bytes_budget
        facts = ManifestHeader(fingerprint=live.fingerprint, eviction=live.eviction, bytes_budget=budget)
    else:
        held = lock(folder, shared=True)
        try:
            manifest = read_manifest(folder)
            found = _salvage_saved(folder, manifest)
        finally:
            held.release()
        budget = manifest.bytes_budget
        facts = ManifestHeader(fingerprint=manifest.fingerprint, eviction=manifest.eviction, bytes_budget=budget)
    views = [StreamView(state, store) for state, store in zip(found.states, found.stores, strict=True)]
    save(out, views, found.draws, facts)
    return found.lost


def _salvage_saved(folder: Folder, manifest: Manifest) -> Salvaged:
    layout, found = layout_from(manifest.layout), Salvaged()
    with TensorReader(folder, manifest.data) as opened:
        file = _Described(in_present_form(opened, manifest.earlier), manifest.data.tensors)
        stores = {}
        for number, entry in enumerate(manifest.streams):
            if entry.store not in stores:
                stores[entry.store] = _store(file, entry, layout, found.lost)
            store = stores[entry.store]
            found.stores.append(store)
            state = read_sound_state(
                file, number, entry, layout, store, found.lost, lambda nothing, count: nothing, file.zeros_like
            )
            found.states.append(clean(number, state, store, found.lost))
            found.draws.append(read_sound_generator(file, number, found.lost))
    return found


class _Described:
    """A file, and the entries its manifest has for its tensors."""

    def __init__(self, file: Tensors, described: Mapping[str, TensorEntry]) -> None:
        self.path, self._file = file.path, file
        self._described = {renamed(name): entry for name, entry in described.items()}

    @property
    def lasting(self) -> bool:
        return self._file.lasting

    @property
    def names(self) -> Collection[str]:
        return self._file.names

    def get(self, name: str) -> Tensor:
        return self._file.get(name)

    def zeros_like(self, name: str) -> Tensor:
        """Return zeros in place of a tensor that was damaged."""
        entry = self._described[name]
        return torch.zeros(entry.shape, dtype=DTYPES[entry.dtype])


def _store(file: Tensors, entry: StreamEntry, layout: StoreLayout, lost: list[str]) -> MmapStore:
    store = MmapStore(layout)
    for layer, count in enumerate(entry.ltm):
        prefix = f"store.{entry.store}.{layer}"
        try:
            rows = read_rows(file, prefix, count, layout)
            layout.check(rows)
        except (MemoryFileError, InputError) as error:
            lost.append(f"{prefix}: all {count} rows ({error})")
            continue
        if count:
            store.append(layer, rows)
    return store
