"""Journal: the exchanges that are still in the prompt, on disk beside the memory they will go to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import cattrs
from cattrs.preconf.json import make_converter

from mplus.chat.exchange import Exchange
from mplus.errors import MemoryFileError
from mplus.stores.disk.files import FileSystem

JSON = make_converter()
FILE = "chat.jsonl"
"""Name of the journal in the directory of a memory."""


class Journal:
    """A file with a line of JSON for each exchange that memory does not have yet, so that a crash loses nothing said.

    Args:
        path: of the file; there need be none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Exchange]:
        """Return the exchanges. A last line without its end was being written in a crash, and is left out.

        Raises:
            MemoryFileError: the file cannot be read, or something else stands in it.
        """
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            lines = text.splitlines(keepends=True)
            return [JSON.loads(line, Exchange) for line in lines if line.endswith("\n")]
        except (OSError, ValueError, cattrs.BaseValidationError) as error:
            raise MemoryFileError(
                f"{self.path} must have an exchange of a chat in each line, got {error!r:.200}: move it away to go on "
                "without what was last said"
            ) from error

    def write(self, exchanges: Sequence[Exchange]) -> None:
        """Put these exchanges in place of all others; they are on disk when this returns. Raises MemoryFileError."""
        beside = self.path.with_suffix(".new")
        try:
            with open(beside, "w", encoding="utf-8", opener=self._opener) as file:
                file.writelines(JSON.dumps(one) + "\n" for one in exchanges)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
            FileSystem().sync_folder(self.path.parent)  # else a crash may bring the older file back
        except OSError as error:
            raise MemoryFileError(f"{self.path} cannot be written: {error}") from error

    def _opener(self, path: str, flags: int) -> int:
        """Open a file with the permissions of the memory's own files; by itself, for its owner only."""
        manifest = self.path.parent / "manifest.json"
        mode = manifest.stat().st_mode & 0o777 if manifest.exists() else 0o600
        file = os.open(path, flags, mode)
        os.fchmod(file, mode)
        return file
