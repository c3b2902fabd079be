"""A key/value cache layer that keeps memory in front of its text, so that the two are not joined for every token."""

from __future__ import annotations

from typing import cast

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

    def __deepcopy__(self, memo: dict[int, _Buffer]) -> _Buffer:
        # Segments are never written, so copies may share them; only then does ``holds`` know them again.
        return _Buffer(self.keys.clone(), self.values.clone(), self.segments, self.front)


class MemoryCacheLayer(DynamicLayer):
    """A ``DynamicLayer`` of transformers whose text lies in a buffer with room behind it, and memory in front of it.

    New text is written into the room. Whatever else changes the text (beams that are reordered, tokens that are cut
    off) leaves the buffer, and the next token makes a new one. Where gradients flow there is no buffer.
    """

    _keys: Tensor  # None until there is text, as in any layer of transformers
    _values: Tensor
    _buffer: _Buffer | None = None
    single_tokens = 0

    @property
    def keys(self) -> Tensor:
        """``[B, Hkv, S, D]`` of the text."""
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys, self._buffer = cast("Tensor", keys), None

    @property
    def values(self) -> Tensor:
        """``[B, Hkv, S, Dv]`` of the text."""
        return self._values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values, self._buffer = cast("Tensor", values), None

    def update(self, key_states: Tensor, value_states: Tensor, *args: int, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
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
        # Empty, not zeros: what lies behind the text is written before it is read.
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
        """Return whether ``keys`` ``[B, Hkv, S, D]`` are the layer's text as it lies there; a decoder may change it."""
        own = self.layer.keys
        # Compared by place and not by value: no number is read, and a copy, equal or not, is not this text.
        return keys.data_ptr() == own.data_ptr() and keys.shape == own.shape and keys.stride() == own.stride()

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of ``[memory | text]``."""
        return self.layer.behind(self.segments)


def memory_in_cache(cache: Cache | None, index: int, segments: tuple[Segment, ...], rows: int) -> MemoryInCache | None:
    """Let layer ``index`` of a cache keep ``segments``; None where it cannot.

    That is: without a cache that grows as the text does; where a batch of ``rows`` shares one memory, which would be
    copied for each; where streams have rows of different number; and where gradients flow.
    """
    if torch.is_grad_enabled() or cache is None:
        return None
    # A cache of another kind may keep its layers anywhere, and an offloaded one moves them away.
    if getattr(type(cache), "update", None) is not Cache.update or cache.offloading:
        return None
    if any(segment.lengths is not None or segment.keys.shape[0] != rows for segment in segments):
        return None
    layers = cache.layers
    if cache.layer_class_to_replicate is DynamicLayer:
        layers.extend(DynamicLayer() for _ in range(len(layers), index + 1))
    layer = layers[index] if index < len(layers) else None
    if type(layer) is DynamicLayer and not layer.get_seq_length():
        layer = layers[index] = MemoryCacheLayer()
    return MemoryInCache(layer, segments) if isinstance(layer, MemoryCacheLayer) else None


def _writable(buffer: _Buffer) -> bool:
    """Return whether a buffer can be written: one made in inference mode cannot be outside of it."""
    return torch.is_inference_mode_enabled() or not buffer.keys.is_inference()
