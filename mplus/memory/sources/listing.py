"""List the sources of a stream, with the rows still held of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

import torch
from attrs import define
from torch import Tensor

from mplus.errors import MemoryFileError
from mplus.memory.report import SourceInfo
from mplus.memory.sources.clock import datetime_of
from mplus.memory.sources.table import SourceTable
from mplus.memory.state import LONG_TERM, StreamView
from mplus.memory.texts import Waiting


@define(frozen=True, eq=False)
class Held:
    """Rows of one tier in one layer, or a part of them: sources ``[n]`` and births ``[n]``, both int64."""

    sources: Tensor
    births: Tensor


class Ages(TypedDict):
    """The ages in a ``SourceInfo``."""

    newest_age: int | None
    oldest_age: int | None
    newest_age_chunks: int | None
    oldest_age_chunks: int | None


def sources_of(view: StreamView, chunk_rows: int) -> list[SourceInfo]:
    """Return the sources of a stream, in order of first writing; a chunk leaves ``chunk_rows`` rows in a layer."""
    state, layers = view.state, range(view.store.layout.layers)
    tiers = {
        state.lists.get(name, name): [Held(rows.source, state.births(name, rows.birth, state.clock)) for rows in parts]
        for name, parts in state.row_lists().items()
    }
    tiers[LONG_TERM] = [held for layer in layers for held in stored(view, layer)]
    return listed(state.sources, tiers, len(layers), state.clock, chunk_rows, state.tail)


def listed(
    sources: SourceTable,
    tiers: Mapping[str, Sequence[Held]],
    layers: int,
    clock: int,
    chunk_rows: int,
    tail: Sequence[Waiting],
) -> list[SourceInfo]:
    """Return the sources in ``sources``, with the rows held of each.

    Args:
        sources: of the stream.
        tiers: the rows, by what reports call them, in as many parts as they lie in.
        layers: that the rows are spread over.
        clock: of the stream.
        chunk_rows: rows that a chunk leaves in a layer.
        tail: text that waits.
    """
    numbers = sources.column("number")
    waiting = {part.source: len(part.ids) for part in tail}
    counts = {name: torch.zeros(len(sources), dtype=torch.int64) for name in tiers}
    latest, oldest = [-(2**63)] * len(sources), [2**63 - 1] * len(sources)
    for name, parts in tiers.items():
        for part in parts:
            counts[name].add_(_counted(part, numbers, latest, oldest))
    rows = {name: [total / layers for total in count.tolist()] for name, count in counts.items()}
    return [
        SourceInfo(
            source.name,
            source.tokens,
            source.chunks,
            {name: tier[place] for name, tier in rows.items()},
            tail_tokens=waiting.get(number, 0),
            **_ages(clock, latest[place], oldest[place], chunk_rows),
            written=datetime_of(source.time),
            last_written=datetime_of(source.last_time),
            expires=datetime_of(source.expires),
            pinned=source.pinned,
        )
        for place, (number, source) in enumerate(sources.items())
        if source.is_written
    ]


def stored(view: StreamView, layer: int) -> Iterator[Held]:
    """Yield the long-term rows of a layer, in as many parts as they lie in."""
    for piece in view.store.chunks(layer, "source", "birth"):
        places = slice(None) if piece.live is None else piece.live
        yield Held(piece.columns["source"][places], piece.columns["birth"][places])


def _counted(part: Held, numbers: Tensor, latest: list[int], oldest: list[int]) -> Tensor:
    """Count the rows of every source, of ascending ``numbers``; the extremes of births are updated in place."""
    known = part.sources >= 0
    sources, births = part.sources[known].cpu(), part.births[known].cpu()
    places = torch.searchsorted(numbers, sources)
    if len(sources) and not torch.equal(
        numbers[places.clamp(max=len(numbers) - 1)] if len(numbers) else numbers, sources
    ):
        raise MemoryFileError("rows must come from sources of their stream, and some come from none: run verify")
    for extremes, how in ((latest, "amax"), (oldest, "amin")):
        found = torch.tensor(extremes, dtype=torch.int64).scatter_reduce(0, places, births, how)
        extremes[:] = found.tolist()
    return torch.bincount(places, minlength=len(numbers))


def _ages(clock: int, latest: int, oldest: int, chunk_rows: int) -> Ages:
    if latest < oldest:
        return Ages(newest_age=None, oldest_age=None, newest_age_chunks=None, oldest_age_chunks=None)
    newest, eldest = clock - 1 - latest, clock - 1 - oldest
    return Ages(
        newest_age=newest,
        oldest_age=eldest,
        newest_age_chunks=newest // chunk_rows,
        oldest_age_chunks=eldest // chunk_rows,
    )
