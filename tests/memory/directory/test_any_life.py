"""A memory in a directory against plain lists, through closing, opening, and ends of its process at any instant."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from mplus.memory import Memory
from tests.memory.disks.disks import Watched, open_memory
from tests.memory.rows_machine import CONFIGS, STORES, Held, Rows, follow, held

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest


class Copying(Watched):
    """At one call, copies a folder as it is then: before the call, or in the middle of it where it is a write."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 0

    def copy(self, at: int, folder: Path, into: Path) -> None:
        """Copy ``folder`` to ``into`` at the ``at``-th call from now."""
        self.calls, self.at, self.folder, self.into = 0, at, folder, into

    def before(self, call: int, what: str) -> None:
        if call == self.at:
            shutil.copytree(self.folder, self.into)
            self.at = 0

    def write_some(self, handle: int, data: memoryview) -> int:
        if self.calls + 1 != self.at:
            return super().write_some(handle, data)
        written = super().write_some(handle, data[: max(1, len(data) // 2)])
        shutil.rmtree(self.into)  # the copy was of what was there before
        shutil.copytree(self.folder, self.into)
        return written


INSTANTS = st.one_of(st.integers(1, 4), st.integers(1, 25))
"""Calls of a change: a record in the journal takes a few, a checkpoint more."""


class LiveRows(Rows):
    """What can be done to any memory, and to a directory."""

    steps: ClassVar[list[int]] = [0]
    memory: Memory

    def new_memory(self, store: str, seed: int) -> Memory:
        """A directory; how long its journal gets depends on the seed."""
        self.files, self.lives = Copying(), 0
        self.path, self.store = self.folder / "0", STORES[store]
        self.journal_bytes = (1, 5_000, 10**9)[seed % 3]
        return self.opened(seed=seed, keep_text=True)

    def opened(self, **options: Any) -> Any:
        """The directory, open for writing."""
        return open_memory(
            self.path, self.model, store=self.store, journal_bytes=self.journal_bytes, files=self.files, **options
        )

    @rule()
    def checkpoint(self) -> None:
        """Changes nothing."""
        self.memory.checkpoint()

    @rule(journal_bytes=st.sampled_from([1, 5_000, 10**9]))
    def close_and_open(self, journal_bytes: int) -> None:
        """What is there is what was there."""
        self.memory.close()
        self.journal_bytes = journal_bytes
        self.memory = self.watched(self.opened())

    @rule()
    def die_between_changes(self) -> None:
        """Nothing is closed, nothing is tidied up; every change that returned is there."""
        self.memory.directory.close()  # as the system does when a process ends
        self.memory = self.watched(self.opened())

    @rule()
    def look_from_outside(self) -> None:
        """A reader sees what the writer has written, and goes on seeing it."""
        reader = Memory.open(self.path, self.model, read_only=True)
        assert held(reader) == self.expected
        self.keep(reader)

    @rule(at=INSTANTS, tokens=st.integers(1, 8), name=st.sampled_from(["a", "b"]))
    def die_while_writing(self, at: int, tokens: int, name: str) -> None:
        """The chunk is there, or it is not, or its text is there and waits."""
        self.die_within(lambda: self.write(tokens, name), at)
        self.flush()

    @precondition(lambda self: self.memory.sources())
    @rule(at=INSTANTS, which=st.integers(0, 2))
    def die_while_forgetting(self, at: int, which: int) -> None:
        """The source is gone, or it is not."""
        self.die_within(lambda: self.forget(which), at)

    @rule(at=INSTANTS)
    def die_while_tidying_up(self, at: int) -> None:
        """Everything is there."""
        self.die_within(self.memory.checkpoint, at)

    def die_within(self, change: Callable[[], object], at: int) -> None:
        """Go on with what was in the directory at one instant of a change, if it has so many."""
        before: Held = [Counter(rows) for rows in self.expected]
        self.lives += 1
        other = self.folder / str(self.lives)
        self.files.copy(at, self.path, other)
        change()
        self.files.at = 0
        if not other.exists():
            return
        self.memory.directory.close()
        self.path = other
        self.memory = self.watched(self.opened())
        found = held(self.memory)
        assert found in (before, self.expected), "a change is there, or it is not"
        self.expected = found


def test_every_row_is_where_the_lists_say(record_property: pytest.RecordProperty) -> None:
    stores = {"fifo": "int8 in tiers", "reservoir": "tiers", "waits": "int8"}
    kinds = [(config, stores.get(config, "mmap")) for config in CONFIGS if config not in {"grows", "short"}]
    record_property("steps", follow(LiveRows, kinds, nightly=6_000))
