"""The time of a memory: datetimes with a timezone for callers, seconds since 1970 (UTC) in tables and files."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from mplus.errors import InputError

Clock = Callable[[], datetime]
"""Returns the present time, with a timezone."""

FIRST, LAST = -62_135_596_800.0, 221_845_392_000.0
"""The first and the last time there is, in seconds: the beginnings of the years 1 and 9000."""


def utc_now() -> datetime:
    """Return the present time: the clock of a memory that is given no other."""
    return datetime.now(UTC)


def seconds_of(time: datetime, what: str) -> float:
    """Return a time in seconds since 1970 (UTC). Raises InputError, which names it ``what``: it has no timezone."""
    if not isinstance(time, datetime) or time.tzinfo is None:
        raise InputError(f"{what} must be a datetime with a timezone, as datetime.now(timezone.utc), got {time!r}")
    return time.timestamp()


def datetime_of(seconds: float | None) -> datetime | None:
    """Return seconds since 1970 as a datetime in UTC; None: the time is not known."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def read_clock(clock: Clock) -> float:
    """Return what a clock says, in seconds since 1970 (UTC). Raises InputError: it gives no time with a timezone."""
    return seconds_of(clock(), "what the clock of a memory returns")


def expiry_of(expires: datetime | timedelta, clock: Clock) -> float:
    """Return when a source that is written now expires, in seconds since 1970 (UTC).

    Raises InputError: it is no time with a timezone, no length of time, or not after the present.
    """
    now = read_clock(clock)
    due = now + expires.total_seconds() if isinstance(expires, timedelta) else seconds_of(expires, "expires")
    if not now < due <= LAST:
        raise InputError(
            f"expires must be a time to come, after {datetime_of(now)}, or a positive timedelta, got {expires!r}"
        )
    return due
