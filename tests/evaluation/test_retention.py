"""The harness on episodes whose right answers are known: what arms see, what is counted, what is reported."""

from __future__ import annotations

import json

import pytest
from attrs import evolve

import mplus
from mplus.errors import ConfigError, InputError
from mplus.evaluation.execution.generated import GeneratedAnswers
from mplus.evaluation.generating import Generation, exported
from mplus.evaluation.options import ArmOptions, RunOptions
from mplus.evaluation.reports.report import ARMS, Report
from mplus.evaluation.retention import retention
from mplus.evaluation.tasks.key_value import KeyValue
from mplus.evaluation.texts import Texts
from tests.evaluation import data
from tests.evaluation.bench import CHUNK, SmallTokenizer, execution, model
from tests.evaluation.data import WordTokenizer
from tests.memory.tiny import K0, SIZES, N

TEXT_ARMS = ("none", "window", "bm25", "full-context")
GENERATION = Generation(tokens=2)


class Reader:
    """In place of a decoder: says the value behind a key where the prompt holds the pair, else something else."""

    mplus_config = mplus.MPlusConfig.from_dict(SIZES)

    def __init__(self):
        self.tokenizer = WordTokenizer()
        self.mplus_engine = model().mplus_engine  # memories of rows

    def train(self, mode):
        """As of modules."""

    def new_memory(self, **settings):
        return self

    def write(self, *data, **settings):
        """Text arms read no memory."""

    def answers(self, model, tokenizer, prompts, generation, memory=None):
        names = list(self.tokenizer.words)
        replies = []
        for prompt in prompts:
            *context, key, _ = (names[token] for token in prompt)
            pair = f'"{key}":'
            value = context[context.index(pair) + 1].strip('"') if pair in context else "unheard"
            replies.append(type("Made", (), {"text": f"{value}\nmore"})())
        return replies


def make(tmp_path, tokenizer, **changes):
    path = data.key_value(tmp_path / "kv.jsonl.gz", records=12)
    settings = {"passages": 9, "episodes": 4, "passage_tokens": CHUNK, "pairs": 3, "untold": 1, "prompt": "{key} is"}
    return KeyValue(KeyValue.Options(data=path, **{**settings, **changes}), Texts(tokenizer))


