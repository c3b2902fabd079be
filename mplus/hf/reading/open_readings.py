"""``with model.reading(memory):``, in which every call of the model reads that memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from attrs import define

from mplus.errors import NotSupported
from mplus.hf.reading.arguments import ReadArguments


@define(frozen=True, eq=False)
class OpenReading:
    """One ``with`` block that has been entered and not left.

    Attributes:
        arguments: what calls inside it read.
        thread, process: numbers of the thread that entered it, and of its process.
        threads: calls from other threads read the same.
    """

    arguments: ReadArguments
    thread: int
    process: int
    threads: bool


_ENTERED: ContextVar[tuple[OpenReading, ...]] = ContextVar("mplus_entered_readings", default=())
"""The blocks this context is in, of all models, outermost first. Those left elsewhere may still be among them."""


class OpenReadings:
    """The ``with`` blocks that are open for one decoder, in any thread."""

    def __init__(self) -> None:
        # No lock, which an interrupt could leave locked: single operations on a dict are indivisible.
        self._open: dict[OpenReading, None] = {}

    @contextmanager
    def enter(self, arguments: ReadArguments, threads: bool) -> Iterator[None]:
        """Let calls of the decoder in this context read by ``arguments``."""
        entered = OpenReading(arguments, threading.get_ident(), os.getpid(), threads)
        try:
            try:
                self._open[entered] = None
                _ENTERED.set((*_ENTERED.get(), entered))
                yield
            finally:
                self._leave(entered)
        finally:
            self._leave(entered)  # once more, for an interrupt may have struck the first time

    def _leave(self, entered: OpenReading) -> None:
        # Not by a token: generators may leave their blocks in any order, and in other contexts.
        self._open.pop(entered, None)
        _ENTERED.set(tuple(one for one in _ENTERED.get() if one is not entered))

    def current(self) -> ReadArguments | None:
        """Return the arguments of the block that a call in this context is in, or None where none is open for it.

        Raises:
            NotSupported: only other threads have opened blocks, and not for all threads.
        """
        return self._current() if self._open else None

    @torch.compiler.disable  # what it finds differs from call to call
    def _current(self) -> ReadArguments | None:
        opened = tuple(self._open)
        for entered in reversed(_ENTERED.get()):
            if any(one is entered for one in opened):
                return entered.arguments
        here, process = threading.get_ident(), os.getpid()
        # Of the threads of a parent process a forked child has but the one that forked.
        innermost = {one.thread: one for one in opened if one.process == process or one.thread == here}
        if here in innermost:
            return None  # another task of this thread opened it: contexts are its business
        match list(innermost.values()):
            case [one] if one.threads:
                return one.arguments
            case []:  # left by its thread in the meantime
                return None
        raise NotSupported(
            "another thread is in `with model.reading(...)`, which holds for its own calls only: pass memory= to this "
            "call, open a reading in this thread too (of None for the decoder alone), or use "
            "model.reading(..., threads=True) in one thread"
        )
