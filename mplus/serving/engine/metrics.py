"""Metrics: counts and sums of an engine, in which no user can be told from another."""

from __future__ import annotations

from collections import defaultdict


class Metrics:
    """Numbers by name: counts, sums of seconds, and what is so at the moment; a duration has a count and a sum."""

    def __init__(self) -> None:
        self._numbers: defaultdict[str, float] = defaultdict(float)

    def count(self, name: str, number: float = 1) -> None:
        """Add to a count."""
        self._numbers[name] += number

    def took(self, name: str, seconds: float, times: int = 1) -> None:
        """Note ``times`` durations of so many seconds."""
        self._numbers[f"{name}_count"] += times
        self._numbers[f"{name}_sum"] += seconds * times

    def now(self, **numbers: float) -> dict[str, float]:
        """Return all numbers, with those that are so at the moment."""
        return {**self._numbers, **numbers}
