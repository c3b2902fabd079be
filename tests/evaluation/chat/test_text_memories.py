"""Evaluations of memories of text: what they recall is evidence, and those that answer calls are asked as others."""

from __future__ import annotations

import json

import pytest

import mplus
from mplus.evaluation.generating import answers
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.retention import retention
from mplus.hf.pretrained.shipped import load_decoder
from mplus.hf.text.encoding import encoded
from mplus.mechanisms import MECHANISMS, Recalled, TextMechanism
from tests.evaluation.chat.small import decoder, execution, greedy, notes, tokenizer


class Newest(TextMechanism):
    """Puts the newest passage in front of a prompt."""

    name = "last-note"

    def write(self, entries, passage, before, ask):
        return [(passage,)]

    def recall(self, entries, prompt, ask, budget):
        return Recalled(entries[-1].fields[0], entries[-1:], (0.5,))


class Called(Newest):
    """Answers calls, which begin as this decoder begins what it says: a quotation mark."""

    name = "called"
    opens, closes, most_calls = '"', ",", 1

    def recall(self, entries, prompt, ask, budget):
        return Recalled()

    def answer(self, entries, call, ask):
        return Recalled(" a", entries[:1])


def made(mechanism, **options):
    MECHANISMS.register(mechanism.name, mechanism)
    try:
        config = mplus.MPlusConfig.from_dict({"mechanism": mechanism.name, "chunk_tokens": 64})
        return execution(mplus.wrap(load_decoder(), config, check=False).eval(), **options)
    finally:
        MECHANISMS.unregister(mechanism.name)


def test_what_is_recalled_is_evidence_and_is_attended():
    one = made(Newest)
    [moment] = list(one.moments())
    report = retention(one, ArmOptions(arms=("last-note",)))
    [cell] = report.arm("last-note").cells
    newest = f"note {len(one.episodes[0].passages) - 1}"
    assert cell.recall == pytest.approx(sum({newest} == set(due.sources()) for due in moment.due) / len(moment.due))
    told = encoded(tokenizer(), one.episodes[0].passages[-1].text + "\n", inside=True)
    questions = [one.question(due) for due in moment.due]
    assert cell.tokens_attended == max(map(len, questions)) + len(told)
    found = answers(one.model, tokenizer(), questions, one.generation, moment.memory.select([0] * len(questions)))
    begin = len(one.chat.begin)
    for prompt, answer in zip(questions, found, strict=True):
        assert (answer.choice.sources, answer.choice.score, answer.recalled_tokens) == ((newest,), 0.5, len(told))
        assert answer.ids == greedy(decoder(), [*prompt[:begin], *told, *prompt[begin:]])


def test_a_memory_that_is_called_is_evaluated_and_tells_no_likelihood(tmp_path):
    task = notes(questions=1, untold=1)
    one = made(Called, task=task, tokens=6, answers=tmp_path / "answers.jsonl")
    report = retention(one, ArmOptions(arms=("none", "called")))
    [cell] = report.arm("called").cells
    assert cell.questions == 1
    assert cell.tokens_attended is None, "pieces have no cache to tell"
    untold = report.arm("called").details["untold"]
    assert "auroc_of_likelihood" not in untold
    assert "auroc_of_likelihood" in report.arm("none").details["untold"]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["arm"] == "called"]
    assert len(own) == 2
    assert all(line["likelihood"] is None for line in own)
    assert {source["source"] for line in own for source in line["read"]} == {"note 0"}, "no call was answered"
