"""Where a text is cut into chunks: behind sentences and lines, so that what is brought back makes sense by itself."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

SENTENCE_ENDS = tuple(".!?。！？…")
CLOSERS = "\"'”’)]}»"
"""What may stand between the end of a sentence and the space behind it."""

Decode = Callable[[Sequence[int]], str]
"""Turns ids into text."""


def cut_at_sentences(ids: Tensor, most: int, decode: Decode) -> list[Tensor]:
    """Cut ``[n]`` ids into chunks of whole sentences, as many in each as ``most`` tokens hold.

    A sentence of more than ``most`` tokens is cut where a word ends, or, where there is no such place, after ``most``.

    Args:
        ids: of one text, at least one.
        most: tokens of a chunk.
        decode: the tokenizer's, for single ids too.

    Example:
        >>> words = "It rained . We stayed in . Then the sun came out .".split()
        >>> chunks = cut_at_sentences(torch.arange(12), 7, lambda some: " " + words[some[0]])
        >>> [len(chunk) for chunk in chunks]
        [7, 5]
    """
    whole, words = _ends(ids.tolist(), decode)
    chunks, begin = [], 0
    while len(ids) - begin > most:
        limit = begin + most
        end = next((end for end in (_last(whole, limit), _last(words, limit)) if end > begin), limit)
        chunks.append(ids[begin:end])
        begin = end
    return [*chunks, ids[begin:]]


def _last(places: Sequence[int], limit: int) -> int:
    """Return the last of ascending places that is at most ``limit``; 0 where there is none."""
    number = bisect_right(places, limit)
    return places[number - 1] if number else 0


def _ends(ids: list[int], decode: Decode) -> tuple[list[int], list[int]]:
    """Return the places behind which a sentence or a line ends, and those behind which a word ends."""
    known = {number: decode([number]) for number in set(ids)}
    pieces = [known[number] for number in ids]
    sentences, words = [], []
    for place, (piece, following) in enumerate(pairwise(pieces), 1):
        apart = piece[-1:].isspace() or following[:1].isspace()
        if apart:
            words.append(place)
        # A closing quote may be a token of its own: what it closes counts.
        bare = "".join(pieces[max(place - 3, 0) : place]).rstrip().rstrip(CLOSERS)
        if "\n" in piece or (apart and bare.endswith(SENTENCE_ENDS)):
            sentences.append(place)
    return sentences, words
