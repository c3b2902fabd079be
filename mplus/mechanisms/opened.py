"""What one read keeps: what ``open`` made ready, the rows that were retrieved, and what ``finish`` keeps of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from attrs import define, field
from torch import Tensor

from mplus.memory.state import StreamView
from mplus.rows import MemoryRows
from mplus.stores.base import Location


@define(frozen=True, eq=False)
class Retrieved:
    """Long-term rows a read brings back in one layer for one batch row, oldest first.

    Attributes:
        rows: the rows themselves.
        ids: ``[n]`` int64, their ids in the view they were picked from.
        scores: ``[n]`` float32; empty where nothing was scored.
        source: where ``rows`` lack ``projected``: where that lies in the view.
        units: ``[n]`` int64, which of the things that were chosen as wholes each row belongs to, such as a chunk; None:
            rows were chosen one by one.
    """

    rows: MemoryRows
    ids: Tensor
    scores: Tensor
    source: Location | None = None
    units: Tensor | None = None


@define(frozen=True, eq=False)
class Insertion:
    """Memory in the middle of a text: blocks of rows, and how much of the text stands in front of each.

    The tokens in front of a block are computed as if it were not there; those behind it see it, and their positions
    move on by its length. Tensors are on the CPU.

    Attributes:
        tokens: ``[B, k]`` int64, ascending: the tokens of the text, padding not counted, in front of each block.
        rows: ``[B, k]`` int64, rows of each block; blocks lie one behind the other in the segments of every layer.
        room: ``[B, k]`` int64, positions that each block takes, where these are not as many as its rows; its rows end
            where the room ends.

    Example:
        ``[2 tokens | 3 rows | rest]``, and for another batch row ``[2 rows | rest]``:

        >>> where = Insertion(torch.tensor([[2], [0]]), torch.tensor([[3], [2]]))
        >>> where.positions
        tensor([[2, 3, 4],
                [0, 1, 2]])
    """

    tokens: Tensor
    rows: Tensor
    room: Tensor | None = None

    @property
    def rooms(self) -> Tensor:
        """``[B, k]`` int64, positions that each block takes."""
        return self.rows if self.room is None else self.room

    @property
    def counts(self) -> Tensor:
        """``[B]`` int64, rows of all blocks together."""
        return self.rows.sum(1)

    @property
    def block_of(self) -> Tensor:
        """``[B, P]`` int64, which block each row belongs to; fillers behind the rows of a stream to the last one."""
        place = torch.arange(int(self.counts.max())).expand(len(self.rows), -1).contiguous()
        return torch.searchsorted(self.rows.cumsum(1), place, right=True).clamp(max=self.rows.shape[1] - 1)

    @property
    def positions(self) -> Tensor:
        """``[B, P]`` int64, where the rows sit on the position axis, and fillers behind them."""
        ends, lasts = self.tokens + self.rooms.cumsum(1), self.rows.cumsum(1)
        return torch.arange(int(self.counts.max())) + (ends - lasts).gather(1, self.block_of)


@define(frozen=True, eq=False)
class Opened:
    """The state of one read: of the whole text that it begins with and all tokens that follow.

    Attributes:
        views: one per batch row.
        own: whatever the mechanism made for it.
        text_offset: ``[B]`` int64, the position of the first text token, where it is not 0 (rows that sit at 0, 1, ...,
            or learned positions behind a front); None: the decoder's configuration says.
        prepared: what ``prepare`` made, where rows are read as they are kept; None: they are projected anew.
        settled: why nothing else can be read later on in this text (``reopen``); None: something else can.
        insertion: where in the text the rows stand, if not in front of all of it; there is no ``text_offset`` then.
            Rows that are projected without positions of their own get those of the insertion.
    """

    views: Sequence[StreamView]
    own: Any = None
    text_offset: Tensor | None = None
    prepared: Any = None
    settled: str | None = None
    insertion: Insertion | None = None

    def views_of(self, rows: int) -> list[StreamView]:
        """Return the view that each of ``rows`` batch rows reads.

        In a pass a batch may have several copies of each stream, one behind the other: beams, or several samples.
        """
        copies = rows // len(self.views)
        return [view for view in self.views for _ in range(copies)]


class TextCache(Protocol):
    """Kept by ``MemoryMechanism.finish``; follows the decoder's key/value cache.

    It is copied with that one (``copy.deepcopy``) and dropped with it.
    """

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, ``[n]`` int64, in this order: beams that are reordered, or copies of a row."""

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens of each row."""


@define(eq=False)
class TokenTensors(TextCache):
    """A ``TextCache`` of tensors with one entry for each token, ``[B, S, ...]``, such as keys and values.

    Example:
        >>> cache = TokenTensors()
        >>> cache.append("keys", torch.zeros(2, 5, 8)).shape, cache.append("keys", torch.zeros(2, 1, 8)).shape
        (torch.Size([2, 5, 8]), torch.Size([2, 6, 8]))
        >>> cache.select(torch.tensor([1, 1, 1]))
        >>> cache["keys"].shape
        torch.Size([3, 6, 8])
    """

    tensors: dict[str, Tensor] = field(factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def append(self, name: str, new: Tensor) -> Tensor:
        """Add the entries ``[B, T, ...]`` of new tokens to the tensor ``name``, and return all of it."""
        before = self.tensors.get(name)
        self.tensors[name] = new if before is None else torch.cat([before, new], 1)
        return self.tensors[name]

    def select(self, rows: Tensor) -> None:
        self.tensors = {name: tensor[rows.to(tensor.device)] for name, tensor in self.tensors.items()}

    def crop(self, tokens: int) -> None:
        self.tensors = {name: tensor[:, :tokens] for name, tensor in self.tensors.items()}
