"""What each arm puts in front of the decoder, what it says it costs, and why it cannot run."""

from __future__ import annotations

import sys
from functools import partial

import pytest

from mplus.errors import InputError, UnknownNameError
from mplus.evaluation.arms import BM25, FullContext, MemoryArm, NoMemory, Window
from mplus.evaluation.execution.base import Due
from mplus.evaluation.execution.telling import MemoryMoment
from mplus.evaluation.generating import answers
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.oracle import OracleMechanism
from mplus.evaluation.reports.report import ARMS
from mplus.evaluation.retention import make_arms
from mplus.evaluation.retriever_swap import Recency, Way, retriever_for
from mplus.evaluation.tasks.base import Episode, Passage, Question
from mplus.hf.reading.override import reading_as
from mplus.retrievers.random import RandomRetriever
from tests.evaluation.bench import execution
from tests.memory.tiny import K0, N, build

pytestmark = pytest.mark.two_computations

TEXTS = (
    "the red house stands near the old river bank today",
    "grey cats sleep under warm stones all morning long now",
    "nine boats left the harbour before dawn without any light",
    "the red mill turns when water comes down the hill",
)


def episode(needs=(0,), after=0, prompt="which house stands near the river"):
    passages = tuple(Passage(text=text, source=f"s{number}") for number, text in enumerate(TEXTS))
    question = Question(prompt=prompt, answers=("red",), needs=needs, after=after)
    return Episode(number=7, passages=passages, questions=(question,))


def due(age=3, **facts):
    return Due(episode(**facts), 0, 0, age)


def told(table, numbers):
    return [token for number in numbers for token in table.texts.ids(TEXTS[number] + "\n")]


def test_due():
    one = due(age=2)
    assert (one.told, one.id, one.sources()) == (3, "7-0-2", {"s0"})


def test_what_is_put_in_front():
    table = execution()
    assert NoMemory(table).context(due()) == []
    assert Window(table, 15).context(due(age=1)) == told(table, [0, 1])[-15:]
    assert Window(table, 100).context(due(age=1)) == told(table, [0, 1])
    full = told(table, range(4))
    question = table.texts.ids(due().question.prompt)
    room = len(full) + len(question) + table.generation.tokens
    assert FullContext(table, room).context(due()) == full
    assert FullContext(table, room - 1).context(due()) is None
    with_begin = execution(bos=1)
    assert FullContext(with_begin, room).context(due()) is None


def test_bm25_brings_the_best_passages_oldest_first():
    table = execution()
    arm = BM25(table, passages=2)
    assert arm.ranked([due()])[0][0] == 0
    assert arm.ranked([due(prompt="where do cats sleep")])[0][0] == 1
    assert arm.context(due(prompt="which red mill turns near the river")) == told(table, [0, 3])
    assert BM25(table, passages=1).context(due(prompt="where do cats sleep")) == told(table, [1])
    # Words nobody told: the newest come first, so that there is an order.
    assert arm.ranked([due(prompt="zebra")]) == [[3, 2, 1, 0]]
    # Passages that have no room are left out, not cut.
    one = len(told(table, [0]))
    assert BM25(table, passages=4, tokens=one).context(due()) == told(table, [0])
    assert BM25(table, passages=4, tokens=one - 1).context(due()) is None
    around = len(table.texts.ids(due().question.prompt)) + table.generation.tokens
    assert BM25(table, passages=4, positions=one + around).context(due()) == told(table, [0])
    assert BM25(table, passages=4, positions=one + around - 1).context(due()) is None
    assert arm.ranked([due(age=1, prompt="which mill turns")])[0][0] in {0, 1}  # not told yet


def test_what_lies_inside_a_window():
    table = execution()
    two = len(told(table, [0, 1]))
    assert Window(table, two).is_inside(due(age=1))
    assert not Window(table, two - 1).is_inside(due(age=1))
    assert not Window(table, two).is_inside(due(age=2))
    assert Window(table, two).is_inside(due(needs=(2, 3), after=3, age=0))
    assert not Window(table, two).is_inside(due(needs=(1, 3), after=3, age=0))
    with pytest.raises(InputError, match="at least 1 token, got 0"):
        Window(table, 0)


