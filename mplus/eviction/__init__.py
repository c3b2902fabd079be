"""The policies that make room in long-term memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry

if TYPE_CHECKING:
    from mplus.eviction.base import EvictionPolicy

__all__ = ["EVICTION"]

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
