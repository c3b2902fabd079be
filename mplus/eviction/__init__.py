"""Policies that make room in long-term memory by name, and the names one needs to write another.

A policy derives from ``EvictionPolicy``. ``topk_rows`` chooses rows by sort keys without sorting all of them, and
``AccessLog`` knows when rows were last read. ``mplus.testing.eviction.EvictionConformance`` tries a policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry, lazy_exports

if TYPE_CHECKING:
    from mplus.config import flag, must_be, number, one_of, options_of, whole
    from mplus.eviction.base import EvictionPolicy, FifoEviction, SortKeys, topk_rows
    from mplus.stores.access_log import AccessLog
    from mplus.stores.base import Chunk, StoreView, chunk_min

__all__ = [
    "EVICTION",
    "AccessLog",
    "Chunk",
    "EvictionPolicy",
    "FifoEviction",
    "SortKeys",
    "StoreView",
    "chunk_min",
    "flag",
    "must_be",
    "number",
    "one_of",
    "options_of",
    "topk_rows",
    "whole",
]

EVICTION: Registry[EvictionPolicy] = Registry(
    "eviction policy",
    group="mplus.eviction",
    base="mplus.eviction.base:EvictionPolicy",
    builtin={
        "fifo": "mplus.eviction.base:FifoEviction",
        "lru": "mplus.eviction.lru:LruEviction",
        "reservoir": "mplus.eviction.reservoir:ReservoirEviction",
        "ttl": "mplus.eviction.ttl:TtlEviction",
    },
)

__getattr__, __dir__ = lazy_exports(
    "mplus.eviction",
    {
        "mplus.config": ("flag", "must_be", "number", "one_of", "options_of", "whole"),
        "mplus.eviction.base": ("EvictionPolicy", "FifoEviction", "SortKeys", "topk_rows"),
        "mplus.stores.access_log": ("AccessLog",),
        "mplus.stores.base": ("Chunk", "StoreView", "chunk_min"),
    },
)
