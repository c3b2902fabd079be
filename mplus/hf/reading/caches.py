"""What a key/value cache of a read holds: its text, the memory it was made under, and virtual tokens of PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from attrs import define, evolve
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from mplus.errors import MemoryMismatchError
from mplus.hf.reading.reading import Reading
from mplus.hf.retrofit.context import change_class, subclass
from mplus.mechanisms.decoder import Text
from mplus.mechanisms.opened import TextCache
from mplus.memory.memory import Memory

if TYPE_CHECKING:
    from peft import PeftModel


def first_tokens(mask: Tensor, count: int | tuple[int, ...] | None) -> Tensor:
    """Return ``mask`` ``[B, T]`` bool with the first ``count`` of its tokens only; one number, or one per row."""
    if count is None:
        return mask
    most = torch.tensor(count, device=mask.device)
    return mask & (mask.cumsum(1) <= (most[:, None] if most.dim() else most))


@define(eq=False)
class TextSoFar:
    """The text of a read up to now, one row for each row of the batch, beams included.

    Attributes:
        mask: ``[B, S]`` bool, False at padding.
        query: ``[B, S]`` bool, the tokens that ``open`` retrieved with.
        chosen: ``[B]`` int64, how many columns of each row had been read when it was last chosen what it reads.
        ids: ``[B, S]`` int64; None where some of the text came as embeddings.
        own: what ``MemoryMechanism.finish`` keeps of these tokens.
        prompt: columns that ``open`` saw.
        reopened: whether it was chosen anew since then, for any row.
        rearranged: rows were exchanged, copied or cut since it was last looked whether to choose anew.
    """

    mask: Tensor
    query: Tensor
    chosen: Tensor
    ids: Tensor | None
    own: TextCache | None = None
    prompt: int = 0
    reopened: bool = False
    rearranged: bool = False

    @staticmethod
    def empty(rows: int, device: torch.device, own: TextCache | None = None) -> TextSoFar:
        """Return a text without tokens."""
        mask = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        ids = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        return TextSoFar(mask, mask, torch.zeros(rows, dtype=torch.int64, device=device), ids, own)

    @property
    def tokens(self) -> int:
        """S."""
        return self.mask.shape[1]

    def with_tokens(self, text: Tensor, mask: Tensor | None) -> TextSoFar:
        """Return this text with further tokens: ids ``[B, T]`` or embeddings ``[B, T, w]``, and their mask.

        This one stays as it is, so that a forward that fails leaves its cache as it was.
        """
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=self.mask.device)
        known = text.dim() == 2 and self.ids is not None
        return evolve(
            self,
            mask=torch.cat([self.mask, mask.to(self.mask.device)], 1),
            query=torch.nn.functional.pad(self.query, (0, text.shape[1]), value=False),
            ids=torch.cat([self.ids, text.to(self.mask.device)], 1) if known and self.ids is not None else None,
        )

    def begin(self, query: Tensor, prompt: int, context: int | tuple[int, ...] | None) -> None:
        """Take note of what ``open`` saw.

        Args:
            query: ``[B, S]`` bool, the tokens it retrieved with.
            prompt: columns it saw.
            context: of each row, tokens that do not count as further ones, one number or one per row; None: all.
        """
        self.query, self.prompt = query.to(self.mask.device), prompt
        place = torch.arange(self.tokens, device=self.mask.device)
        counted = first_tokens(self.mask, context) & (place < prompt)
        self.chosen = torch.where(counted, place + 1, 0).amax(1)

    def waiting(self, end: int) -> Tensor:
        """Return ``[B]`` int64, the tokens in front of column ``end`` that came since rows last chose."""
        place = torch.arange(self.tokens, device=self.mask.device)
        return (self.mask & (place >= self.chosen[:, None]) & (place < end)).sum(1)

    def whole(self, tokenizer: PreTrainedTokenizerBase | None) -> Text:
        """Return all of the text."""
        return Text(self.ids, self.mask, tokenizer)

    def opened(self, tokenizer: PreTrainedTokenizerBase | None) -> Text:
        """Return the text that ``open`` saw."""
        ids = None if self.ids is None else self.ids[:, : self.prompt]
        return Text(ids, self.mask[:, : self.prompt], tokenizer, query=self.query[:, : self.prompt])

    def until_chosen(self, tokenizer: PreTrainedTokenizerBase | None, query_tokens: int | None) -> Text:
        """Return the text up to where each row last chose; its last ``query_tokens`` tokens, or all, retrieve."""
        end = int(self.chosen.max())
        place = torch.arange(end, device=self.mask.device)
        mask = self.mask[:, :end] & (place < self.chosen[:, None])
        later = mask.flip(1).cumsum(1).flip(1)  # of each token, how many come from it on
        query = mask if query_tokens is None else mask & (later <= query_tokens)
        return Text(None if self.ids is None else self.ids[:, :end], mask, tokenizer, query=query)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, numbers ``[n]`` int64 in this order, or ``[B]`` bool."""
        rows = rows.to(self.mask.device)
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        self.mask, self.query, self.chosen = self.mask[rows], self.query[rows], self.chosen[rows]
        self.ids = None if self.ids is None else self.ids[rows]
        if self.own is not None:
            self.own.select(rows)
        self.rearranged = True

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens."""
        if tokens == self.tokens:
            return
        self.mask, self.query = self.mask[:, :tokens], self.query[:, :tokens]
        self.ids = None if self.ids is None else self.ids[:, :tokens]
        self.chosen, self.prompt = self.chosen.clamp(max=tokens), min(self.prompt, tokens)
        if self.own is not None:
            self.own.crop(tokens)
        self.rearranged = True


class FollowedCache(Cache):
    """Mixed into the class of a key/value cache: what is done to its rows is done to the text that it holds."""

    _mplus_text: TextSoFar

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._mplus_text.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._mplus_text.select(torch.arange(len(self._mplus_text.mask)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._mplus_text.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        before = int(self.get_seq_length())
        super().crop(tokens_to_remove)
        # Learned tokens in front (prefix tuning) are none of the text, so count those that have gone.
        self._mplus_text.crop(self._mplus_text.tokens - (before - int(self.get_seq_length())))

    def reset(self) -> None:
        super().reset()
        self._mplus_text.crop(0)


def follow(cache: Cache, text: TextSoFar) -> None:
    """Let ``text`` go with ``cache``, whose tokens it says."""
    if not isinstance(cache, FollowedCache):
        change_class(cache, subclass(type(cache), FollowedCache))  # type: ignore[arg-type]
    cache._mplus_text = text  # type: ignore[attr-defined]


def text_in(cache: Cache | None) -> TextSoFar | None:
    """Return the text that a cache holds; None where it holds none, or no mechanism asked for it."""
    if cache is None or not is_begun(cache):
        return None
    return getattr(cache, "_mplus_text", None)


def is_begun(cache: Cache) -> bool:
    """Return whether a cache holds anything of a text."""
    length = getattr(cache, "get_seq_length", None)  # not every decoder's cache is one of transformers
    try:
        return length is not None and int(length()) > 0
    except ValueError:  # one of states alone has no length
        return bool(cache.has_previous_state())


class Snapshot(Protocol):
    """A reading of a memory, as it was at its ``version``."""

    version: int

    def is_of(self, memory: Memory) -> bool: ...


def keep_reading(cache: Cache, reading: Snapshot) -> None:
    """Note in a cache what it was made under."""
    cache._mplus_reading = reading  # type: ignore[attr-defined]


def check_cache(cache: Cache | None, memory: Memory | None, reuse: bool) -> Reading | None:
    """Return the reading that a non-empty cache was made under, if ``memory`` is still in that state (or ``reuse``).

    Raises:
        MemoryMismatchError: the cache belongs to another state, or to none.
    """
    if cache is None or not is_begun(cache):
        return None
    made_under: Reading | None = getattr(cache, "_mplus_reading", None)
    if made_under is None:
        learned = getattr(cache, "_mplus_learned", None)
        # Virtual tokens and nothing else depend on no memory.
        if memory is None or (learned is not None and int(cache.get_seq_length()) == learned):
            return None
    if made_under is not None and (reuse or (memory is not None and made_under.is_of(memory))):
        return made_under
    was = "without a memory" if made_under is None else f"with version {made_under.version} of a memory"
    now = "no memory" if memory is None else f"version {memory.version} of this memory"
    raise MemoryMismatchError(
        f"past_key_values was made {was}, the call reads {now}: start a new cache, "
        "or pass reuse_memory_cache=True to go on reading what the cache was made with"
        + ("" if made_under is not None else " (for prefix tuning of PEFT, pass the PeftModel to mplus.wrap)")
    )


Prompt = TypeVar("Prompt", bound=Tensor | Cache)


def mark_learned(prompt: Prompt) -> Prompt:
    """Return ``prompt`` itself, noted as learned when it is a cache: it holds virtual tokens and no text."""
    if isinstance(prompt, Cache):
        prompt._mplus_learned = prompt.get_seq_length()  # type: ignore[attr-defined]
    return prompt


def embedded_by(model: PreTrainedModel | PeftModel | None) -> int:
    """Return the number of virtual tokens that a PeftModel embeds in front of a text; 0 for what is no PeftModel.

    Virtual tokens that are keys and values (prefix tuning) pass through no layer, so they do not count.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        return 0
    return int(config.num_virtual_tokens)
