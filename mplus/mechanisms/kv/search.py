"""Which chunks a text brings back: BM25 over token ids, which needs no training and no pass of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from mplus.mechanisms.kv.state import KvState


def bm25(state: KvState, query: Tensor, k1: float, b: float) -> Tensor:
    """Return the score of every chunk, ``[c]`` float64 (Robertson and Zaragoza 2009, equation 3.15).

    Args:
        state: of the stream.
        query: ``[q]`` int64, the tokens to ask with; repeats count once.
        k1: how soon further occurrences of a token stop to count.
        b: how much long chunks are held back, 0 to 1.
    """
    chunks, words = len(state.chunk_length), query.cpu().unique().to(torch.int32)
    chunk_of = torch.arange(chunks).repeat_interleave(state.chunk_length)
    word = torch.searchsorted(words, state.token_ids).clamp(max=len(words) - 1)
    asked = words[word] == state.token_ids
    cells = chunk_of[asked] * len(words) + word[asked]
    counts = torch.bincount(cells, minlength=chunks * len(words)).view(chunks, len(words)).double()
    among = (counts > 0).sum(0)
    rarity = torch.log1p((chunks - among + 0.5) / (among + 0.5))
    lengths = state.chunk_length / state.chunk_length.double().mean()
    return (rarity * counts * (k1 + 1) / (counts + k1 * (1 - b + b * lengths)[:, None])).sum(1)


def choose(state: KvState, scores: Tensor, most: int) -> Tensor:
    """Return ``[k]`` int64, the best chunks that have ``most`` tokens together, the best first.

    Chunks are taken in order of their scores, the newer first among equals, as long as they fit.
    """
    newest_first = torch.arange(len(scores)).flip(0)
    order = newest_first[scores[newest_first].argsort(descending=True, stable=True)]
    room, taken = most, []
    for chunk, length in zip(order.tolist(), state.chunk_length[order].tolist(), strict=True):
        if length <= room:
            taken.append(chunk)
            room -= length
        if room <= 0:
            break
    return torch.tensor(taken, dtype=torch.int64)
