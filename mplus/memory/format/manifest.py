"""Manifest: everything about a saved memory but the values of its tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import attrs
from attrs import define, field

from mplus.config import Component, JsonValue
from mplus.errors import ConfigError, MemoryFileError, MemoryMismatchError
from mplus.mechanisms import MECHANISMS
from mplus.memory.format.earlier import upgraded
from mplus.memory.format.entries import DataEntry, LayoutEntry, StreamEntry, layout_from, name_of
from mplus.memory.format.folder import MANIFEST
from mplus.memory.format.structure import NOT_IN_FILES, structured, unstructured, validator, whole
from mplus.memory.sources.table import SourceTable
from mplus.memory.weights_state import MADE_WITH, weights_of
from mplus.stores.base import StoreLayout
from mplus.stores.disk.files import Folder, PathAt, path_at, read_file

M = TypeVar("M")
FORMAT = "mplus-memory"
LIVE_FORMAT = "mplus-live-memory"
HINTS = {
    LIVE_FORMAT: " but a memory in a directory: Memory.open opens it",
    FORMAT: " but a saved one: Memory.load reads it",
}
VERSION = 3
"""Format version that is written, and the newest that is read.

2: sources do not say when they were last written, and writes have no ids.
1: the manifest lists the sources, and tensors have the names that ``mplus.memory.format.earlier`` knows.
"""
PRESENT_NAMES = 2
"""The oldest format version whose manifest and tensors have the names of this one."""

DEEPEST = 64
"""Levels of a manifest."""

LEFT_OUT = {"retriever.score": "sigmoid_mean"}
"""Facts that older files leave out, since nothing else was possible when they were written."""


class Belonging(Protocol):
    """The part of a manifest that says which decoder a memory belongs to."""

    @property
    def fingerprint(self) -> Mapping[str, JsonValue]:
        """Facts about the decoder."""

    @property
    def layout(self) -> LayoutEntry:
        """The sizes and dtype of the rows."""

    @property
    def streams(self) -> tuple[StreamEntry, ...]:
        """One per batch row."""


def mechanism_in(fingerprint: Mapping[str, JsonValue]) -> JsonValue:
    """Return the mechanism in the facts about a decoder, by name or as a table with its options."""
    return fingerprint.get("mechanism", "mplus")


def rows_per_chunk(fingerprint: Mapping[str, JsonValue]) -> int:
    """Return the rows of a full chunk by the facts about a decoder. Raises ValueError where that is no number."""
    rows = fingerprint.get("memory_tokens_per_chunk", 1)
    if type(rows) is not int or rows < 1:
        raise ValueError(f"fingerprint.memory_tokens_per_chunk must be a whole number of at least 1, got {rows!r}")
    return rows


@validator
def fingerprint(name: str, value: dict[str, JsonValue]) -> None:
    """Validate facts about a decoder, of which those are looked at that are needed without it."""
    if "mechanism" in value:
        _check_component("fingerprint", value["mechanism"])
    rows_per_chunk(value)


def _check_component(name: str, value: JsonValue) -> None:
    try:
        Component.of(value)
    except ConfigError as error:
        raise ValueError(f"{name} must name a component: {error}") from error


component = validator(_check_component)
"""Validator: a component by name, or a table of its name and options."""


@define(frozen=True, kw_only=True)
class Manifest:
    """A saved memory without its tensors.

    Attributes:
        version: of the format.
        written_by: version of mplus that wrote it.
        fingerprint: facts about the decoder that a memory depends on (``Engine.fingerprint``).
        layout: what the rows look like.
        eviction: policy of the long-term memory, by name or as a table with its options.
        streams: one per batch row.
        data: the file with the tensors.
        bytes_budget: bytes that the memory may take in all, or None.
        capacity: long-term rows per layer of a stream, as it was when saved; None: no limit, or an older file.
        text_capacity: text tokens these hold, or None.
        earlier: of format version 1, the sources of each stream.
    """

    version: int = VERSION
    written_by: str
    # Any, as types are resolved when a file is read, and JSON's recursive one cannot be.
    fingerprint: dict[str, Any] = field(validator=fingerprint)
    layout: LayoutEntry
    eviction: Any = field(validator=component)  # of any form that Component.of reads
    streams: tuple[StreamEntry, ...]
    data: DataEntry
    bytes_budget: int | None = field(default=None, validator=attrs.validators.optional(whole(1)))
    capacity: int | None = field(default=None, validator=attrs.validators.optional(whole()))
    text_capacity: int | None = field(default=None, validator=attrs.validators.optional(whole()))
    earlier: tuple[SourceTable, ...] = field(default=(), metadata=NOT_IN_FILES)

    def to_json(self) -> str:
        """Return the text of the file, with a digest of its own content."""
        return to_text(self, FORMAT)


def to_text(manifest: attrs.AttrsInstance, form: str) -> str:
    """Return a manifest (an attrs instance) as JSON, with its format and a digest of its own content."""
    plain = {"format": form, **unstructured(manifest)}
    return json.dumps({**plain, "digest": _digest(plain)}, indent=1) + "\n"


def read_manifest(path: str | Path | Folder, name: str = MANIFEST) -> Manifest:
    """Read the manifest of the memory saved in the folder ``path``; its tensors are not looked at.

    ``name``: of its file, where a save was interrupted before it got its own.

    Raises:
        MemoryFileError: there is none, it was truncated or altered, is of a newer format, or is something else.
    """
    file = (path if isinstance(path, Folder) else Path(path)) / name
    manifest = from_file(file, Manifest, FORMAT, VERSION, "a saved memory", present=PRESENT_NAMES)
    try:
        check_streams(manifest)
        _check_data(manifest)
    except ValueError as error:
        raise MemoryFileError(f"{file} does not describe a memory: {error}") from error
    return manifest


def from_file(file: Path | PathAt, cls: type[M], form: str, latest: int, what: str, *, present: int) -> M:
    """Read what ``to_text`` wrote.

    Args:
        file: its path.
        cls: attrs class of the manifest.
        form, latest: its format, and the newest version that is read.
        what: has this format, in words.
        present: the oldest version whose manifests have the fields of ``cls``.

    Raises:
        MemoryFileError: as ``read_manifest``.
    """
    plain = _parse(_read(file), file)
    if plain is None or plain.get("format") != form:
        held = "something else" if plain is None else f"format {plain.get('format')!r}"
        hint = HINTS.get(str(plain and plain.get("format")), "")
        raise MemoryFileError(f"{file} must have format {form!r}, got {held}: this is not {what}{hint}")
    version = plain.get("version")
    if isinstance(version, int) and version > latest:
        raise MemoryFileError(
            f"{file} was written by format version {version}, this mplus reads up to {latest}: upgrade mplus"
        )
    if type(version) is not int or version < 1:
        raise MemoryFileError(f"{file} must have a format version of at least 1, got {version!r}: it was altered")
    expected, actual = plain.get("digest"), _digest(plain)
    if expected != actual:
        raise MemoryFileError(
            f"{file} was altered after it was saved: its digest must be {expected}, got {actual}: use another copy"
        )
    content = {name: value for name, value in plain.items() if name not in ("format", "digest")}
    try:
        if version >= present:
            return structured(content, cls, "manifest")
        content, earlier = upgraded(content)
        return attrs.evolve(structured(content, cls, "manifest"), earlier=earlier)  # type: ignore[misc]
    except ValueError as error:
        raise MemoryFileError(f"{file} does not describe a memory: {error}") from error


def is_memory(folder: Path | Folder, form: str = FORMAT) -> bool:
    """Return True if ``folder`` has a manifest of this format, of any version. Raises MemoryFileError: unreadable."""
    file = folder / MANIFEST
    try:
        if not path_at(file).exists():
            return False
    except (OSError, ValueError) as error:
        raise MemoryFileError(f"{file} must be a path that can be looked at, got {error}") from error
    text = _read(file)
    try:
        plain = _parse(text, file)
    except MemoryFileError:
        return False
    return plain is not None and plain.get("format") == form


WEIGHTS = ("base", "adapters")
"""Facts of a fingerprint that are digests of weights which are looked at again whenever a memory is used."""


def check_belongs(
    manifest: Belonging,
    fingerprint: Mapping[str, JsonValue],
    layout: StoreLayout,
    where: str | Path,
    *,
    any_weights: bool = False,
) -> None:
    """Raise MemoryMismatchError, with every fact that differs, unless the memory was made by this decoder.

    Args:
        manifest: of the memory.
        fingerprint: of the decoder.
        layout: of the rows that it makes.
        where: the memory is, in messages.
        any_weights: other weights are let pass: such rows are refused when they are used, until they are rewritten.

    Raises MemoryFileError where a manifest says so and describes rows that the decoder, with this ``layout``, does not
    make.
    """
    own = {**json.loads(json.dumps(fingerprint)), "dtype": name_of(layout.dtype)}
    earlier = {name: value for name, value in LEFT_OUT.items() if name in own}
    saved = {**earlier, **manifest.fingerprint, "dtype": manifest.layout.dtype}
    names = [*own, *(name for name in saved if name not in own)]
    differences = [
        f"{name} is {saved.get(name)!r} in the file and {own.get(name)!r} in the model"
        for name in names
        if name != MADE_WITH and not (any_weights and name in WEIGHTS) and saved.get(name) != own.get(name)
    ]
    if differences:
        raise MemoryMismatchError(
            f"{where} must be loaded by the model, adapters and config it was made with, but {'; '.join(differences)}"
            + _not_installed(mechanism_of(manifest))
        )
    found = layout_from(manifest.layout)
    for name in ("layers", "hidden_size", "key_size", "extra"):
        if getattr(found, name) != getattr(layout, name):
            raise MemoryFileError(
                f"{where}: layout.{name} must be {getattr(layout, name)} as of the decoder it was made with, got "
                f"{getattr(found, name)}: the manifest was altered"
            )


def _not_installed(mechanism: str) -> str:
    """Return how to get a mechanism that is not there, as the end of a sentence; "" where it is."""
    if mechanism in MECHANISMS.names():
        return ""
    return (
        f"; the mechanism {mechanism!r} is not installed: a package announces it in the entry-point group "
        f"{MECHANISMS.group!r}"
    )


def _read(file: Path | PathAt) -> bytes:
    try:
        return read_file(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MemoryFileError(f"{file} is missing: {file.parent} must be a folder written by Memory.save") from error
    except OSError as error:
        raise MemoryFileError(f"{file} must be readable, got {error.strerror or error}") from error


def _parse(text: bytes, file: Path | PathAt) -> dict[str, JsonValue] | None:
    """Return the JSON object in ``text``; None where it is other JSON. Raises MemoryFileError where it is none."""
    try:
        plain = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MemoryFileError(f"{file} must hold JSON, got {error}: it is truncated, altered or foreign") from error
    if _depth_exceeds(plain, DEEPEST):
        raise MemoryFileError(f"{file} must hold JSON of at most {DEEPEST} levels: it is altered or foreign")
    return plain if isinstance(plain, dict) else None


def _depth_exceeds(plain: JsonValue, most: int) -> bool:
    level = [plain] if isinstance(plain, dict | list) else []
    for _ in range(most):
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _digest(plain: Mapping[str, JsonValue]) -> str:
    """Return the SHA-256 of everything but the digest itself, however the text is laid out."""
    content = {name: value for name, value in plain.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def mechanism_of(manifest: Belonging) -> str:
    """Return the name of the mechanism of a memory."""
    return Component.of(mechanism_in(manifest.fingerprint)).name


def check_streams(manifest: Belonging) -> None:
    """Raise ValueError where what a manifest says of the streams of a mechanism contradicts itself."""
    streams, layout, mechanism = manifest.streams, manifest.layout, mechanism_of(manifest)
    if not streams:
        raise ValueError("streams must have at least one entry, got none")
    for number, stream in enumerate(streams):
        if stream.mechanism != mechanism:
            raise ValueError(
                f"streams[{number}].mechanism must be that of the fingerprint, {mechanism!r}, got {stream.mechanism!r}"
            )
        if len(stream.ltm) != layout.layers:
            raise ValueError(
                f"streams[{number}].ltm must count the rows of {layout.layers} layers, got {list(stream.ltm)}"
            )
        for name, counts in stream.rows.items():
            if len(counts) > layout.layers:
                raise ValueError(
                    f"streams[{number}].rows[{name!r}] must count the rows of at most {layout.layers} layers, "
                    f"got {list(counts)}"
                )
        if stream.store >= len(streams):
            raise ValueError(f"streams[{number}].store must be below {len(streams)}, got {stream.store}")
        if stream.sources > stream.next_source:
            raise ValueError(
                f"streams[{number}].sources must be at most next_source, {stream.next_source}, got {stream.sources}"
            )
    if MADE_WITH in manifest.fingerprint:
        weights_of(manifest.fingerprint, len(streams))


def _check_data(manifest: Manifest) -> None:
    data, streams = manifest.data, manifest.streams
    size = sum(entry.nbytes for entry in data.tensors.values())
    if size > data.bytes:
        raise ValueError(f"data.tensors must fit into the {data.bytes} bytes of {data.file}, got {size} bytes")
    for number, stream in enumerate(streams):
        first = streams[stream.store]
        if first.store != stream.store or first.ltm != stream.ltm:
            raise ValueError(
                f"streams[{number}].ltm must be that of the stream whose store it shares, {list(first.ltm)}, "
                f"got {list(stream.ltm)}"
            )
