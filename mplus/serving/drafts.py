"""Drafts: files that are needed while a request is answered, on the disk of the memories."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from pathlib import Path

FOLDER = ".drafts"
"""Below the folder of the memories, and no tenant's."""
LONGEST = 3600.0
"""Seconds after which a file that nobody has written to is one that a crash has left."""


def new_draft(memories: Path) -> Path:
    """Return a new, empty file in the folder of all memories; those that a crash left there are removed.

    Whoever asks for it removes it. Raises OSError.
    """
    folder = memories / FOLDER
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    remove_old_drafts(memories)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        return Path(file.name)


def remove_old_drafts(memories: Path) -> None:
    """Remove files that a crash has left, of this server or of others on the same folder."""
    with suppress(FileNotFoundError):  # no draft was ever made; or another server was faster
        for file in (memories / FOLDER).iterdir():
            if time.time() - file.lstat().st_mtime > LONGEST:
                file.unlink()
