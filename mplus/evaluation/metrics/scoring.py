"""Scores of a generated text against the accepted answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from attrs import define, field

from mplus.config import one_of

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _stops(stops: Iterable[str]) -> tuple[str, ...]:
    return tuple(stops)


@define(frozen=True, kw_only=True)
class Scoring:
    """Every rule that decides whether an answer counts.

    Attributes:
        correct: "contains": an accepted answer is a part of the text (published); "contains_words": of whole words;
            "exact": it is the text.
        normalise: "none" compares letter by letter (published); "squad" without case, punctuation and articles.
        stop: the text ends before the first of these.
    """

    correct: Literal["contains", "contains_words", "exact"] = field(
        default="contains", validator=one_of("contains", "contains_words", "exact")
    )
    normalise: Literal["none", "squad"] = field(default="none", validator=one_of("none", "squad"))
    stop: tuple[str, ...] = field(default=("\n",), converter=_stops)

    def cut(self, text: str) -> str:
        """Return ``text`` up to the first stop string, without the blanks around it."""
        ends = [text.find(stop) for stop in self.stop if stop in text]
        return text[: min(ends, default=len(text))].strip()

    def is_correct(self, text: str, answers: Sequence[str]) -> bool:
        """Return whether ``text``, which is cut first, holds or is one of ``answers``."""
        return any(self._matches(self.cut(text), answer) for answer in answers)

    def scores(self, text: str, answers: Sequence[str]) -> dict[str, float]:
        """Return ``exact_match`` and ``f1`` of words as SQuAD defines them, the best over ``answers``."""
        text = self.cut(text)
        return {
            "exact_match": float(any(normalised(text) == normalised(answer) for answer in answers)),
            "f1": max((f1(text, answer) for answer in answers), default=0.0),
        }

    def _matches(self, text: str, answer: str) -> bool:
        # An answer of articles and punctuation only would be nothing, and that is part of every text.
        normalise = self.normalise == "squad" and normalised(answer) != ""
        text, answer = (normalised(text), normalised(answer)) if normalise else (text, answer.strip())
        if self.correct == "exact":
            return text == answer
        if self.correct == "contains_words":
            return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None
        return answer in text


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, one blank between words (SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(text: str, answer: str) -> float:
    """Return the F1 of the words of ``text`` against those of ``answer``, both normalised (SQuAD)."""
    given, wanted = normalised(text).split(), normalised(answer).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))
