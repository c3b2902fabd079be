"""ChatFormat: how messages become the tokens of a prompt, by the tokenizer's chat template or plainly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from attrs import define
from jinja2.exceptions import TemplateError

from mplus.chat.exchange import SPEAKERS, Message
from mplus.errors import ConfigError, InputError

if TYPE_CHECKING:
    from mplus.hf.types import PreTrainedTokenizerBase


@define(frozen=True)
class ChatFormat:
    """Turns messages into a prompt.

    Attributes:
        tokenizer: of the decoder.
        plain: write "User: ..." and "Assistant: ..." in lines, whatever template there is.
    """

    tokenizer: PreTrainedTokenizerBase
    plain: bool = False

    def __attrs_post_init__(self) -> None:
        if not self.plain and getattr(self.tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"a chat needs a tokenizer with a chat template, got {type(self.tokenizer).__name__} without one: take "
                "the chat (instruct) version of the model, set tokenizer.chat_template, or pass plain=True, by which "
                "prompts are lines of 'User: ...' and 'Assistant: ...'"
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """Return texts with which an answer is over, besides the end-of-sequence tokens."""
        return tuple(f"\n{SPEAKERS[role]}:" for role in ("user", "tool")) if self.plain else ()

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a prompt that asks for an answer to ``messages``.

        Raises:
            InputError: the chat template refuses the messages.
        """
        if self.plain:
            return list(self.tokenizer(_plain(messages), verbose=False)["input_ids"])
        try:
            prompt = self.tokenizer.apply_chat_template(
                list(map(dict, messages)), add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(f"the chat template refuses messages of these roles ({roles}): {error}") from error
        return list(cast("Mapping[str, list[int]]", prompt)["input_ids"])


def _plain(messages: Iterable[Message]) -> str:
    lines = []
    for message in messages:
        who = SPEAKERS.get(message["role"])
        lines.append(message["content"] + "\n" if who is None else f"{who}: {message['content']}")
    return "\n".join([*lines, f"{SPEAKERS['assistant']}:"])
