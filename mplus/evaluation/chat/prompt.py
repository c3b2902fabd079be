"""ChatPrompt: a question as the only turn of a conversation, with text in front of it in the same turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Protocol

from attrs import define

from mplus.errors import ConfigError
from mplus.evaluation.texts import Tokenizer

CONTENTS = ("Where?", "123", "the")
"""Turns that begin with different tokens: what their prompts begin with alike stands in front of every turn."""


class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer with a chat template."""

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, return_dict: bool
    ) -> Mapping[str, Sequence[int]]:
        """Return the ids of a conversation as ``input_ids``."""


@define(frozen=True)
class ChatPrompt:
    """Makes prompts of questions by a chat template.

    Example:
        >>> chat = ChatPrompt.of(tokenizer)
        >>> told = tokenizer("Tom has a dog.", add_special_tokens=False)["input_ids"]
        >>> prompt = chat.prompt("Who has a dog?", context=told)
        >>> prompt[len(chat.begin) :][: len(told)] == told
        True

    Attributes:
        tokenizer: has the template.
        begin: BOS, the default system text and the opening of the user's turn, as the template has them.
    """

    tokenizer: ChatTokenizer
    begin: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: ChatTokenizer) -> ChatPrompt:
        """Take the template of ``tokenizer`` apart. Raises ConfigError where it has none, or none for a user's turn."""
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "a chat model's tokenizer must have a chat template, this one has none: take the chat (instruct) "
                "version of the model, or set tokenizer.chat_template"
            )
        columns = zip(*(_ids(tokenizer, content) for content in CONTENTS), strict=False)
        begin = tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
        if all(_ids(tokenizer, content) == list(begin) for content in CONTENTS):
            raise ConfigError("a chat template must have in it what the user says, this one has not")
        return cls(tokenizer, begin)

    def prompt(self, question: str, context: Sequence[int] = ()) -> list[int]:
        """Return the ids of the prompt in which a user asks ``question`` behind the ids of some text.

        Raises:
            ConfigError: the template begins otherwise for this question.
        """
        ids, length = _ids(self.tokenizer, question), len(self.begin)
        if tuple(ids[:length]) != self.begin:
            raise ConfigError(f"a chat template must begin alike for all that a user says, but not so for {question!r}")
        return [*self.begin, *context, *ids[length:]]


def _ids(tokenizer: ChatTokenizer, content: str) -> list[int]:
    turn = {"role": "user", "content": content}
    return list(tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_dict=True)["input_ids"])
