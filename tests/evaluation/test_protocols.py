"""Episodes made of small files in the formats of the data sets."""

from __future__ import annotations

import json

import pytest

from mplus.errors import ConfigError, InputError, UnknownNameError
from mplus.evaluation.tasks import PROTOCOLS, protocol
from mplus.evaluation.tasks.base import Episode, Passage, Question
from mplus.evaluation.texts import Texts
from tests.evaluation import data
from tests.evaluation.data import WordTokenizer

GENERATED = {"notes", "needles", "conversations"}
"""These make what they tell; see test_generated_texts.py."""
DATA_SETS = [name for name in PROTOCOLS if name not in GENERATED]


def make(name, **options):
    cls = protocol(name)
    return cls(cls.Options(**options), Texts(WordTokenizer()))


@pytest.fixture
def all_options(tmp_path):
    """Working options of every protocol."""
    return {
        "squad": {"data": data.squad(tmp_path / "squad.json"), "passage_tokens": 40},
        "natural-questions": {"data": data.natural_questions(tmp_path / "nq.jsonl.gz"), "passage_tokens": 40},
        "key-value": {"data": data.key_value(tmp_path / "kv.jsonl.gz"), "passage_tokens": 6},
        "babi": {
            "data": data.babi(tmp_path / "qa1.txt"),
            "novels": data.novels(tmp_path / "novels"),
            "passage_tokens": 40,
            "split": "all",
        },
    }


@pytest.mark.parametrize("name", DATA_SETS)
def test_what_holds_for_every_protocol(name, all_options):
    options = {**all_options[name], "episodes": 2, "passages": 4, "before": 2}
    made = make(name, **options)
    episodes = made.episodes()
    assert [episode.number for episode in episodes] == [0, 1]
    for episode in episodes:
        assert len(episode.passages) == 6
        assert all(0 < made.texts.count(passage.text) <= options["passage_tokens"] for passage in episode.passages)
        [question] = episode.questions
        assert question.needs == (2,)
        assert question.after == 2
        told = episode.passages[2].text
        assert question.answers[0] in told
        rest = [passage.text for number, passage in enumerate(episode.passages) if number != 2]
        assert not any(question.answers[0] in text for text in rest)
        assert len({passage.source for passage in episode.passages}) == 6
    # Deterministic, and other seeds give others.
    assert make(name, **options).episodes() == episodes
    assert make(name, **options, seed=1).episodes() != episodes
    # Every setting is plain data and said, but not where files lie.
    settings = json.loads(json.dumps(made.settings()))
    assert settings["seed"] == 0
    assert settings["data"] == options["data"].name
    assert made.deviations


def test_squad_tells_test_articles_among_train_articles(all_options):
    episodes = make("squad", **all_options["squad"], passages=5, untold=1).episodes()
    told = {episode.passages[0].source for episode in episodes}
    assert told == {"squad: Town_3", "squad: Town_7"}  # the fourth and the eighth of nine titles
    assert len(episodes) == 6
    for episode in episodes:
        asked, untold = episode.questions
        house = asked.prompt.split()[-2].rstrip("?")
        assert asked.prompt == f"Question: What colour is {house}?\nAnswer:"
        assert house in episode.passages[0].text
        assert len(asked.answers) == 1
        assert not untold.told
        stranger = untold.prompt.split()[-2].rstrip("?")
        text = " ".join(passage.text for passage in episode.passages)
        assert stranger not in text
        assert "house3x" not in text.replace(house, "") or "Town_3" in episode.passages[0].source
        assert not any(f"house{test}x" in passage.text for passage in episode.passages[1:] for test in (3, 7))


def test_many_contexts_of_squad_are_told_before_any_is_asked_about(all_options):
    options = {**all_options["squad"], "contexts": 2, "questions": 3, "passages": 3, "before": 1, "episodes": 1}
    (episode,) = make("squad", **options).episodes()
    names = [passage.source for passage in episode.passages]
    assert [name.split()[0] for name in names] == ["distraction", "squad:", "squad:", "distraction", "distraction"]
    assert len(set(names)) == 5
    assert [question.needs for question in episode.questions][:2] == [(1,), (2,)]
    assert len(episode.questions) <= 3
    assert {question.after for question in episode.questions} == {2}
    for question in episode.questions:
        assert question.answers[0] in episode.passages[question.needs[0]].text


