"""Journal: the changes since the last checkpoint, a record for each, on disk before the change counts.

A record is ``[head][payload]``, each padded to whole sectors of 512 bytes, the unit in which disks write. The head is
a mark, the record's number, the payload's length, the CRC-32 of these, of every sector of the payload, and of the head
itself. The mark is ``mplus-j2`` and 16 bytes of a digest of the file's name, in which the memory's random id stands: no
text or row that somebody has written to the memory looks like a record of its journal. (Journals of earlier versions,
whose names have no id, have the mark ``mplus-j1`` alone.)

A record at the end that was never finished has sectors that are missing or, where the file had already grown, all
zero. Whoever opens the journal leaves such a tail out: nobody was told that it was written. Where a later record stands
behind it, that one was acknowledged, and the tail is a hole: damage, and an error. So is a sector that is neither what
was written nor missing, wherever it stands. (A last record that was acknowledged and of which somebody then cuts
sectors off or overwrites them with zeros cannot be told from an unfinished one.)
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from attrs import define

from mplus.errors import MemoryFileError
from mplus.memory.transaction import Sync
from mplus.stores.disk.files import FileSystem, PathAt, open_file

SECTOR = 512
FIRST_MARK, MARK = b"mplus-j1", b"mplus-j2"
FACTS = struct.Struct("<QQ")
"""Number of the record, bytes of the payload."""
SEARCHED = 2**20
"""Bytes searched for records at a time."""


def record_mark(name: str) -> bytes:
    """Return the bytes that every record of the journal in the file ``name`` begins with."""
    if re.fullmatch(r"journal-\d+\.bin", name):
        return FIRST_MARK
    return MARK + hashlib.sha256(name.encode()).digest()[:16]


class Journal:
    """A journal open for writing; made by ``create`` or ``resume``. All methods may raise OSError.

    Attributes:
        path: of the file.
        size: bytes of finished records.
        records: how many there are.
    """

    def __init__(self, files: FileSystem, path: PathAt, handle: int, size: int, records: int) -> None:
        self._files = files
        self._handle: int | None = handle
        self._mark = record_mark(path.name)
        self.path, self.size, self.records = path, size, records

    @staticmethod
    def create(files: FileSystem, path: PathAt) -> Journal:
        """Create an empty journal; its contents are synced, its name is not."""
        journal = Journal(files, path, files.create(path), 0, 0)
        try:
            files.sync(journal._open())
        except BaseException:
            journal.close()
            raise
        return journal

    @staticmethod
    def resume(files: FileSystem, path: PathAt, size: int, records: int) -> Journal:
        """Open a journal behind its first ``records`` records, ``size`` bytes; cut off what stands behind them."""
        journal = Journal(files, path, files.extend(path), size, records)
        try:
            journal.cut(size, records)
        except BaseException:
            journal.close()
            raise
        return journal

    def append(self, payload: Sequence[bytes | memoryview], sync: Sync | None = None) -> None:
        """Add one record at the end; when this returns, it is on disk. On an error ``cut`` has to follow.

        ``sync``: is called with what syncs the record, and returns once that was called; None: it is synced at once.
        """
        handle = self._open()
        length = sum(len(piece) for piece in payload)
        data = b"".join((*payload, bytes(-length % SECTOR)))
        head = _head(self._mark, self.records, length, data)
        self._files.write(handle, head + data)
        # Before the write shows in memory: what a reader saw is on disk.
        if sync is None:
            self._files.sync(handle)
        else:
            sync(partial(self._files.sync, handle))
        self.size, self.records = self.size + len(head) + len(data), self.records + 1

    def cut(self, size: int, records: int) -> None:
        """Go back to the first ``records`` records, ``size`` bytes; when this returns, the others are gone."""
        handle = self._open()
        # Synced as well: a record that was taken back must not be there again after a crash.
        self._files.truncate(handle, size)
        self._files.sync(handle)
        self.size, self.records = size, records

    def fault(self) -> str | None:
        """Return why an appended record would not be found behind the last one; None: it would be."""
        try:
            named, own = self.path.stat(), os.fstat(self._open())
        except OSError as error:
            return f"{self.path.name} is gone: {error.strerror or error}"
        if not os.path.samestat(named, own):
            return f"{self.path.name} is another file than the one that was opened"
        if own.st_nlink > 1:
            return f"{self.path.name} has got a second name, and what that is would be written to as well"
        if own.st_size != self.size:
            return f"{self.path.name} has {own.st_size} bytes, and {self.size} were written"
        return None

    def close(self) -> None:
        """Close the file; idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(OSError):  # the descriptor is given back all the same, and every record was synced
                self._files.close(handle)

    def _open(self) -> int:
        if self._handle is None:
            raise ValueError(f"{self.path} is closed")
        return self._handle


