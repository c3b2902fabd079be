"""Block files: safetensors whose last tensor holds a checksum for every row, or few KiB, of the others.

The tensor ``checksums`` (U8) has the checksum (``mplus.stores.disk.checksums``) of each block of every other tensor, in
the order of their places; a tensor's last block may be shorter, and no block holds bytes of two tensors. The metadata
says which kind of checksum it is. Whoever refers to a file keeps its size and a SHA-256 over header and checksums: with
these, everything in the file is known to be what was written.

The blocks are this small because rows are picked from all over a file, and each first touch costs its whole block.
Tensors start where pages do as far as their sizes allow, and are written in large pieces, so that the system can keep
them in large pages: these make the first touch of a row cheap.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from attrs import define
from torch import Tensor

from mplus.errors import MemoryFileError
from mplus.stores.disk.checksums import FIRST, PRESENT, Checksums, Scheme
from mplus.stores.disk.files import Bytes, FileSystem, PathAt, open_file, path_of
from mplus.stores.disk.safetensors_io import (
    LONGEST_HEADER,
    Part,
    TensorSpan,
    header,
    parse_header,
    raw,
)
from mplus.stores.disk.verified import Rule, VerifiedTensor

BUFFER_BYTES = 2**18
PAGE_BYTES = 4096
CHECKSUMS = "checksums"


@define(frozen=True)
class FileEntry:
    """An entry for a block file: its name, size in bytes, and SHA-256 of header and checksums."""

    file: str
    bytes: int
    sha256: str


def write_blocks(
    files: FileSystem, path: Path | PathAt, parts: Sequence[Part], *, sync: bool = True, scheme: Scheme = PRESENT
) -> FileEntry:
    """Write a new block file; no more than one piece of a part is copied at a time. On an error it is removed.

    Args:
        files: does it.
        path: of the file.
        parts: its tensors.
        sync: whether to wait until it is on disk.
        scheme: of their checksums.

    Raises:
        OSError: as the file system says.
        MemoryFileError: a part gave more or less than it said.
    """
    # A part whose size is a multiple of a high power of 2 comes early, and starts at a multiple of that: each at one of
    # its item size, and wide rows where pages of the system start, if the first tensor does.
    parts = sorted(parts, key=lambda part: -(part.nbytes & -part.nbytes or LONGEST_HEADER))
    kinds = [scheme.of(part.row_bytes) for part in parts]
    length = sum(_length(part.nbytes, kind) for part, kind in zip(parts, kinds, strict=True))
    table = Part(CHECKSUMS, torch.uint8, (length,), list)
    head = header([*parts, table], scheme.metadata, PAGE_BYTES)
    handle = files.create(path)
    try:
        try:
            out = _Buffered(files, handle)
            out.write(head)
            sums = bytearray()
            for part, kind in zip(parts, kinds, strict=True):
                sums += _write(out, part, kind)
            out.write(sums)
            out.flush()
            if sync:
                files.sync(handle)
        finally:
            files.close(handle)
    except BaseException:
        files.remove(path)
        raise
    size = len(head) + sum(part.nbytes for part in parts) + len(sums)
    return FileEntry(path.name, size, hashlib.sha256(head + sums).hexdigest())


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


def _write(out: _Buffered, part: Part, kind: Checksums) -> bytes:
    """Write a part; returns its checksums."""
    size, found, written, rest = kind.block_bytes, bytearray(), 0, bytearray()
    for piece in part.pieces():
        data = raw(piece)
        out.write(data)
        written += data.nbytes
        if rest:  # the block that the piece before began
            lacking = size - len(rest)
            rest, data = rest + data[:lacking], data[lacking:]
            if len(rest) == size:
                found += _sums(kind, rest)
                rest = bytearray()
        whole = data.nbytes // size * size
        found += _sums(kind, data[:whole])
        rest += data[whole:]
        del piece, data  # before the next one is made
    if rest:
        found += _sums(kind, rest)
    if written != part.nbytes:
        raise MemoryFileError(f"tensor {part.name!r} must have {part.nbytes} bytes, got {written} from its store")
    return bytes(found)


def _sums(kind: Checksums, data: Bytes) -> bytes:
    if not len(data):
        return b""
    step = max(1, BUFFER_BYTES // kind.block_bytes) * kind.block_bytes
    return b"".join(bytes(raw(kind.of(some))) for some in torch.frombuffer(data, dtype=torch.uint8).split(step))


def _length(nbytes: int, kind: Checksums) -> int:
    """Return the bytes of the checksums of a tensor."""
    return -(-nbytes // kind.block_bytes) * kind.size


class BlockFile:
    """A block file, mapped. Nothing but the header and the checksums is read before it is asked for.

    Every block is checked when it is first read. What is returned is mapped from the file and must not be written to.
    May be read from several threads.

    Attributes:
        path: of the file.
        entry: what was known of it beforehand.
        spans: where each tensor lies, ``checksums`` left out.
    """

    def __init__(self, path: Path | PathAt, entry: FileEntry, rules: Mapping[str, Rule] | None = None) -> None:
        """Map a file; ``rules``: of tensors with one whole number in a row.

        Raises MemoryFileError: it is missing, truncated, foreign or altered in header or checksums.
        """
        self.path, self.entry, self._rules = path, entry, rules or {}
        try:
            with os.fdopen(open_file(path), "rb") as file:
                size = file.seek(0, 2)
                if size != entry.bytes:
                    raise MemoryFileError(
                        f"{path} must have {entry.bytes} bytes, got {size}: it is truncated or was replaced"
                    )
                file.seek(0)
                head = file.read(8)
                head += file.read(min(int.from_bytes(head, "little"), LONGEST_HEADER))
                self._begin, self.spans, metadata = parse_header(head, size)
                table = self.spans.pop(CHECKSUMS)
                file.seek(self._begin + table.begin)
                sums = bytearray(file.read(table.end - table.begin))
                # Private: nobody can write through it into the file, and torch takes no read-only mappings.
                storage = torch.UntypedStorage.from_file(path_of(file.fileno(), path), False, size)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MemoryFileError(f"{path} must be a readable file, got {reason}") from error
        except (ValueError, KeyError) as error:
            if isinstance(error, MemoryFileError):
                raise
            raise MemoryFileError(f"{path} must be a file of rows written by mplus, got {error}") from error
        digest = hashlib.sha256(head)
        digest.update(sums)
        scheme = next((scheme for scheme in (PRESENT, FIRST) if scheme.metadata == metadata), None)
        if digest.hexdigest() != entry.sha256 or scheme is None:
            raise MemoryFileError(
                f"{path}: header and checksums must have the SHA-256 {entry.sha256}, got {digest.hexdigest()}: "
                "it was altered"
            )
        self.scheme, self._sums_of, first, blocks = scheme, {}, 0, 0
        for name, span in sorted(self.spans.items(), key=lambda item: item[1].begin):
            kind = scheme.of(span.row_bytes)
            length = _length(span.end - span.begin, kind)
            self._sums_of[name] = kind, slice(first, first + length), slice(blocks, blocks + length // kind.size)
            first, blocks = first + length, blocks + length // kind.size
            if (self._begin + span.begin) % span.dtype.itemsize:
                raise MemoryFileError(f"{path}: tensor {name!r} must begin at a multiple of its item size")
        if first != len(sums):
            raise MemoryFileError(f"{path} must have {first} bytes of checksums, got {len(sums)}")
        # Made in a caller's inference mode, ``_good`` could not be written outside of it.
        with torch.inference_mode(False):
            self._sums = torch.frombuffer(sums, dtype=torch.uint8) if sums else torch.empty(0, dtype=torch.uint8)
            self._good = torch.zeros(blocks, dtype=torch.bool)
            self._bytes = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,))  # type: ignore[call-overload]
        self._tensors: dict[str, VerifiedTensor] = {}

    def rows(self, name: str) -> int:
        """Return a tensor's number of rows. Raises MemoryFileError: there is no such tensor, or it is a number."""
        if not (shape := self.span(name).shape):
            raise MemoryFileError(f"{self.path}: tensor {name!r} must have rows, got a single number")
        return shape[0]

    def span(self, name: str) -> TensorSpan:
        """Return where a tensor lies. Raises MemoryFileError: there is no such tensor."""
        if name not in self.spans:
            raise MemoryFileError(f"{self.path} must hold the tensor {name!r}, which is missing")
        return self.spans[name]

    def tensor(self, name: str) -> VerifiedTensor:
        """Return a tensor to read rows from. Raises MemoryFileError: there is none of this name."""
        found = self._tensors.get(name)
        if found is None:
            span = self.span(name)
            kind, places, blocks = self._sums_of[name]
            data = self._bytes[self._begin + span.begin : self._begin + span.end]
            sums = self._sums[places]
            if sums.storage_offset() % kind.dtype.itemsize:  # a view as wider numbers must begin at a multiple of them
                sums = sums.clone()
            found = VerifiedTensor(
                path=self.path,
                name=name,
                span=span,
                rows=data.view(span.dtype).view(span.shape),
                data=data,
                checksums=kind,
                sums=sums.view(kind.dtype).view(-1, kind.size // kind.dtype.itemsize),
                good=self._good[blocks],
                rule=self._rules.get(name),
            )
            found = self._tensors.setdefault(name, found)  # the one that whoever was faster has made
        return found

    def read(self, name: str) -> Tensor:
        """Return all of a tensor; checked. Raises MemoryFileError: it was altered, or there is none of this name."""
        return self.tensor(name).all()

    def unchecked(self, name: str) -> Tensor:
        """Return a tensor as it lies in the file, whatever its checksums say."""
        return self.tensor(name).rows

    def damaged(self) -> Iterator[tuple[str, int, int]]:
        """Read everything: name and byte range within its tensor of every block that is not what was written."""
        for name in self.spans:
            tensor = self.tensor(name)
            yield from ((name, *tensor.block_span(block)) for block in tensor.faults())

    def sound_rows(self, name: str) -> Tensor:
        """Return ``[rows]`` bool: which rows of a tensor are what was written."""
        tensor = self.tensor(name)
        sound, width = torch.ones(tensor.span.shape[0], dtype=torch.bool), max(tensor.span.row_bytes, 1)
        for block in tensor.faults():
            begin, end = tensor.block_span(block)
            # A block may begin and end inside a row: of a row with any byte in it nothing is known.
            sound[begin // width : -(-end // width)] = False
        return sound
