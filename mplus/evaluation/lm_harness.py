"""A decoder with a memory, as a model of lm-evaluation-harness. Needs the package ``lm_eval``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from attrs import define
from torch import Tensor
from torch.nn.functional import log_softmax

from mplus.errors import InputError, MemoryMismatchError, NotSupported
from mplus.evaluation import require_extra
from mplus.hf.reading.arguments import ReadArguments
from mplus.hf.reading.caches import embedded_by
from mplus.memory.memory import Memory
from mplus.memory.report import progress_bar

require_extra("lm_eval", "evaluation by lm-evaluation-harness")
from lm_eval.models.huggingface import HFLM  # noqa: E402 - now that its absence was reported

logger = logging.getLogger(__name__)


@define(frozen=True)
class Row:
    """One text to score: ``ids`` of context and continuation, but for the last, of which ``context`` are context."""

    context: int
    ids: tuple[int, ...]


class MemoryLM(HFLM):  # type: ignore[misc]
    """``HFLM`` of lm-evaluation-harness for a wrapped decoder that reads a memory.

    What is scored does not retrieve: of every row the context alone does, whatever the batch. Answers
    (``generate_until``) are generated with what their whole prompt retrieves.
    """

    def __init__(
        self,
        pretrained: Any,
        memory: Memory,
        *,
        retrieve_every: int | None = None,
        rolling_retrieve_every: int | None = 64,
        **options: Any,
    ) -> None:
        """Evaluate ``pretrained`` with ``memory``.

        Args:
            pretrained: the wrapped decoder, or a PeftModel around it.
            memory: of one stream; all requests read it. Written before, and not meanwhile.
            retrieve_every: retrieve anew after so many tokens of a continuation or an answer; None: with the context
                only.
            rolling_retrieve_every: the same for texts without a context (``loglikelihood_rolling``); the first token,
                which the harness puts in front, retrieves first.
            options: of ``HFLM``, such as ``tokenizer`` and ``batch_size``.

        Raises:
            ConfigError: a number of tokens breaks its rule.
            InputError: ``pretrained`` is a name, or the memory has several streams.
            MemoryMismatchError: the memory belongs to another decoder.
            MissingDependencyError: lm-evaluation-harness is not installed.
        """
        if not isinstance(pretrained, torch.nn.Module):
            raise InputError(f"pretrained must be a wrapped decoder, got {pretrained!r}: load it first")
        if not isinstance(memory, Memory) or memory.batch_size != 1:
            raise InputError(f"memory must be an mplus.Memory of one stream, got {memory!r}: use memory.select([row])")
        self._decoder: Any = memory.engine.model  # type: ignore[attr-defined]
        if not any(module is self._decoder for module in pretrained.modules()):
            raise MemoryMismatchError("this memory belongs to another model: make it with this model's new_memory")
        self.memory = memory
        self.retrieve_every = ReadArguments(retrieve_every=retrieve_every).retrieve_every
        self.rolling_retrieve_every = ReadArguments(retrieve_every=rolling_retrieve_every).retrieve_every
        self._every = self.retrieve_every
        super().__init__(pretrained=pretrained, **options)
        if self.backend != "causal":
            raise NotSupported(f"a memory is read by causal decoders only, got backend={self.backend!r}")

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score texts without a context, as in ``HFLM``; see ``rolling_retrieve_every``."""
        self._every = self.rolling_retrieve_every
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._every = self.retrieve_every
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """Score as ``HFLM``, whose cache of logits knows no contexts: equal texts of unequal contexts are two rows."""
        asking: dict[Row, list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            asking.setdefault(self._row(context, continuation), []).append(place)
        answers: dict[int, tuple[float, bool]] = {}
        shown = False if disable_tqdm or self.rank else None
        with progress_bar("scoring", len(requests), shown, steps=len(asking), unit="requests") as advance:
            for batch in self._batches(list(asking), requests, override_bs):
                for row, scores in zip(batch, self._scores(batch), strict=True):
                    for place in asking[row]:
                        request, _, continuation = requests[place]
                        answers[place] = _answer(scores, continuation)
                        if request is not None:
                            self.cache_hook.add_partial("loglikelihood", request, answers[place])
                    advance(len(asking[row]))
        return [answers[place] for place in range(len(requests))]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """Return the text to read, cut on the left to the positions of the decoder."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise InputError(
                f"a request must have a context and a continuation of at most {self.max_length} tokens, got "
                f"{len(context)} and {len(continuation)} tokens"
            )
        text = [*context, *continuation][-(self.max_length + 1) :]
        if len(text) < len(context) + len(continuation):
            logger.warning(
                "a context of %d tokens and a continuation of %d are longer than %d and lose the beginning",
                len(context), len(continuation), self.max_length,
            )  # fmt: skip
        return Row(len(text) - len(continuation), tuple(text[:-1]))

    def _batches(self, rows: list[Row], requests: Sequence[Any], override_bs: Any) -> Iterator[list[Row]]:
        """Yield batches, longest first; where continuations retrieve, of equal context, so that they do so together."""
        together = self._every is not None
        rows.sort(key=lambda row: (row.context if together else 0, len(row.ids)), reverse=True)
        size = self.batch_size
        if size == "auto":
            longest = max(range(len(requests)), key=lambda place: len(requests[place][1]) + len(requests[place][2]))
            size = override_bs or self._detect_batch_size(requests, longest)
        while rows:
            batch = [row for row in rows[:size] if not together or row.context == rows[0].context]
            del rows[: len(batch)]
            yield batch

    def _scores(self, batch: Sequence[Row]) -> list[Tensor]:
        """Return for every row log-probabilities ``[n, V]`` of each token of its continuation."""
        ids = torch.zeros(len(batch), max(len(row.ids) for row in batch), dtype=torch.int64, device=self.device)
        for place, row in enumerate(batch):
            ids[place, : len(row.ids)] = torch.tensor(row.ids)
        # Padding is on the right, where no token of the text sees it, and does not retrieve either.
        virtual_tokens = embedded_by(self.model)
        with self._reading(query_tokens=[virtual_tokens + row.context for row in batch]):
            logits = self._model_call(ids)[:, virtual_tokens:]
        scores = log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        return [scores[place, row.context - 1 : len(row.ids)] for place, row in enumerate(batch)]

    def _model_generate(self, *args: Any, **options: Any) -> Any:
        """Generate as in ``HFLM``."""
        with self._reading():
            return super()._model_generate(*args, **options)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Find the batch size as in ``HFLM``, with the room that memory takes."""
        with self._reading():
            size: int = super()._detect_batch_size(requests, pos)
        return size

    def _reading(self, query_tokens: Sequence[int] | None = None) -> AbstractContextManager[None]:
        block: AbstractContextManager[None] = self._decoder.reading(
            self.memory, query_tokens=query_tokens, retrieve_every=self._every
        )
        return block


def _answer(scores: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Return the log-likelihood of a continuation, and whether greedy decoding gives it."""
    expected = torch.tensor(continuation, device=scores.device)
    chosen = scores.gather(-1, expected[:, None])
    return float(chosen.sum()), bool((scores.argmax(-1) == expected).all())
