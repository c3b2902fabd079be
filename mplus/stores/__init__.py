"""Stores of long-term memory rows by name, and the names one needs to write another.

A store derives from ``MemoryStore``, or from ``WrappingStore`` around another store. It checks rows with
``layout.check``, and ``mplus.testing.stores.StoreConformance`` tries it. ``whole``, ``number``, ``one_of`` and ``flag``
are validators for the fields of its ``Options``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry, lazy_exports

if TYPE_CHECKING:
    from mplus.config import Component, as_component, flag, must_be, number, one_of, options_of, whole
    from mplus.rows import MemoryRows
    from mplus.stores.base import (
        Chunk,
        Column,
        Content,
        Identity,
        Location,
        MemoryStore,
        StoreLayout,
        StoreView,
        chunk_min,
    )
    from mplus.stores.wrapping import WrappingStore, WrappingView

__all__ = [
    "STORES",
    "Chunk",
    "Column",
    "Component",
    "Content",
    "Identity",
    "Location",
    "MemoryRows",
    "MemoryStore",
    "StoreLayout",
    "StoreView",
    "WrappingStore",
    "WrappingView",
    "as_component",
    "chunk_min",
    "flag",
    "must_be",
    "number",
    "one_of",
    "options_of",
    "whole",
]

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

__getattr__, __dir__ = lazy_exports(
    "mplus.stores",
    {
        "mplus.config": ("Component", "as_component", "flag", "must_be", "number", "one_of", "options_of", "whole"),
        "mplus.rows": ("MemoryRows",),
        "mplus.stores.base": (
            "Chunk",
            "Column",
            "Content",
            "Identity",
            "Location",
            "MemoryStore",
            "StoreLayout",
            "StoreView",
            "chunk_min",
        ),
        "mplus.stores.wrapping": ("WrappingStore", "WrappingView"),
    },
)
