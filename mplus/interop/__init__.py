"""Published checkpoints and golden traces of the published code."""

from mplus.interop.comparison import CaseReport
from mplus.interop.golden import replay
from mplus.interop.published import PublishedCheckpoint, load_published

__all__ = ["CaseReport", "PublishedCheckpoint", "load_published", "replay"]
