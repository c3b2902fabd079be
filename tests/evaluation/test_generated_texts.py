"""Notes, needles and conversations: generated texts in halves that share nothing, and files in the format of LoCoMo."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest

from mplus.errors import ConfigError, InputError
from mplus.evaluation.tasks import protocol
from mplus.evaluation.tasks.generated_conversations import ConversationGenerator
from mplus.evaluation.tasks.people.splits import ATTRIBUTES, FIRST, LAST, SPLITS, draw_names, fill, half, people_of
from mplus.evaluation.texts import Texts
from tests.evaluation import data
from tests.evaluation.data import WordTokenizer


def make(name, **options):
    cls = protocol(name)
    return cls(cls.Options(**options), Texts(WordTokenizer()))


def test_the_halves_share_nothing_and_every_sentence_is_whole():
    assert len(set(FIRST)) == len(FIRST)
    assert len(set(LAST)) == len(LAST)
    for kind in ATTRIBUTES.values():
        for items in (kind.values, kind.told, kind.changed, kind.said, kind.asked, FIRST, LAST):
            assert len(set(items)) == len(items)
            assert not set(half(items, "choose")) & set(half(items, "test"))
            assert set(half(items, "choose")) | set(half(items, "test")) == set(items)
        for sentence in kind.told + kind.changed:
            told = fill(sentence, "Maria Keller", "VALUE")
            assert "Maria Keller" in told
            assert "VALUE" in told
            assert "{" not in told
        for question in kind.asked:
            assert "VALUE" not in fill(question, "Maria Keller", "VALUE")
    # No value of one kind is one of another, so that no note answers a question about another kind by accident.
    for one, other in itertools.combinations(ATTRIBUTES.values(), 2):
        assert not set(one.values) & set(other.values)


@pytest.mark.parametrize("split", ["unseen", "fresh"])
def test_a_last_word_shares_nothing_with_the_splits_before_it(split):
    unseen, seen = people_of(split), [people_of(before) for before in SPLITS[: SPLITS.index(split)]]
    for items in (unseen.first, unseen.last):
        assert len(set(items)) == len(items) == 32
    for people in seen:
        assert not {*unseen.first, *unseen.last} & {*people.first, *people.last}
    for kind in unseen.attributes:
        for other in itertools.chain.from_iterable(people.attributes for people in seen):
            assert not {*kind.values} & {*other.values}
            assert not {*kind.told, *kind.changed, *kind.asked} & {*other.told, *other.changed, *other.asked}
        for sentence in (*kind.told, *kind.changed):
            assert sentence.count("{value}") == 1
            assert "Agnes Hollis" in fill(sentence, "Agnes Hollis", "VALUE")
    for one, other in itertools.combinations(unseen.attributes, 2):
        assert not {*one.values} & {*other.values}


def test_names_are_different_and_of_their_half():
    names = draw_names(200, "test", random.Random(0))
    assert len(set(names)) == 200
    assert {name.split()[0] for name in names} <= set(half(FIRST, "test"))
    with pytest.raises(ValueError, match="1,024 names"):
        draw_names(2000, "test", random.Random(0))


@pytest.mark.parametrize("split", SPLITS)
def test_notes_hold_the_answers_of_their_questions_and_the_newest_holds(split):
    made = make("notes", notes=60, changed=0.5, questions=30, untold=4, episodes=2, split=split)
    for episode in made.episodes():
        texts = [passage.text for passage in episode.passages]
        assert len(texts) == len(set(texts)) == 60
        told, untold = episode.questions[:-4], episode.questions[-4:]
        assert len(told) == 30
        newer = 0
        for question in told:
            (need,), (answer,) = question.needs, question.answers
            assert answer in texts[need]
            name = next(name for name in re.findall(r"[A-Z]\w+ [A-Z]\w+", question.prompt) if name in texts[need])
            values = next(kind.values for kind in people_of(split).attributes if answer in kind.values)
            holding = [
                n for n, text in enumerate(texts) if name in text and any(re.search(rf"\b{v}\b", text) for v in values)
            ]
            assert max(holding) == need
            newer += len(holding) > 1
            assert question.after == 59
        assert newer
        assert not any(question.told for question in untold)
    assert made.episodes() == make("notes", **{**made.settings(), "data": None}).episodes()


def test_notes_lie_in_order_among_the_novels(tmp_path):
    folder = data.novels(tmp_path / "novels")
    made = make("notes", notes=12, questions=12, among=300, data=folder, passage_tokens=40, split="choose")
    (episode,) = made.episodes()
    novel = [passage for passage in episode.passages if passage.source.startswith("novel")]
    assert sum(made.texts.count(passage.text) for passage in novel) == 300
    notes = [passage.source for passage in episode.passages if passage not in novel]
    assert notes == [f"note {number}" for number in range(12)]
    for question in episode.questions:
        assert question.answers[0] in episode.passages[question.needs[0]].text
    with pytest.raises(InputError, match="among needs novels"):
        make("notes", among=10).episodes()


def test_needles_lie_at_their_depth(tmp_path):
    folder = data.novels(tmp_path / "novels")
    options = {"data": folder, "tokens": 400, "depths": (0, 0.5, 1), "episodes": 2, "passage_tokens": 40}
    episodes = make("needles", **options, split="choose").episodes()
    assert len(episodes) == 6
    for episode, depth in zip(episodes, (0, 0, 0.5, 0.5, 1, 1), strict=True):
        (question,) = episode.questions
        place = question.needs[0]
        assert [passage.source for passage in episode.passages].index("needle") == place
        assert question.ages == (len(episode.passages) - 1 - place,)
        assert place / (len(episode.passages) - 1) == pytest.approx(depth, abs=0.06)
        assert question.answers[0] in episode.passages[place].text
    with pytest.raises(ConfigError, match="depths must be numbers from 0"):
        make("needles", data=folder, depths=(2,))


def test_needles_together_lie_at_their_depth_of_each_length_of_one_novel(tmp_path):
    folder = data.novels(tmp_path / "novels")
    options = {"data": folder, "lengths": (400, 200), "depths": (0, 0.5, 1), "episodes": 2, "passage_tokens": 40}
    made = make("needles", **options, together=True, split="choose")
    (episode,) = made.episodes()
    novel = [passage for passage in episode.passages if passage.source.startswith("novel")]
    assert sum(made.texts.count(passage.text) for passage in novel) == 400
    assert len(episode.passages) == len(novel) + 12 <= made.passages
    places = set()
    for question in episode.questions:
        length, depth = (float(word) for word in re.findall(r"[\d.]+", question.category))
        (place,), (age,) = question.needs, question.ages
        places.add(place)
        told = episode.passages[: place + age + 1]  # when it is asked
        before, after = (
            sum(made.texts.count(one.text) for one in some if one in novel) for some in (told[:place], told[place:])
        )
        assert before + after == pytest.approx(length, abs=40)
        assert before == pytest.approx(depth * length, abs=40)
        assert question.answers[0] in episode.passages[place].text
    assert len(places) == 12


def test_generated_conversations_say_what_is_asked():
    made = make("conversations", episodes=2, sessions=5, categories=(1, 2, 4, 5))
    one, two = made.episodes()
    assert one.passages != two.passages
    assert made.episodes() == [one, two]
    for episode in (one, two):
        for question in episode.questions:
            texts = [episode.passages[need].text for need in question.needs]
            if len(texts) > 1:
                assert all(any(part in text for text in texts) for part in question.answers[0].split(", "))
            elif texts and "When" not in question.prompt:
                assert question.answers[0] in texts[0]
            elif texts:
                day, month, year = question.answers[0].split()
                assert f"on {day} {month}, {year}" in texts[0]
        assert any(not question.told for question in episode.questions)


def test_what_is_said_twice_is_true_as_said_last():
    changed = 0
    for number in range(5):
        sample = ConversationGenerator(sessions=6, changed=1.0).conversation(number)
        turns = [turn for session in range(1, 7) for turn in sample[f"session_{session}"]]
        names = [turn["dia_id"] for turn in turns]
        for qa in (qa for qa in sample["qa"] if qa["category"] == 4):
            speaker = next(name for name in (sample["speaker_a"], sample["speaker_b"]) if name in qa["question"])
            kind = next(kind for kind in ATTRIBUTES.values() if qa["answer"] in kind.values)
            said = [turn["dia_id"] for turn in turns if turn["speaker"] == speaker and _tells(kind, turn["text"])]
            assert max(said, key=names.index) == qa["evidence"][0]
            changed += len(said) > 1
    assert changed


def _tells(kind, text):
    return any(re.search(re.escape(said).replace(r"\{value\}", r"\w+"), text) for said in kind.said)


def test_a_file_in_the_published_format_is_read(tmp_path):
    file = tmp_path / "locomo.json"
    turns = [{"speaker": "Ann", "dia_id": "D1:1", "text": "I paint.", "blip_caption": "a photo of a vase"}]
    later = [
        {"speaker": "Bob", "dia_id": "D2:1", "text": "I ski."},
        {"speaker": "Ann", "dia_id": "D2:2", "text": "Fine."},
    ]
    qa = [
        {"question": "What do both do?", "answer": "paint, ski", "evidence": ["D1:1; D2:1"], "category": 1},
        {"question": "How old is Ann?", "answer": 30, "evidence": ["D1:1"], "category": 4},
        {"question": "Does Ann ski?", "adversarial_answer": "Yes", "evidence": ["D2:1"], "category": 5},
    ]
    talk = {"session_2": later, "session_2_date_time": "now", "session_1": turns, "session_1_date_time": "before"}
    file.write_text(json.dumps([{"conversation": talk, "qa": qa}]), encoding="utf-8")
    (episode,) = make("conversations", data=file, categories=(1, 4, 5)).episodes()
    assert [passage.source for passage in episode.passages] == ["D1:1", "D2:1", "D2:2"]
    assert episode.passages[0].text == "Ann (before): I paint. [shares a photo of a vase]"
    assert [(question.answers, question.needs) for question in episode.questions] == [
        (("paint, ski",), (0, 1)),
        (("30",), (0,)),
        ((), ()),
    ]
    file.write_text(json.dumps([{"qa": qa}]), encoding="utf-8")
    with pytest.raises(InputError, match="must have sessions with turns"):
        make("conversations", data=file).episodes()
    file.write_text('{"qa": 1}', encoding="utf-8")
    with pytest.raises(InputError, match="must be a list of conversations"):
        make("conversations", data=file).episodes()
    with pytest.raises(ConfigError, match="categories must be some of 1, 2, 3, 4, 5"):
        make("conversations", categories=(6,))
