"""An engine in memory: it keeps memories as lists of texts, says what it is told to say, and records what is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from attrs import define, field

from mplus.hf.pretrained.shipped import STORIES260K, load_tokenizer
from mplus.serving.config import Limits
from mplus.serving.errors import ServingError
from mplus.serving.messages import (
    Began,
    DeleteMemory,
    DescribeMemory,
    DescribeUsage,
    Ended,
    EndRow,
    Event,
    ExportMemory,
    FlushMemory,
    ForgetSource,
    ForkMemory,
    Generate,
    ImportMemory,
    ListMemories,
    ListSources,
    MakeMemory,
    MemoryName,
    ModelFacts,
    NewToken,
    ReadSource,
    SearchMemory,
    Source,
    TokenLogprobs,
    WriteMemory,
)

TOKENIZER = load_tokenizer()


def ids(text: str) -> list[int]:
    """Token ids without BOS."""
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@define
class Kept:
    """A memory: texts by source, in order, and the bodies by write id."""

    texts: dict[str, list[str]] = field(factory=dict)
    writes: dict[str, tuple] = field(factory=dict)
    version: int = 0


@define(eq=False)
class RecordingEngine:
    """An EngineClient.

    Attributes:
        says: token ids of every answer, again and again.
        rows_say: others, by number of the row.
        ended: rows of answers that were ended, as (id, row).
        limits: waiting requests are refused above.
        pause: seconds between tokens.
        free: set: requests are read at once; cleared: they wait.
        asked, called: what came, in order.
        running: rows that are being answered.
        fails: is raised in the place of the third token.
        refuses: is raised by every write.
        folder: of the tokenizer.
    """

    says: list[int] = field(factory=lambda: ids("there was a little girl named Lily."))
    rows_say: dict[int, list[int]] = field(factory=dict)
    ended: set[tuple[str, int]] = field(factory=set)
    limits: Limits = field(factory=Limits)
    pause: float = 0.0
    free: bool = True
    asked: list[Generate] = field(factory=list)
    called: list = field(factory=list)
    memories: dict[MemoryName, Kept] = field(factory=dict)
    running: int = 0
    waiting: int = 0
    steps: int = 0
    fails: Exception | None = None
    refuses: Exception | None = None
    folder: str = str(STORIES260K)
    down: bool = False
    closed: bool = False

    async def model(self) -> ModelFacts:
        if self.down:
            raise ServingError("the engine is starting", 503, "server_error", code="engine_not_ready")
        return ModelFacts("stories", self.folder, 512, 512, "kv", 1_700_000_000)

    async def metrics(self):
        counts = {"open_memories": float(len(self.memories)), "requests_running": 99.0}
        return {**counts, "time_to_first_token_seconds_count": 99.0}

    async def close(self) -> None:
        self.closed = True

    # ------------------------------------------------------------------ generating

    async def generate(self, request: Generate) -> AsyncIterator[Sequence[Event]]:
        self.asked.append(request)
        kept = None if request.memory is None else self._kept(request.memory)
        if self.waiting >= self.limits.waiting:
            message = "too many requests wait"
            raise ServingError(message, 429, "rate_limit_error", code="too_many_requests", retry_after=1)
        self.waiting += 1
        try:
            while not self.free:
                await asyncio.sleep(0.005)
        finally:
            self.waiting -= 1
        self.running += request.answers
        try:
            async for step in self._steps(request, kept):
                yield step
        finally:
            self.running -= request.answers

    async def _steps(self, request: Generate, kept: Kept | None) -> AsyncIterator[Sequence[Event]]:
        texts = {} if kept is None else kept.texts
        sources = [Source(name, len(parts), 0.5, 7, None) for name, parts in texts.items()]
        yield [Began(len(request.prompt), None if kept is None else kept.version, sources)]
        most = request.sampling.max_tokens or 512 - len(request.prompt)
        if not request.sampling.ignore_end:
            most = min(most, len(self.says) + 1)
        for place in range(most):
            await asyncio.sleep(self.pause)
            if self.fails is not None and place == 2:
                raise self.fails
            self.steps += 1
            if place == len(self.says) and not request.sampling.ignore_end:
                yield [Ended(row, "stop") for row in self._left(request)]
                return
            best = request.sampling.logprobs
            tokens: list[Event] = []
            for row in self._left(request):
                says = self.rows_say.get(row, self.says)
                token = says[place % len(says)]
                scored = None if best is None else TokenLogprobs(-0.5, [(token, -0.5), (0, float("-inf"))][:best])
                tokens.append(NewToken(row, token, scored))
            yield tokens
        yield [Ended(row, "length") for row in self._left(request)]

    def _left(self, request: Generate) -> list[int]:
        return [row for row in range(request.answers) if (request.id, row) not in self.ended]

    # ------------------------------------------------------------------ memories

    async def call(self, command):
        self.called.append(command)
        await asyncio.sleep(self.pause)
        if self.refuses is not None and isinstance(command, WriteMemory):
            raise self.refuses
        return getattr(self, "_" + type(command).__name__)(command)

    def _kept(self, name: MemoryName) -> Kept:
        if name.id == "default":
            return self.memories.setdefault(name, Kept())
        if name not in self.memories:
            raise ServingError(f"there is no memory {name.id!r}", 404, "not_found_error", code="memory_not_found")
        return self.memories[name]

    def _EndRow(self, one: EndRow):  # noqa: N802
        self.ended.add((one.answer, one.row))
        return {}

    def _MakeMemory(self, one: MakeMemory):  # noqa: N802 - named by the command
        if one.memory in self.memories:
            raise ServingError("it is there", 409, "conflict_error", code="memory_exists")
        self.memories[one.memory] = Kept()
        return {"id": one.memory.id}

    def _ListMemories(self, one: ListMemories):  # noqa: N802
        own = [name.id for name in self.memories if name.tenant == one.tenant]
        rest = own[own.index(one.after) + 1 :] if one.after in own else own
        return {"data": [{"id": name} for name in rest[: one.limit]], "has_more": len(rest) > one.limit}

    def _DescribeMemory(self, one: DescribeMemory):  # noqa: N802
        return {"id": one.memory.id, "version": self._kept(one.memory).version}

    def _DeleteMemory(self, one: DeleteMemory):  # noqa: N802
        self._kept(one.memory)
        del self.memories[one.memory]
        return {"id": one.memory.id, "deleted": True}

    def _ForkMemory(self, one: ForkMemory):  # noqa: N802
        self.memories[MemoryName(one.memory.tenant, one.to)] = self._kept(one.memory)
        return {"id": one.to}

    def _ExportMemory(self, one: ExportMemory):  # noqa: N802
        Path(one.to).write_text(repr(self._kept(one.memory).texts))
        return {}

    def _ImportMemory(self, one: ImportMemory):  # noqa: N802
        if self._kept(one.memory).texts:
            raise ServingError("it is not empty", 409, "conflict_error", code="memory_not_empty")
        text = Path(one.file).read_text()
        if not text.startswith("{"):
            raise ServingError("this is no exported memory", 400, "invalid_request_error", code="invalid_export")
        self.memories[one.memory].texts = {"imported": [text]}
        return {"id": one.memory.id}

    def _DescribeUsage(self, one: DescribeUsage):  # noqa: N802
        return {"memories": len(self.memories), "disk_bytes": 100}

    def _WriteMemory(self, one: WriteMemory):  # noqa: N802
        kept = self._kept(one.memory)
        body = (repr(one.data), one.source)
        if one.write_id is not None and kept.writes.setdefault(one.write_id, body) != body:
            raise ServingError("another body was written under it", 409, "conflict_error", code="idempotency_conflict")
        if one.write_id is None or self.called.count(one) == 1:
            kept.texts.setdefault(one.source, []).append(repr(one.data))
            kept.version += 1
        return {"tokens": len(repr(one.data)), "chunks": 1, "pending": 0}

    def _FlushMemory(self, one: FlushMemory):  # noqa: N802
        self._kept(one.memory)
        return {"chunks": 0}

    def _ListSources(self, one: ListSources):  # noqa: N802
        texts = self._kept(one.memory).texts
        return {"data": [{"name": name, "chunks": len(parts)} for name, parts in texts.items()]}

    def _ForgetSource(self, one: ForgetSource):  # noqa: N802
        texts = self._kept(one.memory).texts
        if one.source not in texts:
            raise ServingError("there is no such source", 404, "not_found_error", code="source_not_found")
        return {"rows": len(texts.pop(one.source))}

    def _ReadSource(self, one: ReadSource):  # noqa: N802
        return {"name": one.source, "text": "".join(self._kept(one.memory).texts.get(one.source, []))}

    def _SearchMemory(self, one: SearchMemory):  # noqa: N802
        return {"data": [{"source": name, "score": 1.0} for name in self._kept(one.memory).texts][: one.k]}


async def until(holds, seconds: float = 5.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never became true"
        await asyncio.sleep(0.005)
