"""Long-term storage of memory rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry

if TYPE_CHECKING:
    from mplus.stores.base import MemoryStore

__all__ = ["STORES"]

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
