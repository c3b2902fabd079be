"""ReservoirEviction: a uniform sample of all rows that were ever stored."""

from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import whole
from mplus.eviction.base import EvictionPolicy
from mplus.eviction.topk_rows import first_rows
from mplus.stores.base import Piece, StoreView


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
        """Looks at new rows, and at those that were next to leave when their slab was last looked through."""
        pieces = [piece for piece in store.pieces(layer, "birth", "source") if len(piece.ids)]
        draws, places = Draws(self.options.seed, layer), sum(len(piece.ids) for piece in pieces)
        ahead = [max(LEAST, AHEAD * excess * len(piece.ids) // places) for piece in pieces]
        found = [draws.first(*each) for each in zip(pieces, ahead, strict=True)]
        while True:
            pool = Piece(torch.cat([one.ids for one in found]), None, {"birth": torch.cat([one.keys for one in found])})
            chosen = first_rows([pool], excess, lambda piece: [piece.columns["birth"]])
            last = LARGEST
            if len(chosen) == excess:
                last = int(pool.columns["birth"][torch.searchsorted(pool.ids, chosen)].max())
            short = [place for place, one in enumerate(found) if one.bound < last]
            if not short:
                return chosen
            for place in short:
                found[place] = draws.anew(pieces[place], max(excess, ahead[place]))


LEAST, AHEAD = 64, 16
"""Rows of a piece that are kept as next to leave: some, and several times as many as leave now."""

LARGEST = 2**63 - 1


@define(frozen=True, eq=False)
class Next:
    """The rows of a piece that leave first.

    Attributes:
        ids: ``[n]`` int64, ascending; some may have left.
        keys: ``[n]`` int64, the smallest leaves first.
        bound: all other rows up to ``upto`` have larger keys than this.
        upto: the largest id that was looked at.
    """

    ids: Tensor
    keys: Tensor
    bound: int
    upto: int


@define(frozen=True)
class Draws:
    """The random numbers of the rows of one layer."""

    seed: int
    layer: int

    @property
    def name(self) -> str:
        """What pieces know ``Next`` by."""
        return f"next to leave, seed {self.seed}, layer {self.layer}"

    def keys(self, births: Tensor, sources: Tensor) -> Tensor:
        """``[n]`` int64."""
        start = scrambled(scrambled(self.seed) ^ self.layer)
        return ~scramble(scramble(births ^ start) ^ sources)  # the largest number leaves first

    def first(self, piece: Piece, count: int) -> Next:
        """``anew``, but from what is known of the piece, as far as that goes: it may be fewer than ``count`` rows."""
        known: Next | None = piece.inherited.get(self.name)
        if known is None:
            return self.anew(piece, count)
        places = torch.searchsorted(piece.ids, known.ids).clamp(max=len(piece.ids) - 1)
        there = piece.ids[places] == known.ids
        if piece.live is not None:
            there &= piece.live[places]
        ids, keys = known.ids[there], known.keys[there]
        last = int(piece.ids[-1])
        if last > known.upto:
            start = int(torch.searchsorted(piece.ids, known.upto, right=True))
            new = self.keys(piece.columns["birth"][start:], piece.columns["source"][start:])
            early = new <= known.bound
            if piece.live is not None:
                early &= piece.live[start:]
            ids, keys = torch.cat([ids, piece.ids[start:][early]]), torch.cat([keys, new[early]])
        piece.inherited[self.name] = found = Next(ids, keys, known.bound, max(last, known.upto))
        return found

    def anew(self, piece: Piece, count: int) -> Next:
        """At least ``count`` rows, if there are so many; all are looked at."""
        ids, keys = piece.ids, self.keys(piece.columns["birth"], piece.columns["source"])
        if piece.live is not None:
            ids, keys = ids[piece.live], keys[piece.live]
        bound = LARGEST
        if count < len(ids):
            bound = int(keys.kthvalue(count).values)
            early = keys <= bound
            ids, keys = ids[early], keys[early]
        piece.inherited[self.name] = found = Next(ids, keys, bound, int(piece.ids[-1]))
        return found


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
