"""ReservoirEviction: a uniform sample of all rows that were ever stored."""

from __future__ import annotations

import torch
from attrs import define, field
from torch import Tensor

from mplus.config import whole
from mplus.eviction.base import EvictionPolicy, topk_rows
from mplus.stores.base import Chunk, StoreView


class ReservoirEviction(EvictionPolicy):
    """Keeps the rows with the smallest random numbers, so what is held is a uniform sample of all that ever came.

    The number of a row is a hash of seed, layer, birth and source: nothing has to be remembered, the order in which
    rows come does not matter, and a saved memory goes on as if it had not been saved (bottom-k sampling: Cohen and
    Kaplan, 2007). Layers are sampled independently; streams with the same seed alike. Rows of one layer, birth and
    source, as the variant "published" makes them, have one number: they mostly stay or leave together.
    """

    @define(frozen=True, kw_only=True)
    class Options(EvictionPolicy.Options):
        """Options of the draws.

        Attributes:
            seed: another seed, another sample.
        """

        seed: int = field(default=0, validator=whole(0))

    options: Options
    name = "reservoir"

    def select(self, store: StoreView, layer: int, excess: int) -> Tensor:
        """Look at new rows, and at those that were next to leave when their slab was last looked through."""
        chunks = [chunk for chunk in store.chunks(layer, "birth", "source") if len(chunk.ids)]
        priorities, places = RandomPriorities(self.options.seed, layer), sum(len(chunk.ids) for chunk in chunks)
        counts = [max(MIN_CANDIDATES, SPARE_FACTOR * excess * len(chunk.ids) // places) for chunk in chunks]
        found = [priorities.candidates(*each) for each in zip(chunks, counts, strict=True)]
        while True:
            pool = Chunk(torch.cat([one.ids for one in found]), None, {"birth": torch.cat([one.keys for one in found])})
            chosen = topk_rows([pool], excess, lambda chunk: [chunk.columns["birth"]])
            last = LARGEST
            if len(chosen) == excess:
                last = int(pool.columns["birth"][torch.searchsorted(pool.ids, chosen)].max())
            short = [place for place, one in enumerate(found) if one.bound < last]
            if not short:
                return chosen
            for place in short:
                found[place] = priorities.recompute(chunks[place], max(excess, counts[place]))


MIN_CANDIDATES, SPARE_FACTOR = 64, 16
"""Rows of a chunk that are kept as next to leave: some, and several times as many as leave now."""

LARGEST = 2**63 - 1


@define(frozen=True, eq=False)
class Candidates:
    """The rows of a chunk that leave first.

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
class RandomPriorities:
    """The random numbers of the rows of one layer."""

    seed: int
    layer: int

    @property
    def name(self) -> str:
        """The key of ``Candidates`` in the caches of chunks."""
        return f"next to leave, seed {self.seed}, layer {self.layer}"

    def keys(self, births: Tensor, sources: Tensor) -> Tensor:
        """Return the keys ``[n]`` int64 of rows."""
        start = scrambled(scrambled(self.seed) ^ self.layer)
        return ~scramble(scramble(births ^ start) ^ sources)  # the largest number leaves first

    def candidates(self, chunk: Chunk, count: int) -> Candidates:
        """Return the cached candidates, brought up to date (maybe fewer than ``count``), or recompute them."""
        known: Candidates | None = chunk.inherited_cache.get(self.name)
        if known is None:
            return self.recompute(chunk, count)
        places = torch.searchsorted(chunk.ids, known.ids).clamp(max=len(chunk.ids) - 1)
        there = chunk.ids[places] == known.ids
        if chunk.live is not None:
            there &= chunk.live[places]
        ids, keys = known.ids[there], known.keys[there]
        last = int(chunk.ids[-1])
        if last > known.upto:
            start = int(torch.searchsorted(chunk.ids, known.upto, right=True))
            new = self.keys(chunk.columns["birth"][start:], chunk.columns["source"][start:])
            early = new <= known.bound
            if chunk.live is not None:
                early &= chunk.live[start:]
            ids, keys = torch.cat([ids, chunk.ids[start:][early]]), torch.cat([keys, new[early]])
        chunk.inherited_cache[self.name] = found = Candidates(ids, keys, known.bound, max(last, known.upto))
        return found

    def recompute(self, chunk: Chunk, count: int) -> Candidates:
        """Return at least ``count`` rows, if there are so many; all are looked at."""
        ids, keys = chunk.ids, self.keys(chunk.columns["birth"], chunk.columns["source"])
        if chunk.live is not None:
            ids, keys = ids[chunk.live], keys[chunk.live]
        bound = LARGEST
        if count < len(ids):
            bound = int(keys.kthvalue(count).values)
            early = keys <= bound
            ids, keys = ids[early], keys[early]
        chunk.inherited_cache[self.name] = found = Candidates(ids, keys, bound, int(chunk.ids[-1]))
        return found


# Finaliser of splitmix64 (Steele, Lea and Flood, 2014): every bit of the input moves about half of those of the output.
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def scramble(values: Tensor) -> Tensor:
    """Return independent uniform int64 for different int64 ``values``; arithmetic is modulo 2**64."""
    mixed: Tensor = values + _signed(STEP)
    for shift, factor in ((30, FIRST), (27, SECOND)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    result: Tensor = mixed ^ _shifted(mixed, 31)
    return result


def scrambled(value: int) -> int:
    """Return ``scramble`` of one number."""
    return int(scramble(torch.tensor(_signed(value % 2**64))))


def _shifted(values: Tensor, places: int) -> Tensor:
    """Shift bits to the right, zeros coming in from the left: torch itself repeats the sign."""
    moved: Tensor = (values >> places) & (2 ** (64 - places) - 1)
    return moved


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