def _head(mark: bytes, number: int, length: int, data: bytes) -> bytes:
    facts = mark + FACTS.pack(number, length)
    head = facts + zlib.crc32(facts).to_bytes(4, "little") + _checksums(data)
    head += zlib.crc32(head).to_bytes(4, "little")
    return head + bytes(-len(head) % SECTOR)


def _checksums(data: bytes | memoryview) -> bytes:
    view = memoryview(data)
    return b"".join(zlib.crc32(view[at : at + SECTOR]).to_bytes(4, "little") for at in range(0, len(view), SECTOR))


def _padded(size: int) -> int:
    return size + -size % SECTOR


# ---------------------------------------------------------------------- reading


def records(path: Path | PathAt) -> Iterator[tuple[memoryview, int]]:
    """Yield the payload of each finished record, and where in the file it ends; leave out an unfinished tail.

    Raises:
        MemoryFileError: the file is missing, a record is damaged, or records stand behind an unfinished one.
    """
    try:
        with os.fdopen(open_file(path), "rb") as file:
            reader = _Reader(file, path)
            end, number = 0, 0
            while (payload := reader.record(end, number)) is not None:
                end, number = file.tell(), number + 1
                yield payload, end
            for found in reader.behind(end, number):
                raise _damaged(
                    path,
                    number,
                    f"there is a hole at byte {end}, and record {found.number} stands behind it, at byte {found.begin}",
                )
    except OSError as error:
        raise MemoryFileError(f"{path} must be a readable file, got {error.strerror or error}") from error


def recover_records(path: Path | PathAt) -> Iterator[memoryview]:
    """Yield payloads as ``records`` does, also from behind a hole, as far as no record is missing.

    Raises:
        MemoryFileError: there is more than what was given until then, or there was.
    """
    try:
        with os.fdopen(open_file(path), "rb") as file:
            reader = _Reader(file, path)
            end, number, fault = 0, 0, None
            while True:
                try:
                    payload = reader.record(end, number)
                except MemoryFileError as error:
                    payload, fault = None, error
                later = None
                if payload is None:
                    for found in reader.behind(end, number):
                        later = found
                        if found.number == number and (payload := reader.whole(found)) is not None:
                            break
                if payload is None:
                    if fault is None and later is not None:
                        fault = _damaged(path, number, f"it is missing, and record {later.number} stands behind it")
                    if fault is not None:
                        raise fault
                    return
                end, number, fault = file.tell(), number + 1, None
                yield payload
    except OSError as error:
        raise MemoryFileError(f"{path} must be a readable file, got {error.strerror or error}") from error


@define(frozen=True)
class _Found:
    """Where the head of a record begins, and the number of the record."""

    begin: int
    number: int


