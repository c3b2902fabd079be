"""Tokenizer and chunks of the little language, for text that a person types."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mplus.errors import InputError
from mplus.facts import words
from mplus.facts.language import Language
from mplus.hf.decoders.tokenizers import word_tokenizer


def recall_tokenizer(language: Language | None = None) -> Any:
    """Return the tokenizer of the language; every word it does not know becomes a filler."""
    vocabulary = (language or Language()).vocabulary
    return word_tokenizer(vocabulary, unknown=words.FILLERS[0], pad=words.PAD, begin=words.BEGIN)


def told_chunk(language: Language, sentence: str, chunk_tokens: int, generator: torch.Generator) -> Tensor:
    """Return ids ``[chunk_tokens]``: a sentence that tells a fact, with fillers around it as in training.

    Raises:
        InputError: it tells no fact of this language; the message says what one looks like.
    """
    spoken = sentence.lower().replace(words.STOP, " ").split()
    fact = language.fact(" ".join(spoken[:4]))
    value = spoken[4:]
    accepted = [language.value(fact, number) for number in range(language.values(fact))]
    if value not in accepted:
        raise InputError(
            f"a fact must end in a {language.relation(fact)}, such as {' '.join(accepted[0])} or "
            f"{' '.join(accepted[-1])}, got {' '.join(value)!r}"
        )
    ids = [language.ids[word] for word in [*spoken, words.STOP]]
    fillers = torch.tensor([language.ids[word] for word in words.FILLERS])
    chunk = fillers[torch.randint(len(fillers), (chunk_tokens,), generator=generator)]
    chunk[1 : 1 + len(ids)] = torch.tensor(ids)
    return chunk
