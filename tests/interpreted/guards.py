"""Buffers with no man's land around them and between their rows: what is read there is NaN, what is written is seen."""

from __future__ import annotations

import math

import torch

SENTINEL = -12345.0
MARGIN = 2**15
"""Numbers in front of and behind each buffer: the interpreter really writes where a mistaken kernel writes."""


def guarded(tensor):
    """The same numbers inside a larger buffer of NaN, or of the largest number where there is no NaN."""
    if tensor.dtype == torch.bool:
        outside = True
    elif tensor.is_floating_point():
        outside = torch.nan
    else:
        outside = torch.iinfo(tensor.dtype).max // 2
    _, inside = _buffer(tensor.shape, outside, tensor.dtype)
    inside.copy_(tensor)
    return inside


class Output:
    """A buffer to write to: NaN where a kernel has to write, a sentinel where it must not."""

    def __init__(self, *shape, dtype=torch.float32):
        self._whole, self.inside = _buffer(shape, SENTINEL, dtype)
        self.inside.fill_(torch.nan)

    def check(self):
        """Raise AssertionError unless all of the inside was written and nothing of the outside."""
        assert not self.inside.isnan().any(), "not written, or NaN written"
        written = self.inside.clone()
        sentinel = torch.tensor(SENTINEL, dtype=written.dtype)
        self.inside.fill_(sentinel)
        assert bool((self._whole == sentinel).all()), "written outside"
        self.inside.copy_(written)


def _buffer(shape, outside, dtype):
    """All of a buffer, and the part of it that is in use, of which no dimension follows closely on another."""
    larger = [size + 3 for size in shape]
    count = math.prod(larger)
    whole = torch.full((count + 2 * MARGIN,), outside, dtype=dtype)
    return whole, whole[MARGIN : MARGIN + count].view(larger)[tuple(slice(1, -2) for _ in shape)]
