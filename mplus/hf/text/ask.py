"""Ask the decoder itself for a text: greedy decoding without memory, among choices where there are some."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import define, field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from mplus.errors import InputError
from mplus.hf.model.modes import in_eval_mode
from mplus.hf.model.offloading import input_device
from mplus.hf.model.sizes import known_positions
from mplus.hf.reading.generating import generate_in


class Contains(StoppingCriteria):
    """Ends a generation of one text when one of some marks stands in it, at whatever tokens.

    Args:
        tokenizer: turns ids into text.
        marks: any of them ends it.
        start: number of ids that are not looked at.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: Sequence[str], start: int) -> None:
        self.tokenizer, self.marks, self.start = tokenizer, marks, start
        self.most = 2 * max(map(len, marks)) + 8  # a mark lies in as many tokens as it has bytes, at most

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Tensor) -> Tensor:
        tail = input_ids[:, self.start :][:, -4 * self.most :]
        texts = [self.tokenizer.decode(row) for row in tail]
        found = [any(mark in text for mark in self.marks) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, *, inside: bool) -> list[int]:
    """Return the tokens of a piece of text, without special ones.

    Args:
        tokenizer: of the text.
        text: any.
        inside: it stands behind other text, so that no space is put in front of it, as some tokenizers do.
    """
    if not text:
        return []
    pieces = [ANCHOR, ANCHOR + text] if inside else [text]
    *before, found = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
    if not before:
        return list(found)
    (anchor,) = before
    if found[: len(anchor)] != anchor:  # it joins with what follows
        return encoded(tokenizer, text, inside=False)
    return list(found[len(anchor) :])


ANCHOR = "\n"
"""Stands in front of a piece of text while it is turned into tokens."""


@define(frozen=True)
class Trie:
    """Choices as rows of tokens that may have beginnings in common.

    Attributes:
        choice: that ends here; None: none.
        next: what follows, by token.
    """

    choice: str | None = None
    next: dict[int, Trie] = field(factory=dict)

    @staticmethod
    def of(choices: Sequence[tuple[str, Sequence[int]]]) -> Trie:
        """Return the trie of choices, each with its tokens."""
        ended = [choice for choice, ids in choices if not ids]
        by_first: dict[int, list[tuple[str, Sequence[int]]]] = {}
        for choice, ids in choices:
            if ids:
                by_first.setdefault(ids[0], []).append((choice, ids[1:]))
        return Trie(ended[0] if ended else None, {first: Trie.of(rest) for first, rest in by_first.items()})


def ask(
    model: PreTrainedModel,
    base: type[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int,
    stop: Sequence[str] = (),
    choices: Sequence[str] = (),
) -> str:
    """Return what the decoder puts behind a prompt; see ``mplus.mechanisms.decoder.Decoder.ask``.

    Args:
        model: the wrapped decoder.
        base: its class before it was wrapped.
        tokenizer, prompt, tokens, stop, choices: as there.
    """
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=input_device(model))
    choice_ids = [(choice, encoded(tokenizer, choice, inside=True)) for choice in choices]
    if not all(found for _, found in choice_ids):
        raise InputError(f"choices must have at least one token each, got {list(choices)!r}")
    longest = max((len(found) for _, found in choice_ids), default=tokens)
    positions = known_positions(model.config.get_text_config(decoder=True))
    if positions is not None and ids.shape[1] + longest > positions:
        raise InputError(
            f"what a memory asks must fit into the {positions:,} positions of {type(model).__name__}, got a prompt of "
            f"{ids.shape[1]:,} tokens and {longest:,} to come: ask for less, or with a shorter prompt"
        )
    with torch.no_grad(), in_eval_mode(model):
        if choices:
            return _chosen(
                lambda row: generate_in(model, None, base.forward, model, input_ids=row).logits[0, -1],
                ids, Trie.of(choice_ids), tokenizer.eos_token_id,
            )  # fmt: skip
        criteria = [Contains(tokenizer, stop, ids.shape[1])] if stop else []
        generate: Callable[..., Tensor] = base.generate  # type: ignore[attr-defined]
        found = generate_in(
            model, None, generate, model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            do_sample=False, num_beams=1, stopping_criteria=criteria, return_dict_in_generate=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )  # fmt: skip
    answer = str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    return answer[: min((at for mark in stop if (at := answer.find(mark)) >= 0), default=len(answer))]


def _chosen(logits_of: Callable[[Tensor], Tensor], ids: Tensor, trie: Trie, end: int | None) -> str:
    """Return the choice that greedy decoding among the tokens of ``trie`` comes to; ``end`` stands for no more.

    ``logits_of(ids)`` gives the logits ``[V]`` of what follows ``ids`` ``[1, T]``.
    """
    while trie.next:
        able = list(trie.next)
        if trie.choice is not None and end is None:
            break
        logits = logits_of(ids)
        offered = torch.tensor([*able, end] if trie.choice is not None else able, device=logits.device)
        best = int(logits[offered].argmax())
        if best == len(able):
            break
        trie = trie.next[able[best]]
        ids = torch.cat([ids, ids.new_tensor([[able[best]]])], 1)
    return trie.choice or ""
