"""Answer the calls that a decoder makes of its memory while it generates a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from attrs import define, field
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mplus.errors import NotSupported
from mplus.hf.model.sizes import known_positions
from mplus.hf.reading.generation import GenerateCall
from mplus.hf.text.ask import Contains, choose
from mplus.hf.text.encoding import encoded
from mplus.hf.text.engine import TextEngine
from mplus.hf.text.reading import TextReading, check_recalled
from mplus.hf.types import Generated


def refuse_for_calls(call: GenerateCall) -> None:
    """Raise NotSupported for ways of generating in which a call cannot be answered."""
    reasons = [
        f"{name}=1 is needed: a call is answered in one text" for name in ("num_beams", "num_return_sequences")
        if (call.number(name) or 1) > 1
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


class Pieces(TypedDict):
    """The settings of a call that every piece of its text gets anew."""

    logits_processor: LogitsProcessorList | None
    stopping_criteria: StoppingCriteriaList | None


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
        settings: of the call that every piece gets anew.
        visible: tokens of the visible text.
        banned: tokens that the next piece must not begin with: it would be the call that was just taken back.
        answered: the call that was answered last; None: none was.
        span: where it stands in ``context``, with its answer.
    """

    engine: TextEngine
    reading: TextReading
    row: int
    generate: Callable[..., Generated]
    context: list[int]
    left: int
    settings: Pieces
    visible: list[int] = field(factory=list, init=False)
    banned: list[int] = field(factory=list, init=False)
    answered: str | None = field(default=None, init=False)
    span: slice = field(default=slice(0, 0), init=False)

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
            if not self._answer(new, head, whole):
                self.context += head
                self.banned = [new[whole], mark[0]]
        return self.visible

    def _answer(self, new: list[int], head: list[int], whole: int) -> bool:
        """Let a call be finished and put it with its answer into the context; return False where it is taken back.

        Args:
            new: what was generated last, with the mark of the call.
            head: what stands in front of the mark.
            whole: the token of ``new`` in which the mark begins.
        """
        mechanism, tokenizer = self.engine.mechanism, self.reading.tokenizer
        entries, opens = self.reading.states[self.row].entries(), mechanism.opens or ""
        base = list(self.context)
        if not mechanism.keeps_calls:
            del base[self.span]
        choices = mechanism.calls(entries)
        if choices:
            call: str | None = self._chosen([*base, *head], choices)
        else:
            call = self._call([*base, *new], len(base) + whole, opens)
        if call is None or (call == self.answered and not mechanism.repeats_calls):
            return False
        answer = mechanism.answer(entries, call, self.engine.asking(tokenizer))
        if answer is None:
            return False
        check_recalled(self.engine, "answer", answer)
        called = encoded(tokenizer, f"{opens}{call}{mechanism.closes}{answer.text}", inside=True)
        base += head
        if self.positions is not None and len(base) + len(called) >= self.positions:
            return False
        self.reading.recalled[self.row].append(answer)
        self.context, self.answered, self.banned = [*base, *called], call, []
        self.span = slice(len(base), len(self.context))
        return True

    @property
    def positions(self) -> int | None:
        """Positions of the decoder; None: there is no limit."""
        return known_positions(self.engine.model.config.get_text_config(decoder=True))

    def _chosen(self, context: list[int], choices: Sequence[str]) -> str | None:
        """Return the one of ``choices`` that the decoder calls with behind a text; None where no position is left."""
        mechanism, tokenizer = self.engine.mechanism, self.reading.tokenizer
        opened = [*context, *encoded(tokenizer, mechanism.opens or "", inside=True)]
        found = choose(self.engine.model, tokenizer, opened, [choice + mechanism.closes for choice in choices])
        return None if found is None else found.removesuffix(mechanism.closes)

    def _before(self, new: list[int], text: str, at: int) -> tuple[int, list[int]]:
        """Return the number of tokens of ``new`` that lie whole in ``text[:at]``, and the tokens of ``text[:at]``."""
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
        """Generate the tokens behind ``context``, until ``end``; () where the decoder's positions are at an end."""
        most = tokens if self.positions is None else min(tokens, self.positions - len(context))
        if most < 1:
            return []
        ids = torch.tensor([context], device=self.engine.device)
        processors = [*(self.settings.get("logits_processor") or ()), _Without(self.banned, len(context))]
        criteria = [*(self.settings.get("stopping_criteria") or ()), end]
        sequences = self.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, return_dict_in_generate=False,
            logits_processor=LogitsProcessorList(processors), stopping_criteria=StoppingCriteriaList(criteria),
        )  # fmt: skip
        new: list[int] = sequences[0, len(context) :].tolist()
        return new


class _Until(StoppingCriteria):
    """Ends a generation of one text when its tokens from ``start`` on are enough."""

    def __init__(self, enough: Callable[[list[int]], bool], start: int) -> None:
        self.enough, self.start = enough, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Tensor) -> Tensor:
        done = self.enough(input_ids[0, self.start :].tolist())
        return torch.tensor([done], device=input_ids.device)
