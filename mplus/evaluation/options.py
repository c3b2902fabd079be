"""Options of an evaluation, and of the arms it compares."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from attrs import define, field
from attrs.converters import optional

from mplus.config import number, whole
from mplus.errors import ConfigError


def as_numbers(numbers: Iterable[int]) -> tuple[int, ...]:
    """Return numbers as a tuple: a converter of options, whose type mypy understands."""
    return tuple(numbers)


def as_texts(texts: Iterable[str]) -> tuple[str, ...]:
    """Return texts as a tuple: a converter of options, whose type mypy understands."""
    return tuple(texts)


@define(frozen=True, kw_only=True)
class RunOptions:
    """Settings of an evaluation over natural text.

    Example:
        >>> RunOptions().chosen_ages(passages=9)
        (0, 1, 2, 4, 8)

    Attributes:
        ages: passages told between the last needed one and the question; None: 0, 1, 2, 4, 8 and so on.
        streams: episodes at a time, as batch rows of one memory; results do not depend on it.
        separator: between passages, and before the question, where they are read as one text.
        seed: of the draws of which rows leave the STM: episode i has ``seed + i``.
        export: write the questions for SnapKV to this file.
        answers: write every answer to this file, a line of JSON each.
        directory: folder for memories on disk, which are closed and opened again before questions; None: in RAM. One
            that was written by an earlier run, or a part of it, is gone on with.
        timed: questions of each arm that are answered one by one to time the first token.
    """

    ages: tuple[int, ...] | None = field(default=None, converter=optional(as_numbers))
    streams: int = field(default=8, validator=whole(1))
    separator: str = "\n"
    seed: int = field(default=0, validator=whole(0))
    export: Path | None = field(default=None, converter=optional(Path))
    answers: Path | None = field(default=None, converter=optional(Path))
    directory: Path | None = field(default=None, converter=optional(Path))
    timed: int = field(default=0, validator=whole(0))

    def chosen_ages(self, passages: int) -> tuple[int, ...]:
        """Return the ages to ask at. Raises ConfigError when one is beyond the ``passages`` that are told."""
        if self.ages is None:
            return (0, *(2**power for power in range(passages.bit_length()) if 2**power < passages))
        if not self.ages or min(self.ages) < 0 or max(self.ages) >= passages:
            raise ConfigError(
                f"ages must be at least one number from 0 to {passages - 1}, one less than the passages told, got "
                f"{list(self.ages)}: tell more passages, or ask earlier"
            )
        return tuple(sorted(set(self.ages)))


@define(frozen=True, kw_only=True)
class ArmOptions:
    """The arms that are wanted, and their settings.

    Attributes:
        arms: names; None: all there are.
        window_tokens: of the plain window; None: as many as M+ attends to (begin row, K0 and N), or another mechanism
            (what it retrieves and keeps at hand, a chunk at least), and 64 for facts.
        window_converged: a window that answers a smaller share of what lies inside it is not to be compared with.
        bm25_passages, bm25_tokens: most passages in front of the question, and room for them; None: 4 (of facts, as
            many as the window holds), and as ``positions``.
        positions: of the decoder, for full-context and bm25; None: its ``max_position_embeddings``.
        snapkv_answers: file of answers; None: the arm is skipped.
        seed: of the random retriever.
    """

    arms: tuple[str, ...] | None = field(default=None, converter=optional(as_texts))
    window_tokens: int | None = field(default=None, validator=whole(1, optional=True))
    window_converged: float = field(default=0.98, validator=number(0, 1.01))
    bm25_passages: int | None = field(default=None, validator=whole(1, optional=True))
    bm25_tokens: int | None = field(default=None, validator=whole(1, optional=True))
    positions: int | None = field(default=None, validator=whole(1, optional=True))
    snapkv_answers: Path | None = field(default=None, converter=optional(Path))
    seed: int = field(default=0, validator=whole(0))
