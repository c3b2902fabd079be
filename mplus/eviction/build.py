"""Eviction policies by name."""

from __future__ import annotations

from mplus.config import Component, options_of
from mplus.eviction import EVICTION
from mplus.eviction.base import EvictionPolicy


def build_eviction(component: Component) -> EvictionPolicy:
    """Build the eviction policy that ``component`` names.

    Raises:
        UnknownNameError, PluginError, ConfigError: there is no such policy, its plug-in fails, or an option is wrong.
    """
    cls = EVICTION.get(component.name)
    return cls(options_of(cls, component.options))
