"""Conversations over many sessions between two invented people, in the format of LoCoMo (arXiv 2402.17753).

Each tells of themselves and of people they know, things change, small talk lies in between, and some things are never
said. Nothing of the published data set is in here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import NotRequired, TypedDict

from attrs import define, field

from mplus.evaluation.tasks.people.splits import ATTRIBUTES, Half, draw_names, fill, half

SINGLE, TEMPORAL, MULTI, ADVERSARIAL = 4, 2, 1, 5
"""Categories of questions, as LoCoMo numbers them; 3, what needs knowledge of the world, is not generated."""
BEGIN = datetime(2023, 5, 8, 13, 56)  # noqa: DTZ001 - what people say the time is has no zone

GREETINGS = (
    "Hey {other}, good to hear from you!",
    "Hi {other}! It has been a while.",
    "Hello {other}, how have you been?",
    "There you are, {other}! I was just thinking of you.",
)
SMALL_TALK = (
    "The weather has been strange all week, rain in the morning and sun at noon.",
    "I could not put that book down last night, and now I can hardly keep my eyes open.",
    "The trains were late again, so I walked half of the way.",
    "My neighbour has started to renovate, and you would not believe the noise.",
    "I tried to fix the tap in the kitchen and made it worse.",
    "There was a street market today, and I came home with far too many apples.",
    "I have been trying to sleep more, with little success so far.",
    "We watched an old film yesterday. The ending still makes me laugh.",
    "The garden is a jungle by now; somebody should do something about it.",
    "I lost my keys for an hour. They were in my pocket.",
    "My phone has decided to speak another language since the update.",
    "The bakery at the corner has closed for the summer.",
)
REPLIES = (
    "That sounds familiar!",
    "Really? Tell me more some time.",
    "Good to know, thanks for telling me.",
    "Ha, I can picture that.",
    "I see. Nothing much on my side.",
    "Oh, I had no idea.",
    "Well, that is life.",
    "I will remember that.",
)
NEWS = (
    "Something has changed here. ",
    "You will not guess what is new. ",
    "A lot has happened since. ",
    "News from me! ",
)


class Turn(TypedDict):
    """One speaker's words at a time; ``dia_id`` is "D<session>:<turn>", both counted from 1.

    ``blip_caption`` describes a picture that is shared, in published conversations.
    """

    speaker: str
    dia_id: str
    text: str
    blip_caption: NotRequired[str]


class QuestionAnswer(TypedDict):
    """A question; of category 5 the answer was never given, and ``adversarial_answer`` is what one might guess."""

    question: str
    evidence: list[str]
    category: int
    answer: NotRequired[str]
    adversarial_answer: NotRequired[str]


Sample = dict[str, str | list[Turn] | list[QuestionAnswer]]
"""``speaker_a``, ``speaker_b``, ``session_<n>_date_time``, ``session_<n>`` and ``qa``."""


@define
class Said:
    """``speaker`` said in ``turn`` of the session on ``date`` that ``attribute`` is ``value`` with them."""

    speaker: str
    attribute: str
    value: str
    turn: str
    date: str


@define
class ConversationGenerator:
    """Makes conversations; equal settings give equal ones.

    Attributes:
        sessions: of a conversation, days to weeks apart.
        turns: of a session, about.
        changed: share of what the speakers said of themselves that changes in a later session.
        split: of names, values and sentences, see ``mplus.evaluation.tasks.people``.
        seed: of everything that is drawn.

    Example:
        >>> sample = ConversationGenerator(sessions=2, turns=6).conversation(0)
        >>> sorted(sample)[:3]
        ['qa', 'session_1', 'session_1_date_time']
    """

    sessions: int = 12
    turns: int = 20
    changed: float = 0.5
    split: Half = "test"
    seed: int = 0
    _rng: random.Random = field(init=False, factory=random.Random)
    _said: list[Said] = field(init=False, factory=list)

    def conversation(self, number: int) -> Sample:
        """Return one conversation with its questions."""
        self._rng = random.Random(f"conversations:{self.split}:{self.seed}:{number}")  # noqa: S311 - reproducible
        self._said = []
        speakers = tuple(draw_names(2, self.split, self._rng))
        # Two of each speaker's things stay unsaid: they are asked for too.
        plans = {name: self._rng.sample(list(ATTRIBUTES), len(ATTRIBUTES) - 2) for name in speakers}
        due = self._schedule(plans)
        sample: Sample = {"speaker_a": speakers[0], "speaker_b": speakers[1]}
        date = BEGIN
        for session in range(1, self.sessions + 1):
            date += timedelta(days=self._rng.randint(2, 20), minutes=self._rng.randint(-300, 300))
            said = f"{date:%I:%M %p} on {date.day} {date:%B}, {date.year}".lstrip("0").replace("AM", "am")
            sample[f"session_{session}_date_time"] = said.replace("PM", "pm")
            sample[f"session_{session}"] = self._session(
                session, speakers, due.get(session, []), f"{date.day} {date:%B} {date.year}"
            )
        sample["qa"] = list(self._questions(speakers, plans))
        return sample

    def _schedule(self, plans: dict[str, list[str]]) -> dict[int, list[tuple[str, str]]]:
        """Return which speaker says which of their things in which session; what changes comes a second time."""
        due: dict[int, list[tuple[str, str]]] = {}
        for speaker, attributes in plans.items():
            for attribute in attributes:
                first = self._rng.randint(1, self.sessions)
                due.setdefault(first, []).append((speaker, attribute))
                if first < self.sessions and self._rng.random() < self.changed:
                    due.setdefault(self._rng.randint(first + 1, self.sessions), []).append((speaker, attribute))
        return due

    def _session(self, session: int, speakers: tuple[str, ...], due: list[tuple[str, str]], date: str) -> list[Turn]:
        """Return the turns of a session; the two take turns, and what is due is said by whom it is about."""
        rng, waiting = self._rng, list(due)
        rng.shuffle(waiting)
        count = max(self.turns, 2 * len(waiting) + 4)
        places = set(rng.sample(range(2, count), min(2 * len(waiting), count - 2)))
        turns: list[Turn] = []
        for place in range(count):
            speaker, other = speakers[(session + place) % 2], speakers[(session + place + 1) % 2]
            name = f"D{session}:{place + 1}"
            mine = next((entry for entry in waiting if entry[0] == speaker), None)
            if place < 2:
                text = rng.choice(half(GREETINGS, self.split)).format(other=other.split(maxsplit=1)[0])
            elif mine is not None and (place in places or count - place <= 2 * len(waiting) + 2):
                waiting.remove(mine)
                text = self._say(*mine, name, date)
            elif place % 2 and rng.random() < 0.6:
                text = rng.choice(half(REPLIES, self.split))
            elif rng.random() < 0.2:
                text = self._gossip()
            else:
                text = rng.choice(half(SMALL_TALK, self.split))
            turns.append({"speaker": speaker, "dia_id": name, "text": text})
        return turns

    def _say(self, speaker: str, attribute: str, turn: str, date: str) -> str:
        rng, kind = self._rng, ATTRIBUTES[attribute]
        before = [said.value for said in self._said if (said.speaker, said.attribute) == (speaker, attribute)]
        value = rng.choice([value for value in half(kind.values, self.split) if value not in before])
        self._said.append(Said(speaker, attribute, value, turn, date))
        news = rng.choice(half(NEWS, self.split)) if before else ""
        return news + fill(rng.choice(half(kind.said, self.split)), speaker, value)

    def _gossip(self) -> str:
        """Return a sentence about somebody whom both know, which is not asked for."""
        rng = self._rng
        kind = rng.choice(list(ATTRIBUTES.values()))
        (name,) = draw_names(1, self.split, rng)
        return fill(rng.choice(half(kind.told, self.split)), name, rng.choice(half(kind.values, self.split)))

    def _questions(self, speakers: tuple[str, ...], plans: dict[str, list[str]]) -> Iterator[QuestionAnswer]:
        newest = {(said.speaker, said.attribute): said for said in self._said}
        for (speaker, attribute), said in newest.items():
            (asked,) = half(ATTRIBUTES[attribute].asked, self.split)
            question = fill(asked, speaker)
            yield {"question": question, "answer": said.value, "evidence": [said.turn], "category": SINGLE}
            when = f"When did {speaker} first mention this: {said.value}?"
            yield {"question": when, "answer": said.date, "evidence": [said.turn], "category": TEMPORAL}
        for attribute, kind in ATTRIBUTES.items():
            both = [newest[name, attribute] for name in speakers if (name, attribute) in newest]
            if len(both) == len(speakers):
                asked = half(kind.asked, self.split)[0]
                question = " ".join(fill(asked, name) for name in speakers)
                answer = ", ".join(said.value for said in both)
                evidence = [said.turn for said in both]
                yield {"question": question, "answer": answer, "evidence": evidence, "category": MULTI}
        for speaker, said_of in plans.items():
            for attribute in [name for name in ATTRIBUTES if name not in said_of]:
                (asked,) = half(ATTRIBUTES[attribute].asked, self.split)
                guess = self._rng.choice(half(ATTRIBUTES[attribute].values, self.split))
                question = fill(asked, speaker)
                yield {"question": question, "adversarial_answer": guess, "evidence": [], "category": ADVERSARIAL}
