"""Engine: one thread with an event loop, which reads prompts and generates tokens in turns; writes go beside it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

import torch

from mplus.memory.memory import Memory
from mplus.serving.config import ServeConfig
from mplus.serving.engine.answers.batch import Answer, Batch
from mplus.serving.engine.answers.fair import FairQueue
from mplus.serving.engine.answers.pace import Pace
from mplus.serving.engine.decoder import ServedDecoder
from mplus.serving.engine.memories.commands import Commands
from mplus.serving.engine.memories.lanes import Lanes
from mplus.serving.engine.memories.opening import copied_memory, opened_memory
from mplus.serving.engine.memories.pool import Pool
from mplus.serving.engine.memories.tenants import Tenants
from mplus.serving.engine.memories.writer import Writer
from mplus.serving.engine.metrics import Metrics
from mplus.serving.engine.refusals import LOG, refusal
from mplus.serving.errors import ServingError
from mplus.serving.messages import GRACE, Command, Delivery, EndRow, Event, Generate, MemoryName

THREADS = 8
"""For opening, closing and the disk; and as many for tokenising and copies, which take longer."""
COUNTED = 256
"""Tokens of an answer that count for the order of requests, where it may be as long as it likes."""


class Engine:
    """The decoder and all memories of a server, in a thread of its own.

    ``submit``, ``cancel`` and ``close`` may be called in any thread.

    Raises:
        OSError, MPlusError: the folder of the memories cannot be used.

    Args:
        decoder: what is served.
        config: of the server.
        deliver: is given what there is to say, of all requests together, once for each turn; called in the engine's
            thread, and must not block.

    Example:
        >>> engine = Engine(decoder, config, print)  # doctest: +SKIP
        >>> engine.submit(1, messages.MakeMemory(MemoryName("ada", "notes")))  # doctest: +SKIP
    """

    def __init__(
        self, decoder: ServedDecoder, config: ServeConfig, deliver: Callable[[Sequence[Delivery]], None]
    ) -> None:
        self.decoder, self.config, self.metrics = decoder, config, Metrics()
        self._deliver = deliver
        self._out: list[Delivery] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._open = True
        self._started = threading.Event()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mplus-engine", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failed is not None:
            raise self._failed

    # ------------------------------------------------------------------ in any thread

    def submit(self, number: int, request: Command | Generate) -> None:
        """Take a request; what comes of it is delivered under ``number``."""
        if not self._call(lambda: self._begin(number, request)):
            self._deliver([Delivery(number, error=_failed(), over=True)])

    def cancel(self, number: int) -> None:
        """End a request that is not over; nothing more is delivered of it."""
        self._call(lambda: self._cancel(number))

    def numbers(self) -> dict[str, float]:
        """Return the metrics."""
        return self.metrics.now(
            requests_running=len(self._batch.running),
            requests_waiting=self._queue.waiting,
            rows_waiting=self._queue.waiting,  # as the engine sees it, beside what the front counts
            batch_rows=len(self._batch.running),
            open_memories=len(self._pool),
            memory_bytes=self._pool.bytes,
        )

    @property
    def is_alive(self) -> bool:
        """Return whether requests are answered."""
        return self._thread.is_alive()

    def close(self, grace: float = GRACE) -> None:
        """Take no more requests, give those that run so many seconds, end the rest with errors; close all memories."""
        self._call(lambda: self._stop(grace))
        self.wait()

    def wait(self) -> None:
        """Wait until it has ended, because it was closed, or has failed."""
        self._thread.join()

    def _call(self, function: Callable[[], None]) -> bool:
        """Call a function in the engine's thread. Returns False: it has ended."""
        with suppress(RuntimeError):  # the loop has just ended
            if self._thread.is_alive():
                self._loop.call_soon_threadsafe(function)
                return True
        return False

    # ------------------------------------------------------------------ in the engine's thread

    def _run(self) -> None:
        try:
            with torch.no_grad():
                asyncio.run(self._main())
        except Exception as error:
            if self._started.is_set():
                raise
            self._failed = error
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self._wake = asyncio.Event()
        decoder, config = self.decoder, self.config
        executor = ThreadPoolExecutor(THREADS, thread_name_prefix="mplus-memories")
        long = ThreadPoolExecutor(THREADS, thread_name_prefix="mplus-long")
        pace = Pace(config.turn_seconds)
        tenants = Tenants(config.memories, config.limits)
        self._pool = Pool(
            self._opened, config.open_memories, config.ram_bytes, config.lock_seconds, executor, self.metrics
        )
        self._queue = FairQueue(config.max_batch, config.limits.waiting)
        self._batch = Batch(decoder.model, config.max_batch, decoder.ends, pace, self.metrics)
        writer = Writer(pace, self.metrics, lambda: bool(self._batch.running))
        empty = decoder.model.new_memory(tokenizer=decoder.tokenizer)
        # Nothing changes the weights of a decoder that is served, so they are looked at once.
        weights = empty.engine.weights()
        self._commands = Commands(tenants, self._pool, Lanes(), writer, executor, long, self._copied, empty, weights)
        self._tenants, self._pace = tenants, pace
        work = [asyncio.create_task(self._turns()), asyncio.create_task(writer.work())]
        self._started.set()
        stopped = asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait([stopped, *work], return_when=asyncio.FIRST_COMPLETED)
        failed = next((task.exception() for task in work if task.done()), None)
        if failed is not None:  # nobody would be answered any more, and nobody told so
            LOG.critical("the engine has failed, and ends", exc_info=failed)
            self._open = False
            await self._end_all(_failed())
        # In this order: nobody takes turns, nobody writes, memories are closed, and what was said meanwhile is
        # delivered.
        for task in work:
            task.cancel()
        writer.close()
        await self._pool.close_all()
        self._flush()
        for threads in (executor, long):
            threads.shutdown(wait=True)

    def _opened(self, name: MemoryName) -> tuple[Memory, int]:
        path, first = self._tenants.opening(name)
        memory, version = opened_memory(path, self.decoder, self.config)
        return memory, first + version

    def _copied(self, name: MemoryName, file: Path) -> Memory:
        return copied_memory(self._tenants.path(name), file, self.decoder, self.config)

    async def _turns(self) -> None:
        """Take turns for as long as there is something to do."""
        while True:
            batch = self._batch
            if not (batch.running or batch.can_read):
                # No await since the look at the batch: a request that comes later sets it again.
                self._wake.clear()
                await self._wake.wait()
            self._turn()
            self._flush()
            # Requests, and those that leave, have their turn of the loop between two turns of the decoder.
            await asyncio.sleep(0)

    def _turn(self) -> None:
        """Read some prompts, and generate a token of every answer."""
        batch = self._batch
        if batch.can_read:
            batch.read(self._pace.tokens(answering=bool(batch.running)))
        if batch.running:
            batch.step()

    def _begin(self, number: int, request: Command | Generate) -> None:
        if not self._open:
            self._tell(Delivery(number, error=_closing(), over=True))
            return
        self._tasks[number] = asyncio.create_task(self._serve(number, request, time.perf_counter()))

    def _cancel(self, number: int) -> None:
        task = self._tasks.get(number)
        if task is not None:
            task.cancel()

    async def _serve(self, number: int, request: Command | Generate, arrived: float) -> None:
        """Answer a request, whatever comes of it."""
        try:
            if isinstance(request, Generate):
                await self._generate(number, request, arrived)
                self._tell(Delivery(number, over=True))
            elif isinstance(request, EndRow):
                self._batch.end_row(request.answer, request.row)
                self._tell(Delivery(number, over=True))
            else:
                answer = await self._commands.answer(request)
                self._tell(Delivery(number, answer=answer, over=True))
        except asyncio.CancelledError:
            self.metrics.count("cancelled")
        except Exception as error:  # noqa: BLE001 - one bad request ends no other
            self._tell(Delivery(number, error=refusal(error, self.config.memories), over=True))
        finally:
            del self._tasks[number]

    async def _generate(self, number: int, request: Generate, arrived: float) -> None:
        self._check(request)
        tenant, name, limit, queue = request.tenant, request.memory, self._limit(request), self._queue
        begin, done = queue.arrive(tenant), self._loop.create_future()
        release = partial(queue.leave, tenant)
        answer = Answer(request, limit, partial(self._happened, number), begin, release, done, arrived)
        # Undone from the last to the first, however it ends: out of the batch, the memory given back, then the place in
        # the queue.
        async with AsyncExitStack() as held:
            held.callback(begin)
            lane = None if name is None else self._commands.lanes.begin_read(name)
            if lane is not None:
                await lane[0].until(lane[1])
            await queue.admit(tenant, request.answers, len(request.prompt) + request.answers * min(limit, COUNTED))
            held.callback(lambda: queue.leave(tenant, answer.left))
            if name is not None:
                memory = await held.enter_async_context(self._commands.reading(name))
                answer.memory, answer.version = memory, partial(self._commands.version, name, memory)
            held.callback(self._batch.remove, answer)
            self._batch.ready.append(answer)
            self._wake.set()
            await done

    def _happened(self, number: int, events: Sequence[Event]) -> None:
        self._out.append(Delivery(number, events=tuple(events)))

    def _check(self, request: Generate) -> None:
        """Raise ServingError (400) for what no decoder answers; the front has looked at it before."""
        facts, prompt = self.decoder.facts, request.prompt
        question = request.question if request.question is not None else (0,)
        if not prompt or not question or not all(0 <= token < facts.vocabulary for token in (*prompt, *question)):
            raise ServingError(
                f"a prompt must have at least one token, each from 0 to {facts.vocabulary - 1}",
                400, "invalid_request_error", param="prompt",
            )  # fmt: skip
        if len(prompt) >= facts.context:
            raise ServingError(
                f"the context is {facts.context} tokens for a prompt and its answer, and the prompt has {len(prompt)}",
                400, "invalid_request_error", code="context_length_exceeded", param="messages",
            )  # fmt: skip

    def _limit(self, request: Generate) -> int:
        """Return how many tokens an answer has at most: as asked for, cut to the room there is."""
        room = self.decoder.facts.context - len(request.prompt)
        return room if request.sampling.max_tokens is None else min(request.sampling.max_tokens, room)

    def _tell(self, delivery: Delivery) -> None:
        if not self._out:
            # All that is told in one round of the loop is delivered together.
            self._loop.call_soon(self._flush)
        self._out.append(delivery)

    def _flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self._deliver(out)

    def _stop(self, grace: float) -> None:
        if self._open:
            self._open = False
            self._end = asyncio.ensure_future(self._wind_up(grace))

    async def _wind_up(self, grace: float) -> None:
        tasks = dict(self._tasks)
        if tasks:
            await asyncio.wait(tasks.values(), timeout=grace)
        await self._end_all(_closing())
        self._stopped.set()

    async def _end_all(self, error: ServingError) -> None:
        """End all requests with an error."""
        for number, task in list(self._tasks.items()):
            task.cancel()
            self._tell(Delivery(number, error=error, over=True))
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))


def _failed() -> ServingError:
    message = "the engine has failed, and is started again if it can be: try again in a while"
    return ServingError(message, 503, "server_error", code="engine_failed", retry_after=5)


def _closing() -> ServingError:
    return ServingError("the server is going down: try again in a while", 503, "server_error", code="shutting_down")
