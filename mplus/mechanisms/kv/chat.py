"""The parts of a chat prompt, found by rendering the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from attrs import define

from mplus.tokenizer import ChatTokenizer, Tokenizer, has_chat_template

FIRST, REPLY, SECOND = "first-content", "reply-content", "second-content"
"""Contents that are looked for in what the template renders."""


@define(frozen=True)
class ChatFormat:
    """The text of a chat template around what a user says.

    Attributes:
        prefix: ids of everything in front of the first user's content, the default system text included.
        opening: ids in front of every user's content: the end of ``prefix``.
        closing: ids behind the last user's content, up to where the answer begins.

    Example:
        >>> chat = ChatFormat(prefix=(9, 1, 2), opening=(1, 2), closing=(3, 4))
        >>> chat.last_turn([9, 1, 2, 50, 51, 3, 4, 60, 3, 1, 2, 70, 3, 4])
        (11, 12)
    """

    prefix: tuple[int, ...]
    opening: tuple[int, ...]
    closing: tuple[int, ...]

    @staticmethod
    def of(tokenizer: Tokenizer | None) -> ChatFormat | None:
        """Return the format of a tokenizer's chat template; None where it has none, or one that hides the contents."""
        if not has_chat_template(tokenizer):
            return None
        one = _render(tokenizer, [("user", FIRST)])
        three = _render(tokenizer, [("user", FIRST), ("assistant", REPLY), ("user", SECOND)])
        if FIRST not in one or REPLY not in three or SECOND not in three:
            return None
        prefix, _, closing = one.partition(FIRST)
        between = three.partition(REPLY)[2].partition(SECOND)[0]
        # What closes a turn of the assistant stands between its reply and the user's opening, which alone ends both.
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(prefix[::-1], between[::-1], strict=False))
        opening = prefix[len(prefix) - sum(1 for _ in alike) :]
        if not opening or not closing:
            return None
        return ChatFormat(*(_ids(tokenizer, text) for text in (prefix, opening, closing)))

    def last_turn(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Return where the last user's content begins and ends in the ids of a prompt; None: it is no chat."""
        begin = _last(ids, self.opening)
        if begin is None:
            return None
        begin += len(self.opening)
        rest = ids[begin:]
        # Content that ends in a space may swallow the first id of what closes it.
        end = _last(rest, self.closing)
        return begin, len(ids) if end is None else begin + end


def _render(tokenizer: ChatTokenizer, messages: Sequence[tuple[str, str]]) -> str:
    named = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(named, tokenize=False, add_generation_prompt=True)


def _ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _last(ids: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Return the place of the last occurrence of ``wanted``."""
    size = len(wanted)
    places = range(len(ids) - size, -1, -1)
    return next((place for place in places if tuple(ids[place : place + size]) == tuple(wanted)), None)
