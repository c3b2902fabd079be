"""The state of one stream: one batch row of a memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.memory.texts import Text, Texts
from mplus.memory.weights_state import WeightsState
from mplus.rows import MemoryRows
from mplus.stores.base import StoreView
from mplus.stores.usage import Usage


@define(frozen=True)
class Source:
    """A text, or part of one, that was written under one name.

    Attributes:
        name: what the caller called it; None for text written without a source.
        tokens: text tokens written.
        chunks: chunks written.
    """

    name: str | None
    tokens: int = 0
    chunks: int = 0


@define(frozen=True, eq=False, kw_only=True)
class StreamState:
    """Everything a stream remembers besides its store. Immutable: a write makes a new one.

    Attributes:
        stm: short-term rows of each layer, oldest first (layers differ in length only after ``forget``).
        pending: rows of each layer that left the STM and wait for the next merge; empty where there is no waiting.
        clock: rows written so far per layer; the next birth index.
        sources: what was written, by source number.
        newest: per layer ``[c, d]``, hidden states of the newest short-term rows (K of them, where there are as many),
            which the next write reads; empty where the rows keep theirs.
        counters: the mechanism's own numbers, each a small tensor.
        texts: what was written, where the memory keeps that; else None.
        weights: what keys and values, and retriever keys, were computed with; None where nobody knows.
    """

    stm: tuple[MemoryRows, ...]
    pending: tuple[MemoryRows, ...]
    clock: int = 0
    sources: tuple[Source, ...] = ()
    newest: tuple[Tensor, ...] = ()
    counters: dict[str, Tensor] = field(factory=dict)
    texts: Texts | None = None
    weights: WeightsState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the short-term and pending rows."""
        return sum(rows.nbytes for rows in (*self.stm, *self.pending)) + sum(part.nbytes for part in self.newest)

    def context(self, layer: int, count: int) -> MemoryRows:
        """The newest ``count`` short-term rows of a layer, oldest first, with their hidden states."""
        rows = self.stm[layer]
        rows = rows.select(slice(len(rows) - count, None))
        if not self.newest:
            return rows
        hidden = self.newest[layer]
        return rows.replace(hidden=hidden[hidden.shape[0] - count :])

    def kept(self, layer: int, kept: Tensor) -> Tensor:
        """What is left of ``newest`` when of this layer's short-term rows those at ``kept`` (bool or places) stay."""
        hidden = self.newest[layer]
        places = kept.nonzero().squeeze(1) if kept.dtype == torch.bool else kept
        places = places - (len(self.stm[layer]) - hidden.shape[0])
        return hidden[places[places >= 0].to(hidden.device)]

    def with_source(self, name: str | None, tokens: int) -> tuple[StreamState, int]:
        """Count ``tokens`` of one chunk under ``name``; returns the new state and the source's number."""
        for number, entry in enumerate(self.sources):
            if entry.name == name:
                grown = evolve(entry, tokens=entry.tokens + tokens, chunks=entry.chunks + 1)
                return evolve(self, sources=(*self.sources[:number], grown, *self.sources[number + 1 :])), number
        return evolve(self, sources=(*self.sources, Source(name, tokens, 1))), len(self.sources)

    def with_text(self, ids: Tensor, source: int, turn: int) -> StreamState:
        """Keep the ids ``[n]`` of one chunk, where texts are kept."""
        if self.texts is None:
            return self
        text = Text(ids.to("cpu", torch.int32, copy=True), source, turn)
        return evolve(self, texts=self.texts.appended(text))


@define(frozen=True, eq=False)
class StreamView:
    """What a read sees of one stream: an immutable state and an immutable view of its store.

    Attributes:
        state: all but the long-term rows.
        store: these.
        usage: where the read notes what it retrieves, if the eviction policy goes by that.
    """

    state: StreamState
    store: StoreView
    usage: Usage | None = None


def alike(chunks: Sequence[Tensor], states: Sequence[StreamState]) -> list[list[int]]:
    """Places of those that can share one pass: same chunk length, same number of short-term rows in every layer."""
    groups: dict[Any, list[int]] = {}
    for place, (ids, state) in enumerate(zip(chunks, states, strict=True)):
        groups.setdefault((len(ids), tuple(len(rows) for rows in state.stm)), []).append(place)
    return list(groups.values())
