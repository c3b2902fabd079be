"""The batch reader at 1, 32 and 256 users, each with a memory of their own."""

from __future__ import annotations

import mplus
from benchmarks.gpu.session import Session
from mplus.errors import NotSupported


def batch(session: Session) -> None:
    """Time joining and steps of many users; not there before mplus has a batch reader."""
    with session.gate("batch reader") as _:
        if "BatchReader" not in mplus.__all__:
            raise NotSupported("this mplus has no BatchReader")
