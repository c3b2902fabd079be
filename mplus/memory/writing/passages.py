"""Cut a text into passages, for a memory of text: sentences that follow one another, up to a number of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor

from mplus.errors import InputError
from mplus.memory.writing.chunking import NOTHING, Ids, Turns, WriteData, checked_ids, to_items
from mplus.tokenizer import Tokenizer

SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|\n\s*")
WORD_END = re.compile(r"\s+")


@define(frozen=True, eq=False)
class Passage:
    """A passage that is to be written.

    Attributes:
        text: as it was given.
        source: name of its source.
        before: the passage in front of it in the same write; "" for the first one.
        tokenizer: of the memory.
    """

    text: str
    source: str | None
    before: str
    tokenizer: Any


def to_texts(data: WriteData, batch_size: int, tokenizer: Tokenizer | None) -> list[list[str]]:
    """Return the texts of each batch row: one, one for each turn of a conversation, or none.

    Args:
        data: as for ``mplus.memory.writing.chunking.to_rows``; ids are turned into text.
        batch_size: B of the memory.
        tokenizer: of the memory.

    Raises:
        InputError: wrong batch size, wrong type, nothing to write at all, or no tokenizer.
    """
    rows = []
    for item in to_items(data, batch_size):
        found = item.texts if isinstance(item, Turns) else [to_text(item, tokenizer)]
        rows.append([text for text in found if text is not None and text.strip()])
    if not any(rows):
        raise InputError(NOTHING)
    return rows


def to_text(item: str | Ids | None, tokenizer: Tokenizer | None) -> str | None:
    """Return the text of a text or ids; None: there is none. Raises InputError: no tokenizer, or wrong ids."""
    known = _needed(tokenizer)
    if item is not None and not isinstance(item, str):
        ids = checked_ids(item)
        return None if ids is None else str(known.decode(ids, skip_special_tokens=True))
    return item or None


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer. Raises InputError: there is none."""
    if tokenizer is None:
        raise InputError("a memory of text needs a tokenizer: pass tokenizer= to new_memory, load or open")
    return tokenizer


def cut(text: str, tokenizer: Tokenizer | None, most: int) -> list[str]:
    """Cut a text into passages of whole sentences, each filled up; together they are the text.

    Args:
        text: any.
        tokenizer: counts tokens, sentence by sentence.
        most: tokens of a passage. A longer sentence is cut between words, a longer word inside.
    """
    cutter = PassageCutter(tokenizer, most)
    return [*cutter.add(text), *cutter.rest()]


@define(eq=False)
class PassageCutter:
    """A cutter of text that arrives bit by bit, into the passages that ``cut`` makes of all of it.

    Attributes:
        tokenizer, most: as for ``cut``.
        held: the passage that is being filled.
        size: its tokens.
        sentence: the beginning of the sentence behind it, of which the end has not come.
    """

    tokenizer: Tokenizer | None
    most: int
    held: str = ""
    size: int = 0
    sentence: str = ""

    def add(self, text: str) -> list[str]:
        """Return the passages that are full, whatever comes behind ``text``."""
        text = self.sentence + text
        # A sentence that ends where the text ends so far may go on with what comes next.
        ends = [found.end() for found in SENTENCE_END.finditer(text) if found.end() < len(text)]
        end = ends[-1] if ends else 0
        self.sentence = text[end:]
        return self._filled(text[:end])

    def rest(self) -> list[str]:
        """Return the last passages."""
        passages = self._filled(self.sentence)
        return [*passages, self.held] if self.held else passages

    def _filled(self, text: str) -> list[str]:
        """Put whole sentences into passages; return those that are full."""
        passages = []
        for piece, tokens, alone in _units(text, self.tokenizer, self.most):
            if self.held and (alone or self.size + tokens > self.most):
                passages.append(self.held)
                self.held, self.size = "", 0
            self.held, self.size = self.held + piece, self.size + tokens
        return passages


def _units(text: str, tokenizer: Tokenizer | None, most: int) -> Iterator[tuple[str, int, bool]]:
    """Yield what must not be cut, its tokens, and whether a passage must begin with it."""
    for sentence, tokens in _counted(_split(text, SENTENCE_END), tokenizer):
        if tokens <= most:
            yield sentence, tokens, False
            continue
        first = True
        for word, count in _counted(_split(sentence, WORD_END), tokenizer):
            for part, of_part in [(word, count)] if count <= most else _halves(word, tokenizer, most):
                yield part, of_part, first
                first = False


def _halves(word: str, tokenizer: Tokenizer | None, most: int) -> Iterator[tuple[str, int]]:
    ((_, count),) = _counted([word], tokenizer)
    # One character can have more tokens than fit (bytes of an emoji, say), and cannot be cut.
    if count <= most or len(word) == 1:
        yield word, count
        return
    for half in (word[: len(word) // 2], word[len(word) // 2 :]):
        yield from _halves(half, tokenizer, most)


def _split(text: str, end: re.Pattern[str]) -> list[str]:
    ends = [found.end() for found in end.finditer(text)]
    return [text[first:behind] for first, behind in zip([0, *ends], [*ends, len(text)], strict=True) if behind > first]


def _counted(texts: Sequence[str], tokenizer: Tokenizer | None) -> list[tuple[str, int]]:
    return [(text, len(ids)) for text, ids in zip(texts, token_ids(texts, tokenizer), strict=True)]


def token_ids(texts: Sequence[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """Return the tokens of each text, without special ones."""
    if not texts:
        return []
    found: list[list[int]] = _needed(tokenizer)(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return found


def with_ids(passages: Sequence[str], tokenizer: Tokenizer | None) -> list[tuple[str, Tensor]]:
    """Return the passages that are more than white space, each with its tokens ``[n]`` int64."""
    texts = [text for text in passages if text.strip()]
    return [
        (text, torch.tensor(ids, dtype=torch.int64))
        for text, ids in zip(texts, token_ids(texts, tokenizer), strict=True)
    ]
