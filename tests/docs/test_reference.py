"""The reference leaves nothing out that people are meant to use."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import mplus
from mplus.backends import BACKENDS
from mplus.eviction import EVICTION
from mplus.mechanisms import MECHANISMS
from mplus.retrievers import RETRIEVERS
from mplus.retrievers.chunks import CHUNK_RETRIEVERS
from mplus.stores import STORES
from mplus.training.data import SOURCES
from mplus.training.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
DOCUMENTED = {
    name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}
REGISTRIES = {
    registry.kind: registry
    for registry in (STORES, EVICTION, RETRIEVERS, CHUNK_RETRIEVERS, BACKENDS, MECHANISMS, OBJECTIVES, SOURCES)
}


def is_documented(thing: type) -> bool:
    """Whether a class or function has a directive of its own, or one of its module."""
    return bool({thing.__module__, f"{thing.__module__}.{thing.__qualname__}"} & DOCUMENTED)


def interface_of(registry) -> type:
    """The class that every implementation derives from."""
    module, _, name = registry._base.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_what_is_documented_can_be_imported(name: str) -> None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return
    raise AssertionError(name)


def test_every_public_name_of_the_package() -> None:
    missing = [name for name in mplus.__all__ if name != "__version__" and not is_documented(getattr(mplus, name))]
    # What belongs to memory is documented as a member of its package.
    assert missing == ["Memory", "write_together"]
    assert "mplus.memory" in DOCUMENTED
    assert {"Memory", "write_together"} <= set(importlib.import_module("mplus.memory").__all__)


def test_every_module_of_the_top_level() -> None:
    modules = {f"mplus.{file.stem}" for file in (ROOT / "mplus").glob("*.py") if not file.stem.startswith("_")}
    assert modules <= DOCUMENTED


@pytest.mark.parametrize("kind", sorted(REGISTRIES))
def test_every_implementation_and_its_interface(kind: str) -> None:
    registry = REGISTRIES[kind]
    ours = [registry.get(name) for name in registry.names() if registry.origin(name).startswith("mplus (")]
    assert ours
    for implementation in ours:
        assert is_documented(implementation), implementation
        assert is_documented(interface_of(registry)), registry.kind


def test_every_conformance_suite() -> None:
    for file in (ROOT / "mplus" / "testing").glob("*.py"):
        for name in re.findall(r"^class (\w+Conformance)\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            assert f"mplus.testing.{file.stem}.{name}" in DOCUMENTED


def test_the_overview_links_every_page() -> None:
    overview = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.name == "index.md" or f"]({page.name})" in overview
