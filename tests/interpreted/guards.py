"""Buffers with no man's land around them and between their rows: what is read there is NaN, what is written is seen."""

from __future__ import annotations

import torch

SENTINEL = -12345.0


def guarded(tensor):
    """The same numbers inside a larger buffer of NaN, or of the largest number where there is no NaN."""
    if tensor.dtype == torch.bool:
        outside = True
    elif tensor.is_floating_point():
        outside = torch.nan
    else:
        outside = torch.iinfo(tensor.dtype).max // 2
    inside = _inside(torch.full([size + 3 for size in tensor.shape], outside, dtype=tensor.dtype))
    inside.copy_(tensor)
    return inside


class Output:
    """A buffer to write to: NaN where a kernel has to write, a sentinel where it must not."""

    def __init__(self, *shape, dtype=torch.float32):
        self.whole = torch.full([size + 3 for size in shape], SENTINEL, dtype=dtype)
        self.inside = _inside(self.whole)
        self.inside.fill_(torch.nan)

    def check(self):
        """Raise AssertionError unless all of the inside was written and nothing of the outside."""
        assert not self.inside.isnan().any(), "not written, or NaN written"
        outside = self.whole.clone()
        _inside(outside).fill_(SENTINEL)
        assert bool((outside == torch.tensor(SENTINEL, dtype=outside.dtype)).all()), "written outside"


def _inside(whole):
    return whole[tuple(slice(1, -2) for _ in whole.shape)]
