"""Queries and keys of a decoder that is not there, for retrievers that need some."""

from __future__ import annotations

import torch
from torch import Tensor

from mplus.retrievers.base import Heads, RetrieverShape


class SmallAttention:
    """``Projections`` with random weights, in place of a decoder's own; another width in each layer."""

    def __init__(self, shape: RetrieverShape) -> None:
        generator = torch.Generator().manual_seed(7)
        self.sizes = [Heads(4, 2, 3 + layer % 2, 0.5) for layer in range(shape.layers)]
        self.weights = [
            torch.randn(shape.hidden_size, heads.queries + heads.keys, heads.width, generator=generator)
            for heads in self.sizes
        ]

    def heads(self, layer: int) -> Heads:
        """Four heads with queries, two with keys."""
        return self.sizes[layer]

    def queries(self, layer: int, hidden: Tensor) -> Tensor:
        """``[B, n, d]`` -> ``[B, n, 4, D]``."""
        return torch.einsum("bnd,dhw->bnhw", hidden, self.weights[layer][:, :4].to(hidden))

    def keys(self, layer: int, hidden: Tensor) -> Tensor:
        """``[B, n, d]`` -> ``[B, n, 2, D]``."""
        return torch.einsum("bnd,dhw->bnhw", hidden, self.weights[layer][:, 4:].to(hidden))
