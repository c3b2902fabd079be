"""Ask the decoder itself for a text: greedy decoding without memory, among choices where there are some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from attrs import define
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from mplus.errors import InputError
from mplus.hf.model.modes import in_eval_mode
from mplus.hf.model.offloading import input_device
from mplus.hf.model.sizes import known_positions
from mplus.hf.reading.generating import generate_in
from mplus.hf.text.decoding import Trie, chosen, late
from mplus.hf.text.encoding import encoded


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


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int,
    stop: Sequence[str] = (),
    choices: Sequence[str] = (),
    patience: int = 1,
) -> str:
    """Generate the text behind a prompt, greedily; see ``mplus.mechanisms.decoder.Decoder.ask``.

    Args:
        model: the wrapped decoder.
        tokenizer, prompt, tokens, stop, choices: as there.
        patience: see ``mplus.mechanisms.text.asking.Ask``.
    """
    base = type(model).__mplus_base__  # type: ignore[attr-defined]
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
        forward = partial(generate_in, model, None, base.forward, model)
        if choices:
            return chosen(forward, ids, Trie.of(choice_ids), tokenizer.eos_token_id)
        if stop and patience > 1:
            most = tokens if positions is None else min(tokens, positions - ids.shape[1])
            return late(forward, tokenizer, ids, most, stop[0], patience)
        criteria = [Contains(tokenizer, stop, ids.shape[1])] if stop else []
        generate: Callable[..., Tensor] = base.generate
        found = generate_in(
            model, None, generate, model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            do_sample=False, num_beams=1, stopping_criteria=criteria, return_dict_in_generate=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )  # fmt: skip
    answer = str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    return answer[: min((at for mark in stop if (at := answer.find(mark)) >= 0), default=len(answer))]


def choose(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Sequence[int], choices: Sequence[str]
) -> str | None:
    """Return the one of ``choices`` that greedy decoding puts behind a text; None where none fits behind it.

    Args:
        model: the wrapped decoder, read without memory.
        tokenizer: of the text.
        context: its tokens.
        choices: each with at least one token.
    """
    base = type(model).__mplus_base__  # type: ignore[attr-defined]
    choice_ids = [(choice, encoded(tokenizer, choice, inside=True)) for choice in choices]
    positions = known_positions(model.config.get_text_config(decoder=True))
    if positions is not None:
        choice_ids = [(choice, found) for choice, found in choice_ids if len(context) + len(found) <= positions]
    if not choice_ids:
        return None
    ids = torch.tensor([list(context)], device=input_device(model))
    forward = partial(generate_in, model, None, base.forward, model)
    with torch.no_grad(), in_eval_mode(model):
        return chosen(forward, ids, Trie.of(choice_ids), tokenizer.eos_token_id)


@define(frozen=True, eq=False)
class Asking:
    """The decoder of a model, asked without memory; see ``mplus.mechanisms.text.asking.Ask``.

    Attributes:
        model: the wrapped decoder.
        tokenizer: turns texts into ids and back.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __call__(
        self, prompt: str, tokens: int, stop: Sequence[str] = (), choices: Sequence[str] = (), patience: int = 1
    ) -> str:
        """Generate the text behind a prompt, greedily."""
        return ask(self.model, self.tokenizer, prompt, tokens, stop, choices, patience)

    def count(self, text: str) -> int:
        """Return the tokens of a text, special ones left out."""
        return len(encoded(self.tokenizer, text, inside=False))

    def vectors(self, texts: Sequence[str], layer: int) -> Tensor:
        """Return ``[n, d]``, the mean hidden states behind a layer; see ``Ask.vectors``."""
        rows = [encoded(self.tokenizer, text, inside=False) for text in texts]
        positions = known_positions(self.model.config.get_text_config(decoder=True))
        for text, row in zip(texts, rows, strict=True):
            if not row or (positions is not None and len(row) > positions):
                raise InputError(
                    f"a vector is made of a text of 1 to {positions or 'any number of'} tokens, got {len(row)} in "
                    f"{text!r:.80}"
                )
        with torch.no_grad(), in_eval_mode(self.model):
            return torch.stack([self._mean(row, layer) for row in rows])

    def _mean(self, row: Sequence[int], layer: int) -> Tensor:
        ids = torch.tensor([row], device=input_device(self.model))
        if layer == 0:
            embedded: Tensor = self.model.get_input_embeddings()(ids)
            return embedded[0].mean(0).float().cpu()
        forward = type(self.model).__mplus_base__.forward  # type: ignore[attr-defined]
        output = generate_in(self.model, None, forward, self.model, input_ids=ids, output_hidden_states=True)
        if layer >= len(output.hidden_states):
            raise InputError(f"layer must be from 0 to {len(output.hidden_states) - 1}, got {layer}")
        found: Tensor = output.hidden_states[layer][0]
        return found.mean(0).float().cpu()
