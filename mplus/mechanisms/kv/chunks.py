"""Where a text is cut into chunks: behind sentences and lines, so that what is brought back makes sense by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor

SENTENCE_ENDS = tuple(".!?…")
WIDE_ENDS = tuple("。！？")
CLOSERS = "\"'”’)]}»」』"
"""What may stand between the end of a sentence and the space behind it."""
TITLE = re.compile(r"\b(Mrs?|Ms|Dr|St|Prof|Rev|Capt|Col|Gen|Lt|Sgt|Mme?|[A-Z])\.$")
"""Words that end with a full stop in the middle of a sentence, and initials."""
LOOK_BACK = 3
"""Tokens that the end of a sentence, with what closes it, may consist of."""

Decode = Callable[[list[int]], str]
"""Turns ids into text."""


def cut_at_sentences(ids: Tensor, most: int, decode: Decode) -> list[Tensor]:
    r"""Cut ``[n]`` ids into chunks of whole sentences, as many in each as ``most`` tokens hold.

    Where no sentence ends within ``most`` tokens, a chunk ends with a line, else with a word, else after ``most``. A
    chunk is the same whatever comes behind the ``most + 1`` tokens from its first one on.

    Args:
        ids: of one text, at least one.
        most: tokens of a chunk.
        decode: the tokenizer's.

    Example:
        >>> words = "It rained . We stayed in . Then the sun came out .".split()
        >>> chunks = cut_at_sentences(torch.arange(12), 7, lambda some: "".join(" " + words[one] for one in some))
        >>> [len(chunk) for chunk in chunks]
        [7, 5]
    """
    numbers, known = ids.tolist(), dict[int, str]()
    chunks, begin = [], 0
    while len(numbers) - begin > most:
        some = numbers[begin : begin + most + 1]
        for number in some:
            if number not in known:
                # As it is inside of a text: many tokenizers drop a space in front of the first token.
                known[number] = decode([number, number])[len(decode([number])) :]
        end = begin + _best_end([known[number] for number in some])
        chunks.append(ids[begin:end])
        begin = end
    return [*chunks, ids[begin:]]


def _best_end(pieces: Sequence[str]) -> int:
    """Return how many of the tokens make up a chunk; the last one is not of it in any case."""
    line = word = 0
    for place in range(len(pieces) - 1, 0, -1):
        piece, apart = pieces[place - 1], pieces[place][:1].isspace()
        behind = "".join(pieces[max(place - LOOK_BACK, 0) : place])
        apart = apart or piece[-1:].isspace()
        bare = behind.rstrip().rstrip(CLOSERS)
        if behind.endswith("\n\n") or bare.endswith(WIDE_ENDS):
            return place
        if apart and bare.endswith(SENTENCE_ENDS) and TITLE.search(bare) is None:
            return place
        line = line or (place if "\n" in piece else 0)
        word = word or (place if apart else 0)
    return line or word or len(pieces) - 1
