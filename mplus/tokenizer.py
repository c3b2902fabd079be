"""Tokenizer: what mplus asks of the tokenizers of transformers, and of anything that stands in for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeGuard, overload

from torch import Tensor


class Tokenizer(Protocol):
    """Turns text into ids and back, as the tokenizers of transformers do.

    Example:
        >>> ids = tokenizer("Keller", add_special_tokens=False)["input_ids"]
    """

    @overload
    def __call__(
        self, text: str, /, *, add_special_tokens: bool = ..., verbose: bool = ...
    ) -> Mapping[str, list[int]]: ...
    @overload
    def __call__(
        self, text: list[str], /, *, add_special_tokens: bool = ..., verbose: bool = ...
    ) -> Mapping[str, list[list[int]]]: ...
    def __call__(
        self, text: str | list[str], /, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, list[int]] | Mapping[str, list[list[int]]]:
        """Return the ids of a text, or of each of several, as ``input_ids``.

        Args:
            text: one, or several.
            add_special_tokens: put in front and behind what the decoder was trained to see there.
            verbose: warn of a text that is longer than the decoder's context.
        """

    def decode(self, token_ids: Tensor | list[int], /, *, skip_special_tokens: bool = ...) -> str | list[str]:
        """Return the text of ids ``[n]``."""


class PieceTokenizer(Tokenizer, Protocol):
    """A tokenizer that says the pieces of text that its ids stand for."""

    @property
    def all_special_ids(self) -> Sequence[int]:
        """The ids that are no text."""

    def __len__(self) -> int:
        """Return the number of ids."""

    def convert_ids_to_tokens(self, ids: int | list[int], /) -> str | list[str]:
        """Return the piece of an id, or of each of several."""


class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer with a chat template."""

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template, or several by name."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], /, *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Return the text of a conversation."""


def says_pieces(tokenizer: Tokenizer | None) -> TypeGuard[PieceTokenizer]:
    """Return whether a tokenizer says the pieces that its ids stand for."""
    return hasattr(tokenizer, "convert_ids_to_tokens")


def has_chat_template(tokenizer: Tokenizer | None) -> TypeGuard[ChatTokenizer]:
    """Return whether a tokenizer has a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None
