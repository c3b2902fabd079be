"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence

from attrs import define, field
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from mplus.serving.http.answers import Answers
from mplus.serving.http.bodies import read_body
from mplus.serving.http.front import FrontOf, Reader, memory_name, record_of
from mplus.serving.http.openai.logprobs import chat_logprobs
from mplus.serving.http.openai.remember import rememberer
from mplus.serving.http.openai.rows import Delta, Reply, Scored
from mplus.serving.http.openai.running import JsonObject, Run, frame
from mplus.serving.http.openai.schemas import ChatBody
from mplus.serving.messages import Generate

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, front: FrontOf, caller: Reader) -> Response:
    """Answer a conversation, from a memory."""
    body = await read_body(request, ChatBody)
    decoder = await front.served(body.model)
    memory = None if body.memory_id is None else memory_name(caller, body.memory_id, "memory")
    remember = rememberer(front, caller, memory, body, body.messages)
    prompt = await decoder.tokenizer.chat([message.plain() for message in body.messages])
    scored = (body.top_logprobs or 0) if body.logprobs else None
    asked = body.max_completion_tokens or body.max_tokens
    sampling = body.sampling(decoder.room(prompt, asked), body.seed, scored)
    generate = Generate(caller.tenant, memory, prompt, body.n or 1, sampling, body.min_score)
    reply = Reply.to(decoder.tokenizer, 1, body.n or 1, body.stops)
    answers = Answers(front, [generate], record_of(request))
    shape = _ChatShape(decoder.facts.name, body)
    return await Run(answers, reply, shape, remember).respond(request, bool(body.stream))


@define
class _ChatShape:
    model: str
    body: ChatBody
    id: str = field(factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(factory=lambda: int(time.time()))

    def opening(self, reply: Reply, place: int) -> Iterator[str]:
        known = reply.memory(bool(self.body.memory_sources))
        for row in reply.rows:
            yield self._chunk(row.index, {"role": "assistant", "content": ""}, more=known)

    def piece(self, reply: Reply, delta: Delta) -> Iterator[str]:
        yield self._chunk(delta.row, {"content": delta.text}, logprobs=self._logprobs(reply, delta.scored))

    def closing(self, reply: Reply, memory_error: JsonObject | None) -> Iterator[str]:
        for row in reply.rows:
            told: JsonObject = (
                {"memory_error": memory_error} if memory_error is not None and row is reply.rows[-1] else {}
            )
            yield self._chunk(row.index, {}, row.finish, more=told)
        if self.body.include_usage:
            yield frame({**self._head("chat.completion.chunk"), "choices": [], "usage": reply.usage()})

    def whole(self, reply: Reply, memory_error: JsonObject | None) -> JsonObject:
        choices: list[JsonObject] = [
            {
                "index": row.index,
                "message": {"role": "assistant", "content": row.text, "refusal": None},
                "logprobs": self._logprobs(reply, row.scored),
                "finish_reason": row.finish,
            }
            for row in reply.rows
        ]
        told: JsonObject = {} if memory_error is None else {"memory_error": memory_error}
        known = reply.memory(bool(self.body.memory_sources))
        return {**self._head("chat.completion"), "choices": choices, "usage": reply.usage(), **known, **told}

    def _logprobs(self, reply: Reply, scored: Sequence[Scored]) -> JsonObject | None:
        return chat_logprobs(reply.tokenizer, scored) if self.body.logprobs else None

    def _chunk(
        self,
        row: int,
        delta: JsonObject,
        finish: str | None = None,
        logprobs: JsonObject | None = None,
        more: JsonObject | None = None,
    ) -> str:
        choice: JsonObject = {"index": row, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage: JsonObject = {"usage": None} if self.body.include_usage else {}
        return frame({**self._head("chat.completion.chunk"), "choices": [choice], **usage, **(more or {})})

    def _head(self, kind: str) -> JsonObject:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
