"""Memory in the middle of a text: which rows each token sees, and where tokens behind it sit.

Attention gets memory and text as one sequence then, with a mask that hides what a decoder would not see that read the
rows as text at that place; its sliding windows count rows as tokens. Where every token of a forward sees all rows the
request stays as it is.
"""

from __future__ import annotations

import torch
from attrs import define, evolve, field
from torch import Tensor

from mplus.backends.base import AttentionRequest
from mplus.backends.joined import joined_bias, joined_keys_values, text_visibility
from mplus.errors import MechanismError
from mplus.mechanisms.opened import Insertion


@define(frozen=True, eq=False)
class Placement:
    """An ``Insertion`` among the columns of one forward, which count padding and what a cache holds.

    Attributes:
        insertion: one row per stream.
        starts: ``[streams, k]`` int64, the column from which on tokens see each block.
        columns: of the text, those in the cache and those of this forward.
        new: columns of this forward.
    """

    insertion: Insertion
    starts: Tensor
    columns: int
    new: int
    _masks: dict[tuple[int | None, int, int], tuple[Tensor | None, Tensor]] = field(factory=dict, init=False)

    @staticmethod
    def starts_of(insertion: Insertion, mask: Tensor, before: int) -> Tensor:
        """Return ``starts``.

        Args:
            insertion: of the text.
            mask: ``[streams, S]`` bool, False at padding; of the first part of the text at least.
            before: columns in front of these, of learned virtual tokens.
        """
        read = mask.cpu().cumsum(1)[:, None]
        # A block behind what has been read begins as many columns further on as tokens are missing.
        to_come = (insertion.tokens - read[:, :, -1]).clamp(min=0)
        return before + (read <= insertion.tokens[:, :, None]).sum(-1) + to_come

    @property
    def divides(self) -> bool:
        """Return whether a block stands behind the first token of this forward, so that tokens see different rows."""
        return bool((self.starts > self.columns - self.new).any())

    def moved(self, rows: int) -> Tensor:
        """Return ``[rows, new]`` int64, by how many positions memory moves each token of this forward."""
        moved = self._moved(torch.arange(self.columns - self.new, self.columns))
        return moved.repeat_interleave(rows // len(moved), 0)

    def applied(self, request: AttentionRequest, window: int | None) -> AttentionRequest:
        """Return a request in which each token sees what it should of the memory.

        Args:
            request: of one layer, whose segments hold the rows of all blocks.
            window: of the layer: tokens see what is at most ``window - 1`` positions in front of them; None: all.

        Raises:
            MechanismError: the segments hold another number of rows than the insertion says.
        """
        inside = window is None or self.columns + int(self.insertion.rooms.sum(1).max()) <= window
        if not request.segments or (inside and not self.divides):
            return request
        rows, wanted = sum(one.keys.shape[2] for one in request.segments), int(self.insertion.counts.max())
        if rows != wanted:
            raise MechanismError(
                f"prefix must return the {wanted} rows that the Insertion of open says, fillers behind all of them, "
                f"got {rows}"
            )
        visible, bias = self._visible(request, None if inside else window), joined_bias(request)
        mask = visible
        if bias is not None:
            bias = bias.to(request.queries.dtype)
            mask = bias.masked_fill(~visible, torch.finfo(bias.dtype).min)
        keys, values = joined_keys_values(request)
        return evolve(request, keys=keys, values=values, segments=(), joined=None, mask=mask)

    def _visible(self, request: AttentionRequest, window: int | None) -> Tensor:
        """Return ``[B, 1 or H, T, P+S]`` bool, made once for all layers that have the same mask."""
        key = (window, request.keys.shape[2], 0 if request.mask is None else id(request.mask))
        if key not in self._masks:
            # The mask that it was made of is kept beside it, so that its id stays its own.
            self._masks[key] = request.mask, self._made_visible(request, window)
        return self._masks[key][1].to(request.queries.device)

    def _made_visible(self, request: AttentionRequest, window: int | None) -> Tensor:
        batch, keys = request.queries.shape[0], request.keys.shape[2]
        query = torch.arange(self.columns - request.queries.shape[2], self.columns)
        own = self.insertion.block_of
        real = torch.arange(own.shape[1]) < self.insertion.counts[:, None]
        memory = real[:, None] & (query[:, None] >= self.starts.gather(1, own)[:, None])
        near = torch.ones(1, 1, keys, dtype=torch.bool)
        if window is not None:
            # Distances as if the rows were columns of the text; a cache may hold the last columns only.
            first = max(self.columns - keys, 0)
            column = torch.arange(first, first + keys)
            reader = (query + self._moved(query))[:, :, None]
            ends = self.starts + self.insertion.rooms.cumsum(1) - self.insertion.rows.cumsum(1)
            rows = torch.arange(own.shape[1]) + ends.gather(1, own)
            memory = memory & (reader - rows[:, None] < window)
            near = reader - (column + self._moved(column))[:, None] < window
        memory, near = (part.repeat_interleave(batch // len(part), 0)[:, None] for part in (memory, near))
        text = text_visibility(request)
        text = text & near.to(text.device)
        return torch.cat([memory.to(text.device).expand(-1, text.shape[1], -1, -1), text], -1)

    def _moved(self, column: Tensor) -> Tensor:
        """Return ``[streams, n]`` int64, the positions that memory takes in front of each column ``[n]``."""
        behind = column >= self.starts[:, :, None]
        return (behind * self.insertion.rooms[:, :, None]).sum(1)
