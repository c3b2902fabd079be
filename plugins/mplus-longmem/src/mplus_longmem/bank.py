"""The bank of one stream: chunks of keys and values, and the search of every query and head in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from attrs import define, evolve
from torch import Tensor, nn

from mplus.mechanisms import StoreView

MOST_SCORES = 1 << 25
"""Scores that are computed at a time: 128 MiB in float32."""
MOST_READ = 1 << 24
"""Numbers of keys and values that are read at a time: 64 MiB in float32 each."""


@define(frozen=True)
class Heads:
    """Sizes of a chunk.

    Attributes:
        count, keys: heads of queries H and of keys Hkv, which divides H.
        width, value_width: of one head's key and value, D and Dv.
        tokens: of a chunk, c.
    """

    count: int
    keys: int
    width: int
    value_width: int
    tokens: int

    @property
    def row(self) -> int:
        """Numbers of a chunk: its keys ``[Hkv, c, D]`` and behind them its values ``[Hkv, c, Dv]``."""
        return self.keys * self.tokens * (self.width + self.value_width)

    def chunked(self, projected: Tensor) -> Tensor:
        """Return chunks ``[n, row]`` of the keys and values ``[n c, Hkv (D + Dv)]`` of tokens, one behind the other."""
        parts = projected.split([self.keys * self.width, self.keys * self.value_width], -1)
        chunks = [part.unflatten(0, (-1, self.tokens)).unflatten(-1, (self.keys, -1)) for part in parts]
        return torch.cat([chunk.transpose(1, 2).flatten(1) for chunk in chunks], -1)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Split chunks ``[n, row]`` into keys ``[n, Hkv, c, D]`` and values ``[n, Hkv, c, Dv]``: views."""
        sizes = [self.keys * self.tokens * width for width in (self.width, self.value_width)]
        keys, values = (part.unflatten(-1, (self.keys, self.tokens, -1)) for part in rows.split(sizes, -1))
        return keys, values

    def means(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return the mean key ``[n, Hkv D]`` of each chunk ``[n, row]`` of ``tokens`` ``[n]``, its padding left out."""
        keys, _ = self.split(rows)
        real = torch.arange(self.tokens, device=rows.device) < tokens[:, None]
        return ((keys * real[:, None, :, None]).sum(2) / tokens[:, None, None]).flatten(1)


@define(frozen=True, eq=False)
class Bank:
    """The chunks of one stream at one moment, the oldest first.

    Attributes:
        store: holds them.
        ids: ``[C]`` int64, their ids in it.
        means: ``[C, Hkv D]``, what is searched.
        most: chunks that a query reads.
        tokens: ``[C]`` int64, tokens of each chunk.
        columns: ``[m, row]`` each, where chunks lie as they are read; none where the store has to give them out.
        column, row: ``[C]`` int64, in which of these, and at which place, each chunk lies.
    """

    store: StoreView
    ids: Tensor
    means: Tensor
    tokens: Tensor
    most: int
    columns: Sequence[Tensor] = ()
    column: Tensor | None = None
    row: Tensor | None = None

    @staticmethod
    def of(store: StoreView, most: int) -> Bank:
        """Return the bank that a store holds, of which a query reads at most so many chunks."""
        ids, means = store.ids(0), store.keys(0)
        assert means is not None  # noqa: S101 - the layout says so
        small = store.gather(0, ids, leave_out=("key", "projected"))
        bank = Bank(store, ids, means, small.extra["tokens"].long(), most)
        located = store.locate(0, "projected", ids) if len(ids) else None
        if located is None:
            return bank
        row = torch.cat([places for _, places in located.parts])
        column = torch.cat([torch.full_like(places, number) for number, (_, places) in enumerate(located.parts)])
        if located.order is not None:
            row, column = row[located.order], column[located.order]
        return evolve(bank, columns=[part for part, _ in located.parts], column=column, row=row)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def readable(self) -> bool:
        """Return whether a query reads anything of it."""
        return bool(len(self)) and self.most > 0

    def rows(self) -> Tensor:
        """Return all chunks ``[C, row]``."""
        found = self.store.gather(0, self.ids).projected
        assert found is not None  # noqa: S101 - the layout says so
        return found

    def read(self, heads: Heads, places: Tensor, of_head: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys ``[..., c, D]`` and values ``[..., c, Dv]`` of one head each, of the chunks at ``places``.

        Args:
            heads: sizes.
            places: ``[...]`` int64.
            of_head: int64, the key head of each; broadcastable to it.
        """
        if self.column is None or self.row is None:
            wanted, where = places.unique(return_inverse=True)
            found = self.store.gather(0, self.ids[wanted]).projected
            assert found is not None  # noqa: S101 - the layout says so
            keys, values = heads.split(found)
            return keys[where, of_head], values[where, of_head]
        if len(self.columns) == 1:
            keys, values = heads.split(self.columns[0])
            return keys[self.row[places], of_head], values[self.row[places], of_head]
        of_head, like = of_head.expand(places.shape), self.columns[0]
        keys, values = (
            like.new_empty(*places.shape, heads.tokens, width) for width in (heads.width, heads.value_width)
        )
        for number, part in enumerate(self.columns):
            here = (self.column[places] == number).nonzero(as_tuple=True)
            where = self.row[places[here]], of_head[here]
            for target, kept in zip((keys, values), heads.split(part), strict=True):
                target[here] = kept[where]
        return keys, values


@define(frozen=True, eq=False)
class ChunkRead:
    """What the queries of one text read in its bank.

    Attributes:
        output: ``[H, T, Dv]``.
        places: ``[H, T, n]`` int64, the chunks that each query chose, by place in the bank, best first; -1 where there
            were not enough.
        keys, values: ``[H, T, n c, D]`` and ``[H, T, n c, Dv]``, what it attended to.
    """

    output: Tensor
    places: Tensor
    keys: Tensor
    values: Tensor


class ChunkSearch(nn.Module):
    """Lets every query of every head find its own chunks of a bank, and attend to their tokens. Has no parameters.

    Args:
        heads: sizes.
        zero_neighbours: where the bank holds fewer, the missing ones are keys and values of zeros that take part in the
            softmax, as in the published code; else they are left out.
    """

    def __init__(self, heads: Heads, zero_neighbours: bool) -> None:
        super().__init__()
        self.heads, self.zero_neighbours = heads, zero_neighbours

    def forward(self, queries: Tensor, bank: Bank, scale: float) -> ChunkRead:
        """Return what ``queries`` ``[H, T, D]``, not rotated, read; scores of attention are scaled by ``scale``."""
        parts = [self._read(piece, bank, scale) for piece in self._pieces(queries, bank)]
        if len(parts) == 1:
            return parts[0]
        output, places, keys, values = (
            torch.cat([getattr(part, name) for part in parts], 1) for name in ("output", "places", "keys", "values")
        )
        return ChunkRead(output, places, keys, values)

    def _pieces(self, queries: Tensor, bank: Bank) -> Iterator[Tensor]:
        numbers = self.heads.count * bank.most * self.heads.tokens * max(self.heads.width, self.heads.value_width)
        most = min(MOST_SCORES // (self.heads.count * max(len(bank), 1)), MOST_READ // max(numbers, 1))
        yield from queries.split(max(most, 1), 1)

    @torch.no_grad()
    def search(self, queries: Tensor, bank: Bank) -> Tensor:
        """Return ``[H, T, n]`` int64, the places of the chunks whose mean keys each query likes best, best first."""
        heads, tokens = self.heads, queries.shape[1]
        means = bank.means.to(queries.device).unflatten(-1, (heads.keys, heads.width)).permute(1, 2, 0)
        grouped = queries.detach().to(means.dtype).reshape(heads.keys, -1, heads.width)  # query heads side by side
        scores: Tensor = grouped @ means
        return scores.topk(min(bank.most, len(bank)), -1).indices.view(heads.count, tokens, -1)

    def _read(self, queries: Tensor, bank: Bank, scale: float) -> ChunkRead:
        heads, places = self.heads, self.search(queries, bank)
        head = torch.arange(heads.count, device=bank.ids.device)[:, None, None] // (heads.count // heads.keys)
        kept = bank.read(heads, places.to(bank.ids.device), head)
        keys, values = (part.flatten(2, 3).to(queries) for part in kept)
        scores = (keys @ queries[..., None]).squeeze(-1) * scale
        real = torch.arange(heads.tokens, device=queries.device) < bank.tokens.to(queries.device)[places][..., None]
        scores = scores.masked_fill(~real.flatten(2), -torch.inf)
        missing = bank.most - places.shape[-1]
        if missing and self.zero_neighbours:
            places = nn.functional.pad(places, (0, missing), value=-1)
            scores = nn.functional.pad(scores, (0, missing * heads.tokens))
            keys, values = (nn.functional.pad(part, (0, 0, 0, missing * heads.tokens)) for part in (keys, values))
        output = (scores.softmax(-1)[..., None, :] @ values).squeeze(-2)
        return ChunkRead(output, places, keys, values)


def gated(text: Tensor, reads: Sequence[ChunkRead | None], bias: Tensor) -> Tensor:
    """Return ``(1 - g) text + g memory`` with ``g = sigmoid(bias)`` of each head; text alone where nothing was read.

    Args:
        text: ``[B, H, T, Dv]``, attention to the text.
        reads: of each batch row, of its own bank; None: that is empty.
        bias: ``[H]``.
    """
    gate = bias.sigmoid().to(text)[:, None, None]
    mixed = [
        own if read is None else (1 - gate) * own + gate * read.output for own, read in zip(text, reads, strict=True)
    ]
    return torch.stack(mixed)
