"""One context is told among passages of distraction, and asked about later: what SQuAD and NaturalQuestions share."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal

from attrs import define, field

from mplus.config import Validator, flag, must_be, one_of, whole
from mplus.errors import InputError
from mplus.evaluation.tasks.base import Episode, FileOptions, Passage, Protocol, Question
from mplus.evaluation.texts import Texts


@define(frozen=True)
class Asked:
    """A question of the data set with its accepted ``answers``, the first one first."""

    question: str
    answers: tuple[str, ...]


@define(frozen=True)
class Context:
    """Something to tell: the ``title`` of its article, its ``text`` and what is ``asked`` about it."""

    title: str
    text: str
    asked: tuple[Asked, ...] = ()


def holds(placeholder: str) -> Validator:
    """Return a validator of texts: they must have ``placeholder`` in them."""
    return must_be(f"a text with {placeholder} in it", lambda value: isinstance(value, str) and placeholder in value)


@define(frozen=True, kw_only=True)
class ContextOptions(FileOptions):
    """Besides what every protocol can be told.

    Attributes:
        answer_tokens: most tokens of an answer; None: any length.
        contexts: told in an episode one after the other, all before it is asked about any; ``questions`` are spread
            over them. With more than one, many questions are asked of one memory.
        golds: accept the "first" answer (published) or "all".
        context: how a context is told; ``{text}`` stands for it.
        prompt: how it is asked; ``{question}`` stands for the question.
        avoid_answers: no distraction that holds an answer of the episode.
        same_distraction: tell every episode the same distraction in the same order (published), as far as that holds
            none of its answers.
    """

    answer_tokens: int | None = field(default=3, validator=whole(1, optional=True))
    contexts: int = field(default=1, validator=whole(1))
    golds: Literal["first", "all"] = field(default="first", validator=one_of("first", "all"))
    context: str = field(default="{text}", validator=holds("{text}"))
    prompt: str = field(default="Question: {question}\nAnswer:", validator=holds("{question}"))
    avoid_answers: bool = field(default=True, validator=flag)
    same_distraction: bool = field(default=False, validator=flag)


class ContextProtocol(Protocol):
    """A protocol over contexts."""

    options: ContextOptions

    def make(self, contexts: Sequence[Context], distraction: Sequence[Context]) -> list[Episode]:
        """Make episodes about ``contexts`` in random order, each with ``distraction`` before and after it.

        Raises:
            InputError: no context fits, or there is nothing to distract with.
        """
        options, rng = self.options, _rng(self.name, self.options.seed)
        fitting = [(context, usable) for context in contexts if (usable := self._usable(context))]
        if not fitting:
            length = "" if options.answer_tokens is None else f" and an answer of at most {options.answer_tokens}"
            raise InputError(
                f"{self.name}: the data must have a context of at most {options.passage_tokens} tokens{length}, "
                f"none of {len(contexts)} has: raise passage_tokens or answer_tokens"
            )
        rng.shuffle(fitting)
        size = options.contexts
        starts = range(0, len(fitting) - size + 1, size) or range(1)  # fewer contexts than that are one episode
        return [
            self._episode(number, fitting[start : start + size], fitting, distraction, rng)
            for number, start in enumerate(starts[: options.episodes])
        ]

    def _episode(
        self,
        number: int,
        chosen: Sequence[tuple[Context, list[Asked]]],
        fitting: Sequence[tuple[Context, list[Asked]]],
        distraction: Sequence[Context],
        rng: random.Random,
    ) -> Episode:
        """Return an episode about the ``chosen`` of the ``fitting`` contexts, each with its questions."""
        options, titles = self.options, {context.title for context, _ in chosen}
        strange = [(c, q) for c, questions in fitting if c.title not in titles for q in questions]
        untold = rng.sample(strange, min(options.untold, len(strange)))
        # The first question of every context, then the second of each, and so on.
        every = sorted(
            (
                (turn, options.before + place, q)
                for place, (_, usable) in enumerate(chosen)
                for turn, q in enumerate(usable)
            ),
            key=lambda entry: entry[:2],
        )
        asked = [(q, (place,)) for _, place, q in every[: options.questions]] + [(q, ()) for _, q in untold]
        closed = titles | {c.title for c, _ in untold}
        avoid = [answer for question, _ in asked for answer in question.answers] if options.avoid_answers else []
        others = self._distraction([c for c in distraction if c.title not in closed], avoid, number)
        last = options.before + len(chosen) - 1
        return Episode(
            number=number,
            passages=self._passages([context for context, _ in chosen], others),
            questions=tuple(self._question(question, needs, last) for question, needs in asked),
        )

    def _usable(self, context: Context) -> list[Asked]:
        options, found = self.options, []
        if self.texts.count(options.context.replace("{text}", context.text)) > options.passage_tokens:
            return []
        for asked in context.asked:
            golds = asked.answers[:1] if options.golds == "first" else asked.answers
            if golds and (options.answer_tokens is None or self.texts.count(golds[0]) <= options.answer_tokens):
                found.append(Asked(asked.question, golds))
        return found

    def _question(self, asked: Asked, needs: tuple[int, ...], after: int) -> Question:
        prompt = self.options.prompt.replace("{question}", asked.question)
        return Question(prompt=prompt, answers=asked.answers, needs=needs, after=after)

    def _passages(self, contexts: Sequence[Context], others: Iterator[str]) -> tuple[Passage, ...]:
        options, end = self.options, self.options.before + len(contexts)
        names = [f"{self.name}: {context.title}" for context in contexts]
        if len(contexts) > 1:
            names = [f"{name}, {place}" for place, name in enumerate(names)]  # an article has many paragraphs
        told = [
            Passage(text=options.context.replace("{text}", context.text), source=name)
            for context, name in zip(contexts, names, strict=True)
        ]
        numbers = [*range(options.before), *range(end, end + options.passages - 1)]
        around = [Passage(text=next(others), source=f"distraction {number}") for number in numbers]
        return (*around[: options.before], *told, *around[options.before :])

    def _distraction(self, contexts: Sequence[Context], avoid: Sequence[str], number: int) -> Iterator[str]:
        """Yield passages of full length, of contexts in random order, over and over."""
        options = self.options
        texts = [context.text for context in contexts if not any(answer in context.text for answer in avoid)]
        if not texts:
            raise InputError(
                f"{self.name}: the data must have something to distract with, but all of its {len(contexts)} other "
                "contexts hold an answer: allow that with avoid_answers = false, or take larger data"
            )
        rng = _rng("distraction", options.seed if options.same_distraction else f"{options.seed}:{number}")
        # A context keeps its place in the order whatever else was left out.
        rank = {text: rng.random() for text in sorted({context.text for context in contexts})}
        return joined(self.texts, sorted(texts, key=rank.__getitem__), options.context, options.passage_tokens)


def joined(texts: Texts, pieces: Sequence[str], template: str, limit: int) -> Iterator[str]:
    """Yield passages of ``limit`` tokens (or a few less, where the next word would be too much), without end."""

    def endless() -> Iterator[str]:
        while True:
            for piece in pieces:
                yield template.replace("{text}", piece)

    return texts.join(endless(), limit)


def _rng(*names: str | int) -> random.Random:
    return random.Random(":".join(map(str, names)))  # noqa: S311 - reproducible, not secret
