"""The manifest of a saved memory: all there is to know about it but the values of its tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

import attrs
import cattrs
import torch
from attrs import define

from mplus.errors import MemoryFileError, MemoryMismatchError
from mplus.memory.folder import DATA, MANIFEST
from mplus.memory.stream import Source
from mplus.memory.weights_state import MADE_WITH
from mplus.stores.disk.folder import Folder, PathAt, path_at, read_file

M = TypeVar("M")
FORMAT = "mplus-memory"
LIVE_FORMAT = "mplus-live-memory"
HINTS = {
    LIVE_FORMAT: " but a memory in a directory: Memory.open opens it",
    FORMAT: " but a saved one: Memory.load reads it",
}
VERSION = 1
"""Format version that is written, and the newest that is read."""

EARLIER = {"retriever.score": "sigmoid_mean"}
"""Facts that older files leave out, since nothing else was possible when they were written."""


@define(frozen=True, kw_only=True)
class LayoutEntry:
    """What the rows look like: see ``mplus.stores.base.StoreLayout``; ``dtype`` by name ("float32")."""

    layers: int
    hidden_size: int
    key_size: int
    expiry: bool
    dtype: str
    projected_size: int = 0
    keeps_hidden: bool = True

    @property
    def required(self) -> tuple[str, ...]:
        """Columns that every row has."""
        content = ("hidden",) * self.keeps_hidden + ("projected",) * bool(self.projected_size)
        return ("birth", "source", *content)


@define(frozen=True, kw_only=True)
class StreamEntry:
    """One stream.

    Attributes:
        clock: rows written so far per layer.
        sources: what was written, by source number.
        stm, pending, ltm: rows in each layer.
        store: number of its store; streams that share one have the same.
    """

    clock: int
    sources: tuple[Source, ...]
    stm: tuple[int, ...]
    pending: tuple[int, ...]
    ltm: tuple[int, ...]
    store: int


@define(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of the data file: dtype by name, shape, and SHA-256 of its bytes (row-major, little-endian)."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@define(frozen=True, kw_only=True)
class DataEntry:
    """The data file beside the manifest: name, size in bytes, SHA-256 of all of it, and its tensors by name."""

    file: str
    bytes: int
    sha256: str
    tensors: dict[str, TensorEntry]


class Belonging(Protocol):
    """A manifest of a memory of one decoder."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Facts about the decoder."""

    @property
    def layout(self) -> LayoutEntry:
        """What the rows look like."""


@define(frozen=True, kw_only=True)
class Manifest:
    """A saved memory without its tensors.

    Attributes:
        written_by: version of mplus that wrote it.
        fingerprint: facts about the decoder that a memory depends on (``Engine.fingerprint``).
        layout: what the rows look like.
        eviction: policy of the long-term memory, by name or as a table with its options.
        streams: one per batch row.
        data: the file with the tensors.
        bytes_budget: bytes that the memory may take in all, or None.
        capacity: long-term rows per layer of a stream, as it was when saved; None: no limit, or an older file.
        text_capacity: text tokens these hold, or None.
    """

    written_by: str
    fingerprint: dict[str, Any]
    layout: LayoutEntry
    eviction: Any
    streams: tuple[StreamEntry, ...]
    data: DataEntry
    bytes_budget: int | None = None
    capacity: int | None = None
    text_capacity: int | None = None

    def to_json(self) -> str:
        """The text of the file, with a digest of its own content."""
        return to_text(self, FORMAT, VERSION)


def to_text(manifest: Any, form: str, version: int) -> str:
    """A manifest (an attrs instance) as JSON, with its format, version, and a digest of its own content."""
    plain = {"format": form, "version": version, **_converter(type(manifest)).unstructure(manifest)}
    return json.dumps({**plain, "digest": _digest(plain)}, indent=1) + "\n"


def read_manifest(path: str | Path | Folder, name: str = MANIFEST) -> Manifest:
    """Read the manifest of the memory saved in the folder ``path``; its tensors are not looked at.

    ``name``: of its file, where a save was interrupted before it got its own.

    Raises:
        MemoryFileError: there is none, it was truncated or altered, is of a newer format, or is something else.
    """
    file = (path if isinstance(path, Folder) else Path(path)) / name
    manifest = from_file(file, Manifest, FORMAT, VERSION, "a saved memory")
    _check(manifest, file)
    return manifest


