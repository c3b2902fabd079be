"""Tensors to and from a safetensors file, a piece at a time and with a checksum for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from attrs import define
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mplus.errors import MemoryFileError
from mplus.memory.manifest import DataEntry, TensorEntry, name_of

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""dtypes of a memory's tensors, and what safetensors calls them."""

DTYPES = {name_of(dtype): dtype for dtype in CODES}
PIECE_BYTES = 2**26
"""Bytes of a file hashed at a time."""


@define(frozen=True, eq=False)
class Part:
    """A tensor to write: its facts first, its rows when they are asked for.

    Attributes:
        name: key in the file.
        dtype, shape: of the whole tensor.
        pieces: gives the tensor in pieces along its first dimension, in order and on any device.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(file: BinaryIO, parts: Sequence[Part]) -> tuple[str, dict[str, TensorEntry]]:
    """Write a safetensors file; no more than one piece is copied at a time.

    Returns:
        SHA-256 of the file, and what a manifest says about each tensor.
    """
    # Wide types first: then every tensor starts at a multiple of its item size.
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)
    whole = hashlib.sha256()
    header = _header(parts)
    file.write(header)
    whole.update(header)
    entries = {}
    for part in parts:
        own, written = hashlib.sha256(), 0
        for piece in part.pieces():
            data = _raw(piece)
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


def _header(parts: Sequence[Part]) -> bytes:
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        begin, end = end, end + part.nbytes
        described[part.name] = {"dtype": CODES[part.dtype], "shape": part.shape, "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; a view where it lies like that on the CPU already."""
    flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


class TensorReader:
    """Reads the data file of a manifest, one tensor at a time; a context manager.

    What it returns is mapped from the file: copy what is kept.
    """

    def __init__(self, folder: Path, data: DataEntry) -> None:
        self.path = folder / data.file
        self.data = data

    def __enter__(self) -> Self:
        """Open the file. Raises MemoryFileError when it is missing, of another size or no safetensors file."""
        try:
            size = self.path.stat().st_size
            if size != self.data.bytes:
                raise MemoryFileError(
                    f"{self.path} must have {self.data.bytes} bytes, got {size}: it is truncated or was replaced"
                )
            opened: Any = safe_open(self.path, "pt")
            self._file = opened.__enter__()
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

    def names(self) -> set[str]:
        """Names of the tensors in the file."""
        return set(self._names)

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises MemoryFileError when it is missing or not the one that was saved."""
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
        digest = hashlib.sha256(_raw(tensor)).hexdigest()
        if digest != entry.sha256:
            raise MemoryFileError(
                f"{self.path}: tensor {name!r} must have the SHA-256 {entry.sha256}, got {digest}: "
                "it was altered; use another copy"
            )
        return tensor


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            whole.update(piece)
    return whole.hexdigest()
