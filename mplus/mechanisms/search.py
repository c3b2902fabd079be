"""Which of the texts that were scored have room."""

from __future__ import annotations

import torch
from torch import Tensor


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
