"""Exchange: what was said and answered at a time; and how messages that come in are checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TypeAlias

from attrs import define

from mplus.errors import InputError

Message: TypeAlias = Mapping[str, str]
"""A chat message: "role" and "content", and "name" of who says it where that is known."""
ROLES = ("user", "assistant", "tool")
SPEAKERS = {"user": "User", "assistant": "Assistant", "tool": "Tool"}
"""How those are called who have no name."""

STATEMENT = re.compile(r"[.!。！]\s|[.!。！]$|[^.!?。！？؟]$")
"""The end of a sentence that is no question."""


@define(frozen=True)
class Turn:
    """One speaker's words at a time.

    Attributes:
        role: "user", "assistant" or "tool".
        content: the words.
        speaker: who says them, as memory knows them.
    """

    role: str
    content: str
    speaker: str

    def message(self) -> dict[str, str]:
        """Return the turn as chat templates take it."""
        return {"role": self.role, "content": self.content}


@define(frozen=True)
class Exchange:
    """A question and its answer; it leaves the prompt as a whole, and is one source of the memory.

    Attributes:
        name: of the source.
        said: when, in UTC.
        turns: at least one of the user, and the answer, if there is one already.
    """

    name: str
    said: datetime
    turns: tuple[Turn, ...]


def to_turns(message: str | Message | Sequence[Message], speakers: Mapping[str, str]) -> tuple[Turn, ...]:
    """Return the turns of what is sent: a text of the user, a message, or several, the last of which is no answer.

    Args:
        message: as ``Chat.send`` takes it.
        speakers: names by role; a message's own "name" goes first.

    Raises:
        InputError: it is none of these, has no words, or ends with an answer.
    """
    if isinstance(message, str):
        messages: Sequence[Message] = [{"role": "user", "content": message}]
    else:
        messages = [message] if isinstance(message, Mapping) else list(message)
    turns = tuple(_turn(one, speakers) for one in messages)
    if not turns or turns[-1].role == "assistant":
        raise InputError(f"what is sent must end with something to answer, a message of the user, got {message!r:.80}")
    return turns


def _turn(message: Message, speakers: Mapping[str, str]) -> Turn:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        raise InputError(f"a message must be a dict with a text as 'content' and a 'role', got {message!r:.80}")
    role, content = message.get("role"), message["content"].strip()
    if role not in ROLES:
        hint = " (what the system says is given to Chat as system=)" if role == "system" else ""
        raise InputError(f"the role of a message must be one of {', '.join(ROLES)}{hint}, got {role!r}")
    if not content:
        raise InputError("a message must have words, got none")
    name = message.get("name")
    return Turn(role, content, name if isinstance(name, str) and name else speakers[role])


def told(exchange: Exchange, roles: Sequence[str]) -> str:
    """Return the text of an exchange, each turn in a line with its speaker; "" where there is nothing to keep.

    Args:
        exchange: it is of.
        roles: whose turns count. Without the answer, turns that do nothing but ask tell nothing.
    """
    turns = [turn for turn in exchange.turns if turn.role in roles and turn.content]
    if "assistant" not in roles:
        turns = [turn for turn in turns if STATEMENT.search(turn.content)]
    return "".join(f"{turn.speaker}: {turn.content}\n" for turn in turns)
