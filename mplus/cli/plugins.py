"""``mplus plugins``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplus.cli.output import print_json

if TYPE_CHECKING:
    from mplus.registry import NameRegistry


def plugins(as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON instead.")] = False) -> None:
    """List everything a config, recipe or command can name, where it comes from, and what is wrong with broken ones.

    Each is imported to find out. MPLUS_PLUGINS in the environment limits third-party packages to those it names.
    """
    found = implementations()
    if as_json:
        print_json(found)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    for column in ("kind", "name", "origin"):
        table.add_column(column, overflow="fold")
    for entry in found:
        table.add_row(*(escape(entry[column] or "") for column in ("kind", "name", "origin")))
    console = Console(highlight=False)
    console.print(table)
    broken = [entry for entry in found if entry["error"]]
    if broken:
        console.print(f"\n{len(broken)} cannot be used:", style="bold red")
    for entry in broken:
        console.print(f"- {entry['error']}", markup=False, soft_wrap=True)


def registries() -> list[NameRegistry[Any]]:
    """Return every registry of mplus."""
    from mplus.backends import BACKENDS
    from mplus.eviction import EVICTION
    from mplus.interop.golden import REPLAYS
    from mplus.mechanisms import MECHANISMS
    from mplus.retrievers import RETRIEVERS
    from mplus.retrievers.chunks import CHUNK_RETRIEVERS
    from mplus.stores import STORES
    from mplus.training.data import SOURCES
    from mplus.training.objectives import OBJECTIVES
    from mplus.training.recipe import RECIPES

    return [MECHANISMS, STORES, EVICTION, RETRIEVERS, CHUNK_RETRIEVERS, BACKENDS, OBJECTIVES, SOURCES, RECIPES, REPLAYS]


def implementations() -> list[dict[str, str | None]]:
    """Return kind, name, origin and error (None: none) of every implementation."""
    _import_torch()
    return [
        {"kind": registry.kind, "name": entry.name, "origin": entry.origin, "error": entry.error}
        for registry in registries()
        for entry in registry.entries()
    ]


def _import_torch() -> None:
    """Import torch without its own plug-ins.

    It looks for them with ``importlib.metadata``, which one line without ``=`` in the entry points of any distribution
    brings down, and torch with it. That distribution is one of those to be listed here.
    """
    if "torch" in sys.modules:
        return
    switch = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "0"
    try:
        import torch  # noqa: F401
    finally:
        os.environ.pop(switch)
        if before is not None:
            os.environ[switch] = before
