"""Answer: an answer while it is given, to be read piece by piece, in a loop or an asynchronous one."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from mplus.chat.reply import Reply
from mplus.chat.streaming import Watch
from mplus.errors import InputError


class Answer:
    """An answer of a chat while it is given: ``for`` and ``async for`` go over its pieces of text, once.

    It is generated in a thread of its own, from the first piece that is asked for. Leaving the loop early, by ``break``
    or an exception, ends it at its next token.

    Example:
        >>> answer = chat.stream("Where does Maria live?")
        >>> for piece in answer:
        ...     print(piece, end="", flush=True)
        >>> answer.reply.recalled
    """

    def __init__(self, watch: Callable[[Callable[[str], None]], Watch], run: Callable[[Watch], Reply]) -> None:
        """Args: ``watch`` makes what watches the generation, and ``run`` generates."""
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._watch, self._run = watch(self._pieces.put), run
        self._reply: Reply | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def reply(self) -> Reply:
        """The finished answer. Raises InputError: it is not over yet, or ended with an error."""
        if self._reply is None:
            raise InputError("the answer must be over before its reply is there: read its pieces to the end first")
        return self._reply

    def stop(self) -> None:
        """Let the answer end at its next token; may be called from any thread."""
        self._watch.interrupted = True

    def __iter__(self) -> Iterator[str]:
        thread = self._begin()
        try:
            while (piece := self._pieces.get()) is not None:
                yield piece
        finally:
            self.stop()
            thread.join()
        self._check()

    async def __aiter__(self) -> AsyncIterator[str]:
        thread = self._begin()
        try:
            while (piece := await asyncio.to_thread(self._pieces.get)) is not None:
                yield piece
        finally:
            self.stop()
            await asyncio.to_thread(thread.join)
        self._check()

    def _begin(self) -> threading.Thread:
        if self._thread is not None:
            raise InputError("an answer can be read once: send the message again, or take answer.reply.text")
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._generate,), name="mplus-chat", daemon=True)
        self._thread.start()
        return self._thread

    def _generate(self) -> None:
        try:
            self._reply = self._run(self._watch)
        except BaseException as error:  # noqa: BLE001 - raised where the pieces are read
            self._error = error
        finally:
            self._pieces.put(None)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
