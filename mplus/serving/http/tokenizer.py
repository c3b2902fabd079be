"""Tokenizer: prompts to token ids and back, off the event loop where they are long."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from attrs import define, field
from tokenizers.pre_tokenizers import ByteLevel

from mplus.chat.prompt import ChatFormat
from mplus.errors import InputError
from mplus.hf.pretrained.load import load_tokenizer
from mplus.serving.errors import ServingError
from mplus.serving.http.errors import bad_request
from mplus.serving.http.text import IncrementalText
from mplus.tokenizer import has_chat_template

if TYPE_CHECKING:
    from mplus.hf.types import PreTrainedTokenizerBase

Prompt = TypeVar("Prompt")
LONG = 20_000
"""Characters from which on a text is tokenized in a thread."""
CHARACTERS_PER_TOKEN = 64
"""The beginning of a text that has more of them for each position is tokenized first: it nearly always is too long."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@define(slots=False)  # cached_property needs a dict
class Tokenizer:
    """The decoder's tokenizer, with the checks of the HTTP contract.

    Attributes:
        folder: it lies in.
        context: positions for a prompt and its answer.
        vocabulary: ids are below it.
        model: the tokenizer of transformers.
    """

    folder: str
    context: int
    vocabulary: int
    model: PreTrainedTokenizerBase = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.model = load_tokenizer(self.folder)

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids that are no text."""
        return frozenset(self.model.all_special_ids)

    @property
    def has_template(self) -> bool:
        """Messages go through a chat template; else their contents are joined by newlines."""
        return has_chat_template(self.model)

    # ------------------------------------------------------------------ text to ids

    async def prompt(self, text: str, param: str = "prompt") -> list[int]:
        """Return the ids of a text. Raises ServingError (400): it has none, or is longer than the context."""
        await self._check_beginning(text, param)
        return self.checked(await _encode(self._ids, text, len(text)), param)

    async def chat(self, messages: Sequence[Mapping[str, str]], param: str = "messages") -> list[int]:
        """Return the ids of a prompt that asks for an answer to messages with ``role`` and ``content``.

        Raises ServingError (400): as ``prompt``, or the chat template refuses these messages.
        """
        contents = "\n".join(message["content"] for message in messages)
        if not self.has_template:
            return await self.prompt(contents, param)
        await self._check_beginning(contents, param)
        try:
            return self.checked(await _encode(ChatFormat(self.model).ids, messages, len(contents)), param)
        except InputError as error:
            raise bad_request(str(error), param) from error

    def checked(self, ids: Sequence[int], param: str) -> list[int]:
        """Return ids that are some, in the vocabulary, and leave room for a token. Raises ServingError (400)."""
        if not ids:
            raise bad_request("the prompt has no tokens", param, "empty_prompt")
        if len(ids) >= self.context:
            raise self._too_long(f"{len(ids)} tokens", param)
        wrong = next((one for one in ids if not 0 <= one < self.vocabulary), None)
        if wrong is not None:
            raise bad_request(f"token ids must be from 0 to {self.vocabulary - 1}, got {wrong}", param, "invalid_value")
        return list(ids)

    async def _check_beginning(self, text: str, param: str) -> None:
        """Refuse a text that is much too long without tokenizing all of it, which takes 100 times its bytes."""
        most = self.context * CHARACTERS_PER_TOKEN
        if len(text) > most and (count := len(await _encode(self._ids, text[:most], most))) >= self.context:
            raise self._too_long(f"at least {count} tokens in the first {most} of {len(text)} characters", param)

    def _ids(self, text: str) -> list[int]:
        return list(self.model(text, verbose=False)["input_ids"])

    def _too_long(self, length: str, param: str) -> ServingError:
        message = f"the decoder has {self.context} positions for a prompt and its answer, and the prompt has {length}"
        return bad_request(message, param, "context_length_exceeded")

    # ------------------------------------------------------------------ ids to text

    def text(self) -> IncrementalText:
        """Return what turns the tokens of a new answer into text."""
        return IncrementalText(self.decode, self.special)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self.model.decode(ids, skip_special_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, which may be a part of a character."""
        piece = str(self.model.convert_ids_to_tokens(token))
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        if token not in self.special and all(letter in self._letters for letter in piece):
            return bytes(self._letters[letter] for letter in piece)
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    @cached_property
    def _letters(self) -> Mapping[str, int]:
        """The bytes by the letters that stand for them in a byte-level vocabulary; empty for others."""
        backend = getattr(self.model, "backend_tokenizer", None)
        if backend is None or "ByteLevel" not in str(backend.decoder):
            return {}
        plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = sorted(set(range(256)) - set(plain))
        letters = {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
        return letters if set(ByteLevel.alphabet()) == set(letters) else {}


async def _encode(encode: Callable[[Prompt], list[int]], given: Prompt, size: int) -> list[int]:
    return encode(given) if size < LONG else await asyncio.to_thread(encode, given)
