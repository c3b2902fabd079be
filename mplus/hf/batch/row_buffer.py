"""Keys and values of many rows of unequal length, with room behind each, and one step of a plain decoder for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from attrs import define
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from mplus.hf.batch.requests import Row
from mplus.hf.types import Argument

COLUMNS = 64
"""The least number of columns that a buffer grows by."""
GROWTH = 1.25
"""Factor by which columns grow beyond what is needed, so that few tokens pay for a copy."""

KeysValues = tuple[Tensor, Tensor]
"""Keys ``[Hkv, n, D]`` and values ``[Hkv, n, Dv]`` of a part of one row in one layer."""


@define(eq=False)
class Front:
    """The part of a buffer that one step works on; the same in all layers.

    Attributes:
        rows: B, rows that are there.
        columns: columns up to the one that the longest row writes now.
        write_to: ``[B, 1, 1, 1]`` int64, the column that each row writes.
    """

    rows: int
    columns: int
    write_to: Tensor


class RowLayer(CacheLayerMixin):
    """One layer of the buffer, as transformers' caches are made of: ``[rows, Hkv, columns, D]`` with room.

    Text begins in column 0; memory stands in front of it. All columns behind a row's length are finite.
    """

    is_sliding = False
    front: Front
    keys: Tensor  # None until there are rows, as in any layer of transformers
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: ``grow`` makes the tensors."""

    def grow(self, rows: int, columns: int, like: KeysValues) -> None:
        """Make room for ``rows`` rows of ``columns`` columns; what is there stays."""
        keys, values = like
        self.keys, self.values = _grown(self.keys, keys, rows, columns), _grown(self.values, values, rows, columns)
        self.is_initialized = True

    def release(self) -> None:
        """Give all room back."""
        self.keys, self.values = cast("Tensor", None), cast("Tensor", None)
        self.is_initialized = False

    def put(self, place: int, parts: Sequence[KeysValues]) -> None:
        """Let row ``place`` be these parts, one behind the other, and nothing else."""
        begin = 0
        for keys, values in parts:
            end = begin + keys.shape[1]
            self.keys[place, :, begin:end], self.values[place, :, begin:end] = keys, values
            begin = end
        # What a row left behind here may be infinite, and a mask cannot hide that.
        self.keys[place, :, begin:], self.values[place, :, begin:] = 0, 0

    def move(self, place: int, to: int, columns: int) -> None:
        """Copy the first ``columns`` columns of row ``place`` to row ``to``."""
        for kept in (self.keys, self.values):
            kept[to, :, :columns] = kept[place, :, :columns]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Argument, **kwargs: Argument
    ) -> tuple[Tensor, Tensor]:
        """Write one token per row, ``[B, Hkv, 1, D]``; return all columns that any row has, ``[B, Hkv, S, D]``."""
        front = self.front
        found = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            of_rows = kept[: front.rows]
            of_rows.scatter_(2, front.write_to.expand(new.shape), new)
            found.append(of_rows[:, :, : front.columns])
        return found[0], found[1]

    def get_seq_length(self) -> int:
        return 0 if not self.is_initialized else self.front.columns - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.front.columns, 0

    def get_max_length(self) -> int:
        return -1


@define(frozen=True, eq=False)
class _BufferedRow:
    """A row of the buffer; ``length``: its columns, less the steps there were when it came."""

    row: Row
    length: int  # less the steps, so that one count of steps lengthens all rows


