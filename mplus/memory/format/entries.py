"""Entries of manifests: rows, streams and tensors; and the class of the states that a stream's entry names."""

from __future__ import annotations

import re

import attrs
import torch
from attrs import define, field

from mplus.errors import DuplicateNameError, MissingDependencyError, PluginError, UnknownNameError
from mplus.mechanisms import MECHANISMS
from mplus.memory.format.folder import DATA
from mplus.memory.format.structure import ONLY_IF_SET, check_name, check_whole, named_like, validator, whole
from mplus.memory.state import PlainState, StreamState
from mplus.stores.base import TAKEN, StoreLayout
from mplus.stores.disk.safetensors_io import CODES

MOST = 2**31 - 1
"""The most layers, or numbers in a row, that are read."""
MOST_ROWS = 2**42
"""The most rows per layer that a stream can have written; access times (``mplus.stores.access_log``) go to 2**20 as
much."""


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype: ``torch.float32`` -> "float32"."""
    return str(dtype).removeprefix("torch.")


DTYPES = {name_of(dtype): dtype for dtype in CODES}
"""dtypes of tensors in files, by name."""

SHA256 = named_like("[0-9a-f]{64}", "<64 hex digits>")


def _check_dtype(name: str, value: str) -> None:
    if value not in DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {value!r}")


@validator
def _floating(name: str, value: str) -> None:
    _check_dtype(name, value)
    if not DTYPES[value].is_floating_point:
        raise ValueError(f"{name} must be one of floating numbers, got {value!r}")


@validator
def _row_counts(name: str, value: dict[str, tuple[int, ...]]) -> None:
    for rows, counts in value.items():
        check_name(name, rows, r"[A-Za-z_]\w*", "<word>")
        check_whole(name, counts)
        if not counts:
            raise ValueError(f"{name} must count the rows of every part of {rows!r}, got none")


@validator
def _column_name(name: str, value: str) -> None:
    check_name(name, value, r"[A-Za-z_]\w*", "<word>")
    if value in TAKEN:
        raise ValueError(f"{name} must be that of no other column, got {value!r}")


@define(frozen=True, kw_only=True)
class ColumnEntry:
    """A further column of rows: its name, the shape of one row in it, and its dtype by name."""

    name: str = field(validator=_column_name)
    shape: tuple[int, ...] = field(validator=whole(1, MOST))
    dtype: str = field(validator=validator(_check_dtype))


@define(frozen=True, kw_only=True)
class LayoutEntry:
    """The layout of the rows: see ``mplus.stores.base.StoreLayout``; dtypes by name ("float32")."""

    layers: int = field(validator=whole(1, MOST))
    hidden_size: int = field(validator=whole(0, MOST))
    key_size: int = field(validator=whole(0, MOST))
    expiry: bool
    dtype: str = field(validator=_floating)
    projected_size: int = field(default=0, validator=whole(0, MOST))
    keeps_hidden: bool = True
    extra: tuple[ColumnEntry, ...] = field(default=(), metadata=ONLY_IF_SET)
    key_dtype: str | None = field(default=None, validator=attrs.validators.optional(_floating), metadata=ONLY_IF_SET)

    @property
    def least_bytes(self) -> int:
        """Return the bytes of a row in the columns that every row has, whole numbers and content."""
        width = self.keeps_hidden * self.hidden_size + self.projected_size
        return 16 + width * DTYPES[self.dtype].itemsize


def layout_from(entry: LayoutEntry) -> StoreLayout:
    """Return the layout that a manifest describes."""
    return StoreLayout(
        layers=entry.layers,
        hidden_size=entry.hidden_size,
        key_size=entry.key_size,
        expiry=entry.expiry,
        dtype=DTYPES[entry.dtype],
        projected_size=entry.projected_size,
        keeps_hidden=entry.keeps_hidden,
        extra=tuple((column.name, column.shape, DTYPES[column.dtype]) for column in entry.extra),
        key_dtype=None if entry.key_dtype is None else DTYPES[entry.key_dtype],
    )


@define(frozen=True, kw_only=True)
class StreamEntry:
    """One stream.

    Attributes:
        mechanism: whose rows and tensors they are, by name.
        clock: rows written so far per layer.
        sources: how many there are.
        next_source: the number that the next new source gets.
        rows: by the name of each list of rows, how many it has in each of its parts (layers, as a rule).
        ltm: long-term rows in each layer.
        store: number of its store; streams that share one have the same.
    """

    mechanism: str
    clock: int = field(validator=whole(0, MOST_ROWS))
    sources: int = field(validator=whole())
    next_source: int = field(validator=whole())
    rows: dict[str, tuple[int, ...]] = field(validator=_row_counts)
    ltm: tuple[int, ...] = field(validator=whole())
    store: int = field(validator=whole())


@define(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of the data file: dtype by name, shape, and SHA-256 of its bytes (row-major, little-endian)."""

    dtype: str = field(validator=validator(_check_dtype))
    shape: tuple[int, ...] = field(validator=whole())
    sha256: str = field(validator=SHA256)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        size = DTYPES[self.dtype].itemsize
        for length in self.shape:  # not through torch, whose sizes end at 2 ** 63
            size *= length
        return size


@define(frozen=True, kw_only=True)
class DataEntry:
    """The data file beside the manifest: name, size in bytes, SHA-256 of all of it, and its tensors by name."""

    file: str = field(validator=named_like(re.escape(DATA).replace(r"\{\}", "[0-9a-f]+"), DATA.format("<n>")))
    bytes: int = field(validator=whole())
    sha256: str = field(validator=SHA256)
    tensors: dict[str, TensorEntry]


def state_class(mechanism: str) -> type[StreamState]:
    """Return the class of the states of a mechanism; ``PlainState`` where it is not installed, or broken."""
    try:
        found: type[StreamState] = MECHANISMS.get(mechanism).State
    except (UnknownNameError, DuplicateNameError, PluginError, MissingDependencyError):
        return PlainState
    return found
