"""NoteBatches: notes in plain English about invented people stand in running text, and are asked for later."""

from __future__ import annotations

from functools import cached_property
from typing import cast

from attrs import define, field
from torch import Tensor

from mplus.config import flag
from mplus.errors import ConfigError
from mplus.facts.notes import FIRST, LAST, RELATIONS, Relation, part, sentences
from mplus.training.batch import TextSample
from mplus.training.data.counter_rng import CounterRNG, permuted
from mplus.training.data.generated.base import GeneratedBatches, GeneratedOptions
from mplus.training.data.generated.copying import shared
from mplus.training.data.options import share
from mplus.training.data.tokens import encode

PLAIN, ANSWER = "Question: {question} Answer:", "The answer is"
INSTRUCTIONS = ("", " Answer with one short sentence.", " Answer briefly.", " Reply in a word or two.")
"""Behind a question to a chat model."""


@define(frozen=True, kw_only=True)
class NoteOptions(GeneratedOptions):
    """Options of ``GeneratedOptions`` and these.

    Attributes:
        held_out: tell of people, values and sentences that are never trained with.
        strange: of the facts, this share has a value of any relation, so that nothing but what was told tells it.
        chat: of the batches, this share asks as a user of the tokenizer's chat template does; the others as
            ``Question: ... Answer:``.
    """

    held_out: bool = field(default=False, validator=flag)
    strange: float = field(default=0.0, validator=share)
    chat: float = field(default=0.0, validator=share)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        most = len(part(FIRST, self.held_out)) * len(part(LAST, self.held_out)) * len(RELATIONS) // 2
        if self.max_age >= most:
            raise ConfigError(f"max_age must be below {most}, so that no fact is told twice, got {self.max_age}")


class NoteBatches(GeneratedBatches):
    """``Alma Baker keeps a goat in the garden.`` tells, ``What pet does Alma Baker have?`` asks.

    A fact comes back, with a new value, only after all other facts about the people of this data set.
    """

    Options = NoteOptions
    kind = 3
    options: NoteOptions

    @cached_property
    def _people(self) -> list[str]:
        held_out = self.options.held_out
        return [f"{first} {last}" for first in part(FIRST, held_out) for last in part(LAST, held_out)]

    @cached_property
    def _values(self) -> tuple[str, ...]:
        return tuple(word for known in RELATIONS.values() for word in part(known.values, self.options.held_out))

    def fact(self, stream: int, place: int) -> tuple[Relation, str, str]:
        """Return relation, name and value told in a chunk."""
        count = len(self._people) * len(RELATIONS)
        relation, person = divmod(permuted(place % count, count, self._seed, "facts", stream), len(self._people))
        known = list(RELATIONS.values())[relation]
        strange = CounterRNG(self._seed, "strange", stream, place).uniform() < self.options.strange
        values = self._values if strange else part(known.values, self.options.held_out)
        return known, self._people[person], self._pick(values, "value", stream, place)

    def tell(self, stream: int, place: int) -> Tensor:
        relation, name, value = self.fact(stream, place)
        told = self._pick(sentences(relation.told, self.options.held_out), "told", stream, place)
        return encode(self._tokenizer, " " + told.format(name=name, value=value))  # it stands between sentences

    def ask(self, stream: int, place: int, source: int, draws: CounterRNG) -> TextSample:
        relation, name, value = self.fact(stream, place)
        ways = sentences(relation.asked, self.options.held_out)
        question = ways[draws.below(len(ways))].format(name=name)
        chat = CounterRNG(self._seed, "chat", self._step).uniform() < self.options.chat
        return self._text(question, value, source, INSTRUCTIONS[draws.below(len(INSTRUCTIONS))] if chat else None)

    def longest(self) -> tuple[int, int]:
        def size(text: str) -> int:
            return len(encode(self._tokenizer, text))

        name, value = f"{max(FIRST, key=size)} {max(LAST, key=size)}", max(self._values, key=size)
        told = [
            sentence.format(
                name=name,
                value=value if self.options.strange else max(part(known.values, self.options.held_out), key=size),
            )
            for known in RELATIONS.values()
            for sentence in sentences(known.told, self.options.held_out)
        ]
        asked = [sentence.format(name=name) for known in RELATIONS.values() for sentence in known.asked]
        way = max(INSTRUCTIONS, key=size) if self.options.chat else None
        return max(map(size, told)) + 1, len(self._text(max(asked, key=size), value, 0, way).ids)

    def _pick(self, items: tuple[str, ...], *where: str | int) -> str:
        return items[CounterRNG(self._seed, *where).below(len(items))]

    def _text(self, question: str, value: str, source: int, instruction: str | None) -> TextSample:
        """Return a question with its answer; ``instruction`` None: not in the chat template."""
        prompt = PLAIN.format(question=question) if instruction is None else self._prompt(question + instruction)
        # A value has a space in front, as where it was told: without one it is made of other tokens.
        before = prompt if instruction is None else prompt + ANSWER
        texts = (prompt, before, f"{before} {value}")
        ids = encode(self._tokenizer, f"{texts[-1]}.")
        given, start, end = (shared(ids, encode(self._tokenizer, text)) for text in texts)
        return TextSample(ids, source=source, prompt_tokens=given, query_tokens=given, answer=(start, end))

    def _prompt(self, question: str) -> str:
        """Return a user's question in the chat template, up to where the answer begins."""
        make = getattr(self._tokenizer, "apply_chat_template", None)
        if make is None or getattr(self._tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"chat must be 0 where the tokenizer has no chat template, got {self.options.chat} and "
                f"{type(self._tokenizer).__name__}"
            )
        turns = [{"role": "user", "content": question}]
        return cast("str", make(turns, add_generation_prompt=True, tokenize=False))