def test_squad_train_articles_do_not_distract_from_themselves(all_options):
    for episode in make("squad", **all_options["squad"], split="train", passages=6, untold=1).episodes():
        houses = [question.prompt.split()[-2].rstrip("?") for question in episode.questions]
        for house in houses:
            assert not any(house.split("x")[0] + "x" in passage.text for passage in episode.passages[1:])


def test_squad_options(all_options):
    options = all_options["squad"]
    both = make("squad", **options, golds="all", passages=1).episodes()
    assert all(len(episode.questions[0].answers) == 2 for episode in both)
    with pytest.raises(InputError, match="at most 10 tokens and an answer of at most 3, none of 6 has"):
        make("squad", **{**options, "passage_tokens": 10}).episodes()
    with pytest.raises(ConfigError, match=r"prompt must be a text with \{question\} in it, got 'Why\?'"):
        make("squad", **options, prompt="Why?")
    with pytest.raises(ConfigError, match="episodes must be a whole number of at least 1, got 0"):
        make("squad", **options, episodes=0)
    shared = make("squad", **options, passages=3, same_distraction=True, avoid_answers=False).episodes()
    assert len({episode.passages[1:] for episode in shared}) == 1
    own = make("squad", **options, passages=3, avoid_answers=False).episodes()
    assert len({episode.passages[1:] for episode in own}) > 1


def test_nothing_to_distract_with(tmp_path):
    path = data.squad(tmp_path / "one.json", articles=4)
    articles = json.loads(path.read_text())
    articles["data"] = articles["data"][3:] + articles["data"][:1]
    for paragraph in articles["data"][1]["paragraphs"]:
        paragraph["context"] += " red green blue black white grey pink brown"
    path.write_text(json.dumps(articles))
    with pytest.raises(InputError, match=r"all of its .* other contexts hold an answer"):
        make("squad", data=path, passage_tokens=60, split="all").episodes()


def test_natural_questions_options(all_options):
    options = all_options["natural-questions"]
    episodes = make("natural-questions", **options, passages=3).episodes()
    assert len(episodes) == 5  # the last question's passage does not hold its answer
    assert episodes[0].questions[0].prompt.startswith("Question: how long is river ")
    assert episodes[0].questions[0].prompt.endswith("?\nAnswer:")
    assert episodes[0].passages[0].text.startswith("River")
    long = make("natural-questions", **options, passages=3, told="long_answer").episodes()
    assert long[0].passages[0].text.startswith("Long: River")
    squad = make("natural-questions", **options, passages=3, distraction=all_options["squad"]["data"])
    assert "house" in squad.episodes()[0].passages[1].text
    assert squad.deviations != make("natural-questions", **options).deviations


def test_key_value_pairs_fill_passages_and_never_come_twice(all_options):
    made = make("key-value", **all_options["key-value"], passages=3, episodes=3, untold=1, questions=2)
    seen = []
    for episode in made.episodes():
        for passage in episode.passages:
            lines = passage.text.splitlines()
            assert len(lines) == 2  # two words a pair, one for the line: six tokens hold two
            seen += lines
        first, second, stranger = episode.questions
        assert {first.prompt, second.prompt} == {
            line.split(": ")[0] + ': "' for line in episode.passages[0].text.splitlines()
        }
        assert f'{first.prompt}{first.answers[0]}"' in episode.passages[0].text
        assert stranger.answers == ()
        assert not stranger.told
        assert stranger.prompt[1:-4] not in " ".join(passage.text for passage in episode.passages)
    assert len(set(seen)) == len(seen)


