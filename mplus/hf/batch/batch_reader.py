"""BatchReader: rows that join, step together and leave, each with a memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from mplus.errors import MemoryMismatchError, NotSupported
from mplus.hf.batch.joining import Joining
from mplus.hf.batch.requests import Row, RowRequest
from mplus.hf.batch.slow_reasons import reasons_to_step_alone
from mplus.hf.batch.stepped_rows import SteppedRows
from mplus.hf.model.installed import WrappedModel, decoder_inside, is_peft_model
from mplus.hf.model.static_reader import merged_projections, merged_weights, running_decoder
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
        self.slow_because = reasons_to_step_alone(decoder)
        self._model = decoder
        self._weights = self._merged = None
        engine, adapters = decoder.mplus_engine, dict[str | None, None]()
        if not self.slow_because:
            adapters[None] = None
        if not self.slow_because and not isinstance(engine, TextEngine):
            self._weights, self._merged = engine.watch.look().weights, merged_weights(decoder)
            adapters = dict.fromkeys((engine.adapter("read"), None))  # one decoder where there is no adapter
        decoders = [running_decoder(decoder, adapter) for adapter in adapters]
        self._projections = merged_projections(decoder, decoders[0]) if decoders else {}
        self._stepped = SteppedRows(decoder, decoders)

    @property
    def rows(self) -> list[Row]:
        """The rows that are there, in the order of ``step``, which may change whenever any row joins or leaves."""
        return self._stepped.rows

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all rows in the buffers, room included."""
        return self._stepped.nbytes

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
        asked = [one if isinstance(one, RowRequest) else made(*one) for one in requests]
        return Joining(
            self._model, self._stepped, asked, self._check_weights, bool(self.slow_because), self._projections
        )

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
        return self._stepped.step(tokens)

    def leave(self, rows: Row | Sequence[Row]) -> None:
        """Let rows go; their places are taken by others.

        Raises:
            InputError: one of them is not among ``rows``; none has left then.
        """
        self._stepped.leave([rows] if isinstance(rows, Row) else list(rows))

    def _check_weights(self) -> None:
        if self._weights is None:  # then there are no copies of weights
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
