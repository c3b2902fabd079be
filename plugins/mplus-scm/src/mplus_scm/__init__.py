"""SCM (arXiv 2304.13343) for mplus: a stream of turns, of which the last one and the best ones go into the prompt."""

from __future__ import annotations

from mplus_scm.mechanism import SCMMechanism

__all__ = ["SCMMechanism"]