class RowBuffer:
    """Rows ``[memory | text | room]`` that one plain decoder steps together.

    Rows lie one below the other without gaps; where one leaves, the last one takes its place. Whatever fails or is
    interrupted, the rows that are there stay whole.

    Args:
        decoder: takes ``position_ids`` and a mask of four dimensions.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        self._decoder = decoder
        self._layers = [RowLayer() for _ in range(decoder.config.get_text_config(decoder=True).num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._rows: list[_BufferedRow] = []
        self._steps = 0
        self._room = (0, 0)
        # Not -inf: a row of which nothing is visible, such as an empty one, would become NaN.
        self._hidden = torch.finfo(decoder.dtype).min
        self._mask = torch.empty(0, 1, 1, 0, dtype=decoder.dtype, device=decoder.device)
        # Of each row the column and the position of its next token.
        self._next = torch.empty(2, 0, dtype=torch.int64, device=decoder.device)

    @property
    def rows(self) -> list[Row]:
        """The rows, from the first to the last."""
        return [one.row for one in self._rows]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    @property
    def columns(self) -> int:
        """Columns of the longest row."""
        return max((one.length for one in self._rows), default=-self._steps) + self._steps

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, room included."""
        return sum(part.nbytes for layer in self._layers for part in (layer.keys, layer.values) if part is not None)

    @torch.no_grad()
    def reserve(self, rows: int, columns: int, like: Sequence[Sequence[KeysValues]]) -> None:
        """Make room for so many rows more, of so many ``columns`` at most; ``like``: those of one in every layer."""
        self._reserve(len(self._rows) + rows, max(self.columns, columns) + 1, [parts[-1] for parts in like])

    @torch.no_grad()
    def add(self, row: Row, layers: Sequence[Sequence[KeysValues]], position: int) -> None:
        """Add a row below all others.

        Args:
            row: the row.
            layers: the parts of its keys and values in every layer.
            position: of the token that comes next.
        """
        place, length = len(self._rows), length_of(layers)
        self.reserve(1, length, layers)
        for layer, given in zip(self._layers, layers, strict=True):
            layer.put(place, given)
        self._mask[place] = self._hidden
        self._mask[place, ..., :length] = 0
        self._next[0, place], self._next[1, place] = length, position
        self._rows.append(_BufferedRow(row, length - self._steps))

    @torch.no_grad()
    def remove(self, row: Row) -> None:
        """Let a row go; the last one takes its place."""
        place, last = self.rows.index(row), len(self._rows) - 1
        if place != last:
            columns = min(self.columns + 1, self._room[1])
            for layer in self._layers:
                layer.move(last, place, columns)
            self._mask[place], self._next[:, place] = self._mask[last], self._next[:, last]
        self._rows = [self._rows[last if at == place else at] for at in range(last)]
        if not self._rows:
            self._release()

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Read one more token per row, ``[B]`` int64, and return the logits ``[B, V]`` of what follows."""
        rows, columns = len(self._rows), self.columns + 1
        if columns > self._room[1]:
            self._reserve(rows, columns, [(layer.keys[0], layer.values[0]) for layer in self._layers])
        places = self._next[:, :rows]
        write_to = places[0].view(rows, 1, 1, 1)
        front = Front(rows, columns, write_to)
        for layer in self._layers:
            layer.front = front
        output = self._decoder(
            input_ids=ids[:, None],
            position_ids=places[1, :, None],
            attention_mask=self._mask[:rows].scatter_(3, write_to, 0.0)[..., :columns],
            past_key_values=self._cache,
            use_cache=True,
        )
        # Only now, and in this order: a step that fails or is interrupted is taken again as if it had not been.
        self._steps += 1
        places += 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def _reserve(self, rows: int, columns: int, like: Sequence[KeysValues]) -> None:
        had_rows, had_columns = self._room
        if rows > had_rows:  # at least twice as many, so that rows that come one by one are seldom copied
            rows = max(rows, 2 * had_rows)
        if columns > had_columns:
            columns = int(columns * GROWTH) + COLUMNS
        rows, columns = max(rows, had_rows), max(columns, had_columns)
        if (rows, columns) == self._room:
            return
        with torch.inference_mode(False):  # else it could be written in inference mode only
            for layer, one in zip(self._layers, like, strict=True):
                layer.grow(rows, columns, one)
            mask = self._mask.new_full((rows, 1, 1, columns), self._hidden)
            mask[:had_rows, ..., :had_columns] = self._mask
            following = self._next.new_zeros(2, rows)
            following[:, :had_rows] = self._next
            self._mask, self._next = mask, following
        self._room = rows, columns

    def _release(self) -> None:
        """Give all room back."""
        for layer in self._layers:
            layer.release()
        self._room, self._mask, self._next = (0, 0), self._mask[:0, ..., :0].clone(), self._next[:, :0].clone()


def length_of(layers: Sequence[Sequence[KeysValues]]) -> int:
    """Return the number of columns of a row of these parts."""
    return sum(keys.shape[1] for keys, _ in layers[0])


def _grown(kept: Tensor | None, like: Tensor, rows: int, columns: int) -> Tensor:
    grown = like.new_zeros(rows, like.shape[0], columns, like.shape[2])
    if kept is not None:
        grown[: kept.shape[0], :, : kept.shape[2]] = kept
    return grown
