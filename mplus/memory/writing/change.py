"""The change in which a memory takes in a chunk that was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.memory.sources.clock import read_clock
from mplus.memory.state import StreamState
from mplus.memory.transaction import Streams, Sync
from mplus.memory.writing.plan import StreamWrite
from mplus.memory.writing.update import NewEntries, Update, WriteContext, absorbed_by, check_finite


@define(frozen=True, eq=False)
class ReadChunk:
    """A chunk of some streams of one memory that was read, and is to be written.

    Attributes:
        streams: of the memory.
        writes: b of them.
        made: the new rows, or entries, of each.
        ids: ``[b, n]``, their chunks.
        finite: whether it is known that all of the rows are.
    """

    streams: Streams
    writes: Sequence[StreamWrite]
    made: Sequence[Update | NewEntries]
    ids: Tensor
    finite: bool


class ChunkChange:
    """The change in which streams of one memory take in the new rows of one chunk each, all or nothing."""

    def __init__(self, chunk: ReadChunk, turn: int) -> None:
        """``turn``: see ``mplus.memory.texts.Text``."""
        self._chunk, self._turn = chunk, turn
        self._kept: dict[int, Mapping[str, Sequence[Tensor]]] = {}
        self._counts: list[tuple[int, int, int]] = []

    def make(self, sync: Sync) -> None:
        """Make the change, on disk when this returns; ``sync``: as for ``Persistence.commit``. Raises as ``write``."""
        chunk, streams = self._chunk, self._chunk.streams
        for update in () if chunk.finite else chunk.made:
            update.check_finite(chunk.ids.shape[1], streams.engine.mechanism.name)
        now = read_clock(streams.clock)
        self._counts.clear()
        streams.change(lambda states: self._absorb(states, now), self._kept, sync)

    def finish(self) -> None:
        """Count the change, and do what is due after it. Raises as ``Persistence.after_write``."""
        for write, (new, dropped, evicted) in zip(self._chunk.writes, self._counts, strict=True):
            write.report.count(write.row, new, dropped, evicted)
        self._chunk.streams.persistence.after_write(self._chunk.streams)

    def _absorb(self, states: list[StreamState], now: float) -> None:
        chunk, streams = self._chunk, self._chunk.streams
        tokens, mechanism = chunk.ids.shape[1], streams.engine.mechanism
        for write, rows, text in zip(chunk.writes, chunk.made, chunk.ids, strict=True):
            row, before = write.row, write.state
            waited = before.waiting(write.name) if write.rest is not None else text[:0]
            new = max(tokens - len(waited), 0)
            state, number = before.with_source(write.name, new, now, write.facts)
            state = state.with_text(text, number, self._turn, write.short)
            state = state.with_waiting(number, waited[tokens:]) if len(waited) else state
            absorbed = absorbed_by(mechanism, state, rows, number, context_of(streams, row, state, text))
            states[row] = write.noted(absorbed.state, number, new, absorbed.dropped, absorbed.evicted, chunks=1)
            self._kept[row] = absorbed.stayed
            self._counts.append((new, absorbed.dropped, absorbed.evicted))


def context_of(streams: Streams, row: int, state: StreamState, ids: Tensor | None = None) -> WriteContext:
    """Return what a mechanism may use and change while a stream takes in rows; part of a change of ``streams``.

    Args:
        streams: of the memory.
        row: the batch row.
        state: of the stream, for the sources that are pinned.
        ids: ``[n]``, the text that the rows were made of, if it is one.
    """
    engine, generator, pinned = streams.engine, streams.generators[row], state.sources.pinned

    def keys(layer: int, hidden: Tensor) -> Tensor | None:
        made = engine.keys(layer, hidden)
        if made is not None:
            check_finite(made, f"in the retriever keys of layer {layer}")
        return made

    return WriteContext(
        store=streams.stores[row],
        eviction=streams.eviction,
        draw=lambda n: torch.randperm(n, generator=generator),
        keys=keys,
        ids=ids,
        capacity=streams.budget.capacity,
        access_log=streams.access_logs[row],
        pinned=pinned if len(pinned) else None,
    )
