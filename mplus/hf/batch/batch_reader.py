"""BatchReader: rows that join, step together and leave, each with a memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mplus.errors import InputError, MemoryMismatchError, NotSupported
from mplus.hf.batch.joint_prompts import read_prompts
from mplus.hf.batch.prompts import ReadPrompt, read_alone
from mplus.hf.batch.requests import Row, RowRequest
from mplus.hf.batch.row_buffer import RowBuffer
from mplus.hf.batch.wrapped_row import WrappedText
from mplus.hf.model.installed import WrappedModel, decoder_inside, is_peft_model
from mplus.hf.model.sizes import known_positions
from mplus.hf.model.static_reader import merged_weights, reasons_against, running_decoder
from mplus.hf.text.engine import TextEngine
from mplus.memory.memory import Memory


class BatchReader:
    """Goes on with many texts at once, each behind a memory of its own, whenever each of them comes and goes.

    A prompt is read as ``model.generate`` reads it alone, with an attention mask of ones. What it retrieved is settled
    then, so its memory and text go as keys and values into a buffer with those of all other rows, and one step of a
    plain decoder, with the adapter for reading merged into it, reads one more token of every row. What a plain decoder
    cannot step (``slow_because``) goes through the wrapped one row by row, with the same results.

    Logits of a row are those of ``generate`` alone but for rounding, whatever joins or leaves beside it. A row keeps
    what it read of its memory: later writes, in whatever thread, do not change it. Use a reader in one thread at a
    time.

    Args:
        model: a wrapped decoder, in eval mode, of any mechanism. Change no weight of it while this is in use.

    Attributes:
        slow_because: why rows go through the wrapped decoder one by one; empty: they do not, unless they ask for
            ``retrieve_every``.

    Raises:
        NotSupported: the model is not wrapped, is in training mode, or has learned tokens in front of every text.

    Example:
        >>> reader = mplus.BatchReader(model)
        >>> anna, bob = reader.join([(memory, prompt), (None, prompt)])
        >>> logits = reader.step([int(row.logits.argmax()) for row in reader.rows])  # [2, V]
        >>> reader.leave([anna])
        >>> reader.rows == [bob]
        True
    """

    def __init__(self, model: WrappedModel) -> None:
        if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
            raise NotSupported("a batch reader does not put learned tokens in front of a text: use model.generate")
        decoder: WrappedModel = decoder_inside(model)  # type: ignore[assignment]
        if getattr(decoder, "mplus_engine", None) is None:
            raise NotSupported(f"{type(model).__name__} is not wrapped: use mplus.wrap or mplus.from_pretrained")
        if decoder.training:
            raise NotSupported("a batch reader needs a decoder in eval mode: use model.eval()")
        self.slow_because = reasons_against(decoder)
        self._model, self._positions = decoder, _learned_positions(decoder)
        self._slow: dict[Row, WrappedText] = {}
        self._buffers: list[RowBuffer] = []
        self._steps, self._last_step = 0, dict[Row, int]()
        if not self.slow_because:
            engine = decoder.mplus_engine
            self._weights, self._merged = engine.watch.look().weights, merged_weights(decoder)
            adapters = dict.fromkeys((engine.adapter("read"), None))  # one decoder where there is no adapter
            self._buffers = [RowBuffer(running_decoder(decoder, adapter)) for adapter in adapters]

    @property
    def rows(self) -> list[Row]:
        """The rows that are there, in the order of ``step``, which may change whenever any row joins or leaves."""
        return [*(row for buffer in self._buffers for row in buffer.rows), *self._slow]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all rows in the buffers, room included."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def join(
        self,
        requests: Sequence[RowRequest | tuple[Memory | None, Sequence[int] | Tensor]],
        *,
        max_new_tokens: int = 1,
        min_score: float | None = None,
    ) -> list[Row]:
        """Read prompts, and let their rows step with the others from now on.

        Args:
            requests: one for each prompt, or pairs of memory and ids ``[T]``. Several may read the same memory.
            max_new_tokens, min_score: of the pairs; see ``RowRequest``.

        Returns:
            For each request as many rows as it has ``copies``. One that could not join has its ``error``, and is not
            among ``rows``; all others have joined.

        Raises:
            MemoryMismatchError: weights have changed since this reader was made. Rows that are there stay as they are.
        """
        joining = self.begin(requests, max_new_tokens=max_new_tokens, min_score=min_score)
        while not joining.advance():
            pass
        return joining.rows

    def begin(
        self,
        requests: Sequence[RowRequest | tuple[Memory | None, Sequence[int] | Tensor]],
        *,
        max_new_tokens: int = 1,
        min_score: float | None = None,
    ) -> Joining:
        """Begin to read prompts in pieces, between which the other rows may step; arguments as of ``join``."""
        made = partial(RowRequest, max_new_tokens=max_new_tokens, min_score=min_score)
        return Joining(self, [one if isinstance(one, RowRequest) else made(*one) for one in requests])

    @torch.no_grad()
    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Read one more token of every row.

        Args:
            tokens: ``[B]`` int64, one for each of ``rows``, in their order.

        Returns:
            The logits ``[B, V]`` of what follows. A row of the wrapped decoder that fails has its ``error`` from then
            on and logits of NaN, until it leaves; where the step of all others fails, all are as they were.

        Raises:
            InputError: there is no row, not one token for each, or a row has no room for another one.
        """
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

    def leave(self, rows: Row | Sequence[Row]) -> None:
        """Let rows go; their places are taken by others.

        Raises:
            InputError: one of them is not among ``rows``; none has left then.
        """
        leaving = [rows] if isinstance(rows, Row) else list(dict.fromkeys(rows))
        here = set(self.rows)
        for row in leaving:
            if row not in here:
                raise InputError("a row that is to leave must be among reader.rows, got one that is not")
        for row in leaving:
            self._last_step.pop(row, None)
            if self._slow.pop(row, None) is None:
                next(buffer for buffer in self._buffers if row in buffer.rows).remove(row)

    def _checked(self, tokens: Sequence[int] | Tensor) -> Tensor:
        ids = torch.as_tensor(tokens)
        count = sum(map(len, self._buffers)) + len(self._slow)
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

    def _check_weights(self) -> None:
        if self.slow_because:
            return
        now = self._model.mplus_engine.watch.look()
        if now.weights != self._weights or merged_weights(self._model) != self._merged:
            raise MemoryMismatchError(
                "the decoder's weights have changed since this BatchReader was made: make another"
            )
        if now.acting:
            raise MemoryMismatchError(
                f"this BatchReader was made when no adapter of yours acted, now {list(now.acting)} do: make another"
            )

    def _read(self, copies: Sequence[Sequence[Row]]) -> None:
        """Read the prompts of rows that have not joined, of which each part is copies of one, and let them step.

        One that fails has its ``error``, and leaves all others as they are.
        """
        model, sound = self._model, []
        for rows in copies:
            try:
                rows[0].request.check(model.mplus_engine.vocab_size)
                sound.append(rows)
            except InputError as error:
                _fail(rows, error)
        found = read_prompts(model, [rows[0].request for rows in sound], together=not self.slow_because)
        for rows, read in zip(sound, found, strict=True):
            if isinstance(read, Exception):
                _fail(rows, read)
                continue
            try:
                self._admit(read, rows)
            except Exception as error:  # noqa: BLE001 - it is that row's, and all others go on
                self.leave([row for row in self.rows if row in rows])
                _fail(rows, error)

    def _admit(self, read: ReadPrompt, rows: Sequence[Row]) -> None:
        """Let ``rows``, copies of one prompt, step from now on."""
        layers, text = read.layers, read.text
        if self.slow_because or rows[0].request.retrieve_every is not None:
            layers = None
        if layers is None and text is None:  # the decoder's cache holds something else than keys and values
            read = read_alone(self._model, rows[0].request)
            layers, text = None, read.text
        most = self._positions
        for number, row in enumerate(rows):
            if layers is not None:
                self._buffers[0 if read.adapted else -1].add(row, layers, read.position)
            elif text is not None:
                self._slow[row] = text if number == len(rows) - 1 else text.copied()
            row.sources, row.memory_version, row._logits = read.sources, read.version, read.logits
            if most is not None:
                row.room = most - read.position
                self._last_step[row] = self._steps + row.room


