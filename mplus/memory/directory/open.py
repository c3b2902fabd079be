"""Open a directory: read the memory that lives there, or make a new one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import torch

from mplus.config import Component, JsonValue
from mplus.errors import ConfigError, LiveMemoryError, MemoryFileError, MemoryMismatchError
from mplus.eviction import EVICTION
from mplus.memory.budget import Budget
from mplus.memory.copying import check_device
from mplus.memory.directory.checkpoint import CheckpointContent, read_checkpoint, replay
from mplus.memory.directory.checkpoint_manifest import (
    JOURNAL,
    LOCK,
    NEW_MANIFEST,
    STATE,
    LiveManifest,
    owner_in,
    read_live_manifest,
)
from mplus.memory.directory.directory import Directory
from mplus.memory.directory.lock import acquire, owner_of
from mplus.memory.directory.persistence import DirectoryPersistence, ReadOnly
from mplus.memory.engine import Engine
from mplus.memory.format.entries import layout_from
from mplus.memory.format.folder import MANIFEST, hold, prepare
from mplus.memory.format.load import as_written
from mplus.memory.format.manifest import check_belongs
from mplus.memory.format.rules import check_fits, check_values
from mplus.memory.recompute import keeps_chunks, with_weights
from mplus.memory.sources.clock import Clock
from mplus.memory.transaction import Persistence, Streams
from mplus.stores.base import StoreLayout
from mplus.stores.disk.files import FileSystem, Folder, writable
from mplus.stores.stack import stack_of

if TYPE_CHECKING:
    from mplus.memory.memory import Memory

TRIES = 20
"""How often a reader begins anew when the writer replaces the checkpoint under its eyes."""


def open_streams(
    path: str | Path,
    engine: Engine,
    new: Callable[..., Memory],
    *,
    batch_size: int | None,
    store: JsonValue | Component,
    eviction: JsonValue | Component,
    bytes_budget: int | str | None,
    device: torch.device | str,
    read_only: bool,
    journal_bytes: int,
    file_mode: int | None,
    clock: Clock | None = None,
    wait: float = 0.0,
) -> Streams:
    """Open the streams of a directory, or make new ones by ``new`` (``model.new_memory``); see ``Memory.open``."""
    if isinstance(journal_bytes, bool) or not isinstance(journal_bytes, int) or journal_bytes < 1:
        raise ConfigError(f"journal_bytes must be a whole number of at least 1, got {journal_bytes!r}")
    deadline = deadline_of(wait)
    wanted = engine.config.store if store is None else Component.of(store)
    policy = None if eviction is None else Component.of(eviction)
    device, files = check_device(device), FileSystem()
    if read_only:
        with hold(path) as folder:
            manifest, content, (_, count) = _read(folder, engine, wanted, device)
        _check_batch(batch_size, manifest, folder)
        persistence: Persistence = ReadOnly(str(path))
        return _existing(
            engine, manifest, content, persistence, policy, bytes_budget, folder, changed=count > 0, clock=clock
        )
    directory = _locked(Path(path), file_mode, files, deadline)
    folder = directory.folder
    try:
        _check_own(folder)  # another process may have been here until it was locked
        if (folder / MANIFEST).exists():
            manifest, content, (size, count) = _read(folder, engine, wanted, device)
            _check_batch(batch_size, manifest, folder)
            with writable(folder):
                directory.resume(manifest, size, count)
            persistence = DirectoryPersistence(directory, journal_bytes)
            return _existing(
                engine, manifest, content, persistence, policy, bytes_budget, folder, changed=count > 0, clock=clock
            )
        streams = new(
            1 if batch_size is None else batch_size,
            store=stack_of(wanted),
            eviction=policy,
            device=device,
            bytes_budget=bytes_budget,
            clock=clock,
        ).streams
        streams.persistence = DirectoryPersistence(directory, journal_bytes)
        streams.checkpoint()
        return streams
    except BaseException:
        directory.close()
        raise


def deadline_of(wait: float) -> float:
    """Return when a wait of so many seconds ends, by ``time.monotonic``. Raises ConfigError: that is no time."""
    if isinstance(wait, bool) or not isinstance(wait, int | float) or not wait >= 0:
        raise ConfigError(f"wait must be seconds, 0 or more, got {wait!r}")
    return time.monotonic() + wait


def _locked(path: Path, file_mode: int | None, files: FileSystem, deadline: float) -> Directory:
    """Open a folder for writing, made where it does not exist.

    Raises LiveMemoryError where it is open elsewhere until the deadline.
    """
    while True:
        folder = prepare(path, file_mode, files, "keep")
        _check_own(folder)  # before a lock is left in a folder of another kind
        with writable(folder):
            lock = acquire(files, folder, deadline)
        # Whoever had it may have deleted the memory, or put another in its place.
        if folder.is_at_its_path() and lock.fault(folder) is None:
            return Directory(folder, files, lock)
        lock.file.release()
        folder.close()
        if time.monotonic() >= deadline:
            raise LiveMemoryError(f"{path} was removed or replaced while it was opened: open it again")


def _existing(
    engine: Engine,
    manifest: LiveManifest,
    content: CheckpointContent,
    persistence: Persistence,
    eviction: Component | None,
    bytes_budget: int | str | None,
    folder: Folder,
    *,
    changed: bool,
    clock: Clock | None,
) -> Streams:
    """Make streams of what a directory holds; ``changed``: the journal adds to the rows the saved indexes are of."""
    content.states = with_weights(content.states, content.stores, manifest.fingerprint, engine, folder.path)
    policy = EVICTION.build(eviction or Component.of(manifest.eviction))
    expiry = engine.layout.expiry or policy.lifetime is not None
    if expiry != manifest.layout.expiry:
        raise MemoryMismatchError(
            f"{folder} holds rows {'with' if manifest.layout.expiry else 'without'} a lifetime, and the policy "
            f"{policy.name!r} needs them {'with' if expiry else 'without'} one: save the memory and load it with that "
            "policy"
        )
    wanted = manifest.bytes_budget if bytes_budget is None else bytes_budget
    budget = Budget.of(wanted, engine.config, engine.mechanism, content.stores[0], len(content.stores))
    if not changed:
        for store, index in zip(content.stores, content.indexes, strict=True):
            engine.mechanism.load_index(store, index)
    generators = [torch.Generator().set_state(draw) for draw in content.draws]
    access_logs = [notes for notes in content.access_logs if notes is not None]
    return Streams(engine, content.states, content.stores, generators, policy, budget, access_logs, persistence, clock)


def _check_own(folder: Folder) -> None:
    """Raise MemoryFileError unless ``folder`` holds a memory that lives there, what a crash left of one, or nothing."""
    if (folder / MANIFEST).exists():
        read_live_manifest(folder)
        return
    with writable(folder):
        owner, begun = owner_of(folder)
        names = [name for name in folder.names() if name != LOCK or not (owner or begun)]
        foreign = [name for name in names if owner is None or owner_in(name) != owner]
        # A crash may have left these of the first checkpoint, when nothing was acknowledged yet.
        leftovers = {STATE.format(owner, 0), NEW_MANIFEST.format(owner)}
        if (journal := JOURNAL.format(owner, 0)) in names and not (folder / journal).stat().st_size:
            leftovers.add(journal)
        kept = [name for name in names if name not in leftovers]
    if kept and not foreign:
        raise MemoryFileError(
            f"{folder / MANIFEST} is missing, and without it {', '.join(map(repr, kept[:3]))}"
            f"{', ...' if len(kept) > 3 else ''} cannot be read: put it back, or choose another path for a new memory"
        )
    if foreign:
        raise MemoryFileError(
            f"{folder} must be empty or hold a memory that lives there, got a folder with "
            f"{', '.join(map(repr, foreign[:3]))}{', ...' if len(foreign) > 3 else ''}: choose another path"
        )


def _read(
    folder: Folder, engine: Engine, wanted: Component, device: torch.device
) -> tuple[LiveManifest, CheckpointContent, tuple[int, int]]:
    """Read what ``read_present`` does; refuse a memory of another decoder."""

    def layout(manifest: LiveManifest) -> StoreLayout:
        facts = engine.fingerprint(manifest.fingerprint)
        check_belongs(manifest, facts, engine.layout, folder.path, any_weights=keeps_chunks(engine))
        return layout_of(manifest, engine.layout, device)

    manifest, content, done = read_present(folder, layout, wanted)
    with as_written(f"{folder}"):
        check_fits(content.states, engine, content.stores[0].layout)
    return manifest, content, done


def read_present(
    folder: Path | Folder, layout: Callable[[LiveManifest], StoreLayout] | None = None, wanted: Component | None = None
) -> tuple[LiveManifest, CheckpointContent, tuple[int, int]]:
    """Read manifest, content, and bytes and number of the journal's records, while a writer may be at work.

    Args:
        folder: of the memory.
        layout: of its rows; None: on the CPU, as the manifest describes them.
        wanted: the store asked for.

    Raises:
        MemoryFileError: it is damaged, or not a memory in a directory.
        UnknownNameError, PluginError, ConfigError: as ``read_directory``.
    """
    for attempt in range(TRIES):
        manifest = read_live_manifest(folder)
        rows = layout(manifest) if layout else layout_of(manifest, layout_from(manifest.layout), torch.device("cpu"))
        try:
            return manifest, *read_directory(folder, manifest, rows, wanted)
        except MemoryFileError:
            if attempt + 1 == TRIES or read_live_manifest(folder).number == manifest.number:
                raise
    raise AssertionError("unreachable")


def read_directory(
    folder: Path | Folder, manifest: LiveManifest, layout: StoreLayout, wanted: Component | None = None
) -> tuple[CheckpointContent, tuple[int, int]]:
    """Read content with what the journal adds, and bytes and number of its records; ``wanted``: the store asked for.

    Raises:
        MemoryFileError: a file is not what was written.
        UnknownNameError, PluginError, ConfigError: there is no such store as the manifest names.
    """
    kept = Component.of(manifest.store)
    content = read_checkpoint(folder, manifest, layout, stack_of(wanted or kept, kept))
    for store in content.mapped:
        store.changes = []  # with a list of changes, a store moves nothing to files by itself
    done = replay(folder, manifest, content, layout)
    for number, state in enumerate(content.states if done[1] else ()):
        with as_written(f"{folder}: stream {number}, by its journal,"):
            check_values(state)
    return content, done


def layout_of(manifest: LiveManifest, layout: StoreLayout, device: torch.device) -> StoreLayout:
    """Return the layout of rows as they were saved, whatever new memories of this decoder hold."""
    return attrs.evolve(
        layout,
        projected_size=manifest.layout.projected_size,
        keeps_hidden=manifest.layout.keeps_hidden,
        expiry=manifest.layout.expiry,
        device=device,
    )


def _check_batch(batch_size: int | None, manifest: LiveManifest, folder: Folder) -> None:
    if batch_size is not None and batch_size != len(manifest.streams):
        raise MemoryMismatchError(
            f"{folder} must be opened with its own batch_size, {len(manifest.streams)}, or without one, "
            f"got {batch_size!r}"
        )
