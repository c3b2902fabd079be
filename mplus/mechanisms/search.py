"""Which texts a query brings back: BM25, which needs no training and no pass of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor


def bm25(lengths: Tensor, ids: Tensor, query: Tensor, k1: float, b: float) -> Tensor:
    """Return the score of every text, ``[c]`` float64 (Robertson and Zaragoza 2009, equation 3.15).

    Args:
        lengths: ``[c]`` int64, words (or tokens) of each text.
        ids: ``[n]`` int32, the words of all texts, one behind the other.
        query: ``[q]`` int64, the words to ask with; repeats count once.
        k1: how soon further occurrences of a word stop to count.
        b: how much long texts are held back, 0 to 1.
    """
    texts, words = len(lengths), query.cpu().unique().to(torch.int32)
    text_of = torch.arange(texts).repeat_interleave(lengths)
    word = torch.searchsorted(words, ids).clamp(max=len(words) - 1)
    asked = words[word] == ids
    cells = text_of[asked] * len(words) + word[asked]
    counts = torch.bincount(cells, minlength=texts * len(words)).view(texts, len(words)).double()
    among = (counts > 0).sum(0)
    rarity = torch.log1p((texts - among + 0.5) / (among + 0.5))
    relative = lengths / lengths.double().mean()
    shares = counts * (k1 + 1) / (counts + k1 * (1 - b + b * relative)[:, None])
    return (rarity * shares.nan_to_num()).sum(1)  # with k1 of 0, a word that a text lacks is 0 of 0


def choose(lengths: Tensor, scores: Tensor, most: int) -> Tensor:
    """Return ``[k]`` int64, the best texts that have ``most`` tokens together, the best first.

    Texts are taken in order of their scores, the newer first among equals, as long as they fit.

    Args:
        lengths: ``[c]`` int64, tokens of each text, oldest first.
        scores: ``[c]``, of each.
        most: tokens.
    """
    newest_first = torch.arange(len(scores)).flip(0)
    order = newest_first[scores[newest_first].argsort(descending=True, stable=True)]
    room, taken = most, []
    for text, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length <= room:
            taken.append(text)
            room -= length
        if room <= 0:
            break
    return torch.tensor(taken, dtype=torch.int64)
