"""Published checkpoints, and traces of published code that are played again and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mplus.registry import lazy_exports

if TYPE_CHECKING:
    from mplus.interop.golden import REPLAYS, CaseReport, TracePlayer, replay
    from mplus.interop.published import PublishedCheckpoint, load_published

__all__ = ["REPLAYS", "CaseReport", "PublishedCheckpoint", "TracePlayer", "load_published", "replay"]

__getattr__, __dir__ = lazy_exports(
    "mplus.interop",
    {
        "mplus.interop.golden": ("REPLAYS", "CaseReport", "TracePlayer", "replay"),
        "mplus.interop.published": ("PublishedCheckpoint", "load_published"),
    },
)