class _Reader:
    """A reader of the records of a file, as long as the file was when this was made."""

    def __init__(self, file: BinaryIO, path: Path | PathAt) -> None:
        self._file, self._path = file, path
        self._mark = record_mark(path.name)
        self._size = file.seek(0, os.SEEK_END)
        self._facts = len(self._mark) + FACTS.size

    def record(self, begin: int, number: int) -> memoryview | None:
        """Read the record ``number``, which begins at ``begin``, and move behind it; None: it was never finished."""
        self._file.seek(begin)
        first = self._file.read(min(SECTOR, self._size - begin))
        # Zeros are what a file system may leave where it had made a file longer and the bytes never came.
        if len(first) < SECTOR or not any(first):
            return None
        facts = self._read_facts(first)
        if facts is None or facts[0] != number:
            raise _damaged(self._path, number, "its head does not have the checksum it was written with")
        length = facts[1]
        # Facts and their checksum, one for each sector of data, and one for all of these.
        used = self._facts + 4 + 4 * (_padded(length) // SECTOR) + 4
        if _padded(used) > self._size - begin:
            return None
        head = first + self._file.read(_padded(used) - SECTOR)
        if zlib.crc32(head[: used - 4]) != int.from_bytes(head[used - 4 : used], "little"):
            # A sector of zeros never reached the disk: the record was not finished. Anything else was altered.
            if any(not any(head[at : at + SECTOR]) for at in range(SECTOR, used, SECTOR)):
                return None
            raise _damaged(self._path, number, "its head does not have the checksum it was written with")
        if any(head[used:]):
            raise _damaged(self._path, number, "there is something behind its head")
        data = memoryview(self._file.read(min(_padded(length), self._size - begin - len(head))))
        whole = _is_whole(data, head[self._facts + 4 : used - 4], self._path, number)
        return data[:length] if whole else None

    def _read_facts(self, first: bytes) -> tuple[int, int] | None:
        """Return number and length of the record whose first sector this is; None: of none."""
        facts = first[: self._facts]
        checksum = int.from_bytes(first[self._facts : self._facts + 4], "little")
        if not facts.startswith(self._mark) or len(first) < self._facts + 4 or checksum != zlib.crc32(facts):
            return None
        number, length = FACTS.unpack(facts[len(self._mark) :])
        return number, length

    def behind(self, begin: int, number: int) -> Iterator[_Found]:
        """Yield the heads of records from ``number`` on behind an unfinished one, which begins at ``begin``.

        At any byte: what was appended behind a part of a sector stands where sectors do not begin.
        """
        start = begin + 1
        if self._mark == FIRST_MARK:
            self._file.seek(begin)
            facts = self._read_facts(self._file.read(SECTOR))
            if facts is not None and facts[0] == number:  # what its payload holds may look like a record of its own
                start = begin + _padded(self._facts + 8 + 4 * (_padded(facts[1]) // SECTOR)) + _padded(facts[1])
        while start < self._size:
            self._file.seek(start)
            piece = self._file.read(min(SEARCHED, self._size - start))
            at = piece.find(self._mark)
            while at >= 0:
                self._file.seek(start + at)
                found = self._read_facts(self._file.read(self._facts + 4))
                if found is not None and found[0] >= number:
                    one = _Found(start + at, found[0])
                    if self._mark != FIRST_MARK or self.whole(one) is not None:
                        yield one
                at = piece.find(self._mark, at + 1)
            # Pieces overlap, so that a mark across the border of two is found.
            start += max(1, len(piece) - len(self._mark) + 1)

    def whole(self, found: _Found) -> memoryview | None:
        """Read the payload of a record; None: it is damaged or unfinished. The file is behind it afterwards."""
        try:
            return self.record(found.begin, found.number)
        except MemoryFileError:
            return None


def _is_whole(data: memoryview, checksums: bytes, path: Path | PathAt, number: int) -> bool:
    """Return True if no byte is missing. Raises MemoryFileError where something was altered."""
    found, whole = _checksums(data), len(data) == len(checksums) // 4 * SECTOR
    for place, at in enumerate(range(0, len(data), SECTOR)):
        if found[4 * place : 4 * place + 4] != checksums[4 * place : 4 * place + 4]:
            # A crash leaves zeros, or a file that ends too early; another sector was altered.
            if at + SECTOR <= len(data) and any(data[at : at + SECTOR]):
                raise _damaged(
                    path, number, f"bytes {at} to {at + SECTOR - 1} of it have another checksum than written"
                )
            whole = False
    return whole


def _damaged(path: Path | PathAt, number: int, fault: str) -> MemoryFileError:
    return MemoryFileError(
        f"{path}: record {number} must be what was written, but {fault}: it was altered; use another copy, or save "
        "what is sound with `mplus memory repair`"
    )
