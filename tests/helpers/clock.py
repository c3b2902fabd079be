"""Clocks of memories that do not run by themselves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from attrs import define

import mplus.memory.transaction

if TYPE_CHECKING:
    import pytest

NOON = datetime(2026, 12, 1, 12, tzinfo=UTC)


def noon() -> datetime:
    """The same time whenever it is asked for."""
    return NOON


def stop(patch: pytest.MonkeyPatch) -> None:
    """Let memories that are given no clock have this one."""
    patch.setattr(mplus.memory.transaction, "utc_now", noon)


@define
class Hands:
    """A clock that is set by hand."""

    now: datetime = NOON

    def __call__(self) -> datetime:
        return self.now

    def move(self, **passed: float) -> None:
        """Go on by a ``timedelta(**passed)``."""
        self.now += timedelta(**passed)
