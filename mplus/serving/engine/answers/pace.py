"""Pace: how much is written and read beside the answers that are generated, by what it took so far."""

from __future__ import annotations

from attrs import define, field

SHARE = 0.3
"""Most of the time in which texts are written while answers are generated."""
SMALLEST, MOST = 16, 8192
"""Tokens of prompts that are read in a turn, at least and at most."""
MOST_PROMPTS = 64
"""Prompts that are read in a turn, at most: even a short one costs what its memory is asked."""
FOLLOWS = 0.3
"""Weight of a new measurement."""


@define(eq=False)
class Pace:
    """Measured seconds, and the work that fits into a turn.

    A turn takes at most ``turn_seconds`` or twice a decode step, whichever is more, as far as pieces of ``SMALLEST``
    tokens allow: that is the gap that an answer sees. Texts are written in a thread beside the turns, a chunk of each
    at a time, with pauses.

    Attributes:
        turn_seconds: as asked for.
        step: of one decode step.
        chunk: of a chunk that is written.
    """

    turn_seconds: float
    step: float = 0.0
    chunk: float = 0.01
    _tokens: dict[bool, float] = field(factory=lambda: {True: 64.0, False: 512.0}, init=False)
    _prompts: dict[bool, float] = field(factory=lambda: {True: 8.0, False: float(MOST_PROMPTS)}, init=False)

    def stepped(self, seconds: float) -> None:
        """Note the seconds of a decode step."""
        self.step = seconds if not self.step else self.step + FOLLOWS * (seconds - self.step)

    def read(self, tokens: int, seconds: float, *, answering: bool, prompts: int = 1) -> None:
        """Note the seconds in which so many tokens of so many prompts were read, while answers waited for it or not.

        What a turn reads doubles at most, and halves at most, towards what would have fitted: a pass has costs of its
        own, so that seconds do not grow as tokens do.
        """
        change = min(max(self._time(answering=answering) / max(seconds, 1e-9), 0.5), 2.0)
        limit = self._tokens[answering]
        if change < 1 or tokens >= limit / 2:
            self._tokens[answering] = min(max(limit * change, SMALLEST), MOST)
        several = self._prompts[answering]
        if change < 1 or prompts >= several / 2:
            self._prompts[answering] = min(max(several * change, 1.0), float(MOST_PROMPTS))

    def tokens(self, *, answering: bool) -> int:
        """Return how many tokens of prompts may be read in a turn."""
        return int(self._tokens[answering])

    def prompts(self, *, answering: bool) -> int:
        """Return how many prompts may be read in a turn."""
        return int(self._prompts[answering])

    def wrote(self, chunks: int, seconds: float) -> None:
        """Note the seconds in which so many chunks were written."""
        self.chunk += FOLLOWS * (seconds / max(chunks, 1) - self.chunk)

    def chunks(self, *, answering: bool) -> int:
        """Return how many chunks may be written in one go."""
        return max(1, int(self._time(answering=answering) / self.chunk))

    def pause(self, seconds: float) -> float:
        """Return how long to write nothing after so many seconds of it, while answers are generated."""
        return seconds * (1 - SHARE) / SHARE

    def _time(self, *, answering: bool) -> float:
        """Return the seconds of a turn besides its decode step; more of them where no answer waits."""
        return max(self.turn_seconds, 2 * self.step) - self.step if answering else 4 * self.turn_seconds
