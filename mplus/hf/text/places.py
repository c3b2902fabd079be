"""Where recalled text stands in a prompt, and the prompt with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from attrs import define
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mplus.hf.text.encoding import encoded

FIRST, REPLY, SECOND = "mplusfirst", "mplusreply", "mplussecond"
"""Messages by which the opening of a user turn is found in a chat template."""


def place_in(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], where: Literal["start", "turn"]) -> int:
    """Return the number of the token of a prompt that recalled text stands in front of.

    Args:
        tokenizer: of the prompt.
        prompt: its tokens, without padding.
        where: "start": behind BOS; "turn": at the opening of the last user turn, where the prompt has one.
    """
    if where == "turn":
        opening = turn_opening(tokenizer)
        ids = encoded(tokenizer, opening.strip(), inside=True)
        for first in range(len(prompt) - len(ids), -1, -1) if ids else ():
            if list(prompt[first : first + len(ids)]) == ids:
                return _behind_space(tokenizer, prompt, first + len(ids), opening[len(opening.rstrip()) :])
    return int(bool(prompt) and prompt[0] == tokenizer.bos_token_id)


def turn_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text with which the tokenizer's chat template opens a user turn; "" where there is no template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return ""
    roles = (("user", FIRST), ("assistant", REPLY), ("user", SECOND))
    messages = [{"role": role, "content": content} for role, content in roles]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    opening, _, rest = text.partition(FIRST)
    again = rest.partition(REPLY)[2].partition(SECOND)[0]
    # In front of the first turn there may be system text: the opening alone is what both turns begin with.
    shared = 0
    while shared < min(len(opening), len(again)) and opening[-1 - shared] == again[-1 - shared]:
        shared += 1
    return opening[len(opening) - shared :]


def _behind_space(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], place: int, space: str) -> int:
    """Return the place behind the white space that ends the opening of a turn, as far as it has tokens of its own."""
    while space and place < len(prompt):
        text = str(tokenizer.decode([prompt[place]]))
        if not text or not space.startswith(text):
            break
        space, place = space[len(text) :], place + 1
    return place


@define(frozen=True, eq=False)
class Spliced:
    """Prompts with recalled text in them.

    Attributes:
        ids: ``[B, T + w]`` int64; shorter rows have padding on the left.
        mask: the same shape, 0 at padding; None: there is none.
        kept: ``[B, T]`` int64, the columns where the tokens of the prompts are now.
        inserted: ``[B]`` int64, tokens put in.
    """

    ids: Tensor
    mask: Tensor | None
    kept: Tensor
    inserted: Tensor

    @property
    def width(self) -> int:
        """w, columns that were added."""
        return self.ids.shape[1] - self.kept.shape[1]

    @staticmethod
    def of(
        ids: Tensor, mask: Tensor | None, texts: Sequence[Sequence[int]], columns: Sequence[int], padding: int
    ) -> Spliced:
        """Put text into prompts.

        Args:
            ids: ``[B, T]`` int64.
            mask: ``[B, T]``, 0 at padding; None: there is none.
            texts: of each row, the tokens to put in.
            columns: of each row, the column that they are put in front of.
            padding: the id of padding.
        """
        rows, tokens = ids.shape
        width = max(map(len, texts))
        old = torch.arange(tokens, device=ids.device)
        new_ids = ids.new_full((rows, tokens + width), padding)
        kept = torch.empty_like(ids)
        new_mask = torch.zeros_like(new_ids)
        for row, (text, column) in enumerate(zip(texts, columns, strict=True)):
            left = width - len(text)  # of padding, in front, so that all prompts end in the same column
            kept[row] = old + left + len(text) * (old >= column)
            new_ids[row, kept[row]] = ids[row]
            new_mask[row, kept[row]] = 1 if mask is None else mask[row].to(new_mask.dtype)
            inside = slice(left + column, left + column + len(text))
            new_ids[row, inside] = ids.new_tensor(text)
            new_mask[row, inside] = 1
        inserted = torch.tensor([len(text) for text in texts], device=ids.device)
        unpadded = mask is None and bool((inserted == width).all())
        return Spliced(new_ids, None if unpadded else new_mask, kept, inserted)

    def positions(self, given: Tensor) -> Tensor:
        """Return ``[B, T + w]`` int64 positions, where the tokens of the prompts had those ``given`` ``[B, T]``."""
        found = torch.zeros_like(self.ids)
        moved = self.kept - torch.arange(self.kept.shape[1], device=self.ids.device)
        behind = moved == self.width  # columns behind the text that was put in
        found.scatter_(1, self.kept, given + self.inserted[:, None] * behind)
        for row, count in enumerate(self.inserted.tolist()):
            before = int((~behind[row]).sum())
            first = given[row, before] if before < given.shape[1] else given[row, -1] + 1
            at = before + self.width - count
            found[row, at : at + count] = first + torch.arange(count, device=self.ids.device)
        return found
