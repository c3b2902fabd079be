"""A key/value cache layer that keeps memory in front of its text, so that the two are not joined for every token."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from mplus.backends.base import Segment

ROOM = 64
"""Least number of text tokens that a new buffer has room for behind those it holds."""
PAYS_AFTER = 16
"""Single tokens after which joining pays where attention could do without: about what one copy costs was then lost."""


@define(eq=False)
class _Buffer:
    """``[memory | text | room]``.

    Attributes:
        keys, values: ``[B, Hkv, rows, D]`` and ``[B, Hkv, rows, Dv]``.
        segments: the memory; empty where there is only text.
        front: rows of memory.
    """

    keys: Tensor
    values: Tensor
    segments: tuple[Segment, ...]
    front: int

    def __deepcopy__(self, memo: Any) -> _Buffer:
        return _Buffer(self.keys.clone(), self.values.clone(), self.segments, self.front)


class MemoryCacheLayer(DynamicLayer):
    """A ``DynamicLayer`` of transformers whose text lies in a buffer with room behind it, and memory in front of it.

    New text is written into the room. Whatever else changes the text (beams that are reordered, tokens that are cut
    off) leaves the buffer, and the next token makes a new one. Where gradients flow there is no buffer.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._buffer: _Buffer | None = None
        self.single_tokens = 0
        super().__init__(**kwargs)

    @property
    def keys(self) -> Any:
        """``[B, Hkv, S, D]`` of the text."""
        return self._keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._keys, self._buffer = keys, None

    @property
    def values(self) -> Any:
        """``[B, Hkv, S, Dv]`` of the text."""
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        self._values, self._buffer = values, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add text ``[B, Hkv, T, D]``; returns all of it."""
        text, tokens = self.get_seq_length(), key_states.shape[2]
        self.single_tokens += tokens == 1
        alike = text and key_states.dtype == self.keys.dtype and value_states.dtype == self.values.dtype
        if not alike or torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        buffer = self._buffer
        if buffer is None or not _writable(buffer) or buffer.front + text + tokens > buffer.keys.shape[2]:
            buffer = self._moved(() if buffer is None else buffer.segments, tokens)
        begin = buffer.front + text
        buffer.keys[:, :, begin : begin + tokens] = key_states
        buffer.values[:, :, begin : begin + tokens] = value_states
        self._look_at(buffer, text + tokens)
        return self.keys, self.values

    def holds(self, segments: tuple[Segment, ...]) -> bool:
        """Return whether ``segments`` lie in front of the text already."""
        return self._buffer is not None and self._buffer.segments is segments and _writable(self._buffer)

    def behind(self, segments: tuple[Segment, ...]) -> tuple[Tensor, Tensor]:
        """Return keys and values of ``[segments | text]``; the segments are copied once, and must not change.

        Args:
            segments: as many batch rows as the text has, all rows real.
        """
        text = self.get_seq_length()
        buffer = self._buffer
        if buffer is None or not self.holds(segments):
            buffer = self._moved(segments)
            self._look_at(buffer, text)
        end = buffer.front + text
        return buffer.keys[:, :, :end], buffer.values[:, :, :end]

    def _moved(self, segments: tuple[Segment, ...], tokens: int = 0) -> _Buffer:
        """Make a buffer with ``segments`` and the present text, and room for ``tokens`` and more."""
        text = self.get_seq_length()
        front = sum(segment.keys.shape[2] for segment in segments)
        rows = front + text + max(tokens + text, ROOM)
        keys, values = (part.new_empty(*part.shape[:2], rows, part.shape[3]) for part in (self.keys, self.values))
        place = 0
        for segment in segments:
            end = place + segment.keys.shape[2]
            keys[:, :, place:end], values[:, :, place:end] = segment.keys, segment.values
            place = end
        keys[:, :, front : front + text], values[:, :, front : front + text] = self.keys, self.values
        return _Buffer(keys, values, segments, front)

    def _look_at(self, buffer: _Buffer, text: int) -> None:
        """Let ``keys`` and ``values`` be the text in ``buffer``."""
        own = slice(buffer.front, buffer.front + text)
        self.keys, self.values = buffer.keys[:, :, own], buffer.values[:, :, own]
        self._buffer = buffer


@define(frozen=True, eq=False)
class MemoryInCache:
    """``Joined``, for a layer whose cache keeps memory in front of its text."""

    layer: MemoryCacheLayer
    segments: tuple[Segment, ...]

    @property
    def worthwhile(self) -> bool:
        """Return whether joining pays: it is done already, or single tokens follow one another."""
        return self.layer.holds(self.segments) or self.layer.single_tokens > PAYS_AFTER

    def fits(self, keys: Tensor) -> bool:
        """Return whether ``keys`` are the layer's text as it lies there: a decoder may change it before it attends."""
        own: Tensor = self.layer.keys
        return keys.data_ptr() == own.data_ptr() and keys.shape == own.shape and keys.stride() == own.stride()

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of ``[memory | text]``."""
        return self.layer.behind(self.segments)


def memory_in_cache(cache: Any, index: int, segments: tuple[Segment, ...], rows: int) -> MemoryInCache | None:
    """Let layer ``index`` of a cache keep ``segments``; None where it cannot.

    That is: without a cache that grows as the text does; where a batch of ``rows`` shares one memory, which would be
    copied for each; where streams have rows of different number; and where gradients flow.
    """
    if torch.is_grad_enabled() or getattr(type(cache), "update", None) is not Cache.update or cache.offloading:
        return None
    if any(segment.lengths is not None or segment.keys.shape[0] != rows for segment in segments):
        return None
    layers = cache.layers
    if cache.layer_class_to_replicate is DynamicLayer:
        layers.extend(DynamicLayer() for _ in range(len(layers), index + 1))
    if index < len(layers) and type(layers[index]) is DynamicLayer and not layers[index].get_seq_length():
        layers[index] = MemoryCacheLayer()
    layer = layers[index] if index < len(layers) else None
    return MemoryInCache(layer, segments) if isinstance(layer, MemoryCacheLayer) else None


def _writable(buffer: _Buffer) -> bool:
    """Return whether a buffer can be written: one made in inference mode cannot be outside of it."""
    return torch.is_inference_mode_enabled() or not buffer.keys.is_inference()
