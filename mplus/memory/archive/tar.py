"""The members of an exported memory: plain files with given names, in the form of tar, written and read in order."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable
from typing import Protocol

from mplus.errors import InputError, MemoryFileError, MemoryFullError

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
"""The end of a tar."""
PIECE_BYTES = 2**20
SUMS = "SHA256SUMS"
KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.DIRTYPE: "a folder",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


class Origin(Protocol):
    """Bytes come from there, in order; no place in it has to be found again."""

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes; b"": there are no more."""


def member_head(name: str, size: int) -> bytes:
    """Return the block in front of a member of ``size`` bytes: nobody's, of no time, for its owner to read."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def padding(size: int) -> bytes:
    """Return the zeros behind a member of ``size`` bytes."""
    return bytes(-size % BLOCK)


def sums_of(digests: dict[str, str]) -> bytes:
    """Return the text of ``SHA256SUMS`` for digests by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()


class ArchiveReader:
    """Reads members in order, and refuses every byte that an export does not have.

    Attributes:
        where: of what, in messages.
        left: bytes that may still come; None: no limit.
    """

    def __init__(self, file: Origin, where: str, max_bytes: int | None = None) -> None:
        self._file, self.where, self.left = file, where, max_bytes

    def member(self, name: str, most: int | None = None) -> tuple[str, int]:
        """Read the head of the next member, and return its name and size.

        Args:
            name: a regular expression for it.
            most: bytes that it may have; None: no limit of its own.

        Raises:
            MemoryFileError: it is another one, no plain file, or too large; nothing of it was read.
            MemoryFullError: more bytes than the limit.
        """
        block = self._exactly(BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise self._refused(f"there must be a file like {name!r} in a tar, got none: {error}") from error
        if info.type != tarfile.REGTYPE:
            kind = KINDS.get(info.type, f"a member of type {info.type!r}")
            raise self._refused(f"all that is in it must be plain files, got {kind}, {info.name!r}")
        if not re.fullmatch(name, info.name):
            raise self._refused(f"there must be a file like {name!r}, got {info.name!r}")
        if info.size < 0 or block != member_head(info.name, info.size):
            raise self._refused(f"the head of {info.name!r} must be as it was written: it was altered")
        if most is not None and info.size > most:
            raise self._refused(f"{info.name!r} must have at most {most:,} bytes, got {info.size:,}")
        self.allow(info.size)
        return info.name, info.size

    def allow(self, size: int) -> None:
        """Raise MemoryFullError where ``size`` further bytes are more than the limit."""
        if self.left is not None and size > self.left:
            raise MemoryFullError(
                f"{self.where} must have at most max_bytes, {self.left:,} more, got {size:,} more; nothing was taken"
            )

    def copy(self, size: int, write: Callable[[bytes], object]) -> str:
        """Hand the ``size`` bytes of a member to ``write``, a piece at a time; return their SHA-256."""
        digest, left = hashlib.sha256(), size
        while left:
            piece = self._some(min(left, PIECE_BYTES))
            digest.update(piece)
            write(piece)
            left -= len(piece)
        if self._exactly(-size % BLOCK) != padding(size):
            raise self._refused("there must be zeros between two files: it was altered")
        return digest.hexdigest()

    def end(self) -> None:
        """Raise MemoryFileError unless the tar ends here."""
        if self._exactly(len(END)) != END or self._file.read(1):
            raise self._refused("there must be nothing behind the last file: it was altered")

    def _exactly(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            found += self._some(count - len(found))
        return bytes(found)

    def _some(self, most: int) -> bytes:
        self.allow(most)
        piece = self._file.read(most)
        if not isinstance(piece, bytes | bytearray | memoryview):
            raise InputError(f"an exported memory must be read as bytes, got {type(piece).__name__}: open it with 'rb'")
        if not piece:
            raise self._refused("it ends in the middle: it was cut off")
        if self.left is not None:
            self.left -= len(piece)
        return piece

    def _refused(self, fault: str) -> MemoryFileError:
        return MemoryFileError(f"{self.where} must be a memory that Memory.export wrote, but {fault}")
