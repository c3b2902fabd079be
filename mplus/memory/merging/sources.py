"""The sources of two streams in one table, and what clashes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Literal

from attrs import define, evolve

from mplus.errors import InputError
from mplus.memory.sources.source import Source
from mplus.memory.sources.table import SourceTable
from mplus.memory.sources.writes import WriteLog
from mplus.memory.state import StreamState

Clash = Literal["join", "rename", "refuse"]
"""What becomes of sources that have one name in both memories."""
CLASHES: tuple[Clash, ...] = ("join", "rename", "refuse")


@define(frozen=True, eq=False)
class MergedSources:
    """The sources of two streams.

    Attributes:
        table: of both.
        numbers: of the other stream's sources, by their number there, their number in ``table``.
        writes: with an id, of both.
        unnoted: ids of writes to the other stream that are not noted, since the own stream has such an id.
    """

    table: SourceTable
    numbers: Mapping[int, int]
    writes: WriteLog
    unnoted: tuple[str, ...] = ()

    @staticmethod
    def of(own: StreamState, other: StreamState, clash: Clash) -> MergedSources:
        """Put the sources of another stream behind those of the own one.

        Text of the other stream that waits is not counted: it is written once more.

        Raises:
            InputError: both have a source, or a write, of one name, and ``clash`` is "refuse".
        """
        waiting = {part.source: len(part.ids) for part in other.tail}
        table, numbers = own.sources, dict[int, int]()
        names = {source.name for part in (own, other) for source in part.sources}
        for number, source in other.sources.items():
            counted = evolve(source, tokens=source.tokens - waiting.get(number, 0))
            found = table.find(source.name)
            if found is None:
                found = table.next_number
                table = table.having(found, counted)
            elif not source.is_written:
                pass  # the name of something that was forgotten there stands for what there is here
            elif not table[found].is_written:
                table = table.having(found, counted)
            elif clash == "rename" and source.name is not None:
                free = next(name for n in count(2) if (name := f"{source.name} ({n})") not in names)
                names.add(free)
                found = table.next_number
                table = table.having(found, evolve(counted, name=free))
            else:
                _check_joined(source.name, clash)
                table = table.having(found, joined(table[found], counted))
            numbers[number] = found
        known = {record.write_id: None for record in other.writes if own.writes.get(record.write_id) is not None}
        if known and clash == "refuse":
            raise InputError(
                f"both memories know the write_id {next(iter(known))!r}, and sources='refuse' takes in none that does: "
                "use sources='join' or 'rename', which keep the one of the memory that takes the other in"
            )
        new = [evolve(record, source=numbers[record.source]) for record in other.writes if record.write_id not in known]
        writes = own.writes.noting(new) if new else own.writes
        return MergedSources(table, numbers, writes, tuple(known))


def _check_joined(name: str | None, clash: Clash) -> None:
    if clash == "refuse":
        said = "text without a name" if name is None else f"a source {name!r}"
        raise InputError(
            f"both memories have {said}, and sources='refuse' takes in none that does: use sources='join', to make one "
            "source of both, or 'rename', to give that of the other memory another name; nothing was changed"
        )


def joined(own: Source, other: Source) -> Source:
    """Return one source for two of one name: written from the first time to the last, and expiring with the earlier.

    It is pinned if one of them is.
    """
    last = [time for time in (own.last_time, other.last_time) if time is not None]
    expires = [time for time in (own.expires, other.expires) if time is not None]
    return evolve(
        own,
        tokens=own.tokens + other.tokens,
        chunks=own.chunks + other.chunks,
        time=None if own.time is None or other.time is None else min(own.time, other.time),
        last_time=max(last, default=None),
        expires=min(expires, default=None),
        pinned=own.pinned or other.pinned,
        write_id=own.write_id or other.write_id,
    )
