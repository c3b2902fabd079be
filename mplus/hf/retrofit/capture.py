"""Stopping an attention module at the point where its keys and values are ready."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache


class Captured(Exception):
    """Carries keys and values ``[B, Hkv, P, D]`` out of an attention module.

    Where its attention function was reached, ``queries`` ``[B, H, P, D]`` and their ``scale`` (None: the usual one),
    too.
    """

    def __init__(self, keys: Tensor, values: Tensor, queries: Tensor | None = None, scale: float | None = None) -> None:
        self.keys, self.values, self.queries, self.scale = keys, values, queries, scale


class CaptureCache(Cache):
    """Raises ``Captured`` when attention hands over its keys and values."""

    layers = ()  # type: ignore[assignment]

    def __init__(self) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise Captured(key_states, value_states)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, *args: Any) -> tuple[int, int]:
        return query_length, 0
