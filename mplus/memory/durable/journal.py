"""Journal: what happened since the last checkpoint, one record per change, each on disk before it counts.

A record is ``[head][payload]``, each padded to whole sectors of 512 bytes, the unit in which disks write. The head is
``MARK``, the record's number, the payload's length, the CRC-32 of these, of every sector of the payload, and of the
head itself.

A record at the end that was never finished has sectors that are missing or, where the file had already grown, all
zero. Whoever opens the journal leaves such a tail out: nobody was told that it was written. A sector that is neither is
damage, wherever it stands, and an error. (A last record that was acknowledged and of which somebody then cuts sectors
off or overwrites them with zeros cannot be told from an unfinished one.)
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from mplus.errors import MemoryFileError
from mplus.stores.disk.filesystem import FileSystem

SECTOR = 512
MARK = b"mplus-j1"
FACTS = struct.Struct("<8sQQ")
"""Mark, number of the record, bytes of the payload."""


class Journal:
    """A journal that is written; made by ``create`` or ``resume``. All methods may raise OSError.

    Attributes:
        path: of the file.
        size: bytes of finished records.
        records: how many there are.
    """

    def __init__(self, files: FileSystem, path: Path, handle: int, size: int, records: int) -> None:
        self._files = files
        self._handle: int | None = handle
        self.path, self.size, self.records = path, size, records

    @staticmethod
    def create(files: FileSystem, path: Path) -> Journal:
        """A new, empty journal, synced but for its name."""
        handle = files.create(path)
        try:
            files.sync(handle)
        except BaseException:
            files.close(handle)
            raise
        return Journal(files, path, handle, 0, 0)

    @staticmethod
    def resume(files: FileSystem, path: Path, size: int, records: int) -> Journal:
        """Go on behind ``records`` records of ``size`` bytes; what stands behind them is cut off."""
        handle = files.extend(path)
        journal = Journal(files, path, handle, size, records)
        try:
            journal.cut(size, records)
        except BaseException:
            journal.close()
            raise
        return journal

    def append(self, payload: Sequence[bytes | memoryview]) -> None:
        """Add one record; when this returns, it is on disk. On an error ``cut`` has to follow."""
        handle = self._open()
        length = sum(len(piece) for piece in payload)
        data = b"".join((*payload, bytes(-length % SECTOR)))
        head = _head(self.records, length, data)
        self._files.write(handle, head + data)
        self._files.sync(handle)
        self.size, self.records = self.size + len(head) + len(data), self.records + 1

    def cut(self, size: int, records: int) -> None:
        """Go back to the first ``records`` records, ``size`` bytes; when this returns, the others are gone."""
        handle = self._open()
        self._files.truncate(handle, size)
        self._files.sync(handle)
        self.size, self.records = size, records

    def close(self) -> None:
        """Give the file back; idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._files.close(handle)

    def _open(self) -> int:
        if self._handle is None:
            raise ValueError(f"{self.path} is closed")
        return self._handle


def _head(number: int, length: int, data: bytes) -> bytes:
    facts = FACTS.pack(MARK, number, length)
    head = facts + zlib.crc32(facts).to_bytes(4, "little") + _checksums(data)
    head += zlib.crc32(head).to_bytes(4, "little")
    return head + bytes(-len(head) % SECTOR)


def _checksums(data: bytes | memoryview) -> bytes:
    view = memoryview(data)
    return b"".join(zlib.crc32(view[at : at + SECTOR]).to_bytes(4, "little") for at in range(0, len(view), SECTOR))


def _padded(size: int) -> int:
    return size + -size % SECTOR


def records(path: Path) -> Iterator[tuple[memoryview, int]]:
    """Payload of each finished record, and where in the file it ends; an unfinished tail is left out.

    Raises:
        MemoryFileError: the file is missing, or a record is damaged.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            end, number = 0, 0
            while end < size:
                file.seek(end)
                payload = _record(file, size - end, number, path)
                if payload is None:
                    return
                end, number = file.tell(), number + 1
                yield payload, end
    except OSError as error:
        raise MemoryFileError(f"{path} must be a readable file, got {error.strerror or error}") from error


def _record(file: BinaryIO, left: int, number: int, path: Path) -> memoryview | None:
    """The record that begins here, with ``left`` bytes of the file; None: it was never finished."""
    first = file.read(SECTOR)
    facts = first[: FACTS.size]
    if len(first) < SECTOR or not any(first):
        return None
    mark, found, length = FACTS.unpack(facts)
    checksum = int.from_bytes(first[FACTS.size : FACTS.size + 4], "little")
    if mark != MARK or found != number or checksum != zlib.crc32(facts):
        raise _damaged(path, number, "its head does not have the checksum it was written with")
    sectors = _padded(length) // SECTOR
    used = FACTS.size + 4 + 4 * sectors + 4
    if _padded(used) > left:
        return None
    head = first + file.read(_padded(used) - SECTOR)
    if zlib.crc32(head[: used - 4]) != int.from_bytes(head[used - 4 : used], "little"):
        if any(not any(head[at : at + SECTOR]) for at in range(SECTOR, used, SECTOR)):
            return None
        raise _damaged(path, number, "its head does not have the checksum it was written with")
    if any(head[used:]):
        raise _damaged(path, number, "there is something behind its head")
    data = memoryview(file.read(_padded(length)))
    if _is_whole(data, head[FACTS.size + 4 : used - 4], path, number):
        return data[:length]
    while sector := file.read(SECTOR):
        if sector.startswith(MARK):
            raise _damaged(path, number, "parts of it are empty, and other records follow")
    return None


def _is_whole(data: memoryview, checksums: bytes, path: Path, number: int) -> bool:
    """Whether nothing is missing. Raises MemoryFileError where something was altered."""
    found, whole = _checksums(data), len(data) == len(checksums) // 4 * SECTOR
    for place, at in enumerate(range(0, len(data), SECTOR)):
        if found[4 * place : 4 * place + 4] != checksums[4 * place : 4 * place + 4]:
            if at + SECTOR <= len(data) and any(data[at : at + SECTOR]):
                raise _damaged(
                    path, number, f"bytes {at} to {at + SECTOR - 1} of it have another checksum than written"
                )
            whole = False
    return whole


def _damaged(path: Path, number: int, fault: str) -> MemoryFileError:
    return MemoryFileError(
        f"{path}: record {number} must be what was written, but {fault}: it was altered; use another copy, or save "
        "what is sound with `mplus memory repair`"
    )
