"""Stores by name."""

from __future__ import annotations

from mplus.config import Component, options_of
from mplus.stores import STORES
from mplus.stores.base import MemoryStore, StoreLayout


def build_store(component: Component, layout: StoreLayout) -> MemoryStore:
    """Build an empty store. Raises UnknownNameError, PluginError or ConfigError."""
    cls = STORES.get(component.name)
    return cls(layout, options_of(cls, component.options))
