"""Batch: the answers that are generated at once, a token of each at every step."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from attrs import define
from torch import Tensor

from mplus.hf.batch.batch_reader import BatchReader
from mplus.hf.batch.joining import Joining
from mplus.hf.batch.requests import Row, RowRequest
from mplus.memory.memory import Memory
from mplus.serving.engine.answers.pace import Pace
from mplus.serving.engine.answers.sampling import Choice, Draws, choose
from mplus.serving.engine.answers.sources import sources_of
from mplus.serving.engine.metrics import Metrics
from mplus.serving.errors import ServingError
from mplus.serving.messages import Began, Ended, Event, Generate, NewToken


@define(eq=False)
class Answer:
    """A request that is answered, by one row or several.

    Attributes:
        request: as it came.
        limit: tokens of each row at most.
        tell: is given what happens.
        begin: called when it no longer waits.
        release: is given how many rows have ended, and how many go on.
        done: set when all rows have ended, or to what failed.
        arrived: when it came, by ``time.perf_counter``.
        memory: what is read; None: nothing is.
        version: makes the version of it that clients see out of that in this process.
        begun, ended: rows whose prompt is being read or was, and rows that have ended.
    """

    request: Generate
    limit: int
    tell: Callable[[Sequence[Event]], None]
    begin: Callable[[], None]
    release: Callable[[int, int], None]
    done: asyncio.Future[None]
    arrived: float
    memory: Memory | None = None
    version: Callable[[int], int] = int
    begun: int = 0
    ended: int = 0

    @property
    def left(self) -> int:
        """Return how many rows have not ended yet."""
        return self.request.answers - self.ended

    def happened(self, events: Sequence[Event]) -> None:
        """Tell events; rows that have ended make room, and the last one ends it."""
        ended = sum(isinstance(event, Ended) for event in events)
        self.ended += ended
        self.tell(events)
        if ended:
            self.release(ended, self.left)
        if not self.left and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        if not self.done.done():
            self.done.set_exception(error)

    def asked(self, rows: int) -> RowRequest:
        """Return what is asked of the reader for so many rows."""
        request, memory = self.request, self.memory
        takes = memory is not None and memory.engine.mechanism.takes_min_score
        return RowRequest(
            memory,
            request.prompt,
            copies=rows,
            max_new_tokens=self.limit,
            # A mechanism without a threshold brings back whatever there is, which 0 asks for.
            min_score=None if request.min_score == 0 and not takes else request.min_score,
            retrieval_query=None if request.question is None or memory is None else tuple(request.question),
        )

    def began(self, row: Row) -> Began:
        """Return the event that the prompt of ``row`` was read."""
        memory, version = self.memory, row.memory_version
        sources = () if memory is None else sources_of(row.sources, memory.engine.config)
        return Began(row.prompt_tokens, None if version is None else self.version(version), tuple(sources))


@define(eq=False)
class Running:
    """A row that is generated.

    Attributes:
        answer: that it belongs to.
        number: of the row in it.
        row: of the reader.
        draws: its way to choose tokens.
        tokens: generated so far.
        last: the newest of them; None: it is over.
    """

    answer: Answer
    number: int
    row: Row
    draws: Draws
    tokens: int = 0
    last: int | None = None

    @property
    def limit(self) -> int:
        """Return how many tokens it may have, where the decoder's positions end as well."""
        return self.answer.limit if self.row.room is None else min(self.answer.limit, self.row.room + 1)


@define(eq=False)
class Prompts:
    """Prompts that are being read, and the answers that their rows are of."""

    joining: Joining
    rows: dict[Row, tuple[Answer, int]]


