"""Reply: the rows of a request as texts, with stop strings and log-probabilities, from the events of the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from attrs import define, field

from mplus.config import JsonValue
from mplus.serving.http.text import IncrementalText, StopStrings
from mplus.serving.http.tokenizer import Tokenizer
from mplus.serving.messages import Began, Ended, Event, NewToken, TokenLogprobs

Finish = Literal["stop", "length"]


@define(frozen=True)
class Scored:
    """A token with its log-probabilities and where it begins in the text of its answer."""

    id: int
    logprobs: TokenLogprobs
    offset: int


@define(frozen=True)
class Delta:
    """A piece of the answer ``row``: text, and the scored tokens of which it is made."""

    row: int
    text: str
    scored: Sequence[Scored] = ()


@define
class Row:
    """One answer.

    Attributes:
        index: among all of the request.
        words: turns its tokens into text.
        stops: ends it.
        tokens: that came.
        pieces: of the text, as they were said.
        scored: all that was scored.
        finish: why it is over; None: it is not.
    """

    index: int
    words: IncrementalText
    stops: StopStrings
    tokens: int = 0
    pieces: list[str] = field(factory=list)
    scored: list[Scored] = field(factory=list)
    finish: Finish | None = None
    _seen: int = 0
    _said: int = 0
    _waiting: list[Scored] = field(factory=list)

    @property
    def text(self) -> str:
        """All that was said."""
        return "".join(self.pieces)

    def add(self, token: NewToken) -> Delta | None:
        """Take a token; return what may be said because of it."""
        if self.finish is not None:
            return None
        self.tokens += 1
        if token.logprobs is not None:
            self._waiting.append(Scored(token.id, token.logprobs, self._seen))
        piece = self.words.add(token.id)
        self._seen += len(piece)
        text = self.stops.add(piece)
        if self.stops.stopped:
            self.finish = "stop"
        return self._say(text)

    def end(self, reason: Finish) -> Delta | None:
        """Take the end of the answer; return what was still held back."""
        if self.finish is not None:
            return None
        text = self.stops.add(self.words.end())
        text += self.stops.end()
        self.finish = "stop" if self.stops.stopped else reason
        return self._say(text)

    def _say(self, text: str) -> Delta | None:
        self._said += len(text)
        # Tokens of text that is held back wait with it; those of a stop string are no part of the answer.
        over = self.finish is not None and not self.stops.stopped
        ready = [one for one in self._waiting if over or one.offset < self._said or not self.stops.stops]
        self._waiting = self._waiting[len(ready) :]
        if not text and not ready:
            return None
        self.pieces.append(text)
        self.scored += ready
        return Delta(self.index, text, ready)


@define
class Reply:
    """All answers of a request.

    Attributes:
        tokenizer: of the decoder.
        answers: of each prompt.
        rows: of all prompts, one prompt after the other.
        began: what is known of each prompt that was read, by its place.
    """

    tokenizer: Tokenizer
    answers: int
    rows: list[Row]
    began: dict[int, Began] = field(factory=dict)

    @classmethod
    def to(cls, tokenizer: Tokenizer, prompts: int, answers: int, stops: Sequence[str]) -> Reply:
        """Return a reply that has not begun."""
        rows = [Row(index, tokenizer.text(), StopStrings(stops)) for index in range(prompts * answers)]
        return cls(tokenizer, answers, rows)

    def take(self, place: int, event: Event) -> Delta | None:
        """Take an event of the prompt ``place``; return what may be said because of it."""
        if isinstance(event, Began):
            self.began[place] = event
            return None
        row = self.row(place, event.row)
        return row.end(event.reason) if isinstance(event, Ended) else row.add(event)

    def row(self, place: int, number: int) -> Row:
        """Return an answer to the prompt ``place``."""
        return self.rows[place * self.answers + number]

    @property
    def over(self) -> bool:
        """All answers are over."""
        return all(row.finish is not None for row in self.rows)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts that were read."""
        return sum(one.prompt_tokens for one in self.began.values())

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(row.tokens for row in self.rows)

    def usage(self) -> dict[str, JsonValue]:
        """Return the counts in OpenAI's form."""
        prompt, answers = self.prompt_tokens, self.tokens
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}

    def memory(self, sources: bool) -> dict[str, JsonValue]:
        """Return the version of the memory that was read, and, if they are asked for, the sources that came back."""
        first = self.began.get(0)
        if first is None:
            return {}
        found: dict[str, JsonValue] = {"memory_version": first.memory_version}
        if sources:
            found["memory_sources"] = [
                {
                    "source": one.source,
                    "rows": one.rows,
                    "score": _number(one.score),
                    "age": one.age,
                    "written": one.written,
                }
                for one in first.sources
            ]
        return found


def _number(value: float | None) -> float | None:
    """Return a number that JSON has; None for others."""
    return value if value is not None and math.isfinite(value) else None
