"""Files of earlier format versions: 1 of saved memories, 1 and 2 of memories in directories.

Their manifests list the sources of every stream, forgotten ones with 0 chunks, and have a fixed list of tiers; tensors
are named after these: ``stream.<i>.stm.<layer>.<column>``, likewise ``pending``, ``stream.<i>.newest.<layer>`` and
``stream.<i>.counter.<name>``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from attrs import define, field
from torch import Tensor

from mplus.config import Component, JsonValue
from mplus.memory.format.structure import structured, whole
from mplus.memory.format.tensors import Tensors
from mplus.memory.sources.source import Source
from mplus.memory.sources.table import SourceTable

RENAMED = re.compile(r"(stream\.\d+)\.(?:(stm|pending)|(newest|counter))\.(.+)")


@define(frozen=True, kw_only=True)
class EarlierSource:
    """A source; one with 0 chunks is a forgotten one."""

    name: str | None
    tokens: int = field(validator=whole())
    chunks: int = field(validator=whole())


@define(frozen=True, kw_only=True)
class EarlierStream:
    """A stream: see ``mplus.memory.format.entries.StreamEntry``. ``sources`` are by number."""

    clock: int
    sources: tuple[EarlierSource, ...]
    stm: tuple[int, ...]
    pending: tuple[int, ...]
    ltm: tuple[int, ...]
    store: int

    def table(self) -> SourceTable:
        """Return its sources, without forgotten ones: that version did not ask whether to keep the name."""
        entries = {n: Source(entry.name, entry.tokens, entry.chunks) for n, entry in enumerate(self.sources)}
        return SourceTable.of({n: entry for n, entry in entries.items() if entry.chunks}, len(self.sources))


def upgraded(plain: Mapping[str, JsonValue]) -> tuple[dict[str, JsonValue], tuple[SourceTable, ...]]:
    """Return the content of a manifest in the present form, and the sources of each stream that it listed.

    Raises ValueError where it is not as it was written.
    """
    named = plain.get("fingerprint")
    mechanism = Component.of(named.get("mechanism", "mplus") if isinstance(named, Mapping) else "mplus").name
    streams: list[dict[str, JsonValue]] = []
    tables: list[SourceTable] = []
    listed = plain.get("streams")
    for number, stream in enumerate(listed if isinstance(listed, Sequence) else ()):
        found = structured(stream, EarlierStream, f"manifest.streams[{number}]")
        tables.append(found.table())
        streams.append(
            {
                "mechanism": mechanism,
                "clock": found.clock,
                "sources": len(tables[-1]),
                "next_source": tables[-1].next_number,
                "rows": {"stm": list(found.stm), "pending": list(found.pending)},
                "ltm": list(found.ltm),
                "store": found.store,
            }
        )
    return {**plain, "streams": streams}, tuple(tables)


class EarlierTensors:
    """A file of an earlier version, as if it were of the present one."""

    def __init__(self, file: Tensors, sources: Sequence[SourceTable]) -> None:
        self.path, self._file = file.path, file
        self._present = {renamed(name): name for name in file.names}
        self._made = {
            f"stream.{number}.sources.{name}": column
            for number, table in enumerate(sources)
            for name, column in table.tensors().items()
        }

    @property
    def lasting(self) -> bool:
        return self._file.lasting

    @property
    def names(self) -> Collection[str]:
        return {**self._present, **self._made}.keys()

    def get(self, name: str) -> Tensor:
        return self._made[name] if name in self._made else self._file.get(self._present.get(name, name))


def in_present_form(file: Tensors, sources: Sequence[SourceTable]) -> Tensors:
    """Return ``file``, whose manifest gave ``earlier`` sources or none, as one of the present version."""
    return EarlierTensors(file, sources) if sources else file


def renamed(name: str) -> str:
    """Return the present name of a tensor of a stream."""
    found = RENAMED.fullmatch(name)
    if found is None:
        return name
    stream, rows, tensor, rest = found.groups()
    return f"{stream}.rows.{rows}.{rest}" if rows else f"{stream}.state.{tensor}.{rest}"
