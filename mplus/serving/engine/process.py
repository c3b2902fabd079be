"""ProcessEngine: the engine in a process of its own, which is started again where it dies."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, TypeAlias

from attrs import define, field

from mplus.errors import CheckpointError
from mplus.serving.config import ServeConfig
from mplus.serving.engine.client import NumberedClient
from mplus.serving.engine.refusals import LOG
from mplus.serving.engine.source import DecoderSource
from mplus.serving.errors import ServingError
from mplus.serving.messages import GRACE, Command, Delivery, Generate, ModelFacts

if TYPE_CHECKING:
    from mplus.serving.engine.engine import Engine

SHORT_LIFE, LONGEST_PAUSE = 10.0, 30.0
"""Seconds: an engine that dies sooner is started again after a pause, which doubles up to the longest."""


@define(frozen=True)
class Submit:
    """A request for the engine."""

    number: int
    request: Command | Generate


@define(frozen=True)
class Cancel:
    """The request to end another one."""

    number: int


@define(frozen=True)
class AskMetrics:
    """The request for the metrics."""

    number: int


@define(frozen=True)
class Close:
    """The request to end, after so many seconds for what runs."""

    grace: float


ToEngine: TypeAlias = Submit | Cancel | AskMetrics | Close
FromEngine: TypeAlias = ModelFacts | Sequence[Delivery] | Exception
"""The facts of the decoder once it is there, news of requests, or why there is no decoder."""


class ProcessEngine(NumberedClient):
    """An engine in a process of its own; its client belongs to one event loop.

    Where the process dies, requests end with a ServingError (503), and another one is started: not where the first one
    has come to nothing (``wait``).

    Args:
        source: the decoder.
        config: of the server.
    """

    def __init__(self, source: DecoderSource, config: ServeConfig) -> None:
        super().__init__()
        self._source, self._config = source, config
        self._loop: asyncio.AbstractEventLoop | None = None
        self._facts: ModelFacts | None = None
        self._why = "the decoder is being loaded: try again in a while"
        self._closing = threading.Event()
        self._error: str | None = None
        self._settled = threading.Event()
        self._pause = 1.0
        self._process, self._channel = self._started()

    def wait(self) -> ModelFacts:
        """Wait until the decoder is there, after the start. Raises CheckpointError: it cannot be loaded."""
        self._settled.wait()
        if self._facts is None:
            raise CheckpointError(self._error or "the engine's process has ended before the decoder was there")
        return self._facts

    # ------------------------------------------------------------------ requests

    def submit(self, number: int, request: Command | Generate) -> None:
        """Send a request to the engine. Raises ServingError (503) while there is none."""
        self._loop = asyncio.get_running_loop()
        if self._facts is None:
            raise self._not_there()
        self._send(Submit(number, request))

    def cancel(self, number: int) -> None:
        """Let the engine end a request that is not over."""
        with contextlib.suppress(ServingError):
            self._send(Cancel(number))

    async def model(self) -> ModelFacts:
        """Return the facts of the decoder. Raises ServingError (503) while it is loaded."""
        if self._facts is None:
            raise self._not_there()
        return self._facts

    async def metrics(self) -> Mapping[str, float]:
        """Return counts and sums, by name; none while there is no engine."""
        if self._facts is None:
            return {}
        self._loop = asyncio.get_running_loop()
        number = self.inbox.begin()
        try:
            self._send(AskMetrics(number))
            return (await self.inbox.next(number)).answer  # type: ignore[return-value]
        finally:
            self.inbox.end(number)

    async def close(self, grace: float = GRACE) -> None:
        """End what runs, close all memories, and end the process."""
        self._closing.set()
        with contextlib.suppress(ServingError):
            self._send(Close(grace))
        await asyncio.to_thread(self._process.join, grace + 30)
        if self._process.is_alive():
            self._process.kill()

    @property
    def pid(self) -> int | None:
        """The id of the engine's process."""
        return self._process.pid

    def _send(self, message: ToEngine) -> None:
        try:
            self._channel.send(message)
        except (OSError, ValueError) as error:
            raise self._not_there() from error

    def _not_there(self) -> ServingError:
        return ServingError(self._why, 503, "server_error", code="engine_not_ready", retry_after=2)

    # ------------------------------------------------------------------ the process

    def _started(self) -> tuple[BaseProcess, Connection]:
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        process = context.Process(
            target=_serve, args=(there, self._source, self._config), name="mplus-engine", daemon=True
        )
        process.start()
        there.close()  # so that its end is seen here
        # Ends the process also where nobody has called close, before multiprocessing waits for it.
        Finalize(None, _end, args=(here, self._closing), exitpriority=10)
        threading.Thread(target=self._listen, args=(here, time.monotonic()), daemon=True).start()
        return process, here

    def _listen(self, channel: Connection, begun: float) -> None:
        """Receive until the process ends, in a thread of its own; start another one then."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._received(channel.recv())
        never, self._facts = not self._settled.is_set(), None
        self._settled.set()
        if never or self._closing.is_set():
            self._tell(lambda: self.inbox.fail(self._not_there()))
            return
        self._why = "the engine has failed and is being started again: try again in a while"
        self._tell(lambda: self.inbox.fail(self._not_there()))
        # One that ends as soon as it is started will do so again: a pause that doubles, until one lives for a while.
        if time.monotonic() - begun < SHORT_LIFE:
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        else:
            self._pause = 1.0
        if not self._closing.is_set():
            LOG.error("the engine's process has ended and is started again")
            self._process, self._channel = self._started()

    def _received(self, message: FromEngine) -> None:
        if isinstance(message, ModelFacts):
            self._facts = message
            self._settled.set()
        elif isinstance(message, Exception):
            self._error = str(message)
            LOG.error("the decoder cannot be loaded: %s", message)
        else:
            self._tell(lambda: self.inbox.deliver(message))

    def _tell(self, function: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():  # else nobody waits for anything
            self._loop.call_soon_threadsafe(function)


@define(eq=False)
class Sender:
    """The engine's end of the channel, which several threads write to."""

    channel: Connection
    _lock: threading.Lock = field(factory=threading.Lock)

    def send(self, message: FromEngine) -> None:
        """Send a message; to nobody where the front is gone, which the engine will see."""
        # One message at a time: two threads that send at once would mix their bytes in the pipe.
        with self._lock, contextlib.suppress(OSError):
            self.channel.send(message)


