"""What a memory that lives in a directory does about a change; others do nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mplus.memory.content import MemoryContent
from mplus.memory.stream import StreamState

Stayed = Mapping[int, Sequence[Tensor]]
"""By batch row, what ``Absorbed.stayed`` says of a write."""


class Keeping(MemoryContent):
    """The part of ``Memory`` that ``mplus.memory.durable`` replaces."""

    def check_writable(self) -> None:
        """Raise LiveMemoryError where this memory cannot be changed."""

    def _begin(self) -> None:
        """Called before a change."""

    def _tidy(self, states: list[StreamState], stayed: Stayed | None) -> None:
        """Called with what a change made of the states, before it is kept; may make others of them, in the list."""

    def _keep(self, after: tuple[StreamState, ...], stayed: Stayed | None) -> None:
        """Put a change on disk that leads to ``after``; called before it shows."""

    def _settled(self, after: tuple[StreamState, ...]) -> bool:
        """After an exception: whether the change to ``after`` is on disk for good; else it is not there at all."""
        return False
