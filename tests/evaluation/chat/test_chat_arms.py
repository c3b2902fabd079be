"""Arms of chat models beside a plain loop over plain text, and what is measured on the way."""

from __future__ import annotations

import copy
import json
import re
from functools import partial

import pytest
import torch
from attrs import evolve, field, make_class

import mplus
from mplus.errors import ConfigError, InputError, UnknownNameError
from mplus.evaluation.chat import choice as choosing_module
from mplus.evaluation.chat.choice import Choice, ChoosingMechanism, choosing
from mplus.evaluation.chat.memories import compare_memories, digest, memory_configs, wrapped_each
from mplus.evaluation.chat.prompt import ChatPrompt
from mplus.evaluation.generating import Generation, answers
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.reports import paired
from mplus.evaluation.retention import make_arms, retention
from mplus.hf.reading.override import reading_as
from mplus.mechanisms.base import MemoryMechanism
from mplus.retrievers.chunks.hybrid import HybridRetriever
from tests.evaluation.chat.small import KV, decoder, execution, greedy, notes, tokenizer, wrapped
from tests.helpers.docstrings import run_examples


def chat(text):
    turn = {"role": "user", "content": text}
    return tokenizer().apply_chat_template([turn], add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.fixture(scope="module")
def asked():
    """An execution, its only moment and the questions that are due then."""
    made = execution()
    [moment] = list(made.moments())
    return made, moment, moment.due


def arm(made, name):
    [[found], _] = make_arms(made, ArmOptions(arms=(name,), window_converged=0))
    return found


def given(made, moment, due, name):
    return [answer.generated.ids for answer in arm(made, name).answers(moment, due)]


def prompt(made, one, context=()):
    return made.chat.prompt(one.question.prompt, context)


def test_a_prompt_is_what_the_template_makes_of_it():
    made = ChatPrompt.of(tokenizer())
    question = "Where does Tom live?"
    assert made.prompt(question) == chat(question)
    assert tokenizer().decode(made.begin) == "<s> user:\n"
    assert made.prompt(question, [7, 8]) == [*made.begin, 7, 8, *chat(question)[len(made.begin) :]]
    other = copy.copy(tokenizer())
    for template, error in ((None, "has none"), ("{{ messages[0]['role'] }}", "must have in it what the user says")):
        other.chat_template = template
        with pytest.raises(ConfigError, match=error):
            ChatPrompt.of(other)


def test_arms_of_text_say_what_a_plain_loop_says(asked):
    made, moment, due = asked
    passages = [made.passage(due[0], number) for number in range(5)]
    assert given(made, moment, due, "none") == [greedy(decoder(), prompt(made, one)) for one in due]
    needed = [passages[one.question.needs[0]] for one in due]
    right = [greedy(decoder(), prompt(made, one, text)) for one, text in zip(due, needed, strict=True)]
    assert given(made, moment, due, "ceiling") == right
    told = [token for passage in passages for token in passage]
    full = [greedy(decoder(), prompt(made, one, told)) for one in due]
    assert given(made, moment, due, "full-context") == full != right
    chosen = [choice.ids for choice in made.choose(moment, due)]
    assert given(made, moment, due, "kv-text") == [
        greedy(decoder(), prompt(made, one, ids)) for one, ids in zip(due, chosen, strict=True)
    ]


def test_what_a_memory_chooses_is_whole_passages_with_their_separators(asked):
    made, moment, due = asked
    told = {passage.source: made.texts.ids(passage.text + "\n") for passage in due[0].episode.passages}
    seen = []
    [answers_] = [arm(made, "kv").answers(moment, due)]
    for one, choice, answer in zip(due, made.choose(moment, due), answers_, strict=True):
        assert list(choice.ids) == [token for source in choice.sources for token in told[source]]
        assert answer.choice == choice
        seen.append(choice.holds(one.sources()))
    assert any(seen)
    assert Choice(("a", "b")).holds({"b"})
    assert not Choice(("a",)).holds({"a", "b"})


def test_the_right_passages_alone_are_what_the_oracle_reads(asked):
    made, moment, due = asked
    found = arm(made, "kv-oracle").answers(moment, due)
    assert all(answer.choice.holds(one.sources()) for one, answer in zip(due, found, strict=True))
    # One of five notes: all of them would have room.
    counts = [answer.tokens_attended for answer in found]
    assert max(counts) < sum(len(made.passage(due[0], number)) for number in range(5))


def test_one_pass_over_what_prompts_begin_with_changes_no_answer(monkeypatch):
    generation = Generation(tokens=5, batch=4)
    begin = torch.randint(3, 500, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [[*begin, 9, 10], [4, 5], [*begin, 9], [*begin, 11, 12, 13], [6]]
    alone = [answers(wrapped(), tokenizer(), [one], generation)[0] for one in prompts]
    passes = []
    monkeypatch.setattr("mplus.evaluation.generating.SHARED", 8)
    monkeypatch.setattr("mplus.evaluation.generating.copy.deepcopy", partial(_noted, copy.deepcopy, passes))
    together = answers(wrapped(), tokenizer(), prompts, generation)
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert [one.entropy for one in together] == pytest.approx([one.entropy for one in alone], rel=1e-3)
    assert passes == [12] * 3


def _noted(copied, passes, cache, *rest):
    if not rest and hasattr(cache, "get_seq_length"):
        passes.append(cache.get_seq_length())
    return copied(cache, *rest)


def test_only_the_choice_is_made_where_no_answer_is_wanted(asked, monkeypatch):
    made, moment, due = asked
    monkeypatch.setattr(MemoryMechanism, "prefix", None)
    ids = torch.tensor([prompt(made, due[0])])
    seen = []
    with reading_as(wrapped(), around=partial(ChoosingMechanism, seen=seen)), torch.no_grad():
        wrapped()(ids, memory=moment.memory)
    assert seen == made.choose(moment, due[:1])


def test_the_digest_of_a_memory_depends_on_options_that_the_config_leaves_out(monkeypatch):
    made = execution()
    found, mechanism, retriever = [digest(made)], wrapped().mplus_engine.mechanism, HybridRetriever
    assert digest(execution()) == found[0]
    monkeypatch.setattr(mechanism, "options", evolve(mechanism.options, rerank=mechanism.options.rerank + 1))
    found.append(digest(made))
    newer = make_class("Options", {"factor": field(default=2.0)}, bases=(retriever.Options,), frozen=True)
    monkeypatch.setattr(retriever, "Options", newer)
    found.append(digest(made))
    assert len(set(found)) == 3


def test_memories_are_compared_under_their_labels():
    config = mplus.MPlusConfig.from_dict(KV)
    small = mplus.MPlusConfig.from_dict({**KV, "retrieved_tokens": 64})
    plain = copy.deepcopy(decoder())
    task = notes(untold=1)
    each = (
        (label, execution(model, task, timed=1)) for label, model in wrapped_each(plain, {"kv": config, "kv:64": small})
    )
    report = compare_memories(each, options=ArmOptions(window_tokens=20), progress=False)
    assert [one.name for one in report.arms] == [
        *("none", "window", "full-context", "ceiling", "kv", "kv-oracle", "kv-text", "kv:64", "kv:64-text")
    ]
    assert {one.status for one in report.arms} == {"ok"}
    assert not hasattr(plain, "mplus_engine")
    memories = report.settings["memory"]
    assert [facts["retrieved_tokens"] for facts in memories.values()] == [96, 64]
    assert len({facts["digest"] for facts in memories.values()}) == 2
    assert all(re.fullmatch("[0-9a-f]{12}", facts["digest"]) for facts in memories.values())
    kv = report.arm("kv")
    # Keys and values of a token in every layer, in float32, and room for more.
    assert kv.details["cache_bytes_per_token_bf16"] == 5 * 2 * 4 * 8 * 2
    assert 2 < kv.details["state_bytes_per_token"] / kv.details["cache_bytes_per_token_bf16"] < 4
    assert {one.at(0).first_token_ms is not None for one in report.arms} == {True}
    assert kv.at(0).outcomes.keys() == report.arm("none").at(0).outcomes.keys()
    assert (kv.at(0).recall is None, report.arm("none").at(0).recall) == (False, None)
    assert type(report).from_plain(report.plain()) == report


def test_an_untrained_memory_of_rows_is_compared_too():
    sizes = {"chunk_tokens": 48, "min_chunk_tokens": 4, "memory_tokens_per_chunk": 4, "short_term_tokens": 8}
    sizes |= {"retrieved_tokens": 4, "long_term_tokens": 64, "retriever": {"name": "linear", "width": 4}}
    configs = memory_configs([json.dumps({"mechanism": "mplus", **sizes}), "notes"])
    each = ((label, execution(model)) for label, model in wrapped_each(copy.deepcopy(decoder()), configs))
    report = compare_memories(each, ["none", "mplus", "mplus-oracle", "notes"], progress=False)
    assert {one.name: one.status for one in report.arms} == dict.fromkeys(
        ("none", "mplus", "mplus-oracle", "notes"), "ok"
    )
    assert report.arm("mplus").at(0).tokens_attended > report.arm("none").at(0).tokens_attended


def test_a_memory_that_was_saved_is_compared_under_its_label(tmp_path):
    plain = copy.deepcopy(decoder())
    sizes = {"chunk_tokens": 48, "min_chunk_tokens": 4, "memory_tokens_per_chunk": 4, "short_term_tokens": 8}
    saved = mplus.wrap(plain, mplus.MPlusConfig.from_dict({"mechanism": "memoryllm", **sizes}))
    with torch.no_grad():
        next(saved.mplus.parameters()).add_(1)  # no other decoder gets these
    marks = {name: tensor.clone() for name, tensor in saved.mplus.named_parameters()}
    saved.save_pretrained(tmp_path)
    mplus.unwrap(saved)
    configs = memory_configs([f"trained={tmp_path}", "kv"])
    assert configs["trained"] == tmp_path
    for (label, model), mechanism in zip(wrapped_each(plain, configs), ("memoryllm", "kv"), strict=True):
        assert model.mplus_config.mechanism.name == mechanism
        if label == "trained":
            assert all(torch.equal(tensor, marks[name]) for name, tensor in model.mplus.named_parameters())
            report = compare_memories([(label, execution(model))], ["trained"], progress=False)
            assert [arm.name for arm in report.arms] == ["trained"]
    with pytest.raises(InputError, match=r"no config\.json"):
        memory_configs(["trained=nowhere"])


def test_labels_of_memories():
    found = memory_configs(["notes", '{"mechanism": "kv", "chunk_tokens": 64}'])
    assert {label: config.mechanism.name for label, config in found.items()} == {"notes": "notes", "kv": "kv"}
    assert found["kv"].chunk_tokens == 64
    with pytest.raises(UnknownNameError, match="nothing"):
        memory_configs(["nothing"])
    with pytest.raises(InputError, match="'kv' twice"):
        memory_configs(["kv", "kv"])
    with pytest.raises(UnknownNameError, match=r"kv-text.*got kv-txt"):
        compare_memories([("kv", execution())], ["none", "kv-txt"], progress=False)
    with pytest.raises(InputError, match="at least one memory"):
        compare_memories([])


def test_memories_on_disk_are_opened_again_to_ask(tmp_path, asked):
    _, moment, due = asked
    made = execution(directory=tmp_path)
    [again] = [(arm(made, "kv").answers(later, later.due), later.memory) for later in made.moments()]
    assert [answer.generated.ids for answer in again[0]] == given(execution(), moment, due, "kv")
    [rows] = [[store.count(0) for store in later.memory.stores] for later in made.moments()]
    assert rows == [store.count(0) for store in moment.memory.stores]  # what was on disk is not written again
    assert len(list(tmp_path.iterdir())) == 1
    assert made.settings(ArmOptions(), {})["harness"]["directory"] is True


def test_answers_are_written_to_a_file(tmp_path):
    made = execution(answers=tmp_path / "answers.jsonl")
    retention(made, ArmOptions(arms=("none", "kv")), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["arm"] for line in lines} == {"none", "kv"}
    [told, *_] = [line for line in lines if line["arm"] == "kv" and line["needed"]]
    assert told["accepted"][0] in told["needed"][0]["text"]
    assert {"source", "text"} == set(told["read"][0])
    assert all(line["read"] is None for line in lines if line["arm"] == "none")


def test_examples(asked):
    question, memory = torch.tensor([chat("Who has a dog?")]), wrapped().new_memory(tokenizer=tokenizer())
    memory.write("Tom has a dog.", source="diary")
    run_examples(ChoosingMechanism, **vars(choosing_module), model=wrapped(), prompt=question, memory=memory)
    run_examples(ChatPrompt, ChatPrompt=ChatPrompt, tokenizer=tokenizer())
    run_examples(memory_configs, memory_configs=memory_configs)
    run_examples(paired.difference, difference=paired.difference)


def test_exported_questions_have_the_ids_around_what_was_told(tmp_path, asked):
    made, _, due = asked
    exporting = execution(export=tmp_path / "q.jsonl")
    exporting.export_questions()
    head, episode = map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())
    for one, question in zip(due, episode["questions"], strict=True):
        assert head["begin"] + [7, 8] + question["ids"] == prompt(made, one, [7, 8])
    assert head["digest"] == exporting.exported()[0]["digest"] != execution(tokens=5).exported()[0]["digest"]


def test_nothing_is_noted_of_a_memory_of_text_but_what_it_says_itself():
    model = mplus.wrap(copy.deepcopy(decoder()), {"mechanism": "notes", "chunk_tokens": 64})
    seen = []
    with choosing(model, seen):
        pass
    made = execution(model)
    assert made.memory_arms.reading == ("notes",)
    [moment] = made.moments()
    found = arm(made, "notes").answers(moment, moment.due)
    assert seen == []
    told = {passage.source for passage in made.episodes[0].passages}
    assert all(set(answer.choice.sources) <= told for answer in found)
    assert any(answer.choice.sources for answer in found)
