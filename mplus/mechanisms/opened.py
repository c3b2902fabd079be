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
    """

    rows: MemoryRows
    ids: Tensor
    scores: Tensor
    source: Location | None = None


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
    """

    views: Sequence[StreamView]
    own: Any = None
    text_offset: Tensor | None = None
    prepared: Any = None
    settled: str | None = None

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
