"""A tokenizer of whole words, for decoders with a vocabulary of their own."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mplus.errors import ConfigError


def word_tokenizer(vocabulary: Sequence[str], *, unknown: str, pad: str, begin: str) -> PreTrainedTokenizerFast:
    """Make a fast tokenizer that lower-cases, cuts at white space and punctuation, and knows only ``vocabulary``.

    Args:
        vocabulary: the words; the id of each is its place.
        unknown: what every other word becomes.
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
