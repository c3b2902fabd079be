"""BM25: which texts share rare words with a question; no training, and no pass of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor


def bm25(lengths: Tensor, words: Tensor, query: Tensor, k1: float, b: float) -> Tensor:
    """Return the score of every text, ``[c]`` float64 (Robertson and Zaragoza 2009, equation 3.15).

    Every word is looked at: 5 ms for 100,000 and 0.7 s for 18 million of them on one core, less than a short forward of
    a small decoder up to some millions, so there is no inverted index.

    Args:
        lengths: ``[c]`` int64, words (or tokens) of each text.
        words: ``[n]`` int32 or int64, the words of all texts as numbers, one behind the other.
        query: ``[q]``, the words to ask with; repeats count once.
        k1: how soon further occurrences of a word stop to count.
        b: how much long texts are held back, 0 to 1.
    """
    texts, asked = len(lengths), query.cpu().unique().to(words.dtype)
    if not len(asked) or not len(words):
        return torch.zeros(texts, dtype=torch.float64)
    place = torch.searchsorted(asked, words).clamp_(max=len(asked) - 1)
    found = (asked[place] == words).nonzero().squeeze(1)
    text_of = torch.searchsorted(lengths.cumsum(0), found, right=True)
    cells = text_of * len(asked) + place[found]
    counts = torch.bincount(cells, minlength=texts * len(asked)).view(texts, len(asked)).double()
    among = (counts > 0).sum(0)
    rarity = torch.log1p((texts - among + 0.5) / (among + 0.5))
    relative = lengths / lengths.double().mean()
    shares = counts * (k1 + 1) / (counts + k1 * (1 - b + b * relative)[:, None])
    return (rarity * shares.nan_to_num()).sum(1)  # with k1 of 0, a word that a text lacks is 0 of 0
