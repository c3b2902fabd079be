"""Tokenizers as training sees them, ids of texts, and a store of those used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from mplus.errors import ConfigError
from mplus.training.data.documents import Document


class Tokenizer(Protocol):
    """Turns text into ids, as tokenizers of transformers do."""

    def __call__(self, text: str, /, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, list[int]]:
        """Return the ids of a text as ``input_ids``."""

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id."""


def encode(tokenizer: Tokenizer | None, text: str) -> Tensor:
    """Return ``[n]`` int64 ids of a text, without special tokens.

    Raises:
        ConfigError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ConfigError("data made of text needs a tokenizer: set it in [model]")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # longer than a prompt, on purpose
    return torch.tensor(ids, dtype=torch.int64)


class TokenCache:
    """Ids of documents by number, encoded when asked for; the ones used last are kept, up to ``limit`` tokens."""

    def __init__(self, tokenizer: Tokenizer | None, limit: int = 4_000_000) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._size = 0

    def ids(self, index: int, document: Document) -> Tensor:
        """Return ``[n]`` ids of ``document``, which is number ``index`` of its set."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        found = encode(self._tokenizer, document.text)
        self._kept[index] = found
        self._size += len(found)
        while self._size > self._limit and len(self._kept) > 1:
            self._size -= len(self._kept.popitem(last=False)[1])
        return found
