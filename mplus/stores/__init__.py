"""Long-term storage of memory rows, and the policies that make room in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry

if TYPE_CHECKING:
    from mplus.stores.base import MemoryStore
    from mplus.stores.eviction import EvictionPolicy

__all__ = ["EVICTION", "STORES"]

STORES: Registry[MemoryStore] = Registry(
    "store",
    group="mplus.stores",
    base="mplus.stores.base:MemoryStore",
    builtin={
        "ram": "mplus.stores.ram:RamStore",
        "mmap": "mplus.stores.mmap:MmapStore",
        "quantized": "mplus.stores.quantized:QuantizedStore",
        "tiered": "mplus.stores.tiered:TieredStore",
    },
)

EVICTION: Registry[EvictionPolicy] = Registry(
    "eviction policy",
    group="mplus.eviction",
    base="mplus.stores.eviction:EvictionPolicy",
    builtin={
        "fifo": "mplus.stores.eviction:FifoEviction",
        "lru": "mplus.stores.eviction_lru:LruEviction",
        "reservoir": "mplus.stores.eviction_reservoir:ReservoirEviction",
        "ttl": "mplus.stores.eviction_ttl:TtlEviction",
    },
)
