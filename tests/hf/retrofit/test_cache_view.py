"""What the cache view says of memory that it cannot show."""

from __future__ import annotations

import pytest
import torch

from mplus.backends.base import Segment
from mplus.errors import NotSupported
from mplus.hf.retrofit.cache_view import MemoryCacheView


def test_a_memory_with_a_bias_is_refused_by_name():
    keys = torch.zeros(1, 2, 3, 4)
    assert MemoryCacheView(None, Segment(keys, keys)).get_seq_length() == 0
    with pytest.raises(NotSupported, match=r"'cache_view' shows .* keys and values only, got .* bias \[1, 1, 3\]"):
        MemoryCacheView(None, Segment(keys, keys, bias=torch.zeros(1, 1, 3)))