def test_key_value_options(all_options):
    options = all_options["key-value"]
    short = make("key-value", **options, passages=2, characters=2, pairs=1).episodes()
    assert all(len(passage.text.splitlines()) == 1 for episode in short for passage in episode.passages)
    assert short[0].questions[0].answers[0] in {"v0", "v1", "v2", "v3"}
    with pytest.raises(InputError, match="pairs for 100 passages of at most 6 tokens, its 40 are not enough"):
        make("key-value", **options, passages=100).episodes()
    with pytest.raises(InputError, match="a pair must fit into a passage of 1 tokens"):
        make("key-value", **{**options, "passage_tokens": 1}).episodes()


def test_babi_facts_are_hidden_in_order(all_options):
    options = {**all_options["babi"], "spread": 2}
    made = make("babi", **options, passages=3, before=1)
    episodes = made.episodes()
    assert len(episodes) == 6
    assert made.chance == 1 / 3  # garden, kitchen, office
    for episode in episodes:
        [question] = episode.questions
        assert question.after == 2
        assert len(episode.passages) == 1 + 2 + 2
        text = " ".join(passage.text for passage in episode.passages)
        places = [text.index(name) for name in ("Mary went", "John moved", "Mary got", "John went") if name in text]
        assert len(places) in {2, 4}
        assert places == sorted(places)
        assert [passage.source.split()[0] for passage in episode.passages] == [
            "novel",
            "story",
            "story",
            "novel",
            "novel",
        ]
        milk = "milk" in question.prompt
        assert question.needs == ((1, 2) if milk else (1,))
        assert "omega" in text or "alpha" in text


def test_babi_splits(all_options, tmp_path):
    options = {**all_options["babi"], "split": "train"}
    text = " ".join(p.text for e in make("babi", **options).episodes() for p in e.passages)
    assert "alpha" in text
    assert "omega" not in text
    with pytest.raises(InputError, match=r"the test part of .* it has 0 stories"):
        make("babi", **{**options, "split": "test"}).episodes()
    many = data.babi(tmp_path / "many.txt", stories=405)
    assert len(make("babi", **{**options, "data": many, "split": "test"}, passages=1).episodes()) == 10
    with pytest.raises(InputError, match="questions must be 1 and untold 0, got 1 and 2"):
        make("babi", **options, untold=2).episodes()
    with pytest.raises(InputError, match="a story of at most 1 sentences, it has 6 stories and none is"):
        make("babi", **options, sentences=1).episodes()
    with pytest.raises(InputError, match="leave room for the story"):
        make("babi", **{**options, "passage_tokens": 5}).episodes()
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a novel, or a folder of novels of the test part"):
        make("babi", **{**options, "data": many, "split": "test", "novels": empty}).episodes()


@pytest.mark.parametrize("name", DATA_SETS)
def test_files_of_another_format(name, all_options, tmp_path):
    broken = tmp_path / "broken"
    for text in ("not it", '{"a": 1}\n', "1 Where? \tyes\n"):
        broken.write_text(text)
        with pytest.raises(InputError, match="broken must be"):
            make(name, **{**all_options[name], "data": broken}).episodes()
    with pytest.raises(InputError, match="missing must be a readable"):
        make(name, **{**all_options[name], "data": tmp_path / "missing"}).episodes()


def test_unknown_protocol():
    with pytest.raises(
        UnknownNameError, match="squad, natural-questions, key-value, babi, notes, needles, conversations, got 'trivia'"
    ):
        protocol("trivia")


def test_questions_must_fit_their_episode():
    passages = (Passage(text="a", source="a"), Passage(text="b", source="b"))
    for needs, after in (((1,), 0), ((0,), 2), ((-1,), 0)):
        with pytest.raises(InputError, match="among the 2 of the episode"):
            Episode(
                number=0, passages=passages, questions=(Question(prompt="?", answers=(), needs=needs, after=after),)
            )


def test_cutting_texts_at_words():
    texts = Texts(WordTokenizer())
    assert texts.cut("one two  three", 2) == "one two"
    assert texts.cut("one two", 2) == "one two"
    assert texts.cut("one", 0) == ""
    # Each passage is as many texts as it takes, the last one cut; what is left over begins no other passage.
    assert list(texts.join(["a b", "c d e", "f g h i"], 4)) == ["a b\nc", "f g h i"]
