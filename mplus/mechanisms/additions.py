"""The parameters of M+ and MemoryLLM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplus.retrievers.base import Retriever


class MemoryAdditions(nn.Module):
    """The parameters that M+ and MemoryLLM train besides the LoRA adapters: ``model.mplus`` of the wrapped decoder.

    Attributes:
        begin: ``[L, 1, d]`` begin row of each layer that carries memory.
        mark: ``[1, 1, d]`` vector added to the last K rows of a write at the input of every layer ("new memory"
            embedding, MemoryLLM appendix; starts at zero).
        retriever: the retriever, or None.
        pool: ``[L, N, d]`` short-term rows a new memory starts from, or None.
    """

    begin: nn.Parameter
    mark: nn.Parameter
    pool: Tensor | None

    def __init__(self, begin: Tensor, retriever: Retriever | None, pool: Tensor | None = None) -> None:
        """``begin`` is ``[L, 1, d]`` and sets dtype and device of the rest."""
        super().__init__()
        self.begin = nn.Parameter(begin.clone())
        self.mark = nn.Parameter(torch.zeros(1, 1, begin.shape[-1], dtype=begin.dtype, device=begin.device))
        self.retriever = None if retriever is None else retriever.to(device=begin.device, dtype=begin.dtype)
        self.register_buffer("pool", pool)
