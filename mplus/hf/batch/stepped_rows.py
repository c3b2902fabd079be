"""SteppedRows: the rows of a batch reader, in buffers of plain decoders or one by one in the wrapped decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mplus.errors import InputError
from mplus.hf.batch.prompts import ReadPrompt, read_alone
from mplus.hf.batch.requests import Row
from mplus.hf.batch.row_buffer import RowBuffer, length_of
from mplus.hf.batch.wrapped_row import WrappedText
from mplus.hf.model.installed import WrappedModel
from mplus.hf.model.sizes import known_positions
from mplus.hf.text.engine import TextEngine


class SteppedRows:
    """Rows that have read their prompts, and read a token more at every step.

    Args:
        model: the wrapped decoder.
        decoders: plain decoders, first the one that has the reading adapter in it, last the one that has not; (): all
            rows go through the wrapped one.
    """

    def __init__(self, model: WrappedModel, decoders: Sequence[PreTrainedModel]) -> None:
        self._model = model
        self._most_positions: int | None = None
        if decoders:  # in the wrapped decoder a row that has no position left fails by itself
            engine, config = model.mplus_engine, model.config.get_text_config(decoder=True)
            if isinstance(engine, TextEngine):
                learned = getattr(config, "rope_parameters", None) is None
            else:
                learned = engine.shape.positions == "learned"
            self._most_positions = known_positions(config) if learned else None  # others are no table that could end
        self._buffers = [RowBuffer(decoder) for decoder in decoders]
        self._slow: dict[Row, WrappedText] = {}
        self._steps = 0
        self._last_step: dict[Row, int] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(map(len, self._buffers)) + len(self._slow)

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order of ``step``."""
        return [*(row for buffer in self._buffers for row in buffer.rows), *self._slow]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in the buffers, room included."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def reserve(self, found: Sequence[tuple[ReadPrompt, int]]) -> None:
        """Make room at once for prompts that are about to be added, with so many copies each."""
        for place, buffer in enumerate(self._buffers):
            own = [
                (one.layers, copies) for one, copies in found if self._place(one) == place and one.layers is not None
            ]
            if own:
                longest = max(length_of(layers) for layers, _ in own)
                buffer.reserve(sum(copies for _, copies in own), longest, own[0][0])

    def _place(self, read: ReadPrompt) -> int:
        """Return the number of the buffer that takes a prompt."""
        # The first decoder has the reading adapter merged into its weights, the last one has none.
        return 0 if read.adapted else len(self._buffers) - 1

    def add(self, read: ReadPrompt, rows: Sequence[Row]) -> None:
        """Add ``rows``, copies of one prompt. Where that fails, none of them is there."""
        try:
            self._add(read, rows)
        except BaseException:
            self.leave([row for row in self.rows if row in rows])
            raise

    def _add(self, read: ReadPrompt, rows: Sequence[Row]) -> None:
        layers, text = read.layers, read.text
        if not self._buffers or rows[0].request.retrieve_every is not None:
            layers = None
        if layers is None and text is None:  # the decoder's cache holds something else than keys and values
            read = read_alone(self._model, rows[0].request)
            text = read.text
        for number, row in enumerate(rows):
            if layers is not None:
                self._buffers[self._place(read)].add(row, layers, read.position)
            elif text is not None:
                self._slow[row] = text if number == len(rows) - 1 else text.copied()
            if self._most_positions is not None:
                row.room = self._most_positions - read.position
                self._last_step[row] = self._steps + row.room
            row.joined(read.logits, read.sources, read.version)

    @torch.no_grad()
    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Read one more token ``[B]`` of every row, and return logits ``[B, V]``; see ``BatchReader.step``."""
        ids = self._checked(tokens)
        parts, place = [], 0
        for buffer in self._buffers:
            if len(buffer):
                parts.append(buffer.step(ids[place : place + len(buffer)]))
                place += len(buffer)
        if self._slow:
            parts += self._step_slow(ids[place:])
        self._steps += 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _checked(self, tokens: Sequence[int] | Tensor) -> Tensor:
        ids, count = torch.as_tensor(tokens), len(self)
        if not count or tuple(ids.shape) != (count,) or ids.is_floating_point():
            raise InputError(f"tokens must be [{count}] ids, one for each row, got {list(ids.shape)} {ids.dtype}")
        vocabulary = self._model.mplus_engine.vocab_size
        if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise InputError(f"tokens must be ids from 0 to {vocabulary - 1}, got {ids.tolist()}")
        if self._last_step and min(self._last_step.values()) <= self._steps:
            full = [place for place, row in enumerate(self.rows) if self._last_step.get(row) == self._steps]
            raise InputError(f"the decoder has no position left for another token of the rows {full}: let them leave")
        return ids.to(self._model.mplus_engine.device, torch.int64)

    def _step_slow(self, ids: Tensor) -> list[Tensor]:
        found = []
        for (row, text), token in zip(self._slow.items(), ids, strict=True):
            if row.error is None:
                try:
                    found.append(text.read(token.view(1, 1))[None])
                    continue
                except Exception as error:  # noqa: BLE001 - it is that row's, and all others go on
                    row.error = error
            found.append(torch.full_like(row.logits, torch.nan)[None])
        return found

    def leave(self, leaving: Sequence[Row]) -> None:
        """Let rows go. Raises InputError, before any has gone, where one is not there."""
        here = set(self.rows)
        if not here.issuperset(leaving):
            raise InputError("a row that is to leave must be among reader.rows, got one that is not")
        for row in dict.fromkeys(leaving):
            self._last_step.pop(row, None)
            if self._slow.pop(row, None) is None:
                next(buffer for buffer in self._buffers if row in buffer.rows).remove(row)
