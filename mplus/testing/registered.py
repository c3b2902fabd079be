"""Running a conformance suite for everything that a registry knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mplus.registry import Registry


def suites(suite: type, registry: Registry[Any]) -> dict[str, type]:
    """One subclass of ``suite`` per registered implementation, by the name under which pytest collects it.

    Put into a test module's namespace (``globals().update(suites(StoreConformance, STORES))``), every
    implementation is tested without being listed, installed plug-ins included.
    """
    made: dict[str, type] = {}
    for name in registry.names():
        title = "Test" + "".join(part.capitalize() for part in name.replace("-", "_").split("_")) + suite.__name__
        made[title] = type(title, (suite,), {"implementation": registry.get(name)})
    return made
