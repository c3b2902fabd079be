"""What a report says about the run that made it."""

from __future__ import annotations

from mplus.training.circumstances import circumstances

__all__ = ["circumstances"]
