"""The controller: two decisions about what goes into the prompt, and summaries."""

from __future__ import annotations

import re
from typing import Literal

from attrs import define

from mplus.mechanisms import Ask

Mode = Literal["decoder", "answer", "rule", "off"]
YES, NO = " (A)", " (B)"
NEEDED = (
    "Question: {question}\nTo answer it, must one look up what was said earlier?\n(A) yes\n(B) no\nThe right letter is"
)
ENOUGH = (
    "Text: {text}\nQuestion: {question}\nDoes the text say what is asked for?\n(A) yes\n(B) no\nThe right letter is"
)
SUMMARY = "Text: {text}\nThe same in one short sentence:"
SUMMARY_TOKENS = 48
VERDICT_TOKENS = 8
SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)
WORD = re.compile(r"\w+")


def verdict(answer: str) -> bool:
    """Return whether an answer of the controller means yes: anything does that has no ``(B)`` in it."""
    return "(B)" not in answer


@define(frozen=True)
class Controller:
    """Decides by the decoder, by a rule, or not at all.

    Attributes:
        ask: the decoder.
        room: tokens that a prompt to it and its answer may have; a longer one is not put, and the verdict is yes.
        threshold: share of the question's words that a text must have, where a rule decides.
    """

    ask: Ask
    room: int
    threshold: float

    def decide(self, mode: Mode, prompt: str, question: str, text: str | None) -> bool:
        """Return the verdict on one decision.

        Args:
            mode: "decoder": the likelier one of "(A)" and "(B)"; "answer": whether "(B)" stands in its answer, as
                released; "rule": whether ``text`` has enough of the question's words; "off": yes.
            prompt: puts the decision to the decoder.
            question: of the user.
            text: what is judged; None: nothing, and a rule says no.
        """
        if mode == "off":
            return True
        if mode == "rule":
            return shared_words(question, text or "") >= self.threshold
        if self.ask.count(prompt) + VERDICT_TOKENS + 1 > self.room:
            return True
        choices = (YES, NO) if mode == "decoder" else ()
        return verdict(self.ask(prompt, VERDICT_TOKENS, stop=() if choices else ("\n",), choices=choices))


def shared_words(question: str, text: str) -> float:
    """Return the share of the words of a question, common ones left out, that a text has; 1 where there are none."""
    asked = set(_words(question)) - COMMON
    return len(asked & set(_words(text))) / len(asked) if asked else 1.0


def summary_of(text: str, by: Literal["decoder", "first", "off"], ask: Ask) -> str:
    """Return a text in one sentence: by the decoder, its first one, or the text itself."""
    if by == "off":
        return text
    if by == "first":
        first = SENTENCE.match(text)
        return first[0].strip() if first else text
    found = ask(SUMMARY.format(text=text), SUMMARY_TOKENS, stop=("\n",)).strip()
    return found or text


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


COMMON = frozenset({
    "a", "an", "and", "are", "at", "by", "did", "do", "does", "for", "from", "had", "has", "have", "how", "i", "in",
    "is", "it", "me", "my", "of", "on", "or", "she", "he", "that", "the", "they", "this", "to", "was", "we", "were",
    "what", "when", "where", "which", "who", "whom", "whose", "why", "will", "with", "you", "your",
})  # fmt: skip
"""Words that say nothing about what is asked for."""
