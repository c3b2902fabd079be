"""Directory: the files of one memory, as its writer holds them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from attrs import define

from mplus.errors import LiveMemoryError, MemoryFileError
from mplus.memory.directory.checkpoint import (
    CheckpointContent,
    WrittenCheckpoint,
    publish,
    remove,
    remove_others,
    write_checkpoint,
)
from mplus.memory.directory.checkpoint_manifest import VERSION, LiveManifest, read_live_manifest
from mplus.memory.directory.journal import Journal
from mplus.memory.directory.lock import Lock
from mplus.memory.format.folder import MANIFEST, check_removed
from mplus.memory.format.save import ManifestHeader
from mplus.memory.transaction import Sync, Token
from mplus.stores.disk.files import FileSystem, Folder

UNRESOLVED = "it could not be taken back"
"""Why nothing can be written while a change that failed has not been taken back."""


@define(eq=False)
class PendingChange:
    """A change that is on its way to disk.

    Attributes:
        token: the object that it makes; says later whether it came to be.
        size, records: of the journal before.
        written: the checkpoint, where it is one.
    """

    token: Token
    size: int
    records: int
    written: WrittenCheckpoint | None = None


class Directory:
    """The files of a memory, and the one way to change them. Not for use by two threads at a time.

    A change is begun by ``append`` or ``checkpoint`` and either finished, when these return, or taken back by
    ``resolve``. Files are reached through the open folder, and nothing is changed where its path, its lock or its
    journal have come to be others.

    Attributes:
        folder: open.
        files: does what is done to files.
        manifest: of the present checkpoint; None: there is none yet.
        failed: why nothing can be written any more; None: it can.
    """

    def __init__(self, folder: Folder, files: FileSystem, lock: Lock) -> None:
        self.folder, self.files = folder, files
        self.manifest: LiveManifest | None = None
        self._files: frozenset[str] = frozenset()
        """Names of all files without which the memory cannot be read; looked for before every write."""
        self.journal: Journal | None = None
        self.failed: str | None = None
        self._lock = lock
        self._process = os.getpid()
        self._pending: PendingChange | None = None
        self._left: list[str] = []
        """Files of earlier checkpoints that could not be removed."""

    @property
    def path(self) -> Path:
        """The folder, as it was opened; absolute."""
        return self.folder.path

    @property
    def owner(self) -> str:
        """The memory's id, which is in the names of all its files."""
        return self._lock.owner

    @property
    def closed(self) -> bool:
        """True once it was closed; in a child of the process that opened it, always."""
        return self._lock.file.handle is None

    def resume(self, manifest: LiveManifest, size: int, records: int) -> None:
        """Continue behind the ``records`` records, ``size`` bytes, of a checkpoint's journal. Raises OSError."""
        self.manifest, self._files = manifest, frozenset({MANIFEST, *manifest.files})
        self.journal = Journal.resume(self.files, self.folder / manifest.journal, size, records)
        remove_others(self.files, self.folder, self.owner, manifest)

    @property
    def in_earlier_version(self) -> bool:
        """True where the checkpoint has an earlier format version, whose journal takes no records of this one."""
        return self.manifest is not None and self.manifest.version < VERSION

    def check(self) -> None:
        """Raise LiveMemoryError where nothing can be written (any more)."""
        if self._process != os.getpid():
            raise LiveMemoryError(
                f"{self.path} may be written by the process that opened it, {self._process}, and this is a fork of it: "
                "use memory.fork() there, or open it here once that process has ended"
            )
        if self.closed:
            raise LiveMemoryError(f"{self.path} must be open to be written, and was closed: open it again")
        if self.failed is None and (fault := self._fault()) is not None:
            self.failed = fault
        if self.failed is not None:
            raise LiveMemoryError(
                f"{self.path} cannot be written after an error that left its state on disk unknown ({self.failed}): "
                "what is in memory can still be read; open it again to go on with what is on disk"
            )

    def _fault(self) -> str | None:
        """Return why what is written now would not be found at the memory's path; None: it would be."""
        if not self.folder.is_at_its_path():
            return "its folder was renamed, removed or replaced"
        return self._lock.fault(self.folder) or self._gone() or (None if self.journal is None else self.journal.fault())

    def _gone(self) -> str | None:
        """Return which files are gone that a reader needs; None: all are there."""
        if self.manifest is None:
            return None
        try:
            gone = self._files.difference(self.folder.names())
        except OSError as error:
            return f"its folder cannot be read: {error.strerror or error}"
        return f"{', '.join(sorted(gone))} is gone" if gone else None

    @property
    def journal_bytes(self) -> int:
        """Bytes of the journal."""
        return 0 if self.journal is None else self.journal.size

    def append(self, token: Token, payload: Sequence[bytes | memoryview], sync: Sync | None = None) -> None:
        """Make a change by a record in the journal. Raises OSError; then ``resolve`` has to follow.

        ``sync``: as for ``Persistence.commit``.
        """
        if self.journal is None:
            raise LiveMemoryError(f"{self.path} has no checkpoint yet")
        self.check()
        # Noted first: an interrupt in the middle of ``append`` has to know how far to go back.
        self._pending = PendingChange(token, self.journal.size, self.journal.records)
        self.journal.append(payload, sync)

    def checkpoint(self, token: Token, content: CheckpointContent, header: ManifestHeader, *, clean: bool) -> None:
        """Make a change by a checkpoint, which holds all of ``content``.

        Args:
            token: the object that the change makes.
            content: what to write.
            header: of the manifest, what it says of the memory as a whole.
            clean: also rewrite files that hold rows which were removed.

        Raises:
            OSError: then ``resolve`` has to follow.
        """
        self.check()
        number = 0 if self.manifest is None else self.manifest.number + 1
        owner = self.owner
        written = write_checkpoint(self.files, self.folder, owner, content, header, number, clean=clean)
        self._pending = PendingChange(token, 0, 0, written)
        self.check()  # writing all that took its time
        try:
            publish(self.files, self.folder, owner, written.manifest)
            self._adopt(written)
        except OSError:
            if not self.resolve(token) or self.failed is not None:
                raise  # else the manifest was found in place and could be synced: what failed has been made good

    def _adopt(self, written: WrittenCheckpoint) -> None:
        names = frozenset({MANIFEST, *written.manifest.files})
        before, self.manifest, self._files = self.manifest, written.manifest, names
        journal, self.journal = self.journal, written.journal
        written.adopt_files()
        if journal is not None and journal is not written.journal:
            journal.close()
        if self.failed is None:  # else nobody knows which manifest a crash would leave: the files of both stay
            self._left = remove_others(self.files, self.folder, self.owner, written.manifest, before)

    def check_removed(self) -> None:
        """Make sure that files of earlier checkpoints are gone, and stay so after a crash.

        Raises:
            MemoryFileError: one is still there, with what was forgotten; the memory itself no longer has it.
        """
        if self._left:
            self._left = remove(self.files, [self.folder / name for name in self._left])
        check_removed(self.path, self._left)
        try:
            self.files.sync_folder(self.folder)
        except OSError as error:
            raise MemoryFileError(
                f"{self.path}: the memory has forgotten what it was to forget, and its files are removed, but they may "
                f"come back when the power is lost now ({error.strerror or error}): open it again then"
            ) from error

    def resolve(self, token: Token) -> bool:
        """Resolve the change that makes ``token`` after an exception: it stays on disk, or is taken back.

        Where neither is possible, nothing can be written any more.

        Returns:
            Whether the change is on disk, and stays.
        """
        begun = self._pending
        if begun is None or begun.token is not token or self._process != os.getpid():
            return False
        failed = None if self.failed == UNRESOLVED else self.failed
        self.failed = UNRESOLVED  # holds if we are interrupted here, until we are called again
        if begun.written is None:
            self._take_back(begun)
            kept = False
        else:
            kept = self._resolve_checkpoint(begun.written)
        self._pending = None
        self.failed = self.failed or failed
        return kept

    def _take_back(self, begun: PendingChange) -> None:
        try:
            if self.journal is not None:
                self.journal.cut(begun.size, begun.records)
        except OSError as error:
            self.failed = f"taking it back failed: {error.strerror or error}"
        else:
            self.failed = None

    def _resolve_checkpoint(self, written: WrittenCheckpoint) -> bool:
        """Go on with ``written`` if the manifest on disk is its own, which is returned, else without it."""
        try:
            kept = (self.folder / MANIFEST).exists()
            kept = kept and read_live_manifest(self.folder).number == written.manifest.number
        except (MemoryFileError, OSError) as error:
            self.failed = f"its manifest cannot be read: {error}"
            return False
        if not kept:
            written.journal.close()
            remove(self.files, written.made)
            self.failed = None
            return False
        try:
            self.files.sync_folder(self.folder)
        except OSError as error:
            self.failed = f"its new manifest could not be synced: {error.strerror or error}"
        else:
            self.failed = None
        self._adopt(written)
        return True

    def close(self) -> None:
        """Release files and lock; idempotent."""
        try:
            if self.journal is not None:
                self.journal.close()
        finally:  # an interrupt leaves no lock behind
            try:
                self._lock.file.release()
            finally:
                self.folder.close()
