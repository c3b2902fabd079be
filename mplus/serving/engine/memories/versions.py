"""Versions of memories as clients see them: they grow with every change, and none is told of two contents.

A version counts checkpoints and records by what the files say. What a deleted memory has told is not told again: the
folder of its tenant keeps the number that all new memories begin with, which names nobody.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from mplus.stores.disk.files import FileSystem

MOST_RECORDS = 2**24
"""More than a journal has before a checkpoint takes its place."""
_FIRST = re.compile(r"versions-from-([0-9]{1,16})")
"""An empty file of a tenant's folder; of several, as a crash may leave them, the highest counts."""
_NUMBERED = re.compile(r"(?:state|journal)-(?:[0-9a-f]{16}-)?([0-9]+)\.(?:safetensors|bin)")
"""Files of a checkpoint, which have its number."""


def version_of(checkpoint: int, records: int) -> int:
    """Return the version of a memory by the number of its checkpoint, and of the records behind it."""
    return checkpoint * MOST_RECORDS + records


def unused_version(directory: Path) -> int:
    """Return a version above all that were told of the memory in a directory, be it damaged."""
    found = [match for name in _names(directory) if (match := _NUMBERED.fullmatch(name))]
    return version_of(max((int(match[1]) for match in found), default=0) + 1, 0)


def first_version(folder: Path) -> int:
    """Return the version that a new memory in the folder of a tenant begins with."""
    return max((int(match[1]) for name in _names(folder) if (match := _FIRST.fullmatch(name))), default=0)


def raise_first_version(folder: Path, version: int, files: FileSystem) -> None:
    """Let new memories of a tenant begin with a version, unless it is a higher one already; it lasts. Raises OSError.

    Another process may do so, too.
    """
    if version <= first_version(folder):
        return
    with suppress(FileExistsError):
        files.close(files.create(folder / f"versions-from-{version}"))
    files.sync_folder(folder)
    for name in _names(folder):
        if (match := _FIRST.fullmatch(name)) and int(match[1]) < version:
            (folder / name).unlink(missing_ok=True)


def _names(folder: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return [entry.name for entry in folder.iterdir()]
    return []
