"""Tenants: which memories there are, whose they are, and where they lie: never under a name that a client chose.

``DIR/sha256(tenant)/sha256(id)`` is the directory of a memory, and ``DIR/sha256(tenant)/sha256(id).json`` says its
names. The manifest of an empty memory is made first, that of a copy once its directory is whole; it goes last: a crash
while a memory is deleted leaves it whole, or empty under its name. Directories that were deleted, or have no manifest,
go when the next server starts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from attrs import asdict, define, evolve

from mplus.errors import LiveMemoryError, MemoryFileError
from mplus.memory.directory.removal import delete_memory, remove_deleted
from mplus.memory.format.folder import lock
from mplus.serving.config import Limits
from mplus.serving.drafts import new_draft, remove_old_drafts
from mplus.serving.engine.memories.versions import first_version, raise_first_version, unused_version
from mplus.serving.errors import ServingError
from mplus.serving.messages import MemoryName
from mplus.stores.disk.files import FileSystem, Folder

LOG = logging.getLogger(__name__)

DEFAULT = "default"
"""The memory of a tenant that needs no making: it reads as empty until it is first written."""
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
FOLDER = re.compile(r"[0-9a-f]{64}")
"""Name of the folder of a tenant, as of the directory of a memory."""


@define(frozen=True)
class MadeMemory:
    """A memory that was made.

    Attributes:
        id: as its tenant calls it.
        made: when, in seconds since 1970.
        number: grows in the order of making, within a tenant.
        first: the version that it began with, as clients see it; no memory of its name had a version as high before.
    """

    id: str
    made: float
    number: int
    first: int = 0

    @property
    def created(self) -> str:
        """Return when it was made, ISO 8601 in UTC."""
        return datetime.fromtimestamp(self.made, UTC).isoformat(timespec="seconds")


class Tenants:
    """The folder of all memories, by tenant. Methods look at the disk, and may be called in any thread.

    Attributes:
        root: the folder.
        limits: of each tenant.
    """

    def __init__(self, root: Path, limits: Limits, files: FileSystem | None = None) -> None:
        """Args: ``files`` does what is done to files; None: the system."""
        self.root, self.limits, self._files = root, limits, files or FileSystem()
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_old_drafts(root)
        for folder in root.iterdir():
            if FOLDER.fullmatch(folder.name):
                self._remove_deleted(folder)

    def path(self, name: MemoryName) -> Path:
        """Return the directory that a memory lives in, or would live in."""
        return self._folder(name.tenant) / _digest(name.id)

    def find(self, name: MemoryName) -> MadeMemory | None:
        """Return what is known of a memory; None: it was not made. Raises ServingError (409): it is damaged."""
        return _read(self._manifest(name))

    def make(self, name: MemoryName) -> MadeMemory:
        """Make an empty memory; its directory comes with the first opening. Raises as ``making``."""
        with self.making(name) as made:
            pass
        return made

    @contextmanager
    def making(self, name: MemoryName) -> Iterator[MadeMemory]:
        """Yield what will be known of a memory while its directory may be made; at the end there is such a memory.

        Where that fails or a crash comes before, there is none. Whoever makes the directory keeps it locked until the
        end.

        Raises:
            ServingError: there is one (409), or the tenant has as many as it may have (413); nothing was made.
        """
        check_id(name.id)
        folder = self._folder(name.tenant)
        self._files.make_folder(folder)
        others = self._check_number(name.tenant)
        self.remove_unmade(name)
        number = max([time.time_ns(), *(other.number + 1 for other in others)])  # clocks may go back
        made = MadeMemory(name.id, time.time(), number, first_version(folder))
        yield made
        with self.draft() as draft, Folder.open(folder) as held:
            self._write(draft, _manifest_of(made, name.tenant))
            alone = lock(held)  # of two at once the second one counts the first
            try:
                self._check_number(name.tenant)
                os.link(draft, self._manifest(name))
            except FileExistsError as error:
                raise already_there(name.id) from error
            finally:
                alone.release()
        self._files.sync_folder(folder)

    def _check_number(self, tenant: str) -> list[MadeMemory]:
        """Return the memories of a tenant. Raises ServingError (413): there are as many as it may have."""
        made = self.all(tenant)
        if self.limits.memories is not None and len(made) >= self.limits.memories:
            raise quota_exceeded(f"a tenant may have {self.limits.memories} memories, and there are {len(made)}")
        return made

    def remove_unmade(self, name: MemoryName) -> None:
        """Remove the directory of a memory that was not made, which a crash, or a copy that failed, has left."""
        if self.path(name).exists() and not self._manifest(name).exists():
            self._delete(self.path(name))

    def first(self, tenant: str) -> int:
        """Return the version of what a tenant has not made yet."""
        return first_version(self._folder(tenant))

    def opening(self, name: MemoryName) -> tuple[Path, int]:
        """Return the directory of a memory that is about to be opened, and the version that it began with."""
        path, made = self.path(name), self.find(name)
        if made is None:
            raise not_made(name.id)
        # A new one; or a crash has ended its deletion, and what it told before must not be told again.
        if not path.exists() and (first := self.first(name.tenant)) > made.first:
            made = evolve(made, first=first)
            with self.draft() as draft:
                self._write(draft, _manifest_of(made, name.tenant))
                draft.replace(self._manifest(name))
        return path, made.first

    def remove(self, name: MemoryName) -> None:
        """Delete a memory that is closed.

        Raises MemoryFileError, LiveMemoryError: it cannot be deleted, and is there as before.
        """
        path, made = self.path(name), self.find(name)
        if path.exists():
            if made is not None:
                raise_first_version(path.parent, made.first + unused_version(path), self._files)
            self._delete(path)
        self._manifest(name).unlink(missing_ok=True)
        self._files.sync_folder(self._folder(name.tenant))

    def _delete(self, path: Path) -> None:
        try:
            delete_memory(path, files=self._files)
        except MemoryFileError as error:
            if path.exists():
                raise
            LOG.warning(
                "files of a deleted memory are still there, and are removed when a server starts", exc_info=error
            )

    def _remove_deleted(self, folder: Path) -> None:
        try:
            left = remove_deleted(folder, files=self._files)
            unmade = [path for path in folder.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()]
            for path in unmade:
                if not path.with_suffix(".json").exists():
                    with suppress(LiveMemoryError):  # another server is making it just now
                        self._delete(path)
        except (MemoryFileError, OSError) as error:  # of one tenant; the others are served
            LOG.warning("what was deleted cannot be looked for in %s", folder.name, exc_info=error)
        else:
            if left:
                LOG.warning("files of %d deleted memories cannot be removed from %s", len(left), folder.name)

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Yield the path of a file for a while, on the disk of the memories."""
        file = new_draft(self.root)
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)

    def all(self, tenant: str) -> list[MadeMemory]:
        """Return the memories of a tenant in order of making, without those whose manifest is damaged."""
        with suppress(FileNotFoundError):
            files = [entry.path for entry in os.scandir(self._folder(tenant)) if entry.name.endswith(".json")]
            found = []
            for file in files:
                with suppress(ServingError):  # a damaged one is logged as it is read; all others are listed
                    found.append(_read(Path(file)))
            return sorted((made for made in found if made is not None), key=lambda made: (made.number, made.id))
        return []

    def disk_bytes(self, name: MemoryName) -> int:
        """Return the bytes of the files of a memory."""
        return _bytes_in(self.path(name))

    def bytes_of_tenant(self, tenant: str) -> int:
        """Return the bytes of the files of all memories of a tenant."""
        return _bytes_in(self._folder(tenant))

    def check_room(self, tenant: str, more: int) -> None:
        """Raise ServingError (413) where the memories of a tenant would take more disk than they may."""
        limit = self.limits.disk_bytes
        if limit is not None and (used := self.bytes_of_tenant(tenant)) + more > limit:
            raise quota_exceeded(
                f"the memories of a tenant may take {limit:,} bytes of disk, and take {used:,} of them: "
                f"{more:,} more do not fit"
            )

    def _write(self, file: Path, content: bytes) -> None:
        handle = self._files.extend(file)
        try:
            self._files.write(handle, content)
            self._files.sync(handle)
        finally:
            self._files.close(handle)

    def _folder(self, tenant: str) -> Path:
        return self.root / _digest(tenant)

    def _manifest(self, name: MemoryName) -> Path:
        return self._folder(name.tenant) / f"{_digest(name.id)}.json"


