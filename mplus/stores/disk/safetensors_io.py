"""Tensors as named spans of bytes, in the layout of safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from attrs import define
from torch import Tensor

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""dtypes of a memory's tensors, and what safetensors calls them."""

DTYPES = {code: dtype for dtype, code in CODES.items()}
LONGEST_HEADER = 2**27
"""Bytes; a file that claims more is not believed."""


class HeaderEntry(TypedDict):
    """A header's entry for one tensor: its dtype by code, its shape, and where it lies behind the header."""

    dtype: str
    shape: Sequence[int]
    data_offsets: Sequence[int]


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

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the first dimension."""
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize

    @staticmethod
    def whole(name: str, tensor: Tensor) -> Part:
        """Return the part that is a tensor in one piece."""
        return Part(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


@define(frozen=True)
class TensorSpan:
    """Where a tensor lies: bytes ``begin .. end-1`` behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the first dimension (of the whole, where there is none)."""
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize


def sort_by_itemsize(parts: Sequence[Part]) -> list[Part]:
    """Sort wide types to the front: then every tensor starts at a multiple of its item size."""
    return sorted(parts, key=lambda part: -part.dtype.itemsize)


def header(parts: Sequence[Part], metadata: Mapping[str, str], multiple: int = 8) -> bytes:
    """Return what stands in front of the bytes of ``parts``: its own length, names, dtypes, shapes and places.

    Its size is made a multiple of ``multiple``, itself one of 8.
    """
    described: dict[str, HeaderEntry | dict[str, str]] = {"__metadata__": dict(metadata)}
    end = 0
    for part in parts:
        begin, end = end, end + part.nbytes
        described[part.name] = {"dtype": CODES[part.dtype], "shape": part.shape, "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % multiple)  # spaces behind JSON change nothing
    return len(text).to_bytes(8, "little") + text


def parse_header(data: bytes | memoryview, size: int) -> tuple[int, dict[str, TensorSpan], dict[str, str]]:
    """Read the header in ``data``, the beginning of ``size`` bytes.

    Returns:
        Where the tensors begin, where each lies, and the metadata.

    Raises:
        ValueError: it is none, or what it says does not fill ``size`` bytes exactly.
    """
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
        raise ValueError(f"a header of {length} bytes does not fit into {size}")
    try:
        described = json.loads(bytes(data[8 : 8 + length]).decode())
        metadata = dict(described.pop("__metadata__", {}))
        spans = {name: _span(entry) for name, entry in described.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"the header is damaged: {error}") from error
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"the header's metadata must be text, got {metadata}")
    end = 0
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != end:
            raise ValueError(f"tensor {name!r} must begin at byte {end}, got {span.begin}")
        end = span.end
    if 8 + length + end != size:
        raise ValueError(f"header and tensors have {8 + length + end} bytes, the whole has {size}")
    return 8 + length, spans, metadata


def _span(entry: HeaderEntry) -> TensorSpan:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):  # True is an int, too
        raise ValueError("sizes must be whole numbers of at least 0")
    count = largest = 1
    for number in shape:  # not through torch, whose sizes end at 2 ** 63
        count, largest = count * number, largest * max(number, 1)
    if largest >= 2**60:
        raise ValueError(f"{entry} is too large to be read")
    if end - begin != count * dtype.itemsize:
        raise ValueError(f"{entry} has another size than its shape says")
    return TensorSpan(dtype, shape, begin, end)


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, row-major; a view where it lies like that on the CPU already."""
    flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Return tensors as the pieces of one safetensors text; ``unpack`` reads them joined."""
    parts = sort_by_itemsize([Part.whole(name, tensor) for name, tensor in tensors.items()])
    return [header(parts, metadata), *(raw(tensors[part.name]) for part in parts)]


def unpack(data: bytes | memoryview) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors (copies) and metadata. Raises ValueError: it is damaged."""
    begin, spans, metadata = parse_header(data, len(data))
    return {name: _tensor(data, begin, span) for name, span in spans.items()}, metadata


def _tensor(data: bytes | memoryview, begin: int, span: TensorSpan) -> Tensor:
    if span.begin == span.end:  # frombuffer takes no empty buffer
        return torch.empty(span.shape, dtype=span.dtype)
    content = bytearray(data[begin + span.begin : begin + span.end])
    return torch.frombuffer(content, dtype=torch.uint8).view(span.dtype).reshape(span.shape)
