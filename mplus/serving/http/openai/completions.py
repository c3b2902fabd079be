"""``POST /v1/completions``: texts or token ids go on."""

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
from mplus.serving.http.openai.logprobs import completion_logprobs
from mplus.serving.http.openai.rows import Delta, Reply, Scored
from mplus.serving.http.openai.running import JsonObject, Run, frame
from mplus.serving.http.openai.schemas import CompletionBody
from mplus.serving.messages import Generate

router = APIRouter()
MOST_TOKENS = 16
"""Where the request does not say, as at OpenAI."""


@router.post("/v1/completions")
async def completions(request: Request, front: FrontOf, caller: Reader) -> Response:
    """Go on with one or several prompts, from a memory."""
    body = await read_body(request, CompletionBody)
    decoder = await front.served(body.model)
    memory = None if body.memory_id is None else memory_name(caller, body.memory_id, "memory")
    prompts = [
        await decoder.tokenizer.prompt(one) if isinstance(one, str) else decoder.tokenizer.checked(one, "prompt")
        for one in body.prompts
    ]
    asked = body.max_tokens or MOST_TOKENS
    generates = [
        Generate(
            caller.tenant, memory, prompt, body.n or 1,
            body.sampling(decoder.room(prompt, asked), body.seed, body.logprobs), body.min_score,
        )
        for prompt in prompts
    ]  # fmt: skip
    reply = Reply.to(decoder.tokenizer, len(prompts), body.n or 1, body.stops)
    shape = _CompletionShape(decoder.facts.name, body)
    return await Run(Answers(front, generates, record_of(request)), reply, shape).respond(request, bool(body.stream))


@define
class _CompletionShape:
    model: str
    body: CompletionBody
    id: str = field(factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(factory=lambda: int(time.time()))

    def opening(self, reply: Reply, place: int) -> Iterator[str]:
        if place == 0:
            row = reply.rows[0]
            yield self._chunk(row.index, "", more=reply.memory(bool(self.body.memory_sources)))

    def piece(self, reply: Reply, delta: Delta) -> Iterator[str]:
        yield self._chunk(delta.row, delta.text, logprobs=self._logprobs(reply, delta.scored))

    def closing(self, reply: Reply, memory_error: JsonObject | None) -> Iterator[str]:
        for row in reply.rows:
            yield self._chunk(row.index, "", row.finish)
        if self.body.include_usage:
            yield frame({**self._head(), "choices": [], "usage": reply.usage()})

    def whole(self, reply: Reply, memory_error: JsonObject | None) -> JsonObject:
        choices: list[JsonObject] = [
            {
                "index": row.index,
                "text": row.text,
                "logprobs": self._logprobs(reply, row.scored),
                "finish_reason": row.finish,
            }
            for row in reply.rows
        ]
        known = reply.memory(bool(self.body.memory_sources))
        return {**self._head(), "choices": choices, "usage": reply.usage(), **known}

    def _logprobs(self, reply: Reply, scored: Sequence[Scored]) -> JsonObject | None:
        return None if self.body.logprobs is None else completion_logprobs(reply.tokenizer, scored)

    def _chunk(
        self,
        row: int,
        text: str,
        finish: str | None = None,
        logprobs: JsonObject | None = None,
        more: JsonObject | None = None,
    ) -> str:
        choice: JsonObject = {"index": row, "text": text, "logprobs": logprobs, "finish_reason": finish}
        usage: JsonObject = {"usage": None} if self.body.include_usage else {}
        return frame({**self._head(), "choices": [choice], **usage, **(more or {})})

    def _head(self) -> JsonObject:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
