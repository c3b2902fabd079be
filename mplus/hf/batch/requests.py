"""What is asked of a batch reader for one text, and the row that answers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from attrs import define, field
from torch import Tensor

from mplus.config import any_number, whole
from mplus.errors import InputError
from mplus.hf.reading.reading import RetrievedSource
from mplus.memory.memory import Memory


def _ids(value: Sequence[int] | Sequence[list[int]] | Tensor) -> tuple[int, ...]:
    ids: Sequence[int] | Sequence[list[int]] = value.tolist() if isinstance(value, Tensor) else value
    # A prompt is often [1, T] with transformers.
    return tuple(cast("Sequence[int]", ids[0] if len(ids) == 1 and isinstance(ids[0], list) else ids))


@define(frozen=True, eq=False)
class RowRequest:
    """A text to go on with, and the memory that is read with it.

    Attributes:
        memory: of one stream; None: the decoder alone.
        ids: of the prompt ``[T]``, all of them text.
        copies: rows that go on with this prompt, which is read once.
        max_new_tokens: that may come behind the prompt, for a memory or a decoder that has to keep positions free for
            them (as in ``generate``).
        min_score, query_tokens, retrieval_query, retrieve_every: as in ``generate``.

    Raises:
        ConfigError: one of them breaks its rule.
    """

    memory: Memory | None
    ids: tuple[int, ...] = field(converter=_ids)
    copies: int = field(default=1, kw_only=True, validator=whole(1))
    max_new_tokens: int = field(default=1, kw_only=True, validator=whole(1))
    min_score: float | None = field(default=None, kw_only=True, validator=any_number)
    query_tokens: int | None = field(default=None, kw_only=True, validator=whole(1, optional=True))
    retrieval_query: str | Sequence[int] | None = field(default=None, kw_only=True)
    retrieve_every: int | None = field(default=None, kw_only=True, validator=whole(1, optional=True))

    def check(self, vocab_size: int) -> None:
        """Raise InputError unless the prompt is made of at least one token, all below ``vocab_size``."""
        if not self.ids:
            raise InputError("the prompt of a row must have at least one token, got none")
        for one in self.ids:
            if type(one) is not int or not 0 <= one < vocab_size:
                raise InputError(f"the prompt of a row must be ids from 0 to {vocab_size - 1}, got {one!r}")


@define(eq=False)
class Row:
    """One text in a batch reader, which holds a snapshot of its memory: later writes do not change it.

    Attributes:
        request: what it was asked for.
        sources: what came back from memory, layer by layer, in the order of reading; () where nothing could.
        memory_version: of the memory that was read; None: none was.
        prompt_tokens: of the prompt.
        room: tokens that it may be stepped by, where the decoder has learned so many positions; None: no limit.
        error: why it could not join, or why it failed in ``step``; None: it did not.
    """

    request: RowRequest
    sources: Sequence[Sequence[RetrievedSource]] = ()
    memory_version: int | None = None
    room: int | None = None
    error: Exception | None = None
    _logits: Tensor | None = None

    def joined(self, logits: Tensor, sources: Sequence[Sequence[RetrievedSource]], memory_version: int | None) -> None:
        """Take note of the logits ``[V]`` behind the prompt, its sources, and the memory's version."""
        self._logits, self.sources, self.memory_version = logits.clone(), sources, memory_version

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.ids)

    @property
    def logits(self) -> Tensor:
        """``[V]``, of the first token behind the prompt. Raises ``error`` where there is one."""
        if self._logits is None:
            raise self.error or InputError("this row has not joined yet: advance its joining")
        return self._logits