def test_costs():
    table = execution(bos=1)
    memory = table.model.new_memory(batch_size=2)
    for _ in range(6):
        for text in TEXTS:
            ids = table.texts.ids(text)
            memory.write([ids, ids], source=text[:9], progress=False)
    asked = [due(age=1), due(age=3)]
    question = len(table.texts.ids(asked[0].question.prompt))

    def costs(arm):
        return [
            (answer.state_bytes, answer.tokens_attended) for answer in arm.answers(MemoryMoment(asked, memory), asked)
        ]

    assert costs(NoMemory(table)) == [(0, 1 + question)] * 2
    two, four = len(told(table, range(2))), len(told(table, range(4)))
    assert costs(FullContext(table, 256)) == [(8 * two, 1 + two + question), (8 * four, 1 + four + question)]
    assert costs(Window(table, 5)) == [(8 * 5, 1 + 5 + question)] * 2
    short_term = sum(rows.nbytes for rows in memory.states[0].stm)
    assert (
        costs(MemoryArm(table, "mplus", Way())) == [(short_term + memory.stores[0].nbytes, 1 + K0 + N + question)] * 2
    )
    assert costs(MemoryArm(table, "memoryllm", Way(retrieved_tokens=0))) == [(short_term, 1 + N + question)] * 2


def test_no_memory_is_asked_once(monkeypatch):
    table = execution()
    asked = []
    arm = NoMemory(table)
    monkeypatch.setattr(
        "mplus.evaluation.execution.generated.answers",
        lambda *args: asked.extend(args[2]) or [type("Made", (), {"text": "x"})() for _ in args[2]],
    )
    found = [arm.answers(MemoryMoment(some, None), some) for some in ([due(age=0), due(age=1)], [due(age=2)])]
    assert [answer.generated.text for some in found for answer in some] == ["x"] * 3
    assert len(asked) == 1


def test_all_arms_and_why_some_cannot_run():
    made, skipped = make_arms(execution(), ArmOptions())
    reasons = {arm.name: arm.reason for arm in skipped}
    assert {arm.name for arm in made} | set(reasons) == {*ARMS, "ceiling"}
    assert "benchmarks/snapkv" in reasons["snapkv"]
    window = next(arm for arm in made if arm.name == "window")
    assert window.tokens == 1 + K0 + N
    assert next(arm for arm in made if arm.name == "full-context").positions == 256


def test_a_decoder_without_long_term_memory():
    table = execution()
    for changes in ({"mechanism": "memoryllm"}, {"long_term_tokens": 0}):
        other = execution(decoder=build(**changes))
        made, skipped = make_arms(other, ArmOptions(arms=("memoryllm", "mplus", "mplus-oracle")))
        assert [arm.name for arm in made] == ["memoryllm"]
        assert {arm.reason for arm in skipped} == {"the decoder was wrapped without long-term memory"}
        memory = other.model.new_memory()
        memory.write([table.texts.ids(TEXTS[0])], source="s0", progress=False)
        [answer] = made[0].answers(MemoryMoment([due(age=0)], memory), [due(age=0)])
        assert answer.state_bytes == memory.nbytes


def test_without_bm25s(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    [skipped] = make_arms(execution(), ArmOptions(arms=("bm25",)))[1]
    assert "mplus[eval]" in skipped.reason


def test_unknown_arms():
    with pytest.raises(UnknownNameError, match="ceiling, got 'oracle'"):
        make_arms(execution(), ArmOptions(arms=("oracle",)))


@pytest.mark.parametrize(
    "name", ["memoryllm", "mplus", "mplus-random", "mplus-recency", "mplus-attention", "mplus-oracle"]
)
def test_a_memory_arm_says_what_the_decoder_says_reading_that_way(name):
    table = execution(tokens=4)
    memory = table.model.new_memory(batch_size=2, seed=1)
    for turn in range(8):
        ids = [table.texts.ids(TEXTS[turn % 4]), table.texts.ids(TEXTS[(turn + 1) % 4])]
        memory.write(ids, source=[f"s{turn % 4}", f"s{(turn + 1) % 4}"], progress=False)
    asked = [Due(episode(), row, 0, 3) for row in (1, 0, 1)]
    [arm] = make_arms(table, ArmOptions(arms=(name,), seed=3))[0]
    found = arm.answers(MemoryMoment(asked, memory), asked)
    shape = table.model.mplus.retriever.shape
    ways = {
        "memoryllm": {"retrieved_tokens": 0},
        "mplus": {},
        "mplus-random": {"retriever": RandomRetriever(shape, RandomRetriever.Options(seed=3))},
        "mplus-recency": {"retriever": Recency(shape)},
        "mplus-attention": {"retriever": retriever_for(table.model, "attention")},
        "mplus-oracle": {"around": partial(OracleMechanism, wanted=[{"s0"}])},
    }
    prompt = [table.texts.ids(asked[0].question.prompt)]
    for one, answer in zip(asked, found, strict=True):
        with reading_as(table.model, **ways[name]):
            [expected] = answers(table.model, table.tokenizer, prompt, table.generation, memory.select([one.row]))
        assert answer.generated.ids == expected.ids
        assert answer.generated.text == expected.text
        assert answer.generated.entropy == pytest.approx(expected.entropy, rel=1e-3)
