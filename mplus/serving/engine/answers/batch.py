"""Batch: the answers that are generated at once, a token of each at every step."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from attrs import define, field
from torch import Tensor

from mplus.memory.memory import Memory
from mplus.serving.engine.answers.pace import Pace
from mplus.serving.engine.answers.rows import Prompt, Row, Rows
from mplus.serving.engine.answers.sampling import Choice, Draws, choose
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
        done: set when all rows have ended, or to what failed.
        arrived: when it came, by ``time.perf_counter``.
        memory: what is read, and what returns its version; None: nothing is.
        joined, ended: rows that have begun, and that have ended.
    """

    request: Generate
    limit: int
    tell: Callable[[Sequence[Event]], None]
    done: asyncio.Future[None]
    arrived: float
    memory: Memory | None = None
    version: Callable[[], int] | None = None
    joined: int = 0
    ended: int = 0

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        if not self.done.done():
            self.done.set_exception(error)


@define(eq=False)
class Running:
    """A row that is generated.

    Attributes:
        answer: that it belongs to.
        number: of the row in it.
        row: of the decoder's batch.
        draws: its way to choose tokens.
        tokens: generated so far.
        last: the newest of them.
    """

    answer: Answer
    number: int
    row: Row
    draws: Draws
    tokens: int = 0
    last: int = 0


@define(eq=False)
class Batch:
    """Answers that are generated, and those that wait for a place with their memories open.

    Attributes:
        rows: the decoder's.
        most: rows at once.
        ends: ids of tokens that end an answer.
        pace, metrics: of the engine.
        ready: answers with rows that have not joined yet.
        running: rows that have.
    """

    rows: Rows
    most: int
    ends: frozenset[int]
    pace: Pace
    metrics: Metrics
    ready: deque[Answer] = field(factory=deque)
    running: list[Running] = field(factory=list)
    _told: float = field(default=0.0, init=False)

    def remove(self, answer: Answer) -> None:
        """Let go of an answer: it is complete, has failed, or nobody wants it any more."""
        if answer in self.ready:
            self.ready.remove(answer)
        gone = [one for one in self.running if one.answer is answer]
        self._leave(gone)

    @property
    def can_join(self) -> bool:
        """Return whether an answer waits, and there is a place."""
        return bool(self.ready) and len(self.running) < self.most

    def join(self, tokens: int) -> None:
        """Read prompts of about so many tokens in all, at least one, and choose the first token of their answers."""
        begun = time.perf_counter()
        prompts: list[tuple[Answer, int]] = []
        while self.can_join and len(self.running) + len(prompts) < self.most:
            answer = self.ready[0]
            if prompts and sum(len(other.request.prompt) for other, _ in prompts) + len(answer.request.prompt) > tokens:
                break
            prompts.append((answer, answer.joined))
            answer.joined += 1
            if answer.joined == answer.request.answers:
                self.ready.popleft()
        joined = self._read(prompts)
        seconds = time.perf_counter() - begun
        read = sum(len(answer.request.prompt) for answer, _ in prompts)
        self.pace.read(read, seconds)
        self.metrics.count("prefill_tokens", read)
        self.metrics.took("prefill_seconds", seconds)
        self.running += joined
        if joined:
            self._choose(joined, torch.stack([one.row.logits for one in joined]), first=True)

    def _read(self, prompts: Sequence[tuple[Answer, int]]) -> list[Running]:
        """Let prompts join together; where that fails, one by one, so that a bad one fails by itself."""
        asked = [
            Prompt(answer.memory, answer.request.prompt, answer.request.min_score, answer.request.question)
            for answer, _ in prompts
        ]
        try:
            rows = self.rows.join(asked)
        except Exception as error:  # noqa: BLE001 - becomes the answer to the request
            if len(prompts) == 1:
                prompts[0][0].fail(error)
                return []
            return [row for prompt in prompts for row in self._read([prompt])]
        return [
            Running(answer, number, row, Draws.of(answer.request.sampling, number))
            for (answer, number), row in zip(prompts, rows, strict=True)
        ]

    def step(self) -> None:
        """Generate one more token of every row."""
        begun, running = time.perf_counter(), list(self.running)
        try:
            logits = self.rows.step([one.row for one in running], [one.last for one in running])
        except Exception as error:  # noqa: BLE001 - becomes the answer to all of them
            for answer in {id(one.answer): one.answer for one in running}.values():
                answer.fail(error)
            self._leave(running)
            return
        now = time.perf_counter()
        self.pace.stepped(now - begun)
        self.metrics.took("step_seconds", now - begun)
        self.metrics.count("batch_rows_sum", len(running))
        if self._told:
            self.metrics.took("inter_token_gap_seconds", now - self._told, len(running))
        self._told = now
        self._choose(running, logits)

    def _choose(self, rows: Sequence[Running], logits: Tensor, *, first: bool = False) -> None:
        choices = choose(logits, [one.draws for one in rows])
        events: dict[int, tuple[Answer, list[Event]]] = {}
        for one, choice in zip(rows, choices, strict=True):
            answer = one.answer
            own = events.setdefault(id(answer), (answer, []))[1]
            if first and not one.number:
                self.metrics.took("time_to_first_token_seconds", time.perf_counter() - answer.arrived)
                own.append(
                    Began(
                        len(answer.request.prompt),
                        None if answer.version is None else answer.version(),
                        tuple(one.row.sources),
                    )
                )
            own += self._events_of(one, choice)
        over = [one for one in rows if one.last < 0]
        for answer, own in events.values():
            answer.ended += sum(isinstance(event, Ended) for event in own)
            answer.tell(own)
            if answer.ended == answer.request.answers and not answer.done.done():
                answer.done.set_result(None)
        self._leave(over)

    def _events_of(self, one: Running, choice: Choice | None) -> list[Event]:
        """Return what a choice means for a row; ``last`` is -1 where it ends it."""
        sampling = one.answer.request.sampling
        if choice is None:
            one.answer.fail(ServingError("the decoder gave no finite number for this text", 500, "server_error"))
            one.last = -1
            return []
        if choice.id in self.ends and not sampling.ignore_end:
            one.last = -1
            return [Ended(one.number, "stop")]
        one.last, one.tokens = choice.id, one.tokens + 1
        events: list[Event] = [NewToken(one.number, choice.id, choice.logprobs)]
        self.metrics.count("generated_tokens")
        if one.tokens >= one.answer.limit:
            one.last = -1
            events.append(Ended(one.number, "length"))
        return events

    def _leave(self, gone: Sequence[Running]) -> None:
        if gone:
            self.rows.leave([one.row for one in gone])
            self.running = [one for one in self.running if one not in gone]
        if not self.running:
            self._told = 0.0
