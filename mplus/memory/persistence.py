"""What a memory that lives in a directory does about a change; others do nothing. And the way back from a change."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from mplus.memory.content import MemoryContent
from mplus.memory.state import StreamState
from mplus.stores.access_log import AccessLog
from mplus.stores.base import MemoryStore, StoreView

Stayed = Mapping[int, Mapping[str, Sequence[Tensor]]]
"""By batch row, what ``Absorbed.stayed`` says of a write: positions of rows that stayed, per list and layer."""


@define(eq=False)
class Begun:
    """What a memory was before a change that is under way.

    Attributes:
        stores, generators, usage: the ones it had.
        snapshots, draws: of the stores and generators.
        after: the states that the change makes; None: it has not come that far.
        thread: makes the change.
        cut_off: whether an exception has ended it, and it is to be settled.
    """

    stores: tuple[MemoryStore, ...]
    generators: tuple[torch.Generator, ...]
    usage: tuple[AccessLog | None, ...]
    snapshots: Sequence[StoreView]
    draws: Sequence[Tensor]
    after: tuple[StreamState, ...] | None = None
    thread: int = field(factory=threading.get_ident)
    cut_off: bool = False


class Keeping(MemoryContent):
    """The part of ``Memory`` that ``mplus.memory.directory`` replaces."""

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

    def _changing(self) -> Begun:
        """Note what the memory is before a change."""
        draws = [generator.get_state() for generator in self.generators]
        snapshots = [store.snapshot() for store in self._stores]
        self._begun: Begun | None = Begun(self._stores, self.generators, self._usage, snapshots, draws)
        return self._begun

    def _settle(self) -> None:
        """End a change that an exception has cut off: it has come to be, or all is as before it."""
        begun: Begun | None = self._begun
        if begun is not None and self._states is not begun.after:
            if begun.after is not None and self._settled(begun.after):
                self._states, self._version = begun.after, self._version + 1
            else:
                self._go_back(begun)
        self._begun = None

    def _settle_rest(self) -> None:
        """Settle what a further interrupt kept from being settled; a change that is under way is let be."""
        begun: Begun | None = self._begun
        if begun is not None and begun.cut_off:
            self._settle()

    def _go_back(self, begun: Any) -> None:
        self._stores, self.generators, self._usage = begun.stores, begun.generators, begun.usage
        for store, snapshot in zip(begun.stores, begun.snapshots, strict=True):
            store.restore(snapshot)
        for generator, state in zip(begun.generators, begun.draws, strict=True):
            generator.set_state(state)

    def _leave_to_parent(self) -> None:
        """In a child that was forked in the middle of a change of another thread: be as before the change."""
        begun: Begun | None = self._begun
        if begun is not None and begun.thread != threading.get_ident():
            if self._states is not begun.after:
                self._go_back(begun)
            self._begun = None
