"""LongTermRows: the long-term rows of one layer of many streams, as dense tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mplus.stores.base import StoreLayout


class LongTermRows:
    """Rows of B streams, equally many in each; at capacity those of the oldest birth make room (policy "fifo").

    Rows stand in no particular order. Buffers grow by doubling and are written in place, so views of them are for
    immediate use.

    Attributes:
        capacity: largest number of rows per stream.
        count: rows per stream, m.
    """

    def __init__(self, batch: int, layout: StoreLayout, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._hidden = torch.zeros(batch, 0, layout.hidden_size, dtype=layout.dtype, device=layout.device)
        self._source = torch.zeros(batch, 0, dtype=torch.int64, device=layout.device)
        self._birth = torch.zeros(batch, 0, dtype=torch.int64, device=layout.device)

    @property
    def hidden(self) -> Tensor:
        """``[B, m, d]``, without graph."""
        return self._hidden[:, : self.count]

    @property
    def source(self) -> Tensor:
        """``[B, m]`` int64."""
        return self._source[:, : self.count]

    @property
    def birth(self) -> Tensor:
        """``[B, m]`` int64."""
        return self._birth[:, : self.count]

    @torch.no_grad()
    def append(self, hidden: Tensor, source: Tensor, birth: Tensor) -> None:
        """Take rows ``[B, n, d]`` with their ``source`` and ``birth`` ``[B, n]``."""
        free = min(hidden.shape[1], self.capacity - self.count)
        if free:
            self._reserve(self.count + free)
            place = slice(self.count, self.count + free)
            for buffer, rows in zip(self._columns(), (hidden, source, birth), strict=True):
                buffer[:, place] = rows[:, :free]
            self.count += free
        if free < hidden.shape[1]:
            self._replace_oldest(hidden[:, free:], source[:, free:], birth[:, free:])

    def _replace_oldest(self, hidden: Tensor, source: Tensor, birth: Tensor) -> None:
        excess = hidden.shape[1]
        births = torch.cat([self.birth, birth], 1)
        # Of all rows the oldest go; a new row may be among them, when it stayed in the STM longer than others.
        gone = births.argsort(dim=1, stable=True)[:, :excess]
        everything = (self.hidden, hidden), (self.source, source), (self.birth, birth)
        stay = torch.ones_like(births, dtype=torch.bool).scatter_(1, gone, False)
        if bool((gone < self.count).all()):
            for buffer, rows in zip(self._columns(), (hidden, source, birth), strict=True):
                index = gone if buffer.ndim == 2 else gone[..., None].expand(-1, -1, buffer.shape[2])
                buffer.scatter_(1, index, rows)
            return
        for buffer, pair in zip(self._columns(), everything, strict=True):
            joined = torch.cat(pair, 1)
            buffer[:, : self.count] = joined[stay].view(joined.shape[0], self.count, *joined.shape[2:])

    def _reserve(self, rows: int) -> None:
        room = self._hidden.shape[1]
        if rows <= room:
            return
        more = min(max(rows, 2 * room), self.capacity) - room
        self._hidden, self._source, self._birth = (
            torch.cat([buffer, buffer.new_zeros(buffer.shape[0], more, *buffer.shape[2:])], 1)
            for buffer in self._columns()
        )

    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._hidden, self._source, self._birth

    def state_dict(self) -> dict[str, Tensor]:
        """Return the rows as tensors of their own."""
        return {"hidden": self.hidden.clone(), "source": self.source.clone(), "birth": self.birth.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the rows of a saved state instead of the present ones."""
        device = self._hidden.device
        self._hidden, self._source, self._birth = (
            state[name].clone().to(device) for name in ("hidden", "source", "birth")
        )
        self.count = self._hidden.shape[1]
