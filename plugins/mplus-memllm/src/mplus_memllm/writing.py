"""Write what a sentence says: by a decoder that was trained to, or held to entities in it and a vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mplus.mechanisms import Ask
from mplus_memllm.calls import ARROW, BETWEEN, CLOSES, ITEMS, OPENS, WRITE, Triple, triples_in, write_prompt

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])|\n+")
NAME = re.compile(r"[A-Z][\w'-]*(?:\s+(?:(?:of|de|der|von|van|the)\s+)?[A-Z][\w'-]*)*|\d[\d.,/-]*\w*")
NO_NAMES = frozenset({
    "A", "An", "And", "At", "But", "He", "Her", "His", "I", "In", "It", "Its", "My", "On", "She", "The", "There",
    "They", "This", "We", "You",
})  # fmt: skip
"""Words that begin sentences, and are no names."""
EXAMPLES = (
    (
        "Apple was founded by Steve Jobs in 1976 .",
        (("Apple", "founded by", "Steve Jobs"), ("Apple", "inception", "1976")),
    ),
    ("Maria lives in Lisbon .", (("Maria", "residence", "Lisbon"),)),
)
MOST_NAMES, MOST_TRIPLES = 6, 4


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text."""
    return [one.strip() for one in SENTENCE.split(text) if one.strip()]


def names_in(sentence: str) -> list[str]:
    """Return what looks like a name or a number in a sentence: words with capitals, one behind the other."""
    found = []
    for match in NAME.finditer(sentence):
        words = match[0].rstrip(".,/-").split()
        while words and words[0] in NO_NAMES:
            words = words[1:]
        if words:
            found.append(" ".join(words))
    return list(dict.fromkeys(found))[:MOST_NAMES]


def written_freely(before: str, sentence: str, ask: Ask, tokens: int, patience: int) -> list[Triple]:
    """Return the triples of the call that a decoder makes behind a sentence.

    Args:
        before: earlier sentences.
        sentence: to be written.
        ask: the decoder, trained to write.
        tokens: of a call.
        patience: of late stopping.
    """
    said = ask(write_prompt(before, sentence), tokens, stop=(CLOSES,), patience=patience)
    if not said.lstrip().startswith(f"{OPENS}{WRITE}{ARROW}"):
        return []
    return triples_in(said)


def written_from_vocabulary(sentence: str, relations: Sequence[str], ask: Ask, room: int) -> list[Triple]:
    """Return the triples that a decoder, trained or not, finds in a sentence when it can write nothing else.

    A triple is of two names in the sentence and a relation of the vocabulary, one for each pair of names; which one,
    and whether there is another one, is what greedy decoding of the call comes to.

    Args:
        sentence: to be written.
        relations: the vocabulary.
        ask: the decoder.
        room: tokens that it can read; where a call does not fit, it ends.
    """
    names = names_in(sentence)
    left = [(one, other) for one in names for other in names if one != other]
    context = "".join(_shown(text, triples) + "\n" for text, triples in EXAMPLES)
    context += f"{write_prompt('', sentence)}{OPENS}{WRITE}{ARROW}"
    found: list[Triple] = []
    while left and len(found) < MOST_TRIPLES:
        possible = {BETWEEN.join((one, relation, other)): (one, relation, other)
                    for one, other in left for relation in relations}  # fmt: skip
        if ask.count(context) + max(map(ask.count, possible)) + 1 >= room:
            break
        said = ask(context, 0, choices=[CLOSES, *(text + end for text in possible for end in (ITEMS, CLOSES))])
        if said == CLOSES:
            break
        found.append(possible[said.removesuffix(CLOSES).removesuffix(ITEMS)])
        if said.endswith(CLOSES):
            break
        context += said
        left = [pair for pair in left if set(pair) != {found[-1][0], found[-1][2]}]
    return found


def _shown(text: str, triples: Sequence[Triple]) -> str:
    return f"{write_prompt('', text)}{OPENS}{WRITE}{ARROW}{ITEMS.join(BETWEEN.join(one) for one in triples)}{CLOSES}"
