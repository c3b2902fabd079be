"""Answer the calls that a decoder makes of its memory while it generates a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mplus.errors import NotSupported
from mplus.hf.model.sizes import known_positions
from mplus.hf.reading.generation import GenerateCall
from mplus.hf.text.ask import Contains, encoded
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.reading import TextReading, check_recalled


def refuse_for_calls(call: GenerateCall) -> None:
    """Raise NotSupported for ways of generating in which a call cannot be answered."""
    reasons = [
        f"{name}=1 is needed: a call is answered in one text" for name in ("num_beams", "num_return_sequences")
        if (call[name] or 1) > 1
    ]  # fmt: skip
    reasons += [
        f"{name} cannot be had: the text is generated in pieces, some of which are taken back"
        for name in ("streamer", "output_scores", "output_logits", "output_hidden_states", "output_attentions")
        if call[name]
    ]
    reasons += [
        f"{name} guesses tokens, of which a call could be one"
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
        if call[name]
    ]
    if reasons:
        raise NotSupported("generate with a memory that is called does not support this call: " + "; ".join(reasons))


class _Without(LogitsProcessor):
    """Keeps some tokens from being the first one behind a text of ``length`` tokens."""

    def __init__(self, tokens: Sequence[int], length: int) -> None:
        self.tokens, self.length = list(tokens), length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self.length:
            scores = scores.clone()
            scores[:, self.tokens] = -torch.inf
        return scores


@define(eq=False)
class Continuation:
    """One text that is generated, with the calls in it.

    Attributes:
        engine: of the decoder.
        reading: of the memory; gets the answers.
        row: number of the prompt.
        generate: ``generate`` of the decoder, with the settings of the call.
        context: what the decoder sees: prompt, recalled text, visible text, calls and answers.
        left: tokens that may still be generated, those of calls not counted.
        settings: of the call that every piece gets anew: "logits_processor" and "stopping_criteria".
        visible: tokens of the visible text.
        banned: tokens that the next piece must not begin with: it would be the call that was just taken back.
    """

    engine: TextEngine
    reading: TextReading
    row: int
    generate: Callable[..., Tensor]
    context: list[int]
    left: int
    settings: Mapping[str, Any]
    visible: list[int] = field(factory=list, init=False)
    banned: list[int] = field(factory=list, init=False)

    def run(self) -> list[int]:
        """Generate the text; return the tokens of what is visible of it."""
        mechanism, tokenizer = self.engine.mechanism, self.reading.tokenizer
        opens = mechanism.opens or ""
        mark = encoded(tokenizer, opens, inside=True)  # may begin with the last token of all, and is finished then
        for calls_left in range(mechanism.most_calls, -1, -1):
            start = len(self.context)
            new = self._generated(self.context, self.left + len(mark), Contains(tokenizer, [opens], start))
            text = str(tokenizer.decode(new))
            at = text.find(opens)
            if at < 0:
                return [*self.visible, *new[: self.left]]
            whole, head = self._before(new, text, at)
            self.visible += head[: self.left]
            self.left -= len(head)
            if not calls_left or self.left < 1:
                break
            call = self._call([*self.context, *new], start + whole, opens)
            self.context += head
            answer = None if call is None else mechanism.answer(self.reading.states[self.row].entries(), call)
            self.banned = []
            if call is None or answer is None:
                self.banned = [new[whole], mark[0]]
                continue
            check_recalled(self.engine, "answer", answer)
            self.reading.recalled[self.row].append(answer)
            self.context += encoded(tokenizer, f"{opens}{call}{mechanism.closes}{answer.text}", inside=True)
        return self.visible

    def _before(self, new: list[int], text: str, at: int) -> tuple[int, list[int]]:
        """Return how many tokens of ``new`` lie whole in ``text[:at]``, and the tokens of ``text[:at]``."""
        decode = self.reading.tokenizer.decode
        ends = [len(str(decode(new[:count]))) for count in range(len(new) + 1)]
        whole = max(count for count, end in enumerate(ends) if end <= at)
        return whole, [*new[:whole], *encoded(self.reading.tokenizer, text[ends[whole] : at], inside=True)]

    def _call(self, opened: list[int], start: int, opens: str) -> str | None:
        """Let a call be finished; return what stands in it, or None where it is malformed.

        Args:
            opened: context and the text in which it begins.
            start: the token of ``opened`` in which it begins.
            opens: its mark.
        """
        tokenizer, closes = self.reading.tokenizer, self.engine.mechanism.closes

        def inside(ids: list[int]) -> str:
            return str(tokenizer.decode(ids)).partition(opens)[2]

        call = inside(opened[start:])
        if closes not in call:
            done = _Until(lambda ids: closes in inside(ids), start)
            new = self._generated(opened, self.engine.mechanism.call_tokens, done)
            call = inside([*opened[start:], *new])
        call, closed, _ = call.partition(closes)
        return call if closed and opens not in call else None

    def _generated(self, context: list[int], tokens: int, end: StoppingCriteria) -> list[int]:
        """Return what the decoder puts behind ``context``, until ``end``; () where its positions are at an end."""
        model, device = self.engine.model, self.engine.device
        positions = known_positions(model.config.get_text_config(decoder=True))
        most = tokens if positions is None else min(tokens, positions - len(context))
        if most < 1:
            return []
        ids = torch.tensor([context], device=device)
        processors = [*(self.settings.get("logits_processor") or ()), _Without(self.banned, len(context))]
        criteria = [*(self.settings.get("stopping_criteria") or ()), end]
        found = self.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, return_dict_in_generate=False,
            logits_processor=LogitsProcessorList(processors), stopping_criteria=StoppingCriteriaList(criteria),
        )  # fmt: skip
        new: list[int] = found[0, len(context) :].tolist()
        return new


class _Until(StoppingCriteria):
    """Ends a generation of one text when its tokens from ``start`` on are enough."""

    def __init__(self, enough: Callable[[list[int]], bool], start: int) -> None:
        self.enough, self.start = enough, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Tensor) -> Tensor:
        done = self.enough(input_ids[0, self.start :].tolist())
        return torch.tensor([done], device=input_ids.device)
