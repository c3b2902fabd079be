"""Pace: how much is written and read in one turn of the loop, by what it took so far."""

from __future__ import annotations

import math
import time

from attrs import define, field

SHARE = 0.3
"""Most of the time that goes into writes while answers are generated."""
SMALLEST = 16
"""Tokens of a prompt that are read at once at least."""
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
        token: of a token of a prompt.
        chunk: of a chunk that is written.
    """

    turn_seconds: float
    step: float = 0.0
    token: float = 1e-4
    chunk: float = 0.01
    _writes: float = field(default=0.0, init=False)
    _all: float = field(default=0.0, init=False)
    _looked: float = field(factory=time.perf_counter, init=False)

    def stepped(self, seconds: float) -> None:
        """Note the seconds of a decode step."""
        self.step = seconds if not self.step else self.step + FOLLOWS * (seconds - self.step)
        self._spent(seconds, writing=False)

    def read(self, tokens: int, seconds: float) -> None:
        """Note the seconds in which so many tokens of prompts were read."""
        self.token += FOLLOWS * (seconds / max(tokens, 1) - self.token)
        self._spent(seconds, writing=False)

    def wrote(self, chunks: int, seconds: float) -> None:
        """Note the seconds in which so many chunks were written."""
        self.chunk += FOLLOWS * (seconds / max(chunks, 1) - self.chunk)
        self._spent(seconds, writing=True)

    def chunks(self, *, answering: bool) -> int:
        """Return how many chunks may be written in this turn; 0: writes have had their share of the last second."""
        if not answering:
            return max(1, int(4 * self.turn_seconds / self.chunk))
        if self._writes > SHARE * max(self._all, self.turn_seconds):
            return 0
        return max(1, int(self._budget / self.chunk))

    def tokens(self, spent: float, *, answering: bool) -> int:
        """Return how many tokens of prompts may be read in a turn of which so many seconds are spent; 0: none."""
        if not answering:
            return max(SMALLEST, int(4 * self.turn_seconds / self.token))
        left = self._budget - spent
        return 0 if left < self._budget / 2 else max(SMALLEST, int(left / self.token))

    @property
    def _budget(self) -> float:
        return max(self.turn_seconds, 2 * self.step) - self.step

    def _spent(self, seconds: float, *, writing: bool) -> None:
        now = time.perf_counter()
        fade = math.exp(self._looked - now)
        self._looked = now
        self._all = fade * self._all + seconds
        self._writes = fade * self._writes + (seconds if writing else 0.0)
