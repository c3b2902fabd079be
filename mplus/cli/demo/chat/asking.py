"""Ask a chat model a question in four ways: with memory, without, with text in its window, with the same text found."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from attrs import define, evolve
from torch import Tensor

from mplus.chat.prompt import ChatFormat
from mplus.chat.reply import Recalled, recalled_of
from mplus.chat.streaming import Watch
from mplus.cli.demo.chat.script import Question
from mplus.hf.types import Cache
from mplus.memory import Memory

NEW_TOKENS = 24
"""Most tokens of an answer."""


@define(frozen=True, kw_only=True)
class Said:
    """An answer to one question.

    Attributes:
        question: it was given to.
        text: of the answer, its first line.
        right: whether the right answer is in it; None: there is none.
        first_seconds: until the first token; None: it was not timed, since it was given beside others.
        tokens_read: of the prompt, what was put into it included; of what was prefilled, none.
        recalled: what memory brought back.
    """

    question: Question
    text: str
    right: bool | None
    first_seconds: float | None
    tokens_read: int
    recalled: tuple[Recalled, ...] = ()


@define(frozen=True, eq=False)
class Prefilled:
    """The beginning of a prompt that was read once, for every question that follows.

    Attributes:
        ids: ``[P]``, of the template and the text.
        cache: of the decoder behind them.
        text_tokens: of the text alone.
        seconds: that reading took.
    """

    ids: tuple[int, ...]
    cache: Cache
    text_tokens: int
    seconds: float

    def cache_for_question(self) -> Cache:
        """Return the cache as it was behind the text: cut off there after another question, or a copy."""
        if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
            return copy.deepcopy(self.cache)  # what has left its window does not come back
        further = self.cache.get_seq_length() - len(self.ids)
        if further:
            self.cache.crop(-further)
        return self.cache

    @property
    def nbytes(self) -> int:
        """Return the bytes of the keys and values."""
        return sum(
            tensor.nbytes
            for layer in self.cache.layers
            for tensor in (getattr(layer, name) for name in ("keys", "values"))
        )


@define(frozen=True)
class Asker:
    """Asks one decoder.

    Attributes:
        model: wrapped.
        format: of its prompts.
    """

    model: Any
    format: ChatFormat

    def ask(self, question: Question, memory: Memory | None = None) -> Said:
        """Return the answer with a memory, or without."""
        return self._said(question, self._ids(question.text), memory=memory)

    def ask_with_text(self, question: Question, texts: Sequence[str]) -> Said:
        """Return the answer with texts in front of the question, in its turn."""
        return self._said(question, self._ids("\n".join([*texts, question.text])))

    def ask_behind(self, question: Question, prefilled: Prefilled) -> Said:
        """Return the answer behind a text that was read before."""
        rest = self._behind(prefilled, question)
        ids = [*prefilled.ids, *rest]
        said = self._said(question, ids, cache=prefilled.cache_for_question())
        return evolve(said, tokens_read=len(rest))

    def ask_each(
        self, questions: Sequence[Question], memory: Memory | None = None, texts: Sequence[Sequence[str]] | None = None
    ) -> tuple[Said, ...]:
        """Return the answers to several questions, given side by side, which takes much less time than one by one.

        Args:
            questions: any number.
            memory: that is read for each; None: none is.
            texts: those in front of each question, in its turn; None: there are none.
        """
        if not questions:
            return ()
        tokenizer = self.format.tokenizer
        fronts = [()] * len(questions) if texts is None else texts
        prompts = [self._ids("\n".join([*front, one.text])) for front, one in zip(fronts, questions, strict=True)]
        most = max(map(len, prompts))
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        ids = self._tensor([[padding] * (most - len(own)) + own for own in prompts])
        mask = self._tensor([[0] * (most - len(own)) + [1] * len(own) for own in prompts])
        reads = {} if memory is None else {"memory": memory, "output_sources": True}
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=padding,
            return_dict_in_generate=True, **reads,
        )  # fmt: skip
        sources = [[]] * len(questions) if memory is None else output.memory_sources
        given = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in output.sequences[:, most:]]
        return tuple(
            self._of(one, answer.partition("\n")[0], None, len(own), recalled_of(read))
            for one, answer, own, read in zip(questions, given, prompts, sources, strict=True)
        )

    def prefill(self, text_ids: Sequence[int], questions: Sequence[Question], positions: int) -> Prefilled:
        """Read as much of the end of a text as the positions hold beside a question and its answer.

        Args:
            text_ids: ids ``[n]`` of the text.
            questions: that will follow.
            positions: of the decoder.
        """
        before, after = self._frame()
        longest = max(len(self._question_ids(question)) for question in questions)
        room = positions - len(before) - longest - len(after) - NEW_TOKENS
        ids = (*before, *text_ids[-room:])
        begun = time.perf_counter()
        with torch.no_grad():
            read = self.model(self._tensor([ids]), use_cache=True, logits_to_keep=1)
        return Prefilled(ids, read.past_key_values, len(ids) - len(before), time.perf_counter() - begun)

    def _behind(self, prefilled: Prefilled, question: Question) -> list[int]:
        return [*self._question_ids(question), *self._frame()[1]]

    def _question_ids(self, question: Question) -> list[int]:
        found = self.format.tokenizer("\n" + question.text, add_special_tokens=False)["input_ids"]
        return list(found)

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the tokens of the template in front of what a user says, and behind it."""
        one, other = (self._ids(letter) for letter in "AB")
        first = next(place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        return one[:first], one[first + 1 :]

    def _ids(self, content: str) -> list[int]:
        return self.format.ids([{"role": "user", "content": content}])

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([list(row) for row in rows], device=self.model.get_input_embeddings().weight.device)

    def _said(
        self, question: Question, ids: Sequence[int], memory: Memory | None = None, cache: Cache | None = None
    ) -> Said:
        watch, prompt = Watch(self.format.tokenizer, ("\n",), lambda piece: None), self._tensor([ids])
        reads = {} if memory is None else {"memory": memory, "output_sources": True}
        if cache is not None:
            reads = {**reads, "past_key_values": cache}
        output = self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False,
            streamer=watch, stopping_criteria=[watch], return_dict_in_generate=True, **reads,
        )  # fmt: skip
        recalled = () if memory is None else recalled_of(output.memory_sources[0])
        return self._of(question, watch.said, (watch.first or watch.started) - watch.started, len(ids), recalled)

    def _of(
        self, question: Question, text: str, first_seconds: float | None, tokens: int, recalled: tuple[Recalled, ...]
    ) -> Said:
        text = text.strip()
        return Said(
            question=question,
            text=text,
            right=None if question.answer is None else contains(text, question.answer),
            first_seconds=first_seconds,
            tokens_read=tokens,
            recalled=recalled,
        )


def contains(text: str, answer: str) -> bool:
    """Return whether the words of ``answer`` stand in ``text``, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None
