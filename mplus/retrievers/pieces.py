"""Pieces: rows of a layer numbered from piece to piece, for readers that make one number of every row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from mplus.stores.base import Column, StoreView


class Pieces:
    """All rows of one layer of a store, by position 0..m-1 in the order of their ids.

    Attributes:
        pieces: of the store, with the columns asked for.
    """

    def __init__(self, store: StoreView, layer: int, *names: Column) -> None:
        self.pieces = [piece for piece in store.pieces(layer, *names) if len(piece.ids)]
        self._layout = store.layout
        lives = [piece.live for piece in self.pieces]
        self._whole = all(live is None for live in lives)
        self._rows: Tensor | None = None  # places of the rows among all places
        if not self._whole:
            masks = [
                torch.ones_like(piece.ids, dtype=torch.bool) if live is None else live
                for piece, live in zip(self.pieces, lives, strict=True)
            ]
            self._rows = torch.cat(masks).nonzero().squeeze(1)

    def have(self, name: str) -> bool:
        """Whether the rows have this column, or would have it if there were any."""
        return all(name in piece.columns for piece in self.pieces) if self.pieces else name in self._layout.columns()

    def each(self, name: str, of: Callable[[Tensor], Tensor]) -> Tensor:
        """``[..., m]``: what ``of`` makes of one column, piece by piece; ``[..., n]`` of ``[n, w]``.

        Places where no row is are among what it gets; they are left out of the result.
        """
        made = [of(piece.columns[name]) for piece in self.pieces]
        values = made[0] if len(made) == 1 else torch.cat(made, -1)
        return values if self._rows is None else values.index_select(-1, self._rows.to(values.device))

    def ids(self, positions: Tensor) -> Tensor:
        """``[n]`` ids of the rows at ``positions`` ``[n]``."""
        if self._rows is not None:
            positions = self._rows[positions]
        if len(self.pieces) == 1:
            return self.pieces[0].ids[positions]
        ids, start = torch.empty_like(positions), 0
        for piece in self.pieces:
            here = ((positions >= start) & (positions < start + len(piece.ids))).nonzero().squeeze(1)
            ids[here] = piece.ids[positions[here] - start]
            start += len(piece.ids)
        return ids