def from_file(file: Path | PathAt, cls: type[M], form: str, newest: int, what: str) -> M:
    """Read what ``to_text`` wrote.

    Args:
        file: its path.
        cls: attrs class of the manifest.
        form, newest: its format, and the newest version that is read.
        what: has this format, in words.

    Raises:
        MemoryFileError: as ``read_manifest``.
    """
    plain = _parse(_read(file), file)
    if plain is None or plain.get("format") != form:
        held = "something else" if plain is None else f"format {plain.get('format')!r}"
        hint = HINTS.get(str(plain and plain.get("format")), "")
        raise MemoryFileError(f"{file} must have format {form!r}, got {held}: this is not {what}{hint}")
    version = plain.get("version")
    if isinstance(version, int) and version > newest:
        raise MemoryFileError(
            f"{file} was written by format version {version}, this mplus reads up to {newest}: upgrade mplus"
        )
    if type(version) is not int or version < 1:
        raise MemoryFileError(f"{file} must have a format version of at least 1, got {version!r}: it was altered")
    expected, actual = plain.get("digest"), _digest(plain)
    if expected != actual:
        raise MemoryFileError(
            f"{file} was altered after it was saved: its digest must be {expected}, got {actual}: use another copy"
        )
    try:
        return _converter(cls).structure(plain, cls)
    except cattrs.BaseValidationError as error:
        faults = "; ".join(cattrs.transform_error(error, path="manifest"))
        raise MemoryFileError(f"{file} does not describe a memory: {faults}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise MemoryFileError(f"{file} does not describe a memory: {error!r}") from error


def is_memory(folder: Path | Folder, form: str = FORMAT) -> bool:
    """Whether ``folder`` has a manifest of this format, of any version. Raises MemoryFileError if nobody can tell."""
    file = folder / MANIFEST
    if not path_at(file).exists():
        return False
    text = _read(file)
    try:
        plain = _parse(text, file)
    except MemoryFileError:
        return False
    return plain is not None and plain.get("format") == form


def check_belongs(manifest: Belonging, fingerprint: Mapping[str, Any], dtype: torch.dtype, where: str | Path) -> None:
    """Raise MemoryMismatchError, with every fact that differs, unless the memory was made by this decoder."""
    own = {**json.loads(json.dumps(fingerprint)), "dtype": name_of(dtype)}
    earlier = {name: value for name, value in EARLIER.items() if name in own}
    saved = {**earlier, **manifest.fingerprint, "dtype": manifest.layout.dtype}
    names = [*own, *(name for name in saved if name not in own)]
    differences = [
        f"{name} is {saved.get(name)!r} in the file and {own.get(name)!r} in the model"
        for name in names
        if name != MADE_WITH and saved.get(name) != own.get(name)
    ]
    if differences:
        raise MemoryMismatchError(
            f"{where} must be loaded by the model, adapters and config it was made with, but {'; '.join(differences)}"
        )


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def _read(file: Path | PathAt) -> bytes:
    try:
        return read_file(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MemoryFileError(f"{file} is missing: {file.parent} must be a folder written by Memory.save") from error
    except OSError as error:
        raise MemoryFileError(f"{file} must be readable, got {error.strerror or error}") from error


def _parse(text: bytes, file: Path | PathAt) -> dict[str, Any] | None:
    """The JSON object in ``text``, or None where it is other JSON. Raises MemoryFileError where it is none."""
    try:
        plain = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MemoryFileError(f"{file} must hold JSON, got {error}: it is truncated, altered or foreign") from error
    return plain if isinstance(plain, dict) else None


def _digest(plain: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the digest itself, however the text is laid out."""
    content = {name: value for name, value in plain.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check(manifest: Manifest, file: Path | PathAt) -> None:
    """Raise MemoryFileError where the parts of a manifest contradict one another."""
    layers = manifest.layout.layers
    if not re.fullmatch(DATA.format("[0-9a-f]+"), manifest.data.file):
        pattern = DATA.format("<hex>")
        raise MemoryFileError(f"{file}: data.file must be named like {pattern!r}, got {manifest.data.file!r}")
    if not manifest.streams:
        raise MemoryFileError(f"{file}: streams must have at least one entry, got none")
    for number, stream in enumerate(manifest.streams):
        for tier in ("stm", "pending", "ltm"):
            counts = getattr(stream, tier)
            if len(counts) != layers or min(counts, default=0) < 0:
                raise MemoryFileError(
                    f"{file}: streams[{number}].{tier} must count the rows of {layers} layers, got {list(counts)}"
                )
        if not 0 <= stream.store < len(manifest.streams):
            raise MemoryFileError(f"{file}: streams[{number}].store must be a store's number, got {stream.store}")


def _converter(manifest: type) -> cattrs.BaseConverter:
    # Not cattrs.Converter: an interrupt while that one generates code leaves the class unusable in this thread.
    _resolve(manifest)
    converter = cattrs.BaseConverter(detailed_validation=False)
    converter.register_unstructure_hook(tuple, list)
    return converter


def _resolve(annotation: Any) -> None:
    """Turn the written annotations of attrs classes into types, wherever they stand in ``annotation``."""
    if isinstance(annotation, type) and attrs.has(annotation):
        attrs.resolve_types(annotation)
        for part in attrs.fields(annotation):
            _resolve(part.type)
    for part in get_args(annotation):
        _resolve(part)
