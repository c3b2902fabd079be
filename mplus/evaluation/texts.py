"""Texts measured in the tokens of one decoder."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from mplus.errors import InputError

_WORD = re.compile(r"\S+\s*|^\s+")


class Tokenizer(Protocol):
    """The parts of a tokenizer that evaluations need; those of transformers have them."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Sequence[int]]:
        """Return the ids of a text as ``input_ids``."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of ids."""


class Texts:
    """Counts, cuts and joins texts by a tokenizer, without special tokens.

    Example:
        >>> texts = Texts(tokenizer)
        >>> texts.count("Once upon a time"), texts.cut("Once upon a time", 3)
        (4, 'Once upon a')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # A passage is counted, cut, written and read by several arms: its tokens are looked up.
        self._known = lru_cache(maxsize=2**14)(self._tokenize)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self._known(text))

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._known(text))

    def cut(self, text: str, limit: int) -> str:
        """Return the longest beginning of whole words that has at most ``limit`` tokens."""
        if self.count(text) <= limit:
            return text
        ends = [match.end() for match in _WORD.finditer(text)]
        low, high = 0, len(ends)  # so many words fit; so many do not
        while high - low > 1:
            middle = (low + high) // 2
            fits = len(self._tokenize(text[: ends[middle - 1]].rstrip())) <= limit
            low, high = (middle, high) if fits else (low, middle)
        return text[: ends[low - 1]].rstrip() if low else ""

    def join(self, texts: Iterable[str], limit: int) -> Iterator[str]:
        """Yield passages of at most ``limit`` tokens, each as many of ``texts`` as it takes, the last of them cut."""
        pieces: list[str] = []
        for text in texts:
            pieces.append(text)
            joined = "\n".join(pieces)
            if self.count(joined) >= limit:
                yield self.cut(joined, limit)
                pieces = []

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def read(path: Path) -> str:
    """Read a UTF-8 file, unpacked where its name ends in ``.gz``. Raises InputError when it cannot be read."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as opened:
                return opened.read()
        return path.read_text(encoding="utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be a readable UTF-8 text, or one packed with gzip: {error}") from error
