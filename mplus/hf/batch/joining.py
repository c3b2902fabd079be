"""Joining: prompts on their way to a batch reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from mplus.hf.batch.joint_prompts import read_prompts
from mplus.hf.batch.pieces import PromptInPieces, in_pieces
from mplus.hf.batch.prompts import ReadPrompt
from mplus.hf.batch.requests import Row, RowRequest
from mplus.hf.batch.stepped_rows import SteppedRows
from mplus.hf.model.installed import WrappedModel
from mplus.hf.retrofit.context import with_merged


class Joining:
    """Prompts that are being read, in pieces, to join the rows of a reader; made by ``BatchReader.begin``.

    Drop it to give up what has not joined yet.

    Attributes:
        rows: for each request as many as it has ``copies``; those whose prompt has been read are among the reader's
            ``rows``, or have an ``error``.
    """

    def __init__(
        self,
        model: WrappedModel,
        stepped: SteppedRows,
        requests: Sequence[RowRequest],
        check_weights: Callable[[], None],
        slow: bool,
        merged: Mapping[nn.Module, nn.Module],
    ) -> None:
        self._model, self._stepped, self._check_weights, self._slow = model, stepped, check_weights, slow
        self._merged = merged
        self._waiting = [[Row(request) for _ in range(request.copies)] for request in requests]
        self._begun: PromptInPieces | None = None
        self.rows = [row for rows in self._waiting for row in rows]

    @property
    def done(self) -> bool:
        """Return whether all prompts have been read."""
        return not self._waiting

    def advance(self, max_tokens: int | None = None) -> bool:
        """Read prompts of about ``max_tokens`` tokens in all, at least one, or a piece of a longer one.

        What a prompt retrieves is settled by all of it, whatever the pieces. Where layers retrieve by themselves (M+) a
        piece is as many layers, for the whole prompt, as cost about as much. Prompts that a plain decoder cannot step
        are read whole.

        Returns:
            Whether all prompts have been read.

        Raises:
            MemoryMismatchError: weights have changed since the reader was made.
        """
        if self._begun is None:
            self._check_weights()
        count, tokens = 0, 0
        while count < len(self._waiting) and (max_tokens is None or tokens < max_tokens):
            tokens += self._waiting[count][0].prompt_tokens
            count += 1
        long = count == 1 and max_tokens is not None and tokens > max_tokens and not self._slow
        with with_merged(self._model, self._merged):
            if self._begun is not None or (long and self._waiting[0][0].request.retrieve_every is None):
                self._read_piece(max_tokens)
            else:
                part, self._waiting = self._waiting[:count], self._waiting[count:]
                self._read(part)
        return self.done

    def _read(self, copies: Sequence[Sequence[Row]]) -> None:
        """Read the prompts of rows, of which each part is copies of one."""
        sound = []
        for rows in copies:
            try:
                rows[0].request.check(self._model.mplus_engine.vocab_size)
                sound.append(rows)
            except Exception as error:  # noqa: BLE001 - it is that row's, and all others go on
                _fail(rows, error)
        found = read_prompts(self._model, [rows[0].request for rows in sound], together=not self._slow)
        copies_of = zip(found, map(len, sound), strict=True)
        self._stepped.reserve([(read, count) for read, count in copies_of if isinstance(read, ReadPrompt)])
        for rows, read in zip(sound, found, strict=True):
            self._end(rows, read)

    def _read_piece(self, max_tokens: int | None) -> None:
        """Read on in the first prompt that waits."""
        rows = self._waiting[0]
        request, tokens = rows[0].request, rows[0].prompt_tokens if max_tokens is None else max_tokens
        read: ReadPrompt | Exception | None
        try:
            if self._begun is None:
                request.check(self._model.mplus_engine.vocab_size)
                self._begun = in_pieces(self._model, request)
            read = self._begun.advance(tokens)
            while read is None and max_tokens is None:
                read = self._begun.advance(tokens)
        except Exception as error:  # noqa: BLE001 - it is that row's, and all others go on
            read = error
        if read is not None:
            self._waiting, self._begun = self._waiting[1:], None
            self._end(rows, read)

    def _end(self, rows: Sequence[Row], read: ReadPrompt | Exception) -> None:
        """Let copies of one prompt step from now on, or say why they cannot."""
        if isinstance(read, Exception):
            _fail(rows, read)
            return
        try:
            self._stepped.add(read, rows)
        except Exception as error:  # noqa: BLE001 - it is that row's, and all others go on
            _fail(rows, error)


def _fail(rows: Sequence[Row], error: Exception) -> None:
    for row in rows:
        row.error = error