def _end(channel: Connection, closing: threading.Event) -> None:
    closing.set()
    with contextlib.suppress(OSError, ValueError):
        channel.send(Close(0.0))


def _end_with_front(loaded: threading.Event) -> None:
    """End this process where the front ends while it still loads: nothing is open yet, and loading takes long."""
    front = multiprocessing.parent_process()
    if front is not None:
        front.join()
        if not loaded.is_set():
            os._exit(1)


def _end_with_engine(engine: Engine, closing: threading.Event) -> None:
    """End this process where its engine has failed, so that the front starts another one."""
    engine.wait()
    if not closing.is_set():
        os._exit(1)


def _serve(channel: Connection, source: DecoderSource, config: ServeConfig) -> None:
    """Be the engine's process, until the other side says so or is gone."""
    for which in (signal.SIGINT, signal.SIGTERM):  # of a terminal or a supervisor: the front ends this one in order
        signal.signal(which, signal.SIG_IGN)
    loaded = threading.Event()
    threading.Thread(target=_end_with_front, args=(loaded,), daemon=True).start()
    try:
        from mplus.serving.engine.engine import Engine  # with torch, which the front's process loads meanwhile

        decoder = source.load(config)
    except Exception as error:  # noqa: BLE001 - told to the front, which tries again
        with contextlib.suppress(OSError):
            channel.send(RuntimeError(str(error)))
        return
    loaded.set()
    sender = Sender(channel)
    engine = Engine(decoder, config, sender.send)
    closing = threading.Event()
    threading.Thread(target=_end_with_engine, args=(engine, closing), daemon=True).start()
    sender.send(decoder.facts)
    grace = GRACE
    with contextlib.suppress(EOFError, OSError):
        while True:
            match channel.recv():
                case Submit(number, request):
                    engine.submit(number, request)
                case Cancel(number):
                    engine.cancel(number)
                case AskMetrics(number):
                    sender.send([Delivery(number, answer=engine.numbers(), over=True)])
                case Close(grace):
                    break
    closing.set()
    engine.close(grace)
