"""What the demo on a chat model finds out, as plain data: the text on the screen and ``--json`` come from it."""

from __future__ import annotations

from statistics import median
from typing import Any

from attrs import define
from cattrs.preconf.json import make_converter

from mplus.cli.demo.chat.asking import Said
from mplus.config import JsonValue

JSON = make_converter()
"""Makes plain data of findings, and findings of it."""


@define(frozen=True, kw_only=True)
class ArmFinding:
    """One way to have the text, and how the questions were answered with it.

    Attributes:
        name: of the way.
        said: answers to the questions about what was told, in the order in which it was told.
        bytes: that it keeps; None: nothing to speak of.
        prefill_seconds: spent once, before the first question.
        text_tokens: of the text that is there for the question.
    """

    name: str
    said: tuple[Said, ...]
    bytes: int | None = None
    prefill_seconds: float | None = None
    text_tokens: int | None = None

    @property
    def right(self) -> int:
        """Return the number of right answers."""
        return sum(bool(one.right) for one in self.said)

    @property
    def first_seconds(self) -> float:
        """Return the median time to the first token, of the answers that were timed."""
        return median(one.first_seconds for one in self.said if one.first_seconds is not None)


@define(frozen=True, kw_only=True)
class Reopened:
    """The answers of another process, which opened the directory of the memory.

    Attributes:
        said: its answers, to some of the questions.
        open_seconds: that opening the memory took.
        seconds: from the start of the process to its end, imports and decoder included.
    """

    said: tuple[Said, ...]
    open_seconds: float
    seconds: float


@define(frozen=True, kw_only=True)
class ChatDemo:
    """All findings.

    Attributes:
        model: name or folder of the decoder.
        parameters: of it.
        mechanism: of the memory.
        config: of the memory, as plain data.
        tokens, sources: that were told.
        write_seconds: for all of it, to disk.
        places: of each question about what was told, how much had been told when its answer was, from 0 to 1.
        arms: with memory, without, and so on.
        untold: answers with memory to what was never told.
        reopened: answers of a new process.
        threads, seed: of this run.
        seconds: of the whole demo, without a download.
    """

    model: str
    parameters: int
    mechanism: str
    config: dict[str, Any]  # cattrs cannot go through a type that refers to itself
    tokens: int
    sources: int
    write_seconds: float
    places: tuple[float, ...]
    arms: tuple[ArmFinding, ...]
    untold: tuple[Said, ...]
    reopened: Reopened
    threads: int
    seed: int
    seconds: float

    def plain(self) -> dict[str, JsonValue]:
        """Return this as plain data, with what is computed from other facts."""
        plain: dict[str, JsonValue] = JSON.unstructure(self)
        plain["arms"] = [
            {**JSON.unstructure(arm), "right": arm.right, "first_seconds": arm.first_seconds} for arm in self.arms
        ]
        return plain
