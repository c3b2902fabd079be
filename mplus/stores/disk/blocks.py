"""Block files: safetensors whose last tensor holds a checksum for every few KiB of the others.

The tensor ``checksums`` (U8) is the CRC-32 (4 bytes, little-endian) of each block of ``BLOCK_BYTES`` of every other
tensor, in the order of their places; a tensor's last block may be shorter, and no block holds bytes of two tensors.
Whoever refers to a file keeps its size and a SHA-256 over header and checksums: with these, everything in the file is
known to be what was written.

CRC-32, because it is fast (2.3 GB/s on one core by zlib; SHA-256 1.4, BLAKE2b 0.6), knows every change of up to 32
neighbouring bits, and misses others once in 2 ** 32 blocks; it guards against decay, not against forgers. The blocks
are this small because rows are picked from all over a file, and each first touch costs its whole block.
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define
from torch import Tensor

from mplus.errors import MemoryFileError
from mplus.stores.disk.filesystem import Bytes, FileSystem
from mplus.stores.disk.parts import LONGEST_HEADER, Part, Stretch, header, in_order, parse_header, raw

BLOCK_BYTES = 8192
BUFFER_BYTES = 2**18
CHECKSUMS = "checksums"
METADATA = {"format": "mplus-blocks", "block_bytes": str(BLOCK_BYTES), "checksum": "crc32"}


@define(frozen=True)
class FileEntry:
    """What is kept of a block file elsewhere: its name, size in bytes, and SHA-256 of header and checksums."""

    file: str
    bytes: int
    sha256: str


def write_blocks(files: FileSystem, path: Path, parts: Sequence[Part], *, sync: bool = True) -> FileEntry:
    """Write a new block file; no more than one piece of a part is copied at a time. On an error it is removed.

    Raises:
        OSError: as the file system says.
        MemoryFileError: a part gave more or less than it said.
    """
    parts = in_order(parts)
    blocks = sum(_blocks(part.nbytes) for part in parts)
    table = Part(CHECKSUMS, torch.uint8, (4 * blocks,), list)
    head = header([*parts, table], METADATA)
    handle = files.create(path)
    try:
        try:
            out = _Buffered(files, handle)
            out.write(head)
            checksums = bytearray()
            for part in parts:
                checksums += _write(out, part)
            out.write(checksums)
            out.flush()
            if sync:
                files.sync(handle)
        finally:
            files.close(handle)
    except BaseException:
        files.remove(path)
        raise
    size = len(head) + sum(part.nbytes for part in parts) + len(checksums)
    return FileEntry(path.name, size, hashlib.sha256(head + checksums).hexdigest())


class _Buffered:
    """Writes small pieces together."""

    def __init__(self, files: FileSystem, handle: int) -> None:
        self._files, self._handle = files, handle
        self._waiting = bytearray()

    def write(self, data: Bytes) -> None:
        if len(data) >= BUFFER_BYTES:
            self.flush()
            self._files.write(self._handle, data)
            return
        self._waiting += data
        if len(self._waiting) >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        self._files.write(self._handle, self._waiting)
        self._waiting = bytearray()


def _write(out: _Buffered, part: Part) -> bytes:
    """Write a part; returns its checksums."""
    found, written, current, room = bytearray(), 0, 0, BLOCK_BYTES
    for piece in part.pieces():
        data = raw(piece)
        out.write(data)
        written += data.nbytes
        while data.nbytes:
            current = zlib.crc32(data[:room], current)
            room, data = room - min(room, data.nbytes), data[room:]
            if room == 0:
                found += current.to_bytes(4, "little")
                current, room = 0, BLOCK_BYTES
        del piece, data  # before the next one is made
    if room < BLOCK_BYTES:
        found += current.to_bytes(4, "little")
    if written != part.nbytes:
        raise MemoryFileError(f"tensor {part.name!r} must have {part.nbytes} bytes, got {written} from its store")
    return bytes(found)


def _blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK_BYTES)


class BlockFile:
    """A block file, mapped. Nothing but the header and the checksums is read before it is asked for.

    Every block is checked when it is first read. What is returned is mapped from the file and must not be written to.
    May be read from several threads.

    Attributes:
        path: of the file.
        entry: what was known of it beforehand.
        stretches: where each tensor lies, ``checksums`` left out.
    """

    def __init__(self, path: Path, entry: FileEntry) -> None:
        """Map a file. Raises MemoryFileError: it is missing, truncated, foreign or altered in header or checksums."""
        self.path, self.entry = path, entry
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size != entry.bytes:
                    raise MemoryFileError(
                        f"{path} must have {entry.bytes} bytes, got {size}: it is truncated or was replaced"
                    )
                file.seek(0)
                head = file.read(8)
                head += file.read(min(int.from_bytes(head, "little"), LONGEST_HEADER))
                self._begin, self.stretches, metadata = parse_header(head, size)
                table = self.stretches.pop(CHECKSUMS)
                file.seek(self._begin + table.begin)
                checksums = file.read(table.end - table.begin)
            # Private: nobody can write through it into the file, and torch takes no read-only mappings.
            self._storage = torch.UntypedStorage.from_file(str(path), False, size)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MemoryFileError(f"{path} must be a readable file, got {reason}") from error
        except (ValueError, KeyError) as error:
            if isinstance(error, MemoryFileError):
                raise
            raise MemoryFileError(f"{path} must be a file of rows written by mplus, got {error}") from error
        digest = hashlib.sha256(head + checksums).hexdigest()
        if digest != entry.sha256 or metadata != METADATA:
            raise MemoryFileError(
                f"{path}: header and checksums must have the SHA-256 {entry.sha256}, got {digest}: it was altered"
            )
        self._sums = array("I", checksums)
        if sys.byteorder == "big":
            self._sums.byteswap()
        self._firsts, first = {}, 0
        for name, stretch in sorted(self.stretches.items(), key=lambda item: item[1].begin):
            self._firsts[name] = first
            first += _blocks(stretch.end - stretch.begin)
        if first != len(checksums) // 4 or len(checksums) % 4:
            raise MemoryFileError(f"{path} must have {first} checksums, got {len(checksums) / 4}")
        with torch.inference_mode(False):
            self._checked = torch.zeros(first, dtype=torch.bool)
        self._whole: set[str] = set()
        self._bytes = raw(self._at(0, Stretch(torch.uint8, (entry.bytes,), 0, entry.bytes)))

    def rows(self, name: str) -> int:
        """Length of a tensor's first dimension. Raises MemoryFileError: there is no such tensor."""
        return self.stretch(name).shape[0]

    def stretch(self, name: str) -> Stretch:
        """Where a tensor lies. Raises MemoryFileError: there is no such tensor."""
        if name not in self.stretches:
            raise MemoryFileError(f"{self.path} must hold the tensor {name!r}, which is missing")
        return self.stretches[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start .. stop-1`` of a tensor, or all of it; checked. Raises MemoryFileError: it was altered."""
        stretch, whole = self.stretch(name), self.unchecked(name)
        if not whole.dim():
            self._check(name, range(_blocks(stretch.end - stretch.begin)))
            return whole
        stop = whole.shape[0] if stop is None else stop
        if stop > start:
            first = start * stretch.row_bytes // BLOCK_BYTES
            self._check(name, range(first, _blocks(stop * stretch.row_bytes)))
        return whole[start:stop]

    def take(self, name: str, places: Tensor) -> Tensor:
        """Copies of the rows at ``places`` (``[n]`` int64), in that order; checked. Raises MemoryFileError as read."""
        self.check(name, places)
        return self.unchecked(name).index_select(0, places)

    def check(self, name: str, places: Tensor) -> None:
        """Check the rows at ``places`` (``[n]`` int64). Raises MemoryFileError as read."""
        width = self.stretch(name).row_bytes
        if name in self._whole or not places.shape[0] or not width:
            return
        begin = places * width
        first, last = begin // BLOCK_BYTES, (begin + width - 1) // BLOCK_BYTES
        most = 1 if BLOCK_BYTES % width == 0 else -(-width // BLOCK_BYTES) + 1  # blocks that a row can lie in
        blocks = first if most == 1 else torch.minimum(first[:, None] + torch.arange(most), last[:, None]).flatten()
        blocks = blocks[~self._checked[self._firsts[name] + blocks]]
        if blocks.shape[0]:
            self._check(name, blocks.unique())

    def unchecked(self, name: str) -> Tensor:
        """A tensor as it lies in the file, whatever its checksums say."""
        return self._at(self._begin, self.stretch(name))

    def _at(self, begin: int, stretch: Stretch) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            tensor: Any = torch.empty(0, dtype=stretch.dtype)
            found: Tensor = tensor.set_(self._storage, (begin + stretch.begin) // stretch.dtype.itemsize, stretch.shape)
            return found

    def damaged(self) -> Iterator[tuple[str, int, int]]:
        """Read everything: name and byte range within its tensor of every block that is not what was written."""
        for name, stretch in self.stretches.items():
            for block in range(_blocks(stretch.end - stretch.begin)):
                if not self._sound(name, block):
                    begin = block * BLOCK_BYTES
                    yield name, begin, min(begin + BLOCK_BYTES, stretch.end - stretch.begin)

    def sound_rows(self, name: str) -> Tensor:
        """``[rows]`` bool: which rows of a tensor are what was written."""
        stretch = self.stretch(name)
        sound = torch.ones(stretch.shape[0], dtype=torch.bool)
        for block in range(_blocks(stretch.end - stretch.begin)):
            if not self._sound(name, block):
                width = max(stretch.row_bytes, 1)
                sound[block * BLOCK_BYTES // width : -(-(block + 1) * BLOCK_BYTES // width)] = False
        return sound

    def _check(self, name: str, blocks: range | Tensor) -> None:
        if name in self._whole:
            return
        first, stretch = self._firsts[name], self.stretch(name)
        count = _blocks(stretch.end - stretch.begin)
        if isinstance(blocks, range):
            checked = self._checked[first + blocks.start : first + blocks.stop]
            if bool(checked.all()):
                return
            blocks = torch.arange(blocks.start, blocks.stop)
        else:
            checked = self._checked[first + blocks]
        # Written out: this is done for every few KiB that are read for the first time.
        sums, data, crc32 = self._sums, self._bytes, zlib.crc32
        start, end = self._begin + stretch.begin, self._begin + stretch.end
        for block in blocks[~checked].tolist():
            place = start + block * BLOCK_BYTES
            if crc32(data[place : min(place + BLOCK_BYTES, end)]) != sums[first + block]:
                begin = block * BLOCK_BYTES
                width = max(stretch.row_bytes, 1)
                rows = (
                    f"rows {begin // width} to {(min(begin + BLOCK_BYTES, stretch.end - stretch.begin) - 1) // width}"
                )
                raise MemoryFileError(
                    f"{self.path}: tensor {name!r} must have the checksums it was written with, and has another in "
                    f"{rows}: it was altered; use another copy, or save what is sound with `mplus memory repair`"
                )
        self._checked[first + blocks] = True
        if bool(self._checked[first : first + count].all()):
            self._whole.add(name)

    def _sound(self, name: str, block: int) -> bool:
        stretch = self.stretch(name)
        begin = self._begin + stretch.begin + block * BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, self._begin + stretch.end)
        return zlib.crc32(self._bytes[begin:end]) == self._sums[self._firsts[name] + block]
