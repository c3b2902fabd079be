"""Write and read safetensors files, a piece at a time and with a checksum for each tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mplus.errors import MemoryFileError
from mplus.memory.format.entries import DTYPES, DataEntry, TensorEntry, name_of
from mplus.stores.disk.files import Bytes, Folder, PathAt, open_file, path_of
from mplus.stores.disk.safetensors_io import CODES, Part, header, raw, sort_by_itemsize

PIECE_BYTES = 2**26
"""Bytes of a file hashed at a time."""


class Sink(Protocol):
    """A file as ``write_tensors`` needs it."""

    def write(self, data: Bytes, /) -> object:
        """Take all of ``data``."""


def tensors_head(parts: Sequence[Part]) -> tuple[list[Part], bytes]:
    """Return parts in the order in which a safetensors file has them, and what stands in front of their bytes."""
    ordered = sort_by_itemsize(parts)
    return ordered, header(ordered, {"format": "pt"})


def write_tensors(file: Sink, parts: Sequence[Part]) -> tuple[str, dict[str, TensorEntry]]:
    """Write a safetensors file; no more than one piece is copied at a time.

    Returns:
        SHA-256 of the file, and what a manifest says about each tensor.
    """
    parts, head = tensors_head(parts)
    whole = hashlib.sha256()
    file.write(head)
    whole.update(head)
    entries = {}
    for part in parts:
        own, written = hashlib.sha256(), 0
        for piece in part.pieces():
            data = raw(piece)
            file.write(data)
            whole.update(data)
            own.update(data)
            written += data.nbytes
            del piece, data  # before the next one is made
        if written != part.nbytes:
            raise MemoryFileError(
                f"tensor {part.name!r} must have {part.nbytes} bytes ({name_of(part.dtype)}, {list(part.shape)}), "
                f"got {written} from its store"
            )
        entries[part.name] = TensorEntry(dtype=name_of(part.dtype), shape=part.shape, sha256=own.hexdigest())
    return whole.hexdigest(), entries


class Tensors(Protocol):
    """A file of tensors: its path, their names, and each of them, checked.

    Attributes:
        path: of the file.
    """

    path: Path | PathAt

    @property
    def lasting(self) -> bool:
        """True if tensors outlast the reader; where they do not, what is kept has to be copied."""

    @property
    def names(self) -> Collection[str]:
        """The names of its tensors."""

    def get(self, name: str) -> Tensor:
        """Return one tensor on the CPU. Raises MemoryFileError when it is missing or not the one that was saved."""


class TensorReader:
    """Reads the data file of a manifest, one tensor at a time; a context manager.

    What it returns is mapped from the file: copy what is kept.
    """

    lasting: ClassVar[bool] = False

    def __init__(self, folder: Path | Folder, data: DataEntry, name: str | None = None) -> None:
        """``name``: of the file, where it is another one than the manifest says."""
        self.path: Path | PathAt = folder / (data.file if name is None else name)
        self.data = data

    def __enter__(self) -> Self:
        """Open the file. Raises MemoryFileError when it is missing, of another size or no safetensors file."""
        try:
            handle = open_file(self.path)
            try:
                size = os.fstat(handle).st_size
                if size != self.data.bytes:
                    raise MemoryFileError(
                        f"{self.path} must have {self.data.bytes} bytes, got {size}: it is truncated or was replaced"
                    )
                opened: Any = safe_open(path_of(handle, self.path), "pt")
                self._file = opened.__enter__()
            finally:
                os.close(handle)
        except OSError as error:
            raise MemoryFileError(f"{self.path} must be a readable file, got {error.strerror or error}") from error
        except SafetensorError as error:
            raise MemoryFileError(f"{self.path} must be a safetensors file, got {error}: it was altered") from error
        self._names = set(self._file.keys())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors that the manifest lists."""
        return self.data.tensors.keys()

    def names_in_file(self) -> set[str]:
        """Return the names of the tensors in the file, listed or not."""
        return set(self._names)

    def get(self, name: str) -> Tensor:
        """Return one tensor on the CPU. Raises MemoryFileError when it is missing or not the one that was saved."""
        entry = self.data.tensors.get(name)
        if entry is None or name not in self._names:
            raise MemoryFileError(f"{self.path} must hold the tensor {name!r}, which is missing: it was altered")
        view = self._file.get_slice(name)
        code = CODES.get(DTYPES.get(entry.dtype, torch.complex64))
        shape = tuple(view.get_shape())
        if view.get_dtype() != code or shape != entry.shape:
            raise MemoryFileError(
                f"{self.path}: tensor {name!r} must be {entry.dtype} {list(entry.shape)}, "
                f"got {view.get_dtype()} {list(shape)}: it was altered"
            )
        tensor: Tensor = self._file.get_tensor(name)
        digest = hashlib.sha256(raw(tensor)).hexdigest()
        if digest != entry.sha256:
            raise MemoryFileError(
                f"{self.path}: tensor {name!r} must have the SHA-256 {entry.sha256}, got {digest}: "
                "it was altered; use another copy"
            )
        return tensor


def digest_of_file(path: Path | PathAt) -> str:
    """Return the SHA-256 of a file."""
    whole = hashlib.sha256()
    with os.fdopen(open_file(path), "rb") as file:
        while piece := file.read(PIECE_BYTES):
            whole.update(piece)
    return whole.hexdigest()
