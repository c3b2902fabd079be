"""Conversations over many sessions, told turn by turn, with questions by category (LoCoMo, arXiv 2402.17753)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from attrs import define, field
from attrs.converters import optional

from mplus.config import JsonValue, must_be, one_of, whole
from mplus.errors import InputError
from mplus.evaluation.tasks.base import Episode, Passage, Protocol, Question
from mplus.evaluation.tasks.contexts import holds
from mplus.evaluation.tasks.generated_conversations import (
    ADVERSARIAL,
    ConversationGenerator,
    QuestionAnswer,
    Sample,
    Turn,
)
from mplus.evaluation.tasks.people.splits import Half
from mplus.evaluation.texts import read

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", ADVERSARIAL: "never said"}


some_categories = must_be(
    f"some of {', '.join(map(str, sorted(CATEGORIES)))}",
    lambda value: isinstance(value, tuple) and bool(value) and set(value) <= CATEGORIES.keys(),
)
"""Validator of categories."""


class Conversations(Protocol):
    """Tells every turn as one passage, with speaker and date, and asks all questions at the end.

    A passage is called by the name of its turn, so that evidence can be found by it.

    Example:
        >>> Conversations.Options(episodes=2, categories=(4, 5), sessions=3).split
        'test'
    """

    @define(frozen=True, kw_only=True)
    class Options(Protocol.Options):
        """Options of conversations; ``passages``, ``before`` and ``untold`` are not used.

        Attributes:
            data: a JSON file in the format of LoCoMo; None: conversations are generated.
            categories: of the questions that are asked, as LoCoMo numbers them: 1 multi-hop, 2 temporal, 3 open-domain,
                4 single-hop, 5 what was never said, so that the right answer is that it was not.
            questions: most of an episode; the first ones of these categories.
            turn: how a turn is told; ``{speaker}``, ``{date}`` and ``{text}`` stand for its own.
            prompt: how it is asked; ``{question}`` stands for the question.
            sessions, turns, changed, split: of generated conversations; see ``ConversationGenerator``.
        """

        data: Path | None = field(default=None, converter=optional(Path))
        categories: tuple[int, ...] = field(default=(1, 2, 3, 4), converter=tuple, validator=some_categories)
        episodes: int = field(default=10, validator=whole(1))
        questions: int = field(default=200, validator=whole(1))
        turn: str = field(default="{speaker} ({date}): {text}", validator=[holds("{speaker}"), holds("{text}")])
        prompt: str = field(default="{question} Answer in a few words.", validator=holds("{question}"))
        sessions: int = field(default=12, validator=whole(1))
        turns: int = field(default=20, validator=whole(4))
        changed: float = 0.5
        split: Half = field(default="test", validator=one_of("choose", "test"))

    options: Options
    name = "conversations"
    answer_tokens = 24
    ages = (0,)

    @property
    def deviations(self) -> tuple[str, ...]:
        return ("images of turns are told by their captions", "answers are compared by words, no model judges them")

    @property
    def passages(self) -> int:
        """Return the most turns of an episode."""
        return max(len(episode.passages) for episode in self.episodes())

    def episodes(self) -> list[Episode]:
        options = self.options
        if options.data is None:
            maker = ConversationGenerator(options.sessions, options.turns, options.changed, options.split, options.seed)
            samples = [maker.conversation(number) for number in range(options.episodes)]
        else:
            samples = locomo_samples(options.data)[: options.episodes]
        made = []
        for number, sample in enumerate(samples):
            try:
                made.append(self._episode(number, sample))
            except InputError:
                raise
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(
                    f"conversation {number} of {options.data} must be in the format of LoCoMo: {error!r}"
                ) from error
        return made

    def _episode(self, number: int, sample: Sample) -> Episode:
        options = self.options
        talk = cast("Sample", sample.get("conversation", sample))
        sessions = sorted(int(found[1]) for name in talk if (found := re.fullmatch(r"session_(\d+)", name)))
        passages: list[Passage] = []
        places: dict[str, int] = {}
        for session in sessions:
            date = cast("str", talk[f"session_{session}_date_time"])
            for turn in cast("list[Turn]", talk[f"session_{session}"]):
                places[turn["dia_id"]] = len(passages)
                passages.append(Passage(text=self._told(turn, date), source=turn["dia_id"]))
        if not passages:
            raise InputError(f"conversation {number} must have sessions with turns, it has none")
        asked = cast("list[QuestionAnswer]", sample["qa"])
        wanted = [qa for qa in asked if qa["category"] in options.categories]
        questions = tuple(self._question(qa, places, len(passages) - 1) for qa in wanted[: options.questions])
        return Episode(number=number, passages=tuple(passages), questions=questions)

    def _told(self, turn: Turn, date: str) -> str:
        text = turn["text"]
        if caption := turn.get("blip_caption"):
            text += f" [shares {caption}]"
        told = self.options.turn.replace("{speaker}", turn["speaker"]).replace("{date}", date).replace("{text}", text)
        return self.texts.cut(told, self.options.passage_tokens)

    def _question(self, qa: QuestionAnswer, places: Mapping[str, int], last: int) -> Question:
        prompt, kind = self.options.prompt.replace("{question}", qa["question"]), CATEGORIES[qa["category"]]
        if qa["category"] == ADVERSARIAL:  # its evidence only shows what it was made of
            return Question(prompt=prompt, answers=(), needs=(), after=last, category=kind)
        # Published evidence has slips such as "D8:6; D9:17" in one entry.
        named = re.findall(r"D\d+:\d+", " ".join(qa.get("evidence") or []))
        needs = tuple(sorted({places[name] for name in named if name in places}))
        return Question(prompt=prompt, answers=(str(qa["answer"]),), needs=needs, after=last, category=kind)

    def settings(self) -> dict[str, JsonValue]:
        """Return every option that is used."""
        unused = {"passages", "before", "untold"}
        return {name: value for name, value in super().settings().items() if name not in unused}


def locomo_samples(path: Path) -> list[Sample]:
    """Return the conversations of a file. Raises InputError where it cannot be read, or has another format."""
    text = read(path)
    try:
        samples = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} must be a JSON file in the format of LoCoMo: {error}") from error
    if not isinstance(samples, list) or not samples:
        raise InputError(
            f"{path} must be a list of conversations in the format of LoCoMo, got {type(samples).__name__}"
        )
    return samples
