"""Keys: who may do what; a file of their hashes, which the server reads anew whenever it changes."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from attrs import asdict, define, evolve, field
from attrs.validators import deep_iterable, in_, instance_of, matches_re, optional
from filelock import FileLock

from mplus.config import JsonValue, whole
from mplus.errors import ConfigError
from mplus.stores.disk.files import FileSystem

Right: TypeAlias = Literal["read", "write", "admin"]
RIGHTS: tuple[Right, ...] = get_args(Right)
DEFAULT_RIGHTS: tuple[Right, ...] = ("read", "write")
ADMIN_TENANT, LOCAL_TENANT = "admin", "local"
"""Tenants of the admin key, and of everyone where no keys are needed."""
FILE = "keys.json"


@define(frozen=True)
class Caller:
    """The holder of a key, from whom a request comes.

    Attributes:
        tenant: whose memories are meant.
        rights: what may be done.
        key: id of the key; None: there is none, or it is the admin key.
        requests: that may be answered at once; None: no limit but the tenant's.
    """

    tenant: str
    rights: tuple[Right, ...]
    key: str | None = None
    requests: int | None = None


@define(frozen=True)
class KeyRecord:
    """A key as the file holds it.

    Attributes:
        id: is part of the key.
        sha256: of the key, in hexadecimal.
        tenant: whose memories it opens.
        rights: what its holder may do.
        made: ISO 8601 in UTC.
        requests: that may be answered at once; None: no limit but the tenant's.
        revoked: ISO 8601 in UTC; None: it is valid.

    Raises:
        ValueError, TypeError, ConfigError: it is none, as where a file was edited.
    """

    id: str = field(validator=matches_re(r"[0-9A-Za-z]+"))
    sha256: str = field(validator=matches_re(r"[0-9a-f]{64}"))
    tenant: str = field(validator=matches_re(r"(?s).+"))
    rights: tuple[Right, ...] = field(validator=deep_iterable(in_(RIGHTS)))
    made: str = field(validator=instance_of(str))
    requests: int | None = field(default=None, validator=whole(1, optional=True))
    revoked: str | None = field(default=None, validator=optional(instance_of(str)))

    def public(self) -> dict[str, JsonValue]:
        """Return what may be shown of it."""
        known: dict[str, JsonValue] = {
            "id": self.id,
            "tenant": self.tenant,
            "rights": list(self.rights),
            "made": self.made,
        }
        return known if self.requests is None else {**known, "requests": self.requests}


@define(eq=False)
class Keys:
    """The keys of a server: those of a file, and the admin key.

    Once there has been a key, every request needs one: revoking the last does not open the server.

    Example:
        >>> keys = Keys(folder / "keys.json")
        >>> record, key = keys.make("ada")
        >>> keys.caller(key).tenant
        'ada'
        >>> keys.revoke(record.id)
        True

    Attributes:
        file: JSON; need not be there.
        admin_key: opens the admin routes; None: nobody can make keys over HTTP.
    """

    file: Path
    admin_key: str | None = field(default=None, repr=False)
    _stamp: tuple[int, ...] | None = field(default=None, init=False)
    _records: dict[str, KeyRecord] = field(factory=dict, init=False)

    @property
    def needed(self) -> bool:
        """Requests need a key."""
        return self.admin_key is not None or bool(self._read())

    def caller(self, key: str) -> Caller | None:
        """Return who holds a key; None: it is none, or was revoked."""
        digest = _digest(key)
        if self.admin_key is not None and hmac.compare_digest(digest, _digest(self.admin_key)):
            return Caller(ADMIN_TENANT, RIGHTS)
        records, parts = self._read(), key.split("-", 2)
        record = records.get(parts[1]) if len(parts) == 3 and parts[0] == "mp" else None
        if record is None or not hmac.compare_digest(digest, record.sha256) or record.revoked is not None:
            return None
        return Caller(record.tenant, record.rights, record.id, record.requests)

    def list(self) -> list[KeyRecord]:
        """Return the valid keys, in order of making."""
        return [record for record in self._read().values() if record.revoked is None]

    def make(
        self, tenant: str, rights: Sequence[Right] = DEFAULT_RIGHTS, requests: int | None = None
    ) -> tuple[KeyRecord, str]:
        """Return a new key with its record; the key itself is kept nowhere."""
        key_id = secrets.token_hex(6)
        key = f"mp-{key_id}-{secrets.token_urlsafe(32)}"
        ordered = tuple(right for right in RIGHTS if right in rights)
        made = datetime.now(UTC).isoformat(timespec="seconds")
        record = KeyRecord(key_id, _digest(key), tenant, ordered, made, requests)
        with self._lock():
            self._write({**self._read(), key_id: record})
        return record, key

    def revoke(self, key_id: str) -> bool:
        """Make a key invalid at once. Returns False where no such key is valid."""
        with self._lock():
            records = self._read()
            record = records.get(key_id)
            if record is None or record.revoked is not None:
                return False
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._write({**records, key_id: evolve(record, revoked=now)})
        return True

    def _lock(self) -> FileLock:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.file}.lock", mode=0o600)

    def _read(self) -> dict[str, KeyRecord]:
        """Return the records of the file by id, as they are now."""
        try:
            status = self.file.stat()
        except FileNotFoundError:
            return self._records if self._stamp is None else self._gone()
        # The number of the file as well: a file that was put in its place within one tick of the clock is another one.
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp:
            self._records, self._stamp = _parse(self.file), stamp
        return self._records

    def _gone(self) -> dict[str, KeyRecord]:
        raise ConfigError(f"the file of the keys was there and is gone, so nobody can be let in: put back {self.file}")

    def _write(self, records: dict[str, KeyRecord]) -> None:
        """Put the file in place in one step, readable by its owner alone."""
        text = json.dumps({"keys": [asdict(record) for record in records.values()]}, indent=1)
        handle, name = tempfile.mkstemp(dir=self.file.parent, prefix=".keys-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(self.file)
        FileSystem().sync_folder(self.file.parent)  # so that a key which was revoked stays so


def _parse(file: Path) -> dict[str, KeyRecord]:
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))["keys"]
        records = [KeyRecord(**{**one, "rights": tuple(one["rights"])}) for one in plain]
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"{file} must be a file of keys as `mplus keys` writes them, and is not: {error}") from error
    return {record.id: record for record in records}


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def rights_of(names: Sequence[str]) -> tuple[Right, ...]:
    """Return rights by name. Raises ConfigError: there is no such right."""
    if not names or (wrong := sorted(set(names) - set(RIGHTS))):
        raise ConfigError(f"rights must be some of {', '.join(RIGHTS)}, got {', '.join(wrong) if names else 'none'}")
    return cast("tuple[Right, ...]", tuple(names))
