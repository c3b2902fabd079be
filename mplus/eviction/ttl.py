"""TtlEviction: rows expire after so many merges (the released code of M+; ``recall frequency`` there)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import number
from mplus.eviction.base import EvictionPolicy
from mplus.eviction.topk_rows import first_rows
from mplus.stores.base import Piece, StoreView, smallest

EXPIRED = 0.01
"""A row leaves when its remaining merges fall to this or below (published constant)."""


class TtlEviction(EvictionPolicy):
    """Every merge takes ``decay`` from the lifetime of every row, new ones included; a row without any left expires.

    At capacity the rows that would expire first leave, among equals the oldest birth, ties by lowest id.
    """

    @define(frozen=True, kw_only=True)
    class Options(EvictionPolicy.Options):
        """How long rows live.

        Attributes:
            lifetime: merges after which a row expires (published: 10). Where rows do not wait for a merge, every write
                is one.
            decay: what a row loses of it per merge (published: 1).
        """

        lifetime: float = field(default=10.0, validator=number(0))
        decay: float = field(default=1.0, validator=number(0))

    options: Options
    name = "ttl"

    @property
    def lifetime(self) -> float | None:
        return self.options.lifetime

    def expire(self, store: StoreView, layer: int, elapsed: float, spare: int) -> tuple[float, Tensor]:
        after = elapsed + self.options.decay
        gone = [torch.empty(0, dtype=torch.int64, device=store.layout.device)]
        for piece in store.pieces(layer, "expiry"):
            if len(piece.ids) and smallest(piece, "expiry") - after <= EXPIRED:  # others are not looked through
                expired = (piece.columns["expiry"] - after) <= EXPIRED
                gone.append(piece.ids[expired if piece.live is None else expired & piece.live])
        ids = torch.cat(gone)
        if store.count(layer) - ids.shape[0] <= spare:
            return elapsed, ids[:0]
        return after, ids

    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        def order(piece: Piece) -> Sequence[Tensor]:
            return [piece.columns["expiry"], piece.columns["birth"]]

        pieces = store.pieces(layer, "expiry", "birth")
        return first_rows(pieces, excess, order, least=lambda piece: smallest(piece, "expiry"))
