"""Pace: how much is written and read in one turn of the loop, by what it took so far."""

from __future__ import annotations

import math
import time

from attrs import define, field

SHARE = 0.3
"""Most of the time that goes into writes while answers are generated."""
SMALLEST, MOST = 16, 8192
"""Tokens of prompts that are read in a turn, at least and at most."""
FOLLOWS = 0.3
"""Weight of a new measurement."""


@define(eq=False)
class Pace:
    """Measured seconds, and the work that fits into a turn.

    A turn takes at most ``turn_seconds`` or twice a decode step, whichever is more, as far as single chunks and pieces
    of ``SMALLEST`` tokens allow: that is the gap that an answer sees.

    Attributes:
        turn_seconds: as asked for.
        step: of one decode step.
        chunk: of a chunk that is written.
    """

    turn_seconds: float
    step: float = 0.0
    chunk: float = 0.01
    _tokens: dict[bool, float] = field(factory=lambda: {True: 64.0, False: 512.0}, init=False)
    _writes: float = field(default=0.0, init=False)
    _all: float = field(default=0.0, init=False)
    _looked: float = field(factory=time.perf_counter, init=False)

    def stepped(self, seconds: float) -> None:
        """Note the seconds of a decode step."""
        self.step = seconds if not self.step else self.step + FOLLOWS * (seconds - self.step)
        self._spent(seconds, writing=False)

    def read(self, tokens: int, seconds: float, *, answering: bool) -> None:
        """Note the seconds in which so many tokens of prompts were read, while answers waited for it or not.

        What a turn reads doubles at most, and halves at most, towards what would have fitted: a pass has costs of its
        own, so that seconds do not grow as tokens do.
        """
        change = min(max(self._time(answering=answering) / max(seconds, 1e-9), 0.5), 2.0)
        limit = self._tokens[answering]
        if change < 1 or tokens >= limit / 2:
            self._tokens[answering] = min(max(limit * change, SMALLEST), MOST)
        self._spent(seconds, writing=False)

    def wrote(self, chunks: int, seconds: float) -> None:
        """Note the seconds in which so many chunks were written."""
        self.chunk += FOLLOWS * (seconds / max(chunks, 1) - self.chunk)
        self._spent(seconds, writing=True)

    def chunks(self, *, answering: bool) -> int:
        """Return how many chunks may be written in this turn; 0: writes have had their share of the last second."""
        if answering and self._writes > SHARE * max(self._all, self.turn_seconds):
            return 0
        return max(1, int(self._time(answering=answering) / self.chunk))

    def tokens(self, spent: float, *, answering: bool) -> int:
        """Return how many tokens of prompts may be read in a turn of which so many seconds are spent; 0: none."""
        if answering and spent > self._time(answering=True) / 2:
            return 0
        return int(self._tokens[answering])

    def _time(self, *, answering: bool) -> float:
        """Return the seconds of a turn besides its decode step; more of them where no answer waits."""
        return max(self.turn_seconds, 2 * self.step) - self.step if answering else 4 * self.turn_seconds

    def _spent(self, seconds: float, *, writing: bool) -> None:
        now = time.perf_counter()
        fade = math.exp(self._looked - now)
        self._looked = now
        self._all = fade * self._all + seconds
        self._writes = fade * self._writes + (seconds if writing else 0.0)
