"""What a retriever of chunks is trained on: passages of texts, and sentences or questions that belong to each."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from attrs import define, field
from torch import Tensor

from mplus.errors import InputError
from mplus.evaluation.texts import Texts, Tokenizer, read
from mplus.mechanisms.kv.chunks import cut_at_sentences

SENTENCE = re.compile(r"(?<=[.!?…。！？])[\"'”’)]*\s+")
SHORTEST = 6
"""Tokens of a sentence that is taken for a question."""
KEPT = 0.1
"""Share of sentences that stay in their passage, so that shared words count too (as in ORQA)."""
HELD_OUT = 0.1
"""Share of each text that nothing is trained on: its end, so that no passage has a neighbour among the others."""
FEWEST = 20
"""Pairs below which there is nothing to train on."""


@define(frozen=True)
class Pairs:
    """Passages, and queries that each belong to one of them.

    Attributes:
        passages: ids of each, as a memory cuts texts into chunks.
        queries: ids of each.
        right: for each query the place of its passage.
    """

    passages: list[Sequence[int]] = field(factory=list)
    queries: list[Sequence[int]] = field(factory=list)
    right: list[int] = field(factory=list)

    def __len__(self) -> int:
        return len(self.queries)

    def add(self, passage: Sequence[int], queries: Sequence[Sequence[int]]) -> None:
        """Add a passage with its queries."""
        self.right.extend([len(self.passages)] * len(queries))
        self.passages.append(passage)
        self.queries.extend(queries)

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.passages)) + sum(map(len, self.queries))


def pairs_of(
    texts: Sequence[Path],
    questions: Path | None,
    tokenizer: Tokenizer,
    *,
    chunk_tokens: int = 128,
    most: int = 1000,
    seed: int = 0,
) -> tuple[Pairs, Pairs]:
    """Return the pairs to train on, and those of the ends of the texts, which are held out.

    Of a text, sentences are cropped out of passages: one is the query, and the rest of its passage the right answer
    (the inverse cloze task: Lee et al. 2019, ORQA).

    Args:
        texts: files of UTF-8 text, ``.gz`` too.
        questions: a file of JSON lines, ``{"question": ..., "passage": ...}``, or None.
        tokenizer: of the decoder.
        chunk_tokens: of a passage at most, as the memory has it.
        most: passages of all texts together; they are taken from everywhere in them.
        seed: of which passages and sentences are taken.

    Raises:
        InputError: a file cannot be read, or there is too little text.
    """
    counted, rng = Texts(tokenizer), random.Random(seed)  # noqa: S311 - which sentences are taken
    trained, held_out = Pairs(), Pairs()
    for file in texts:
        passages = _passages(read(file), counted, chunk_tokens)
        share, end = max(most // len(texts), 1), len(passages) - round(len(passages) * HELD_OUT)
        for pairs, part, count in ((trained, passages[:end], share), (held_out, passages[end:], share * HELD_OUT)):
            made, order = 0, rng.sample(range(len(part)), len(part))
            while order and made < max(round(count), 1):
                made += _add_crop(pairs, part[order.pop()], counted, rng)
    if questions is not None:
        _add_questions(trained, held_out, questions, counted, chunk_tokens)
    if len(trained) < FEWEST or len(held_out) < 2:
        raise InputError(
            f"the texts must give at least {FEWEST} passages of three sentences or more to train on and 2 at their "
            f"ends to try it with, got {len(trained)} and {len(held_out)}: give more text"
        )
    return trained, held_out


def _passages(text: str, texts: Texts, chunk_tokens: int) -> list[str]:
    """Return the chunks that a memory makes of a text."""
    ids = torch.tensor(texts.ids(" ".join(text.split())), dtype=torch.int64)

    def decode(some: Sequence[int]) -> str:
        return texts.tokenizer.decode(some, skip_special_tokens=False)

    chunks: Sequence[Tensor] = cut_at_sentences(ids, chunk_tokens, decode) if len(ids) else ()
    return [decode(chunk.tolist()).strip() for chunk in chunks]


def _add_crop(pairs: Pairs, passage: str, texts: Texts, rng: random.Random) -> bool:
    """Add a passage with one of its sentences for a query; return False where it has fewer than three."""
    sentences = SENTENCE.split(passage)
    able = [place for place, sentence in enumerate(sentences) if texts.count(sentence) >= SHORTEST]
    if len(sentences) < 3 or not able:
        return False
    chosen = rng.choice(able)
    words = sentences[chosen].split()
    length = rng.randint(min(SHORTEST, len(words)), len(words))
    first = rng.randint(0, len(words) - length)
    kept = rng.random() < KEPT
    rest = passage if kept else " ".join(sentences[:chosen] + sentences[chosen + 1 :])
    pairs.add(texts.ids(rest), [texts.ids(" ".join(words[first : first + length]))])
    return True


def _add_questions(trained: Pairs, held_out: Pairs, file: Path, texts: Texts, chunk_tokens: int) -> None:
    """Add the questions of a file to both, those of the last passages to ``held_out``."""
    asked: dict[str, list[str]] = {}
    for number, line in enumerate(read(file).splitlines(), 1):
        try:
            one = json.loads(line)
            question, passage = one["question"], one["passage"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}, line {number}, must be JSON with 'question' and 'passage': {error!r}") from error
        if not (isinstance(question, str) and isinstance(passage, str) and question.strip() and passage.strip()):
            raise InputError(f"{file}, line {number}, must have texts for 'question' and 'passage' that are not empty")
        asked.setdefault(passage, []).append(question)
    end = len(asked) - round(len(asked) * HELD_OUT)
    for place, (passage, own) in enumerate(asked.items()):
        pairs = trained if place < end else held_out
        pairs.add(texts.ids(passage)[:chunk_tokens], [texts.ids(question) for question in own])
