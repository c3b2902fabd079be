"""The sources of a stream and what is still held of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor

from mplus.errors import MemoryFileError
from mplus.memory.report import SourceInfo
from mplus.memory.sources.table import SourceTable
from mplus.memory.state import StreamView


@define(frozen=True, eq=False)
class Held:
    """Rows of one tier in one layer, or a part of them: sources ``[n]`` and births ``[n]``, both int64."""

    sources: Tensor
    births: Tensor


def sources_of(view: StreamView, mechanism: Any) -> list[SourceInfo]:
    """The sources of a stream, in order of first writing."""
    state, layers = view.state, range(view.store.layout.layers)
    tiers = (
        [Held(state.stm[layer].source, mechanism.short_term_births(state, layer)) for layer in layers],
        [Held(rows.source, rows.birth) for rows in state.pending],
        [held for layer in layers for held in stored(view, layer)],
    )
    return listed(state.sources, tiers, len(layers), state.clock, mechanism.config.memory_tokens_per_chunk)


def listed(
    sources: SourceTable, tiers: Sequence[Sequence[Held]], layers: int, clock: int, chunk_rows: int
) -> list[SourceInfo]:
    """The same from plain facts.

    Args:
        sources: of the stream.
        tiers: short-term, pending and long-term rows, in as many parts as they lie in.
        layers: that the rows are spread over.
        clock: of the stream.
        chunk_rows: rows that a chunk leaves in a layer.
    """
    numbers = sources.column("number")
    counts = [torch.zeros(len(sources), dtype=torch.int64) for _ in tiers]
    newest, oldest = [-(2**63)] * len(sources), [2**63 - 1] * len(sources)
    for count, parts in zip(counts, tiers, strict=True):
        for part in parts:
            count.add_(_counted(part, numbers, newest, oldest))
    rows = [[number / layers for number in count.tolist()] for count in counts]
    return [
        SourceInfo(
            source.name,
            source.tokens,
            source.chunks,
            *(tier[place] for tier in rows),
            *_ages(clock, newest[place], oldest[place], chunk_rows),
        )
        for place, source in enumerate(sources)
        if source.chunks
    ]


def stored(view: StreamView, layer: int) -> Iterator[Held]:
    """The long-term rows of a layer, in as many parts as they lie in."""
    for piece in view.store.pieces(layer, "source", "birth"):
        places = slice(None) if piece.live is None else piece.live
        yield Held(piece.columns["source"][places], piece.columns["birth"][places])


def short_term(rows: Held, clock: int) -> Held:
    """Short-term rows with births as others have them: below 0 they count back from the present clock.

    ("release" ages of the mechanism "mplus".)
    """
    return Held(rows.sources, torch.where(rows.births < 0, rows.births + clock, rows.births))


def _counted(part: Held, numbers: Tensor, newest: list[int], oldest: list[int]) -> Tensor:
    """Rows of every source, of ascending ``numbers``; the extremes of births are updated in place."""
    known = part.sources >= 0
    sources, births = part.sources[known].cpu(), part.births[known].cpu()
    places = torch.searchsorted(numbers, sources)
    if len(sources) and not torch.equal(
        numbers[places.clamp(max=len(numbers) - 1)] if len(numbers) else numbers, sources
    ):
        raise MemoryFileError("rows must come from sources of their stream, and some come from none: run verify")
    for extremes, how in ((newest, "amax"), (oldest, "amin")):
        found = torch.tensor(extremes, dtype=torch.int64).scatter_reduce(0, places, births, how)
        extremes[:] = found.tolist()
    return torch.bincount(places, minlength=len(numbers))


def _ages(clock: int, newest: int, oldest: int, chunk_rows: int) -> tuple[int | None, ...]:
    if newest < oldest:
        return (None,) * 4
    ages = clock - 1 - newest, clock - 1 - oldest
    return (*ages, *(age // chunk_rows for age in ages))
