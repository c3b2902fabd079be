"""What is written when a chunk is read, and what each layer sees of it later."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import Registry

if TYPE_CHECKING:
    from mplus.mechanisms.base import MemoryMechanism

__all__ = ["MECHANISMS"]

MECHANISMS: Registry[MemoryMechanism] = Registry(
    "mechanism",
    group="mplus.mechanisms",
    base="mplus.mechanisms.base:MemoryMechanism",
    builtin={
        "mplus": "mplus.mechanisms.mplus:MPlusMechanism",
        "memoryllm": "mplus.mechanisms.memoryllm:MemoryLLMMechanism",
        "kv": "mplus.mechanisms.kv.mechanism:KvMechanism",
    },
)
