"""The parameters of HMT."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HMTAdditions(nn.Module):
    """The parameters that HMT adds to a decoder whose token embeddings are w wide.

    Attributes:
        first: ``[1, w]``, P0, the prompt of a stream without memory.
        topic: ``[1, w]``, T, the prompt around what is summarised; None without recall.
        query, key: ``[h, w]``, Wq and Wk, without bias; None without recall.

    Example:
        >>> sorted(name for name, _ in HMTAdditions(8, 4, scale=0.02).named_parameters())
        ['first', 'key.weight', 'query.weight', 'topic']
    """

    topic: nn.Parameter | None

    def __init__(self, width: int, recall_width: int | None, scale: float) -> None:
        """Draw the parameters.

        Args:
            width: w.
            recall_width: h; None: there is no recall.
            scale: standard deviation of T and P0; published: that of the token embeddings.
        """
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, width) * scale)
        recalls = recall_width is not None
        self.topic = nn.Parameter(torch.randn(1, width) * scale) if recalls else None
        self.query = nn.Linear(width, recall_width, bias=False) if recall_width is not None else None
        self.key = nn.Linear(width, recall_width, bias=False) if recall_width is not None else None

    def first_prompts(self, like: Tensor) -> Tensor:
        """Return P0 for every row of ``like`` ``[B, ...]``, ``[B, 1, w]``, in its dtype and on its device."""
        return self.first.to(like).expand(like.shape[0], 1, -1)
