"""``mplus demo`` with the decoder that comes with mplus for the chat model: what is told, asked, counted and shown."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from attrs import evolve
from rich.console import Console
from typer.testing import CliRunner

from mplus.chat.prompt import ChatFormat
from mplus.cli import app
from mplus.cli.demo.chat import script
from mplus.cli.demo.chat.asking import NEW_TOKENS, Asker, contains
from mplus.cli.demo.chat.findings import JSON, ChatDemo
from mplus.cli.demo.chat.run import AGAIN
from mplus.cli.demo.chat.script import ABOUT_NOTES, ABOUT_TALK, UNTOLD_NOTES, UNTOLD_TALK, Question, make_script
from mplus.cli.demo.chat.show import NOVEL, RIGHT, WRONG, show_chat_demo
from mplus.evaluation.texts import Texts
from mplus.hf.pretrained.shipped import STORIES260K
from tests.chat.conftest import model, tokenizer  # noqa: F401 - fixtures

TOLD, ASKED = 2500, 6
"""Tokens, and questions about them; the demo itself asks 20."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):  # noqa: F811 - a fixture
    folder = tmp_path_factory.mktemp("model") / "stories"
    shutil.copytree(STORIES260K, folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    """What a run prints as JSON, and the folder that it leaves."""
    out, threads = tmp_path_factory.mktemp("demo"), torch.get_num_threads()
    options = ["--model", folder, "--tokens", TOLD, "--mechanism", "notes", "--threads", 1, "--out", out, "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "ABOUT_NOTES", ASKED - 2)
        patch.setattr(script, "ABOUT_TALK", 2)
        result = CliRunner().invoke(app, ["demo", *map(str, options)])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), out


def test_what_is_told_and_asked(tokenizer):  # noqa: F811
    made = make_script(tokenizer, TOLD, 0)
    texts = Texts(tokenizer)
    assert 0 <= sum(texts.count(told.text) for told in made.told) - TOLD < 130
    assert len(made.answerable) == ABOUT_NOTES + ABOUT_TALK == 20
    assert len(made.untold) == UNTOLD_NOTES + UNTOLD_TALK == 3
    by_source = {told.source: (place, told.text) for place, told in enumerate(made.told)}
    assert len(by_source) == len(made.told), "every text has a name of its own"
    places = []
    for question in made.answerable:
        place, text = by_source[question.source]
        assert contains(text, question.answer)
        places.append(place)
    assert places == sorted(places)
    assert make_script(tokenizer, TOLD, 0) == made != make_script(tokenizer, TOLD, 1)


def test_the_numbers_agree(ran):
    found, folder = ran
    assert abs(found["tokens"] - TOLD) < 200
    memory, nothing, window, text = found["arms"]
    assert [arm["name"] for arm in found["arms"]] == ["memory", "nothing", "window", "found text"]
    for arm in found["arms"]:
        assert len(arm["said"]) == ASKED
        assert arm["right"] == sum(contains(one["text"], one["question"]["answer"]) for one in arm["said"])
        assert arm["first_seconds"] > 0
    assert [one["question"] for one in memory["said"]] == [one["question"] for one in window["said"]]
    assert all(one["recalled"] for one in memory["said"])
    assert not any(one["recalled"] for one in nothing["said"])
    longest = max(one["tokens_read"] for one in window["said"])
    assert window["text_tokens"] + longest + NEW_TOKENS <= 512 < window["text_tokens"] + 2 * longest + NEW_TOKENS
    assert all(a["tokens_read"] > b["tokens_read"] for a, b in zip(text["said"], nothing["said"], strict=True))
    assert found["places"] == sorted(found["places"])
    assert (folder / "memory" / "manifest.json").is_file()


def test_a_new_process_answers_the_same(ran):
    found, _ = ran
    again = found["reopened"]["said"]
    assert len(again) == AGAIN
    assert [one["text"] for one in again] == [one["text"] for one in found["arms"][0]["said"][:AGAIN]]


def test_a_question_behind_a_window_is_answered_as_one_text(model, tokenizer):  # noqa: F811
    asker = Asker(model, ChatFormat(tokenizer))
    question = Question("Where is the ball?", "ball")
    ids = tokenizer("Tom had a red ball. It was in the garden.", add_special_tokens=False)["input_ids"]
    prefilled = asker.prefill(ids, [question], 512)
    assert prefilled.text_tokens == len(ids)
    said = asker.ask_behind(question, prefilled)
    again = asker.ask_behind(question, prefilled)
    assert again == evolve(said, first_seconds=again.first_seconds), "the window is as it was"
    whole = [*prefilled.ids, *asker._behind(prefilled, question)]
    expected = asker._said(question, whole)
    assert (said.text, said.right) == (expected.text, expected.right)
    assert tokenizer.decode(whole).count("Where is the ball?") == 1
    assert asker.prefill(ids * 100, [question], 512).text_tokens == 512 - NEW_TOKENS - len(whole) + len(ids)


def test_questions_asked_side_by_side_are_answered_as_one_by_one(model, tokenizer):  # noqa: F811
    asker, memory = Asker(model, ChatFormat(tokenizer)), model.new_memory(tokenizer=tokenizer)
    for number, note in enumerate(("Tom had a red ball.", "Lily saw a big green bird in the tree.")):
        memory.write(note, source=f"note {number}")
    questions = [Question("Where is the big green bird that Lily saw?", "tree"), Question("Who had a ball?", "Tom")]
    one_by_one = [asker.ask(one, memory) for one in questions]
    assert [evolve(one, first_seconds=None) for one in one_by_one] == list(asker.ask_each(questions, memory))
    texts = [["Tom had a red ball."], ["It was hot.", "Tom had a red ball."]]
    with_texts = [asker.ask_with_text(*pair) for pair in zip(questions, texts, strict=True)]
    assert [evolve(one, first_seconds=None) for one in with_texts] == list(asker.ask_each(questions, texts=texts))
    assert asker.ask_each(questions) == tuple(evolve(asker.ask(one), first_seconds=None) for one in questions)


def test_the_screen(ran):
    plain, _ = ran
    found = JSON.structure(plain, ChatDemo)
    arms = [evolve(arm, said=tuple(evolve(one, right=arm.name == "memory") for one in arm.said)) for arm in found.arms]
    console = Console(file=io.StringIO(), width=100, highlight=False)
    show_chat_demo(evolve(found, arms=tuple(arms)), console)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    table = {line.partition(f" of {ASKED}")[0]: line for line in lines if f" of {ASKED}" in line}
    assert f"its memory of all {found.tokens:,} tokens {ASKED}" in table
    assert "nothing but the question 0" in table
    pictures = [line for line in lines if set(line.rpartition(" ")[2]) == {NOVEL, RIGHT}]
    assert [line.count(RIGHT) for line in pictures] == [ASKED]
    assert sum(set(line.rpartition(" ")[2]) == {NOVEL, WRONG} and line.count(WRONG) == ASKED for line in lines) == 3
    assert any(line.startswith("A new process opened the memory in") for line in lines)
