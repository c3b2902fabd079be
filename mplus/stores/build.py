"""Stores and eviction policies by name."""

from __future__ import annotations

from mplus.config import Component, options_of
from mplus.stores import EVICTION, STORES
from mplus.stores.base import MemoryStore, StoreLayout
from mplus.stores.eviction import EvictionPolicy


def build_store(component: Component, layout: StoreLayout) -> MemoryStore:
    """An empty store. Raises UnknownNameError, PluginError or ConfigError."""
    cls = STORES.get(component.name)
    return cls(layout, options_of(cls, component.options))


def build_eviction(component: Component) -> EvictionPolicy:
    """An eviction policy. Raises UnknownNameError, PluginError or ConfigError."""
    cls = EVICTION.get(component.name)
    return cls(options_of(cls, component.options))
