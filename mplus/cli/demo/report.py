"""What the demo finds out, as plain data: the text on the screen and ``--json`` both come from it."""

from __future__ import annotations

from typing import Any

import attrs
from attrs import define

from mplus.config import JsonValue


@define(frozen=True, kw_only=True)
class Positions:
    """Where memory and text sit on the position axis of the decoder.

    Attributes:
        trained: positions the decoder was trained with.
        layout: layout of memory rows (``mplus.hf.retrofit.positions.MemoryPositions``).
        writing: positions that the longest write takes: begin row, context rows and one chunk of text.
        reading: positions that the longest read takes: begin row, retrieved rows, short-term rows and text.
    """

    trained: int
    layout: str
    writing: int
    reading: int


@define(frozen=True, kw_only=True)
class Timing:
    """One kind of work over some text, and the decoder without memory over the same chunks in turn with it.

    Attributes:
        tokens: text tokens, in both.
        seconds, base_seconds: with memory and without.
    """

    tokens: int
    seconds: float
    base_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Return the speed with memory."""
        return self.tokens / self.seconds

    @property
    def base_tokens_per_second(self) -> float:
        """Return the speed without."""
        return self.tokens / self.base_seconds

    def plain(self) -> dict[str, float]:
        """Return this as plain data, speeds included."""
        speeds = {"tokens_per_second": self.tokens_per_second, "base_tokens_per_second": self.base_tokens_per_second}
        return {**attrs.asdict(self), **speeds}


@define(frozen=True, kw_only=True)
class LayerRows:
    """Rows one layer holds, and the ages in rows of what it retrieved for the story (None: nothing)."""

    held: dict[str, int]
    long_term: int
    retrieved: int
    newest_age: int | None
    median_age: int | None
    oldest_age: int | None


@define(frozen=True, kw_only=True)
class RetrievedFrom:
    """Rows retrieved from one source, over all layers; ages in rows written since."""

    source: str | None
    rows: int
    newest_age: int
    oldest_age: int


@define(frozen=True, kw_only=True)
class Story:
    """A greedy generation from one prompt, with memory and without, and what memory it retrieved."""

    prompt: str
    with_memory: str
    without_memory: str
    sources: tuple[RetrievedFrom, ...]


@define(frozen=True, kw_only=True)
class Continuation:
    """The rest of a story, told by a process that writes its beginning into a memory first.

    Attributes:
        text, tokens: what was told, greedily.
        births: of each list of rows and layer, which rows are held afterwards; the write drew which ones left.
    """

    text: str
    tokens: tuple[int, ...]
    births: tuple[tuple[int, ...], ...]


@define(frozen=True, kw_only=True)
class Saved:
    """The save: where, how large, and what this process and a new one did with the memory afterwards."""

    folder: str
    bytes: int
    here: Continuation
    in_new_process: Continuation

    @property
    def identical(self) -> bool:
        """Return whether both processes told the same tokens and kept the same rows."""
        return self.here == self.in_new_process


@define(frozen=True, kw_only=True)
class DemoReport:
    """All of it.

    Attributes:
        parameters: of the decoder, what mplus adds not counted.
        config: the memory configuration as plain data.
        threads: CPU threads torch used.
        seed: seed of the retriever's initial weights and of the draws.
        tokens, chunks, chapters: what was written.
        bytes: all rows of the memory, reserved room included.
        seconds: the whole demo, imports included.
    """

    novel: str
    parameters: int
    config: dict[str, Any]
    threads: int
    seed: int
    tokens: int
    chunks: int
    chapters: int
    layers: tuple[LayerRows, ...]
    bytes: int
    positions: Positions
    write: Timing
    read: Timing
    story: Story
    saved: Saved
    seconds: float

    def plain(self) -> dict[str, JsonValue]:
        """Return this as plain data, with what is computed from other facts."""
        plain = attrs.asdict(self)
        plain["write"], plain["read"] = self.write.plain(), self.read.plain()
        plain["saved"]["identical"] = self.saved.identical
        return plain
