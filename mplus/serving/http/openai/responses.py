"""``POST /v1/responses``: text and events, nothing of which is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Literal

from attrs import define, field
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from mplus.config import JsonValue
from mplus.serving.http.answers import Answers
from mplus.serving.http.bodies import read_body
from mplus.serving.http.front import FrontOf, Reader, memory_name, record_of
from mplus.serving.http.openai.remember import rememberer
from mplus.serving.http.openai.rows import Delta, Reply
from mplus.serving.http.openai.running import JsonObject, Run, frame
from mplus.serving.http.openai.schemas import MOST_MESSAGES, ChatMessage, Remembering, TokenCount
from mplus.serving.messages import Generate

router = APIRouter()


class InputMessage(ChatMessage):
    """An item of the input: a message. What an earlier answer had besides its words may come back with it."""

    unsupported = ChatMessage.unsupported | {"phase"}
    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None


class ResponsesBody(Remembering):
    """``POST /v1/responses``."""

    unsupported = frozenset(
        {
            "background", "context_management", "include", "max_tool_calls", "metadata", "parallel_tool_calls",
            "previous_response_id", "prompt", "prompt_cache_key", "prompt_cache_retention", "reasoning",
            "safety_identifier", "service_tier", "stream_options", "text", "tool_choice", "tools", "top_logprobs",
            "user",
        }
    )  # fmt: skip
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None

    def messages(self) -> list[ChatMessage]:
        """Return the conversation, with the instructions as what the system says."""
        system = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        given = [ChatMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [*system, *given]


@router.post("/v1/responses")
async def create_response(request: Request, front: FrontOf, caller: Reader) -> Response:
    """Answer a text or a conversation, from a memory."""
    body = await read_body(request, ResponsesBody)
    decoder = await front.served(body.model)
    memory = None if body.memory_id is None else memory_name(caller, body.memory_id, "memory")
    messages = body.messages()
    remember = rememberer(front, caller, memory, body, messages)
    prompt = await decoder.tokenizer.chat([message.plain() for message in messages], "input")
    sampling = body.sampling(decoder.room(prompt, body.max_output_tokens))
    generate = Generate(caller.tenant, memory, prompt, 1, sampling, body.min_score)
    reply = Reply.to(decoder.tokenizer, 1, 1, [])
    answers = Answers(front, [generate], record_of(request))
    run = Run(answers, reply, _ResponseShape(decoder.facts.name, body), remember)
    return await run.respond(request, bool(body.stream))


@define
class _ResponseShape:
    model: str
    body: ResponsesBody
    id: str = field(factory=lambda: f"resp_{uuid.uuid4().hex}")
    item: str = field(factory=lambda: f"msg_{uuid.uuid4().hex}")
    created: int = field(factory=lambda: int(time.time()))
    events: int = 0

    def opening(self, reply: Reply, place: int) -> Iterator[str]:
        begun = self._response(reply, "in_progress", [])
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._event("response.content_part.added", **self._place(), part=_part(""))

    def piece(self, reply: Reply, delta: Delta) -> Iterator[str]:
        yield self._event("response.output_text.delta", **self._place(), delta=delta.text, logprobs=[])

    def closing(self, reply: Reply, memory_error: JsonObject | None) -> Iterator[str]:
        text = reply.rows[0].text
        status, item = self._status(reply), self._message(reply)
        yield self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place(), part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{status}", response=self.whole(reply, memory_error))

    def whole(self, reply: Reply, memory_error: JsonObject | None) -> JsonObject:
        told: JsonObject = {} if memory_error is None else {"memory_error": memory_error}
        return {**self._response(reply, self._status(reply), [self._message(reply)]), **told}

    def _status(self, reply: Reply) -> str:
        return "incomplete" if reply.rows[0].finish == "length" else "completed"

    def _message(self, reply: Reply) -> JsonObject:
        """Return the item of the output, the only one, as it is at the end."""
        return self._item(self._status(reply), [_part(reply.rows[0].text)])

    def _response(self, reply: Reply, status: str, output: list[JsonObject]) -> JsonObject:
        counts: JsonObject = {
            "input_tokens": reply.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": reply.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": reply.prompt_tokens + reply.tokens,
        }
        cut: JsonObject | None = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "metadata": {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if self.body.temperature is None else self.body.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if self.body.top_p is None else self.body.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else counts,
            **reply.memory(bool(self.body.memory_sources)),
        }

    def _item(self, status: str, content: list[JsonObject]) -> JsonObject:
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _place(self) -> JsonObject:
        return {"item_id": self.item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **more: JsonValue) -> str:
        number, self.events = self.events, self.events + 1
        return frame({"type": kind, "sequence_number": number, **more}, kind)


def _part(text: str) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
