"""ReservoirEviction: a uniform sample of all rows that were ever stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import whole
from mplus.stores.base import Piece, StoreView
from mplus.stores.choosing import first_rows
from mplus.stores.eviction import EvictionPolicy


class ReservoirEviction(EvictionPolicy):
    """Keeps the rows with the smallest random numbers, so what is held is a uniform sample of all that ever came.

    The number of a row is a hash of seed, layer, birth and source: nothing has to be remembered, the order in which
    rows come does not matter, and a saved memory goes on as if it had not been saved (bottom-k sampling: Cohen and
    Kaplan, 2007). Layers are sampled independently; streams with the same seed alike. Rows of one layer, birth and
    source, as the variant "published" makes them, have one number: they mostly stay or leave together.
    """

    @define(frozen=True, kw_only=True)
    class Options(EvictionPolicy.Options):
        """What is drawn.

        Attributes:
            seed: another seed, another sample.
        """

        seed: int = field(default=0, validator=whole(0))

    options: Options
    name = "reservoir"

    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        start = scrambled(scrambled(self.options.seed) ^ layer)

        def order(piece: Piece) -> Sequence[Tensor]:
            own = scramble(scramble(piece.columns["birth"] ^ start) ^ piece.columns["source"])
            return [~own]  # the largest number leaves first

        return first_rows(store.pieces(layer, "birth", "source"), excess, order)


# Finaliser of splitmix64 (Steele, Lea and Flood, 2014): every bit of the input moves about half of those of the output.
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def scramble(values: Tensor) -> Tensor:
    """Independent uniform numbers, int64, for different int64 ``values``; arithmetic is modulo 2**64."""
    mixed: Tensor = values + _signed(STEP)
    for shift, factor in ((30, FIRST), (27, SECOND)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    result: Tensor = mixed ^ _shifted(mixed, 31)
    return result


def scrambled(value: int) -> int:
    """``scramble`` of one number."""
    return int(scramble(torch.tensor(_signed(value % 2**64))))


def _shifted(values: Tensor, places: int) -> Tensor:
    """Bits moved to the right, zeros coming in from the left: torch itself repeats the sign."""
    moved: Tensor = (values >> places) & (2 ** (64 - places) - 1)
    return moved


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
