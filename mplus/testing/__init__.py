"""Conformance suites and Hypothesis strategies for authors of plug-ins.

A suite is a class to derive from in a test module::

    from mplus.testing.retrievers import RetrieverConformance

    class TestRecency(RetrieverConformance):
        implementation = RecencyRetriever

Needs pytest and hypothesis, but for ``drawing``, ``attention``, ``requests`` and ``rounding``, which need neither.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mplus.registry import Registry

__all__ = ["suites"]

if importlib.util.find_spec("pytest") is not None:
    import pytest

    # Failing asserts in the suites then show the values compared, as those in test modules do.
    pytest.register_assert_rewrite(
        *(
            f"mplus.testing.{module}"
            for module in (
                "backends",
                "chunk_retrievers",
                "eviction",
                "mechanisms",
                "objectives",
                "retrievers",
                "rounding",
                "sources",
                "store_model",
                "stores",
            )
        )
    )


def suites(
    suite: type, registry: Registry[Any], special: Mapping[str, type] | None = None, *, of: type = object
) -> dict[str, type]:
    """Return one subclass of ``suite`` per registered implementation, by the name under which pytest collects it.

    Put into a test module's namespace (``globals().update(suites(StoreConformance, STORES))``), every
    implementation is tested without being listed, installed plug-ins included.

    Args:
        suite: the suite.
        registry: the implementations.
        special: by name, subclasses of ``suite`` for implementations that need one.
        of: only implementations that derive from this class.
    """
    made: dict[str, type] = {}
    for name in registry.names():
        if not issubclass(registry.get(name), of):
            continue
        title = "Test" + "".join(part.capitalize() for part in name.replace("-", "_").split("_")) + suite.__name__
        made[title] = type(title, ((special or {}).get(name, suite),), {"implementation": registry.get(name)})
    return made
