"""Tokenizers for decoders that are built from nothing: trained on texts, or of a list of words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mplus.errors import ConfigError

BEGIN, END = "<s>", "</s>"
SMALLEST = 256 + 2
"""Tokens of the smallest vocabulary: one for every byte, and two special ones."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of ``vocabulary`` tokens, ``<s>`` and ``</s>`` among them.

    Raises:
        ConfigError: fewer tokens than bytes.
    """
    if vocabulary < SMALLEST:
        raise ConfigError(f"vocabulary must be at least {SMALLEST}, one for each byte and two more, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def word_tokenizer(vocabulary: Sequence[str], *, unknown: str, pad: str, begin: str) -> PreTrainedTokenizerFast:
    """Make a fast tokenizer that lower-cases, cuts at white space and punctuation, and knows only ``vocabulary``.

    Args:
        vocabulary: the words; the id of each is its place.
        unknown: the word that every other word becomes.
        pad, begin: special tokens.

    Raises:
        ConfigError: a word twice, or one of the three not in the vocabulary.
    """
    ids = {word: place for place, word in enumerate(vocabulary)}
    if len(ids) != len(vocabulary):
        raise ConfigError(
            f"a vocabulary must have each word once, got {len(vocabulary)} words of which {len(ids)} differ"
        )
    for role, word in (("unknown", unknown), ("pad", pad), ("begin", begin)):
        if word not in ids:
            raise ConfigError(f"{role} must be in the vocabulary, got {word!r}")
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        pad_token=pad,
        bos_token=begin,
        clean_up_tokenization_spaces=False,
    )