def _learned_positions(model: WrappedModel) -> int | None:
    """Return how many positions a decoder has learned; None: its positions are no table that could end."""
    engine = model.mplus_engine
    if isinstance(engine, TextEngine) or engine.shape.positions != "learned":
        return None
    return known_positions(model.config.get_text_config(decoder=True))


def _fail(rows: Sequence[Row], error: Exception) -> None:
    for row in rows:
        row.error = error


class Joining:
    """Prompts that are being read, in pieces, to join the rows of a reader.

    Attributes:
        rows: for each request as many as it has ``copies``; those whose prompt has been read are among the reader's
            ``rows``, or have an ``error``.
    """

    def __init__(self, reader: BatchReader, requests: Sequence[RowRequest]) -> None:
        self._reader = reader
        self._waiting = [[Row(request) for _ in range(request.copies)] for request in requests]
        self.rows = [row for rows in self._waiting for row in rows]

    @property
    def done(self) -> bool:
        """Return whether all prompts have been read."""
        return not self._waiting

    def advance(self, max_tokens: int | None = None) -> bool:
        """Read further prompts, until ``max_tokens`` tokens have been read; return whether all are.

        Raises:
            MemoryMismatchError: weights have changed since the reader was made.
        """
        self._reader._check_weights()
        count, tokens = 0, 0
        while count < len(self._waiting) and (max_tokens is None or tokens < max_tokens):
            tokens += self._waiting[count][0].prompt_tokens
            count += 1
        part, self._waiting = self._waiting[:count], self._waiting[count:]
        self._reader._read(part)
        return self.done