def check_id(name: str) -> None:
    """Raise ServingError (400) unless this may be the id of a memory."""
    if not isinstance(name, str) or not ID.fullmatch(name):
        raise ServingError(
            f"the id of a memory must be 1 to 128 letters, digits and . _ : @ -, the first a letter or digit, "
            f"got {name!r:.160}",
            400, "invalid_request_error", code="invalid_memory_id", param="memory",
        )  # fmt: skip


def not_made(name: str) -> ServingError:
    """Return the error that says: there is no such memory (of this tenant)."""
    return ServingError(f"there is no memory {name!r}", 404, "not_found_error", code="memory_not_found", param="memory")


def already_there(name: str) -> ServingError:
    """Return the error that says: a memory of this name was made before."""
    return ServingError(f"there is a memory {name!r} already", 409, "conflict_error", code="memory_exists", param="id")


def quota_exceeded(message: str) -> ServingError:
    """Return the error that says: a limit of the tenant is reached, and nothing was written."""
    return ServingError(message, 413, "invalid_request_error", code="quota_exceeded")


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _manifest_of(made: MadeMemory, tenant: str) -> bytes:
    return json.dumps({**asdict(made), "tenant": tenant}).encode()


def _read(file: Path) -> MadeMemory | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return MadeMemory(content["id"], content["made"], content["number"], content.get("first", 0))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        LOG.warning("the manifest %s is damaged", file.name, exc_info=error)
        message = "what the server keeps of this memory is damaged: its name cannot be read"
        raise ServingError(message, 409, "conflict_error", code="memory_damaged") from error


def _bytes_in(folder: Path) -> int:
    total = 0
    with suppress(FileNotFoundError, NotADirectoryError):  # files come and go meanwhile
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                total += _bytes_in(Path(entry.path))
            else:
                with suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
    return total
