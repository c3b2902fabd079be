"""What watches a generation: turns tokens into pieces of text as they come, and ends it when it is told to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import define, field
from torch import Tensor

if TYPE_CHECKING:
    from mplus.hf.types import PreTrainedTokenizerBase


@define(eq=False)
class Watch:
    """A streamer and a stopping criterion of one generation of one text.

    Attributes:
        tokenizer: turns ids into text.
        stops: texts with which the answer is over; they are not part of it.
        say: is called with each piece of text.
        started: when the answer was asked for, by ``time.perf_counter``.
        interrupted: set from outside, ends the generation at its next token.
        over: a stop came.
        tokens: generated so far.
        first: when the first token came; None: none came yet.
        said: all text that ``say`` has had.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[str]
    say: Callable[[str], None]
    started: float = field(factory=time.perf_counter)
    interrupted: bool = False
    over: bool = False
    tokens: list[int] = field(factory=list)
    first: float | None = None
    said: str = ""
    _prompt_seen: bool = False

    def put(self, value: Tensor) -> None:
        """Take the prompt ``[1, T]``, then tokens ``[1]`` one by one, as streamers of transformers do."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if self.first is None:
            self.first = time.perf_counter()
        self.tokens += value.flatten().tolist()
        self._tell(final=False)

    def end(self) -> None:
        """Tell what was held back."""
        self._tell(final=True)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Tensor) -> Tensor:
        """Return whether to end, for each text ``[1]``, as stopping criteria of transformers do."""
        return torch.full(
            (input_ids.shape[0],), self.interrupted or self.over, dtype=torch.bool, device=input_ids.device
        )

    def _tell(self, *, final: bool) -> None:
        text = str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            text, self.over = text[: min(ends)], True
        elif not final:
            text = text[: len(text) - self._unsure(text)]
        if len(text) > len(self.said):
            piece, self.said = text[len(self.said) :], text
            self.say(piece)

    def _unsure(self, text: str) -> int:
        """Return the number of last characters that may still change: half a character, or the start of a stop."""
        unsure = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        for stop in self.stops:
            begun = (size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size]))
            unsure = max(unsure, next(begun, 0))
        return unsure
