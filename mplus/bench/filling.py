"""Memories of random rows: as large as wanted without writing thousands of chunks."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.eviction.build import build_eviction
from mplus.memory.memory import Memory
from mplus.memory.state import StreamState
from mplus.rows import NO_SOURCE, MemoryRows
from mplus.stores.base import MemoryStore
from mplus.stores.build import build_store

PIECE = 16_384
"""Rows made, and keys projected, at a time."""


@define(frozen=True, eq=False)
class Content:
    """What a stream remembers; memories of several decoders with the same retriever can be made of it.

    Attributes:
        state: the stream's.
        store: its long-term rows, the oldest of all.
        short_term: per layer ``[N, d]``, hidden states of the short-term rows.
        oldest: per layer ``[n, d]``, those of the oldest long-term rows, as many as were asked for.
        long_term: per layer ``[M, d]``, the same rows as plain tensors, where they were kept.
        keys: per layer ``[M, r]``, theirs.
    """

    state: StreamState
    store: MemoryStore
    short_term: tuple[Tensor, ...]
    oldest: tuple[Tensor, ...]
    long_term: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()

    def memory(self, engine: Any, streams: int = 1, seed: int = 0) -> Memory:
        """A memory of ``streams`` independent streams, all of this content."""
        return Memory(
            engine,
            [self.state] * streams,
            [self.store.fork() for _ in range(streams)],
            [torch.Generator().manual_seed(seed + row) for row in range(streams)],
            build_eviction(engine.config.eviction),
        )


@torch.no_grad()
def fill(
    engine: Any, short_term: int, long_term: int, seed: int, oldest: int = 0, kept_on: torch.device | None = None
) -> Content:
    """Random rows of unit variance in every layer: ``long_term`` with keys in the store, then ``short_term``.

    Args:
        engine: of the decoder; its retriever makes the keys.
        short_term, long_term: rows per layer.
        seed: of the rows; a layer's do not depend on how many others there are.
        oldest: keep hidden states of so many of the oldest long-term rows.
        kept_on: keep the long-term rows and keys as tensors too, on this device.
    """
    layout = engine.layout
    store = build_store(engine.config.store, layout)
    stm, hidden_kept, oldest_kept, newest, rows_kept, keys_kept = [], [], [], [], [], []
    k = engine.config.memory_tokens_per_chunk
    for layer in range(layout.layers):
        generator = torch.Generator(layout.device).manual_seed(seed * 1000 + layer)
        recent = _random(short_term, layout, generator)
        hidden_kept.append(recent)
        newest.append(recent[max(short_term - k, 0) :])
        stm.append(_rows(engine, layer, recent, long_term, with_key=not layout.keeps_hidden))
        hidden = _random(long_term, layout, generator)
        oldest_kept.append(hidden[:oldest].clone())
        keys = None
        if long_term:
            rows = _rows(engine, layer, hidden, 0, with_key=True)
            store.append(layer, rows)
            keys = rows.key
        if kept_on is not None:
            rows_kept.append(hidden.to(kept_on))
            keys_kept.append(hidden.new_empty(long_term, 0) if keys is None else keys.to(kept_on))
    state = evolve(
        engine.mechanism.new_state(layout),
        stm=tuple(stm),
        newest=() if layout.keeps_hidden else tuple(newest),
        clock=long_term + short_term,
    )
    return Content(state, store, tuple(hidden_kept), tuple(oldest_kept), tuple(rows_kept), tuple(keys_kept))


def _random(count: int, layout: Any, generator: torch.Generator) -> Tensor:
    """``[count, d]`` of unit variance, in pieces so that little is held in float32."""
    made = torch.empty(count, layout.hidden_size, dtype=layout.dtype, device=layout.device)
    for piece in made.split(PIECE):
        piece.copy_(torch.randn(piece.shape, generator=generator, device=layout.device))
    return made


def _rows(engine: Any, layer: int, hidden: Tensor, birth: int, with_key: bool) -> MemoryRows:
    """Rows with the columns of the engine's layout."""
    layout, count = engine.layout, hidden.shape[0]
    births = torch.arange(birth, birth + count, dtype=torch.int64, device=layout.device)
    rows = MemoryRows(hidden if layout.keeps_hidden else None, births, torch.full_like(births, NO_SOURCE))
    if layout.projected_size:
        pieces = [engine.project(layer, piece[None])[0] for piece in hidden.split(PIECE)]
        rows = rows.replace(projected=torch.cat(pieces))
    if with_key and layout.key_size:
        rows = rows.replace(key=torch.cat([engine.keys(layer, piece) for piece in hidden.split(PIECE)]))
    return rows
