"""Tenants: which memories there are, whose they are, and where they lie: never under a name that a client chose.

``DIR/sha256(tenant)/sha256(id)`` is the directory of a memory, and ``DIR/sha256(tenant)/sha256(id).json`` says its
names. The manifest is made first and goes last. A directory that is deleted gets another name in one step; what a
crash leaves under such names goes when the next server starts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from attrs import define

from mplus.serving.config import Limits
from mplus.serving.errors import ServingError
from mplus.serving.messages import MemoryName

LOG = logging.getLogger(__name__)

DEFAULT = "default"
"""The memory of a tenant that needs no making: it reads as empty until it is first written."""
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
GONE, DRAFTS = ".gone-", ".drafts"


@define(frozen=True)
class MadeMemory:
    """A memory that was made.

    Attributes:
        id: as its tenant calls it.
        made: when, in seconds since 1970.
        number: grows in the order of making, within a tenant.
    """

    id: str
    made: float
    number: int

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

    def __init__(self, root: Path, limits: Limits) -> None:
        self.root, self.limits = root, limits
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.rmtree(root / DRAFTS, ignore_errors=True)
        for grave in root.glob(f"*/{GONE}*"):  # of a crash
            _remove(grave)

    def path(self, name: MemoryName) -> Path:
        """Return the directory that a memory lives in, or would live in."""
        return self._folder(name.tenant) / _digest(name.id)

    def find(self, name: MemoryName) -> MadeMemory | None:
        """Return what is known of a memory; None: it was not made. Raises ServingError (409): it is damaged."""
        return _read(self._manifest(name))

    def make(self, name: MemoryName) -> MadeMemory:
        """Make an empty memory; its directory comes with the first opening.

        Raises:
            ServingError: there is one (409), or the tenant has as many as it may have (413); nothing was made.
        """
        check_id(name.id)
        others = self.all(name.tenant)
        if self.limits.memories is not None and len(others) >= self.limits.memories:
            raise quota_exceeded(f"a tenant may have {self.limits.memories} memories, and there are {len(others)}")
        folder, left = self._folder(name.tenant), self.path(name)
        folder.mkdir(exist_ok=True, mode=0o700)
        if left.exists() and not self._manifest(name).exists():
            _remove(_buried(left))
        now = time.time()
        number = max([time.time_ns(), *(other.number + 1 for other in others)])  # clocks may go back
        content = {"id": name.id, "tenant": name.tenant, "made": now, "number": number}
        draft = folder / f"{secrets.token_hex(8)}.draft"
        _write(draft, json.dumps(content))
        try:
            os.link(draft, self._manifest(name))
        except FileExistsError as error:
            raise already_there(name.id) from error
        finally:
            draft.unlink(missing_ok=True)
        _sync(folder)
        return MadeMemory(name.id, now, number)

    def remove(self, name: MemoryName) -> None:
        """Remove a memory that is closed: it is gone at once, and its files are deleted then."""
        grave = _buried(self.path(name)) if self.path(name).exists() else None
        self._manifest(name).unlink(missing_ok=True)
        _sync(self._folder(name.tenant))
        if grave is not None:
            _remove(grave)

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Yield the path of a file for a while, on the disk of the memories."""
        folder = self.root / DRAFTS
        folder.mkdir(exist_ok=True, mode=0o700)
        file = folder / secrets.token_hex(8)
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)

    def all(self, tenant: str) -> list[MadeMemory]:
        """Return the memories of a tenant in order of making, without those whose manifest is damaged."""
        with suppress(FileNotFoundError):
            files = [entry.path for entry in os.scandir(self._folder(tenant)) if entry.name.endswith(".json")]
            found = [made for made in map(_read_or_tell, map(Path, files)) if made is not None]
            return sorted(found, key=lambda made: (made.number, made.id))
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


def _buried(path: Path) -> Path:
    """Give a directory the name of one that is deleted, and return that."""
    return path.rename(path.with_name(f"{GONE}{secrets.token_hex(8)}"))


def _remove(grave: Path) -> None:
    try:
        shutil.rmtree(grave)
    except OSError as error:
        LOG.warning("files of a deleted memory are still there, and are removed when a server starts", exc_info=error)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _read(file: Path) -> MadeMemory | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return MadeMemory(content["id"], content["made"], content["number"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        LOG.warning("the manifest %s is damaged", file.name, exc_info=error)
        message = "what the server keeps of this memory is damaged: its name cannot be read"
        raise ServingError(message, 409, "conflict_error", code="memory_damaged") from error


def _read_or_tell(file: Path) -> MadeMemory | None:
    try:
        return _read(file)
    except ServingError:  # logged there; all others are listed
        return None


def _write(file: Path, text: str) -> None:
    with file.open("x", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def _sync(folder: Path) -> None:
    with suppress(FileNotFoundError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