class Batch:
    """Answers that are generated, and those that wait for a place with their memories open.

    Args:
        model: the wrapped decoder.
        most: rows at once.
        ends: ids of tokens that end an answer.
        pace, metrics: of the engine.

    Attributes:
        ready: answers with rows that have not begun yet.
        long: prompts that are read piece by piece, in turns.
        running: the rows that are stepped.
    """

    def __init__(self, model: torch.nn.Module, most: int, ends: frozenset[int], pace: Pace, metrics: Metrics) -> None:
        self._model, self._most, self._ends, self._pace, self._metrics = model, most, ends, pace, metrics
        self._reader = BatchReader(model)  # type: ignore[arg-type]
        self.ready: deque[Answer] = deque()
        self.long: deque[Prompts] = deque()
        self.running: dict[Row, Running] = {}
        self._stepped = 0.0

    def remove(self, answer: Answer) -> None:
        """Let go of an answer: it is complete, has failed, or nobody wants it any more."""
        if answer in self.ready:
            self.ready.remove(answer)
        gone = [prompts for prompts in self.long if any(owner is answer for owner, _ in prompts.rows.values())]
        for prompts in gone:  # one with a long prompt is read by itself
            self.long.remove(prompts)
        self._leave([one for one in self.running.values() if one.answer is answer])

    def end_row(self, answer: str, number: int) -> None:
        """End one row of the answer with an id, whose text is complete; does nothing where it has ended."""
        gone = [one for one in self.running.values() if (one.answer.request.id, one.number) == (answer, number)]
        for one in gone:
            one.answer.happened([Ended(number, "stop")])
        self._leave(gone)

    @property
    def places(self) -> int:
        """Return how many more rows there is a place for."""
        return self._most - len(self.running) - sum(len(prompts.rows) for prompts in self.long)

    @property
    def can_read(self) -> bool:
        """Return whether there is a prompt to read."""
        return bool(self.long) or (bool(self.ready) and self.places > 0)

    # ------------------------------------------------------------------ prompts

    def read(self, tokens: int) -> None:
        """Read short prompts of about so many tokens in all, or else a piece of a long one; choose first tokens."""
        begun, answering = time.perf_counter(), bool(self.running)
        short = self._next_prompts(tokens)
        if short is not None:
            prompts, piece = short, None
        else:
            prompts, piece = self.long[0], tokens
            # A piece of each in turn, so that none waits for all of another one.
            self.long.rotate(-1)
        read = min(tokens, sum(len(row.request.ids) / row.request.copies for row in prompts.rows))
        over, owners = True, list(prompts.rows.values())
        try:
            over = prompts.joining.advance(piece)
        except Exception as error:  # noqa: BLE001 - becomes the answer to all of them
            for answer, _ in prompts.rows.values():
                answer.fail(error)
        if over and prompts in self.long:
            self.long.remove(prompts)
        seconds = time.perf_counter() - begun
        self._pace.read(int(read), seconds, answering=answering, prompts=len({id(one) for one, _ in owners}))
        self._metrics.count("prefill_tokens", read)
        self._metrics.took("prefill_seconds", seconds)
        self._admit(prompts)

    def _next_prompts(self, tokens: int) -> Prompts | None:
        """Take short prompts that fit into a turn, read together; long ones move to ``long``. None: there is none."""
        requests: list[RowRequest] = []
        owners: list[tuple[Answer, int]] = []
        left, most = tokens, self._pace.prompts(answering=bool(self.running))
        while self.ready and len(requests) < most and (places := self.places - len(owners)) > 0:
            answer = self.ready[0]
            size, rows = len(answer.request.prompt), min(answer.request.answers - answer.begun, places)
            if requests and size > left:
                break
            numbers = [(answer, answer.begun + number) for number in range(rows)]
            answer.begun += rows
            answer.begin()
            if answer.begun == answer.request.answers:
                self.ready.popleft()
            try:
                asked = answer.asked(rows)
            except Exception as error:  # noqa: BLE001 - becomes the answer to it
                answer.fail(error)
                continue
            if size > tokens:
                self.long.append(self._begin([asked], numbers))
            else:
                requests.append(asked)
                owners += numbers
                left -= size
        return self._begin(requests, owners) if requests else None

    def _begin(self, requests: Sequence[RowRequest], owners: Sequence[tuple[Answer, int]]) -> Prompts:
        joining = self._reader.begin(requests)
        return Prompts(joining, dict(zip(joining.rows, owners, strict=True)))

    def _admit(self, prompts: Prompts) -> None:
        """Choose the first token of all rows whose prompt has been read now."""
        here, fresh = set(self._reader.rows), []
        for row, (answer, number) in prompts.rows.items():
            if row.error is not None:
                answer.fail(row.error)
            elif row in here and row not in self.running:
                one = self.running[row] = Running(answer, number, row, Draws.of(answer.request.sampling, number))
                fresh.append(one)
        if fresh:
            self._choose(fresh, torch.stack([one.row.logits for one in fresh]), first=True)

    # ------------------------------------------------------------------ tokens

    def step(self) -> None:
        """Generate one more token of every row."""
        begun, running = time.perf_counter(), [self.running[row] for row in self._reader.rows]
        try:
            logits = self._reader.step([one.last or 0 for one in running])
        except Exception as error:  # noqa: BLE001 - becomes the answer to all of them
            for one in running:
                one.answer.fail(error)
            self._leave(running)
            return
        now = time.perf_counter()
        self._pace.stepped(now - begun)
        self._metrics.took("step_seconds", now - begun)
        self._metrics.count("batch_rows_sum", len(running))
        if self._stepped:
            self._metrics.took("inter_token_gap_seconds", now - self._stepped, len(running))
        self._stepped = now
        self._choose(running, logits)

    def _choose(self, rows: Sequence[Running], logits: Tensor, *, first: bool = False) -> None:
        """Choose the next token of every row by its logits ``[B, V]``, and tell what that means."""
        events: dict[int, tuple[Answer, list[Event]]] = {}
        for one, choice in zip(rows, choose(logits, [one.draws for one in rows]), strict=True):
            own = events.setdefault(id(one.answer), (one.answer, []))[1]
            if first and not one.number:
                self._metrics.took("time_to_first_token_seconds", time.perf_counter() - one.answer.arrived)
                own.append(one.answer.began(one.row))
            own += self._events_of(one, choice)
        for answer, own in events.values():
            answer.happened(own)
        self._leave([one for one in rows if one.last is None])

    def _events_of(self, one: Running, choice: Choice | None) -> list[Event]:
        """Return what a choice means for a row."""
        if choice is None:
            error = one.row.error or ServingError("the decoder gave no finite number", 500, "server_error")
            one.answer.fail(error)
            one.last = None
            return []
        if choice.id in self._ends and not one.answer.request.sampling.ignore_end:
            one.last = None
            return [Ended(one.number, "stop")]
        one.last, one.tokens = choice.id, one.tokens + 1
        self._metrics.count("generated_tokens")
        events: list[Event] = [NewToken(one.number, choice.id, choice.logprobs)]
        if one.tokens >= one.limit:
            one.last = None
            events.append(Ended(one.number, "length"))
        return events

    def _leave(self, gone: Sequence[Running]) -> None:
        if gone:
            self._reader.leave([one.row for one in gone])
            for one in gone:
                del self.running[one.row]
        if not self.running:
            self._stepped = 0.0
