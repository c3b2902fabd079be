"""TtlEviction: rows expire after so many merges (the released code of M+; ``recall frequency`` there)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import number
from mplus.eviction.base import EvictionPolicy, topk_rows
from mplus.stores.base import Chunk, StoreView, chunk_min

EXPIRED = 0.01
"""A row leaves when its remaining merges fall to this or below (published constant)."""


class TtlEviction(EvictionPolicy):
    """Every merge takes ``decay`` from the lifetime of every row, new ones included; a row without any left expires.

    At capacity the rows that would expire first leave, among equals the oldest birth, ties by lowest id.
    """

    @define(frozen=True, kw_only=True)
    class Options(EvictionPolicy.Options):
        """The lifetime of rows.

        Attributes:
            lifetime: merges after which a row expires (published: 10). Where rows do not wait for a merge, every write
                is one.
            decay: what a row loses of it per merge (published: 1).
        """

        lifetime: float = field(default=10.0, validator=number(0))
        decay: float = field(default=1.0, validator=number(0))

    options: Options
    name = "ttl"

    def __init__(self, options: EvictionPolicy.Options | None = None) -> None:
        super().__init__(options)
        self.lifetime = self.options.lifetime

    def expire(self, store: StoreView, layer: int, elapsed: float, spare: int) -> tuple[float, Tensor]:
        after = elapsed + self.options.decay
        gone = [torch.empty(0, dtype=torch.int64, device=store.layout.device)]
        for chunk in store.chunks(layer, "expiry"):
            if len(chunk.ids) and chunk_min(chunk, "expiry") - after <= EXPIRED:  # others are not looked through
                expired = (chunk.columns["expiry"] - after) <= EXPIRED
                gone.append(chunk.ids[expired if chunk.live is None else expired & chunk.live])
        ids = torch.cat(gone)
        if store.count(layer) - ids.shape[0] <= spare:
            return elapsed, ids[:0]
        return after, ids

    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        def order(chunk: Chunk) -> Sequence[Tensor]:
            return [chunk.columns["expiry"], chunk.columns["birth"]]

        chunks = store.chunks(layer, "expiry", "birth")
        return topk_rows(chunks, excess, order, lower_bound=lambda chunk: chunk_min(chunk, "expiry"))
