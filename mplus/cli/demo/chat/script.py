"""What the chat model is told and asked: notes about people and a conversation, somewhere in a novel."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from attrs import define

from mplus.evaluation.tasks.generated_conversations import (
    ADVERSARIAL,
    SINGLE,
    ConversationGenerator,
    QuestionAnswer,
    Turn,
)
from mplus.evaluation.tasks.notes import Notes
from mplus.evaluation.texts import Texts, Tokenizer
from mplus.hf.pretrained.shipped import TITLE, chapters

NOTES, ABOUT_NOTES, ABOUT_TALK = 24, 14, 6
"""Notes, and questions about them and about the conversation."""
SESSIONS, TURNS = 3, 12
"""Of the conversation."""
UNTOLD_NOTES, UNTOLD_TALK = 2, 1
PAGE_TOKENS = 120
"""Most tokens of a page of the novel, which is written as a source of its own."""
PROMPT = "{question} Answer with one short sentence."


@define(frozen=True)
class Told:
    """A text that is written, under the name ``source``."""

    text: str
    source: str


@define(frozen=True)
class Question:
    """Something to ask.

    Attributes:
        text: as it is asked.
        answer: what a right answer contains; None: it was never told.
        source: that it was told in; None likewise.
    """

    text: str
    answer: str | None = None
    source: str | None = None


@define(frozen=True)
class Script:
    """Everything that is told, in order, and the questions; those about what was never told are last."""

    told: tuple[Told, ...]
    questions: tuple[Question, ...]

    @property
    def answerable(self) -> tuple[Question, ...]:
        """Return the questions about what was told."""
        return tuple(question for question in self.questions if question.answer is not None)

    @property
    def untold(self) -> tuple[Question, ...]:
        """Return the others."""
        return tuple(question for question in self.questions if question.answer is None)


def make_script(tokenizer: Tokenizer, tokens: int, seed: int) -> Script:
    """Return about ``tokens`` tokens to tell, and the questions; equal arguments give an equal script.

    Names, values and sentences are those of the split "test", which no setting was chosen by.
    """
    texts, rng = Texts(tokenizer), random.Random(f"demo:{seed}")  # noqa: S311 - reproducible
    notes, about_notes = _notes(texts, seed)
    talk, about_talk = _talk(seed)
    left = tokens - sum(texts.count(told.text) for told in (*notes, *talk))
    told = _among(list(_pages(texts, left)), [notes, talk], rng)
    order = {one.source: place for place, one in enumerate(told)}
    questions = sorted((*about_notes, *about_talk), key=lambda one: order.get(one.source or "", len(order)))
    return Script(tuple(told), tuple(questions))


def _notes(texts: Texts, seed: int) -> tuple[list[Told], list[Question]]:
    options = Notes.Options(
        notes=NOTES, questions=ABOUT_NOTES, untold=UNTOLD_NOTES, split="test", seed=seed, prompt=PROMPT
    )
    (episode,) = Notes(options, texts).episodes()
    told = [Told(passage.text, passage.source) for passage in episode.passages]
    questions = [
        Question(one.prompt, *((one.answers[0], told[one.needs[0]].source) if one.told else ()))
        for one in episode.questions
    ]
    return told, questions


def _talk(seed: int) -> tuple[list[Told], list[Question]]:
    sample = ConversationGenerator(sessions=SESSIONS, turns=TURNS, split="test", seed=seed).conversation(0)
    told, sources = [], {}
    for session in range(1, SESSIONS + 1):
        turns: Sequence[Turn] = sample[f"session_{session}"]  # type: ignore[assignment]
        for number, turn in enumerate(turns, 1):
            source = f"call of {str(sample[f'session_{session}_date_time']).rpartition(' on ')[2]}, line {number}"
            sources[turn["dia_id"]] = source
            told.append(Told(f"{turn['speaker']}: {turn['text']}", source))
    asked: list[QuestionAnswer] = sample["qa"]  # type: ignore[assignment]
    single = [qa for qa in asked if qa["category"] == SINGLE][:ABOUT_TALK]
    never = [qa for qa in asked if qa["category"] == ADVERSARIAL][:UNTOLD_TALK]
    questions = [
        Question(PROMPT.format(question=qa["question"]), qa["answer"], sources[qa["evidence"][0]]) for qa in single
    ]
    return told, [*questions, *(Question(PROMPT.format(question=qa["question"])) for qa in never)]


def _pages(texts: Texts, tokens: int) -> Iterator[Told]:
    """Yield the novel from its beginning in pages that have ``tokens`` together; again from there where it ends."""
    paragraphs = [" ".join(part.split()) for chapter in chapters() for part in chapter.text.split("\n\n")]
    number = 0
    while tokens > 0:
        for page in texts.join(filter(None, paragraphs), PAGE_TOKENS):
            number += 1
            yield Told(page, f"{TITLE}, page {number}")
            tokens -= texts.count(page)
            if tokens <= 0:
                return


def _among(pages: list[Told], groups: Sequence[Sequence[Told]], rng: random.Random) -> list[Told]:
    """Put texts between pages at random places, those of a group in order."""
    places = []
    for group in groups:
        at = sorted(rng.random() for _ in group)
        places += list(zip(at, group, strict=True))
    places += [((number + 0.5) / len(pages), page) for number, page in enumerate(pages)]
    return [told for _, told in sorted(places, key=lambda entry: entry[0])]
