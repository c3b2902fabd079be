"""Published checkpoints, and traces of published code that are played again and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import lazy_exports

if TYPE_CHECKING:
    from mplus.interop.behaviours import BehaviourPlayer, Unavailable
    from mplus.interop.golden import REPLAYS, TracePlayer, replay
    from mplus.interop.published import PublishedCheckpoint, load_published
    from mplus.interop.report import CaseReport

__all__ = [
    "REPLAYS",
    "BehaviourPlayer",
    "CaseReport",
    "PublishedCheckpoint",
    "TracePlayer",
    "Unavailable",
    "load_published",
    "replay",
]

__getattr__, __dir__ = lazy_exports(
    "mplus.interop",
    {
        "mplus.interop.behaviours": ("BehaviourPlayer", "Unavailable"),
        "mplus.interop.golden": ("REPLAYS", "TracePlayer", "replay"),
        "mplus.interop.published": ("PublishedCheckpoint", "load_published"),
        "mplus.interop.report": ("CaseReport",),
    },
)
