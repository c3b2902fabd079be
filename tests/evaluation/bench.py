"""A wrapped decoder with a tiny vocabulary of words, and harness parts around it."""

from __future__ import annotations

import functools

from benchmarks.quality.architectures.decoders import VOCAB_SIZE
from mplus.evaluation.arms.base import Bench
from mplus.evaluation.generating import Generation
from mplus.evaluation.texts import Texts
from tests.evaluation.data import WordTokenizer
from tests.memory.tiny import build

CHUNK = 16


class SmallTokenizer(WordTokenizer):
    """Words share ids where the decoder has too few; every id is a word in turn."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        found = super().__call__(text)["input_ids"]
        return {"input_ids": [2 + number % (VOCAB_SIZE - 2) for number in found]}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(f"w{number}" for number in ids)


@functools.cache
def model():
    """A Llama of three layers with K=4, N=12, K0=6, chunks of 16 tokens."""
    return build()


def bench(**generation):
    """What arms share, around ``model``."""
    tokenizer = SmallTokenizer()
    return Bench(model(), tokenizer, Texts(tokenizer), Generation(**{"tokens": 3, **generation}), "\n")
