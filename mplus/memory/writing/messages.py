"""Chat messages as texts to write: a turn each, with its speaker in front in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeGuard

from mplus.config import JsonValue
from mplus.errors import InputError

Message: TypeAlias = Mapping[str, JsonValue]
"""A chat message, ``{"role": ..., "content": ...}``, and perhaps a ``"name"``."""

KNOWN = ("role", "content", "name", "tool_call_id", "tool_calls", "function_call")
CALLS = ("tool_calls", "function_call")


def is_message(item: object) -> TypeGuard[Message]:
    """Return whether ``item`` is meant as a chat message: a mapping, and none with the ids of a text."""
    return isinstance(item, Mapping) and "input_ids" not in item


def is_conversation(item: object) -> TypeGuard[Sequence[Message]]:
    """Return whether ``item`` is meant as a list of chat messages."""
    return isinstance(item, Sequence) and not isinstance(item, str | bytes) and any(map(is_message, item))


def turns(messages: Sequence[Message], where: str = "messages") -> list[str]:
    r"""Return the text of every message that has one, ``"user: I like tea.\n"``; a name stands for the role.

    Args:
        messages: of one conversation, oldest first.
        where: they are, in error messages.

    Raises:
        InputError: a message has no role or no words, a part that is no text, a tool call, or a key that is not known.
            Content of white space alone is no error: nothing was said.

    Example:
        >>> question = {"role": "user", "name": "Ada", "content": "Tea?"}
        >>> turns([question, {"role": "assistant", "content": [{"type": "text", "text": "With milk."}]}])
        ['Ada: Tea?\n', 'assistant: With milk.\n']
    """
    found = []
    for place, message in enumerate(messages):
        here = f"{where}[{place}]"
        if not is_message(message):
            raise InputError(f"{here} must be a message with role and content, got {type(message).__name__}")
        speaker, text = _speaker(message, here), _text(message, here)
        if text.strip():
            found.append(f"{speaker}: {text.strip()}\n")
    return found


def _speaker(message: Message, here: str) -> str:
    """Return who speaks. Raises InputError as ``turns``."""
    unknown = [key for key, value in message.items() if key not in KNOWN and value is not None]
    if unknown:
        raise InputError(
            f"{here} must have role and content, and may have {', '.join(map(repr, KNOWN[2:]))}, got {unknown[0]!r}: "
            "leave it out, or put what is to be remembered into the content"
        )
    for key in ("role", "name"):
        value = message.get(key)
        if not isinstance(value, str) or not value.strip():
            if key == "name" and value is None:
                continue
            raise InputError(f"{here} must have a {key}, a text that is not empty, got {value!r}")
    return str(message.get("name") or message["role"]).strip()


def _text(message: Message, here: str) -> str:
    """Return the words of a message. Raises InputError as ``turns``."""
    for key in CALLS:
        if message.get(key):
            raise InputError(
                f"{here} must have words alone, got {key}: leave the message out, or put what is to be remembered of "
                "the call into its content"
            )
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise InputError(f"{here} must have a content, a text or a list of text parts, got {content!r:.80}")
    return "".join(_part(part, f"{here}['content'][{place}]") for place, part in enumerate(content))


def _part(part: JsonValue, here: str) -> str:
    """Return the words of one part of a content. Raises InputError: it is no text."""
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        got = f"one of type {part.get('type')!r}" if isinstance(part, Mapping) else type(part).__name__
        raise InputError(f"{here} must be a text part, {{'type': 'text', 'text': ...}}, got {got}: leave it out")
    return text
