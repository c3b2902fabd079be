"""The fallback for decoders that compute attention themselves: a cache that shows memory in front of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mplus.backends.base import Segment
from mplus.errors import NotSupported

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin, DummyLayer, LinearAttentionCacheLayerMixin

    Layer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer


class MemoryCacheView(Cache):
    """Passes text to ``inner`` (None: no cache) and returns ``[memory | text]``; memory never enters ``inner``.

    Raises:
        NotSupported: the memory has a bias for each key, which attention that is not mplus's own cannot add.
    """

    def __init__(self, inner: Cache | None, memory: Segment) -> None:
        if memory.bias is not None:
            raise NotSupported(
                f"the technique 'cache_view' shows a decoder keys and values only, got a memory with a bias "
                f"{list(memory.bias.shape)} for each key: use a decoder that runs with the technique 'attention', or "
                "a memory without a bias"
            )
        self.inner, self.memory = inner, memory

    @property
    def layers(self) -> list[Layer]:  # type: ignore[override]
        return [] if self.inner is None else self.inner.layers

    @property
    def is_compileable(self) -> bool:
        return False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Tensor, **kwargs: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.inner is not None:
            key_states, value_states = self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        rows = key_states.shape[0]
        # A memory that the whole batch shares has one row.
        keys, values = (t.expand(rows, -1, -1, -1) for t in (self.memory.keys, self.memory.values))
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.inner is None else self.inner.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return (query_length, 0) if self.inner is None else self.inner.get_mask_sizes(query_length, layer_idx)


def mask_with_memory(mask: Tensor | None, memory: Segment, queries: int, keys: int, like: Tensor) -> Tensor | None:
    """Extend a text mask over ``[memory | text]``.

    Args:
        mask: ``[..., T, S]`` bool (True = visible) or additive float; None: causal.
        queries, keys: T and S of the text.
        like: gives the device.

    Returns:
        ``[..., T, P+S]``, or None when everything is visible.
    """
    if mask is None:
        if queries == 1 and memory.lengths is None:
            return None
        mask = torch.ones(queries, keys, dtype=torch.bool, device=like.device)
        # Causal from the first key on: keys of a static cache beyond the text are not filled yet.
        mask = (mask.tril() if queries > 1 else mask)[None, None]
    rows, valid = memory.keys.shape[2], memory.valid
    if mask.dtype == torch.bool:
        # Memory is before all text: every query sees it, but for fillers.
        front = mask.new_ones(*mask.shape[:-1], rows)
    else:
        front = mask.new_zeros(*mask.shape[:-1], rows)
    if valid is not None:
        visible = valid[:, None, None, :].to(mask.device)
        front = (
            front & visible if mask.dtype == torch.bool else front.masked_fill(~visible, torch.finfo(mask.dtype).min)
        )
        mask = mask.expand(front.shape[0], -1, -1, -1)
    return torch.cat([front, mask], -1)
