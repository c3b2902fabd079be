"""Writing what was said to the memory: the last user message, and the finished answer, each turn once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime

from attrs import define

from mplus.serving.errors import ServingError
from mplus.serving.http.errors import bad_request
from mplus.serving.http.front import Front, need
from mplus.serving.http.keys import Caller
from mplus.serving.http.openai.rows import Reply
from mplus.serving.http.openai.running import JsonObject, Remember, nothing
from mplus.serving.http.openai.schemas import ChatMessage, Remembering
from mplus.serving.messages import MemoryName, WriteMemory

REPEATED = 409
"""Status by which the engine refuses another text under a write id: the answer to this turn was written before."""


def rememberer(
    front: Front, caller: Caller, memory: MemoryName | None, body: Remembering, messages: Sequence[ChatMessage]
) -> Remember:
    """Return what writes the turns that a request asks to be remembered, when its answer is over.

    Raises:
        ServingError: the caller may not write (403), or no memory is read (400).
    """
    if body.remember in (None, "off"):
        return nothing
    need(caller, "write")
    if memory is None:
        raise bad_request("remember needs a memory, and memory is null", "remember", "invalid_value")
    source = body.conversation or f"chat {datetime.now(UTC):%Y-%m-%d}"
    return _Turns(front, memory, source, messages, both=body.remember == "both")


@define(frozen=True)
class _Turns:
    """Writes the last user message and, with ``both``, the first answer. Called with the reply."""

    front: Front
    memory: MemoryName
    source: str
    messages: Sequence[ChatMessage]
    both: bool

    async def __call__(self, reply: Reply) -> JsonObject | None:
        place = max((at for at, one in enumerate(self.messages) if one.role == "user"), default=None)
        try:
            if place is not None and self.messages[place].text.strip():
                message = self.messages[place]
                await self._write(message.text, "user", place, message.text)
            if self.both and (text := reply.rows[0].text.strip()):
                await self._answer(text)
        except ServingError as error:
            return error.body()["error"]
        return None

    async def _answer(self, text: str) -> None:
        said = [message.text for message in self.messages]
        try:
            await self._write(text, "assistant", len(said), *said)
        except ServingError as error:
            # The same question was answered before in this conversation, and that answer was written.
            if error.facts.status != REPEATED:
                raise

    async def _write(self, text: str, role: str, place: int, *said: str) -> None:
        known = json.dumps([self.source, place, role, *said])
        write_id = "turn-" + hashlib.sha256(known.encode()).hexdigest()
        data = [{"role": role, "content": text}]
        await self.front.call(WriteMemory(self.memory, data, source=self.source, write_id=write_id))
