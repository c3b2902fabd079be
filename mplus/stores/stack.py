"""The stack of stores of a directory: mapped files innermost, and around them the stores asked for.

A store that **wraps** another has it as ``inner``, in its options and as an attribute. One that makes something else of
the rows (``quantized``) belongs to the directory: the files hold what it made, and the manifest says so with all its
options. One that is ``transparent`` (``tiered``) is as asked for at each opening.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from mplus.config import Component, JsonValue, options_of
from mplus.stores import STORES
from mplus.stores.base import MemoryStore, parts_of
from mplus.stores.mmap import MmapStore

INNERMOST = MmapStore.name


def stack_of(wanted: Component, kept: Component | None = None) -> Component:
    """Return the store of a directory, with the stores inside it.

    Args:
        wanted: the store asked for. What is innermost there (``ram``, say) gives way to mapped files.
        kept: what the manifest says; None: of a new directory. Where its files hold something else than ``wanted``
            would write, they stay as they are, and transparent stores of ``wanted`` go around all of it.

    Raises:
        UnknownNameError, PluginError, ConfigError: there is no such store, or an option breaks its rule.
    """
    wrapping = _wrapping(wanted)
    if kept is not None and _made(wrapping) != _made(_wrapping(kept)):
        wrapping = [*(part for part in wrapping if STORES.get(part.name).transparent), *_wrapping(kept)]
    return _around(wrapping)


def saved_stack(store: MemoryStore) -> str | dict[str, JsonValue]:
    """Return the manifest's entry for a directory's store: each part that changes rows, with all options."""
    found = [Component(part.name, _facts(part.options)) for part in parts_of(store)[:-1] if not part.transparent]
    return _around(found).plain()


def component_of(store: MemoryStore) -> Component:
    """Return what makes another store of the kind of ``store``, with the same options and the same stores inside it."""
    *around, innermost = [Component(part.name, _facts(part.options)) for part in parts_of(store)]
    return _around(around, innermost)


def _facts(options: attrs.AttrsInstance) -> dict[str, JsonValue]:
    """Return all options of a store but ``inner``."""
    return {name: value for name, value in attrs.asdict(options, recurse=False).items() if name != "inner"}


def _wrapping(kind: Component) -> list[Component]:
    """Return the stores around the innermost one, from outside in, all their options but ``inner`` written out."""
    found = []
    inner: Any = kind
    while isinstance(inner, Component):
        part, options = inner, options_of(STORES.get(inner.name), inner.options)
        inner = getattr(options, "inner", None)
        if isinstance(inner, Component):
            found.append(Component(part.name, _facts(options)))
    return found


def _made(wrapping: Sequence[Component]) -> list[Component]:
    return [part for part in wrapping if not STORES.get(part.name).transparent]


def _around(wrapping: Sequence[Component], innermost: Component | None = None) -> Component:
    """Return stores around an innermost one; None: mapped files."""
    kind = Component(INNERMOST) if innermost is None else innermost
    for part in reversed(wrapping):
        kind = Component(part.name, {**part.options, "inner": kind.plain()})
    return kind
