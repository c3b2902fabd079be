"""How long the tests may take: on every change, or at night."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

NIGHTLY = os.environ.get("MPLUS_NIGHTLY", "") not in {"", "0"}
"""Whether the long modes were asked for, by MPLUS_NIGHTLY=1."""


def on_every_change(usual: T, *, nightly: T) -> T:
    """How many of something to try: few on every change, many at night."""
    return nightly if NIGHTLY else usual
