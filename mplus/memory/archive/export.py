"""Write a memory as one stream."""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

from mplus.errors import InputError, MemoryFileError
from mplus.memory.archive.tar import END, SUMS, member_head, padding, sums_of
from mplus.memory.format.entries import DataEntry
from mplus.memory.format.folder import DATA, MANIFEST, flush
from mplus.memory.format.save import manifest_of, saved_content, saved_parts, store_numbers
from mplus.memory.format.tensors import Sink, tensors_head, write_tensors
from mplus.memory.sources.forget import without_unused_sources
from mplus.memory.transaction import Streams
from mplus.stores.disk.files import Bytes, FileSystem, Folder, PathAt, writable


def export_streams(streams: Streams, file: str | Path | Sink) -> int:
    """Write streams, as they are at the call, to a file; see ``Memory.export``."""
    if not isinstance(file, str | os.PathLike):
        if not callable(getattr(file, "write", None)):
            raise InputError(f"file must be a path or a binary file to write to, got {type(file).__name__}")
        return _write(streams, file)
    path = Path(file).absolute()
    with writable(path.parent), Folder.open(path.parent) as parent:
        return _replace(streams, parent / path.name)


def _replace(streams: Streams, path: PathAt) -> int:
    """Write a file, which takes the place of an older one once it is on disk. Raises OSError, MemoryFileError."""
    files = FileSystem()
    new = path.folder / f".mplus-export-{secrets.token_hex(8)}.tmp"
    try:
        with os.fdopen(files.create(new), "wb") as out:
            size = _write(streams, out)
            flush(out)
        files.rename(new, path)
        files.sync_folder(path.folder)
    except BaseException:
        with suppress(OSError):
            files.remove(new)
        raise
    return size


def _write(streams: Streams, file: Sink) -> int:
    """Write all members; return how many bytes there are."""
    views, draws, header, indexes = saved_content(streams)
    views, numbers = [without_unused_sources(view) for view in views], store_numbers([view.store for view in views])
    parts, head = tensors_head(saved_parts(views, draws, numbers, indexes))
    name, size = DATA.format(hashlib.sha256(head).hexdigest()[:32]), len(head) + sum(part.nbytes for part in parts)
    out = _Counted(file)
    out.write(member_head(name, size))
    digest, entries = write_tensors(out, parts)
    out.write(padding(size))
    manifest = manifest_of(views, numbers, header, DataEntry(file=name, bytes=size, sha256=digest, tensors=entries))
    text = manifest.to_json().encode()
    sums = sums_of({name: digest, MANIFEST: hashlib.sha256(text).hexdigest()})
    for own, data in ((MANIFEST, text), (SUMS, sums)):
        out.write(member_head(own, len(data)) + data + padding(len(data)))
    out.write(END)
    return out.count


class _Counted:
    """Counts the bytes that go to a file, which takes all of them."""

    def __init__(self, file: Sink) -> None:
        self._file, self.count = file, 0

    def write(self, data: Bytes) -> None:
        written = self._file.write(data)
        if isinstance(written, int) and written != len(data):  # a raw file on a full disk
            raise MemoryFileError(f"the file must take all that is written to it, {len(data)} bytes, took {written}")
        self.count += len(data)
