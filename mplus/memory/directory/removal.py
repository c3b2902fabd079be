"""Delete a memory that lives in a directory: at once and for good, whatever is cut off on the way.

The folder gets another name first, in one step that is synced: from then on there is no memory at its path. Its files
are removed after that. What a crash leaves of them is found by its name, and goes with ``remove_deleted``.
"""

from __future__ import annotations

import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from mplus.errors import LiveMemoryError, MemoryFileError
from mplus.memory.directory.checkpoint_manifest import LOCK, owner_in, read_live_manifest
from mplus.memory.directory.lock import acquire, owner_of
from mplus.memory.directory.open import deadline_of
from mplus.memory.format.folder import MANIFEST, hold
from mplus.memory.format.manifest import LIVE_FORMAT, is_memory
from mplus.stores.disk.files import FileSystem, Folder, writable

DELETED = ".mplus-deleted-{}"
DELETED_NAME = re.compile(r"\.mplus-deleted-[0-9a-f]{16}")
"""Name of a folder whose memory was deleted, and whose files are being removed."""
NEW = ".mplus-new-{}"
NEW_NAME = re.compile(r"\.mplus-new-[0-9a-f]{16}")
"""Name of a folder in which a memory is being made, which gets its own name once that is whole."""
LONGEST_START = 3600.0
"""Seconds after which nobody is taken to be about to lock a folder that has no lock yet."""


def delete_memory(path: str | Path, *, wait: float = 0.0, files: FileSystem | None = None) -> None:
    """Delete the memory that lives in the directory ``path``, with its folder; when this returns, that lasts.

    Reads that began before go on to their end: they hold what they read. A crash leaves the memory whole, or nothing
    at ``path`` and a folder ``.mplus-deleted-...`` beside it, which ``remove_deleted`` removes.

    Args:
        path: as given to ``Memory.open``; not a link.
        wait: seconds to wait for another, in this process or elsewhere, that has it open for writing.
        files: does what is done to files; None: the system.

    Raises:
        MemoryFileError: no memory lives there; the folder holds something else, or cannot be renamed: nothing was
            changed. Or the memory is deleted, and files of it could not be removed; says which.
        LiveMemoryError: it is open for writing; says by which process.

    Example:
        >>> mplus.delete_memory("anna")  # doctest: +SKIP
    """
    files, path = files or FileSystem(), Path(path).absolute()
    deadline = deadline_of(wait)
    if path.is_symlink():
        raise MemoryFileError(f"{path} must be the folder of a memory, and is a link: name the folder itself")
    with hold(path) as folder:
        _check_own(folder)
        with writable(folder):
            lock = acquire(files, folder, deadline)
        try:
            if not folder.is_at_its_path() or lock.fault(folder) is not None:
                raise LiveMemoryError(f"{path} was removed or replaced meanwhile: nothing of it was deleted")
            _check_own(folder)  # the one who had it open may have changed it
            with writable(path.parent), Folder.open(path.parent) as parent:
                gone = parent / DELETED.format(secrets.token_hex(8))
                files.rename(parent / path.name, gone)
                files.sync_folder(parent)
                left = remove_folder(files, parent, gone.name)
        finally:
            lock.file.release()
    if left:
        raise MemoryFileError(
            f"{path}: the memory is deleted, but {gone} could not be removed and still holds {', '.join(left)}: remove "
            "it, or call remove_deleted"
        )


def remove_deleted(parent: str | Path, *, files: FileSystem | None = None) -> list[Path]:
    """Remove what a crash left in the folder ``parent`` of memories that were deleted there, or not yet made.

    Whoever keeps memories in a folder calls it when it begins. Memories that another process deletes or makes at this
    moment are left to it.

    Returns:
        Folders that could not be removed.

    Raises:
        MemoryFileError: ``parent`` cannot be read.
    """
    files = files or FileSystem()
    with writable(Path(parent)), Folder.open(parent) as held:
        names = [name for name in held.names() if DELETED_NAME.fullmatch(name)]
        names += [name for name in held.names() if NEW_NAME.fullmatch(name) and _is_abandoned(files, held, name)]
        return [held.path / name for name in names if remove_folder(files, held, name)]


def _is_abandoned(files: FileSystem, parent: Folder, name: str) -> bool:
    """Return True if a process began to make a memory in a folder, and does so no more."""
    try:
        with Folder.open(parent.path / name) as folder:
            if (folder / LOCK).exists():
                acquire(files, folder).file.release()
                return True
            return time.time() - (parent / name).stat().st_mtime > LONGEST_START
    except (LiveMemoryError, OSError):
        return False


def _check_own(folder: Folder) -> None:
    """Raise MemoryFileError unless a memory lives in ``folder``, be it damaged, and nothing else is there."""
    with writable(folder):
        owner, _ = owner_of(folder)
        named: frozenset[str] = frozenset()
        with suppress(MemoryFileError):  # one that is damaged can be deleted all the same
            named = read_live_manifest(folder).files
        if owner is None and not is_memory(folder, LIVE_FORMAT):
            raise MemoryFileError(f"{folder} must be a folder that a memory lives in (Memory.open), and is not")
        owners = {owner, *map(owner_in, named)} - {None}
        own = {MANIFEST, LOCK, *named}
        foreign = [name for name in folder.names() if name not in own and owner_in(name) not in owners]
        foreign += [name for name in folder.names() if stat.S_ISDIR((folder / name).stat().st_mode)]
    if foreign:
        raise MemoryFileError(
            f"{folder} must hold a memory and nothing else to be deleted, got {', '.join(map(repr, foreign[:3]))}"
            f"{', ...' if len(foreign) > 3 else ''}: move that away first"
        )


def remove_folder(files: FileSystem, parent: Folder, name: str) -> list[str]:
    """Remove a folder and the files in it, as far as that is possible; return the names that are still there."""
    left = []
    try:
        with Folder.open(parent.path / name) as folder:
            for one in folder.names():
                try:
                    files.remove(folder / one)
                except FileNotFoundError:  # another process removes it as well
                    continue
                except OSError:
                    left.append(one)
        if not left:
            files.remove_folder(parent / name)
            files.sync_folder(parent)
    except FileNotFoundError:
        return []
    except OSError:
        return left or [name]
    return left
