"""EvictionPolicy: which long-term rows leave when a store is over its capacity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from attrs import define
from torch import Tensor

from mplus.stores.base import Piece, StoreView, smallest


class EvictionPolicy(ABC):
    """Chooses rows to remove; built as ``Policy(options)``."""

    @define(frozen=True, kw_only=True)
    class Options:
        """Options of the implementation (attrs class; the base class has none)."""

    name: ClassVar[str]

    def __init__(self, options: Any = None) -> None:
        self.options = options if options is not None else self.Options()

    @abstractmethod
    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        """Ids of exactly ``excess`` rows of ``layer`` to remove (``[excess]`` int64, ``0 < excess <= count``)."""


class FifoEviction(EvictionPolicy):
    """Oldest birth first (M+ section 3.2: at capacity the rows of the largest age are dropped); ties by lowest id."""

    name = "fifo"

    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        """Looks through pieces from the one with the oldest row on, until no other can have a row that must leave."""
        pieces = [piece for piece in store.pieces(layer, "birth") if len(piece.ids)]
        births = ids = torch.empty(0, dtype=torch.int64, device=store.layout.device)
        for piece in sorted(pieces, key=lambda piece: smallest(piece, "birth")):
            newest = int(births[-1]) if len(ids) == excess else None
            if newest is not None and smallest(piece, "birth") > newest:
                break  # equal births may yet have lower ids
            old, old_ids = _oldest(piece, excess, newest)
            births, ids = _in_order(torch.cat([births, old]), torch.cat([ids, old_ids]))
            births, ids = births[:excess], ids[:excess]
        return ids


def _oldest(piece: Piece, count: int, newest: int | None) -> tuple[Tensor, Tensor]:
    """Births and ids of all rows of a piece that may be among the ``count`` oldest of all, none born after ``newest``.

    In the order of their ids.
    """
    births = piece.columns["birth"]
    births = births if piece.live is None else births.masked_fill(~piece.live, torch.iinfo(births.dtype).max)
    limit: int | Tensor = births.kthvalue(min(count, len(births))).values if newest is None else newest
    old = births <= limit
    places = (old if piece.live is None else old & piece.live).nonzero().squeeze(1)
    return births[places], piece.ids[places]


def _in_order(births: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Oldest first, ties by lowest id."""
    by_id = ids.argsort()
    order = by_id[births[by_id].argsort(stable=True)]
    return births[order], ids[order]
