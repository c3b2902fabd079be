"""Placement: which of several engines a memory belongs to, by rendezvous hashing.

A memory directory has one writer, so a request goes to the owner of its memory and waits there; that another engine is
idle does not matter. Every front finds the same owner from the same list of engines, with nothing written down. When an
engine comes or goes, only the memories move that it gets or had: one in as many as there are engines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from mplus.serving.messages import Command, Generate, MemoryName


def placement_key(request: Command | Generate) -> str:
    """Return what a request is placed by: the memory it is about, hashed; empty: any engine can answer it.

    The key appears in Ray's logs and metrics, which name no user.
    """
    memory: MemoryName | None = getattr(request, "memory", None)
    if memory is None:
        return ""
    return hashlib.sha256(f"{memory.tenant}\n{memory.id}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def owner(key: str, engines: Iterable[str]) -> str:
    """Return the engine that owns what is placed by ``key``: that with the highest hash of both.

    Args:
        key: of ``placement_key``, not empty.
        engines: names of all that are alive, at least one; their order does not matter.

    Source: Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates" (highest random weight).
    """
    return max(engines, key=lambda engine: hashlib.sha256(f"{key}/{engine}".encode()).digest())