@pytest.fixture
def protocol(tmp_path):
    """Four episodes of nine passages of three pairs each; one question told, one not."""
    return make(tmp_path, SmallTokenizer())


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Runs the text arms with a ``Reader``."""
    reader = Reader()
    monkeypatch.setattr("mplus.evaluation.execution.generated.answers", reader.answers)
    protocol = make(tmp_path, reader.tokenizer)
    return lambda **settings: run(protocol, reader, reader.tokenizer, **settings)


def run(protocol, decoder=None, tokenizer=None, **settings):
    options = RunOptions(**settings.pop("options", {}))
    arms = ArmOptions(**{"arms": TEXT_ARMS, "window_tokens": 40, "positions": 256, **settings.pop("arms", {})})
    decoder, tokenizer = decoder or model(), tokenizer or SmallTokenizer()
    asked = GeneratedAnswers(decoder, tokenizer, protocol, options=options, generation=GENERATION)
    return retention(asked, arms, progress=False)


def test_accuracy_over_age(read):
    report = read(options={"ages": (0, 1, 3, 8)})
    accuracy = {arm.name: {cell.age: cell.accuracy for cell in arm.cells} for arm in report.arms}
    # A passage is three lines of two words and a separator, nine tokens: a window of 40 holds four.
    assert report.age_tokens == {0: 0.0, 1: 8.0, 3: 24.0, 8: 64.0}
    assert accuracy["full-context"] == {0: 1, 1: 1, 3: 1, 8: 1}
    assert accuracy["window"] == {0: 1, 1: 1, 3: 1, 8: 0}
    assert accuracy["bm25"] == {0: 1, 1: 1, 3: 1, 8: 1}
    assert accuracy["none"] == {0: 0, 1: 0, 3: 0, 8: 0}
    assert report.arm("window").status == "ok"
    assert report.borderline == 0
    assert {cell.questions for arm in report.arms for cell in arm.cells} == {4}  # what was not told is not asked here
    assert report.arm("bm25").cells[0].scores == {"exact_match": 1.0, "f1": 1.0}
    assert report.reach("full-context") == 64 / report.arm("full-context").at(8).tokens_attended


def test_a_window_that_cannot_read_is_not_converged(read):
    report = read(arms={"window_tokens": 5})
    assert report.arm("window").status == "not_converged"
    assert "no answer lies inside its 5 tokens" in report.arm("window").reason
    harder = read(arms={"window_converged": 1.001})
    assert harder.arm("window").reason.startswith("1.00 of 12 questions inside it, at least 1.001")
    assert harder.arm("window").cells


def test_full_context_answers_only_where_everything_fits(read):
    report = read(arms={"positions": 50})
    full = report.arm("full-context")
    assert [cell.age for cell in full.cells] == [0, 1, 2, 4]
    assert full.details["questions_that_do_not_fit"] == {"8": 4}
    nothing = read(arms={"positions": 5}).arm("full-context")
    assert (nothing.status, nothing.reason) == ("skipped", "at no age do all questions fit")


def test_every_arm_with_a_real_decoder(protocol, tmp_path):
    options = RunOptions(ages=(0, 8), export=tmp_path / "questions.jsonl")
    report = retention(execution(protocol, options=options, tokens=2), name="tiny")
    assert [arm.name for arm in report.arms] == [*ARMS, "ceiling"]
    status = {arm.name: arm.status for arm in report.arms}
    assert {name for name, one in status.items() if one == "skipped"} == {"snapkv"}
    question = 2
    assert report.arm("mplus").at(8).tokens_attended == 1 + K0 + N + question
    assert report.arm("memoryllm").at(8).tokens_attended == 1 + N + question
    assert report.arm("mplus").at(0).tokens_attended == 1 + 4 + question
    assert Report.from_plain(json.loads(json.dumps(report.plain()))) == report
    assert report.settings["generation"]["tokens"] == 2
    assert report.settings["protocol"]["prompt"] == "{key} is"
    assert report.settings["scoring"]["stop"] == ["\n"]
    assert report.settings["harness"]["ages"] == [0, 8]
    assert report.settings["memory"]["short_term_tokens"] == N
    assert report.circumstances["model"] == "tiny"
    assert report.circumstances["seeds"] == {"protocol": 0, "memory": 0, "arms": 0}
    assert [curve.name for curve in report.theory] == ["any of K", "one row"]
    assert (tmp_path / "questions.jsonl").read_text().count("\n") == 5


def test_answers_made_elsewhere_are_joined(protocol, tmp_path):
    episodes = protocol.episodes()
    ages = (0, 8)
    lines = exported(episodes, ages, GENERATION, "\n")
    path = tmp_path / "answers.jsonl"
    head = {"format": 1, "digest": lines[0]["digest"], "press": "SnapKV", "budget": 64}
    replies = [
        {
            "id": f"{episode.number}-{number}-{age}",
            "text": question.answers[0] if age == 0 and question.told else "?",
            "state_bytes": 1000,
            "tokens_attended": 66,
        }
        for episode in episodes
        for number, question in enumerate(episode.questions)
        for age in ages
    ]

    def write(*some):
        path.write_text("".join(json.dumps(line) + "\n" for line in some))

    settings = {"options": {"ages": ages}, "arms": {"arms": ("snapkv",), "snapkv_answers": path}}
    write(head, *replies)
    report = run(protocol, **settings)
    [arm] = report.arms
    assert {cell.age: cell.accuracy for cell in arm.cells} == {0: 1.0, 8: 0.0}
    assert (arm.state_bytes, arm.tokens_attended) == (1000, 66)
    assert report.settings["arms"]["snapkv"] == {"press": "SnapKV", "budget": 64}
    write({**head, "digest": "other"}, *replies)
    with pytest.raises(InputError, match="theirs have another digest"):
        run(protocol, **settings)
    write(head, *replies[1:])
    with pytest.raises(InputError, match="1 are missing, the first 0-0-0"):
        run(protocol, **settings)
    write({"format": 2}, *replies)
    with pytest.raises(InputError, match="a file of answers in format 1"):
        run(protocol, **settings)
    path.write_text("not json")
    with pytest.raises(InputError, match="one JSON object a line"):
        run(protocol, **settings)


def test_other_settings_are_other_questions(protocol):
    episodes = protocol.episodes()
    digests = {
        exported(*arguments)[0]["digest"]
        for arguments in (
            (episodes, (0, 8), GENERATION, "\n"),
            (episodes, (0, 4), GENERATION, "\n"),
            (episodes, (0, 8), Generation(tokens=3), "\n"),
            (episodes, (0, 8), GENERATION, " "),
            (episodes[1:], (0, 8), GENERATION, "\n"),
        )
    }
    assert len(digests) == 5


def test_streams_do_not_depend_on_how_many_there_are_at_a_time(protocol):
    births = []
    for streams in (1, 3):
        options = RunOptions(ages=(8,), streams=streams, seed=5)
        for moment in execution(protocol, options=options).moments():
            states = moment.memory.states
            births += [states[one.row].stm[1].birth.tolist() for one in moment.due if one.number == 0]
    assert births[:4] == births[4:]
    assert births[0] != births[1]


def test_ages():
    assert RunOptions().chosen_ages(9) == (0, 1, 2, 4, 8)
    assert RunOptions().chosen_ages(1) == (0,)
    assert RunOptions(ages=[5, 0, 5]).chosen_ages(6) == (0, 5)
    for ages in ((9,), (-1,), ()):
        with pytest.raises(ConfigError, match="from 0 to 8, one less than the passages told"):
            RunOptions(ages=ages).chosen_ages(9)


def test_passages_must_be_chunks(protocol):
    protocol.options = evolve(protocol.options, passage_tokens=CHUNK + 1)
    with pytest.raises(ConfigError, match=rf"chunk_tokens \({CHUNK}\), got {CHUNK + 1}"):
        run(protocol)
    protocol.options = evolve(protocol.options, passage_tokens=CHUNK, pairs=1)
    with pytest.raises(InputError, match=r"min_chunk_tokens \(4\), 'asked for' of episode 0 has 2"):
        run(protocol)
