"""Generated data: what is told is asked for, at the ages wanted, and can be answered from what was told only."""

from __future__ import annotations

import re

import pytest
import torch

from mplus.config import structure
from mplus.errors import ConfigError, InputError
from mplus.evaluation.tasks.people import splits as people_asked
from mplus.evaluation.tasks.people.splits import half
from mplus.facts.notes import FIRST, LAST, RELATIONS, part, sentences
from mplus.hf.pretrained.shipped import load_tokenizer
from mplus.training.batch import IGNORE_INDEX, NO_SOURCE
from mplus.training.data import SOURCES
from mplus.training.data.generated.questions import people
from tests.helpers.letters import Letters
from tests.training.data.test_document_turns import rows as text_rows
from tests.training.data.test_document_turns import same

KINDS = ["copying", "questions", "notes"]
FILLER = "It was a day. The rain fell! Who came by? Nobody did. "


@pytest.fixture(scope="module")
def filler(tmp_path_factory):
    file = tmp_path_factory.mktemp("filler") / "a.txt"
    file.write_text(FILLER * 30, encoding="utf-8")
    return {"paths": str(file)}


@pytest.fixture
def make(filler):
    def build(kind, *, numbers=(0, 1, 2), seed=1, tokenizer=None, **options):
        implementation = SOURCES.get(kind)
        options = structure(implementation.Options, {"filler": filler, "chunk_tokens": (200, 220), **options})
        return implementation(options, tokenizer=tokenizer or Letters(), numbers=numbers, seed=seed)

    return build


def texts(batch):
    """Per stream and question: the text and the part of it that is the answer."""
    return [
        [
            (Letters.text(ids[mask]), Letters.text(ids[answer]))
            for ids, mask, answer in zip(batch.texts[place], batch.mask[place], batch.answer_mask[place], strict=True)
        ]
        for place in range(len(batch.texts))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_was_told_in_the_chunk_asked_about(make, kind):
    source, told = make(kind), {}
    for step in range(30):
        batch = source.next_batch(1 + step % 3)
        for place in range(3):
            for number, chunk in zip(batch.sources[place].tolist(), batch.chunks[place], strict=True):
                assert number not in told
                told[number] = place, Letters.text(chunk)
            for about, (text, answer) in zip(batch.text_sources[place].tolist(), texts(batch)[place], strict=True):
                owner, chunk = told[about]
                assert owner == place
                assert answer.strip() in chunk
                assert text.rpartition(answer)[0].split()[-1].strip(":") in (*chunk.split(), "Answer", "is")


TOLD = {
    "copying": r"Note: [a-z ]+\.",
    "questions": r" ?[A-Z][^.!?]*(colour|town|pet|fruit)[^.!?]*\.",
    "notes": r" ((?!It was|The rain|Who came|Nobody did)[A-Z][^.!?]*[.!?])+",
}


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_running_text_with_something_told_between_sentences(make, kind):
    batch = make(kind).next_batch(3)
    for chunk in map(Letters.text, batch.chunks.flatten(0, 1)):
        found = list(re.finditer(TOLD[kind], chunk))
        assert len(found) == 1
        before, after = chunk[: found[0].start()], chunk[found[0].end() :]
        assert before.endswith((".", "!", "?")) or not before
        assert before + after in FILLER * 30


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_answer_and_retrieval_sees_what_precedes_it(make, kind):
    batch = make(kind).next_batch(2)
    for place in range(3):
        for ids, labels, answer_mask, query_mask, mask in zip(
            *(getattr(batch, name)[place] for name in ("texts", "labels", "answer_mask", "query_mask", "mask")),
            strict=True,
        ):
            predicted = labels != IGNORE_INDEX
            assert torch.equal(labels[predicted], ids[predicted])
            assert bool((answer_mask <= predicted).all())
            assert torch.equal(query_mask | predicted, mask)
            assert not bool((query_mask & predicted).any())
            assert Letters.text(ids[predicted]).endswith(".")
            assert ids[~mask].sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_source_goes_on_as_the_saved_one(make, kind):
    first, second = make(kind, episode=7, window_tokens=512), make(kind, episode=7, window_tokens=512)
    for step in range(12):
        state = first.state_dict()
        expected = first.next_batch(step % 3 + 1)
        second.next_batch(1)
        second.load_state_dict(state)
        assert same(second.next_batch(step % 3 + 1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gets_the_same_whatever_process_it_is_in(make, kind):
    together, alone = make(kind), make(kind, numbers=[2])
    for _ in range(6):
        expected, found = together.next_batch(2), alone.next_batch(2)
        assert torch.equal(found.chunks[0], expected.chunks[2])
        assert torch.equal(found.sources[0], expected.sources[2])
        assert texts(found)[0] == texts(expected)[2]
    assert len({str(chunk.tolist()) for chunk in together.next_batch(1).chunks}) == 3
    assert not torch.equal(make(kind, seed=2).next_batch(1).texts, make(kind).next_batch(1).texts)


@pytest.mark.parametrize("kind", KINDS)
def test_ages_follow_the_options(make, kind):
    def ages(**options):
        source, found = make(kind, numbers=[0, 1, 2, 3], questions=5, **options), []
        for _ in range(80):
            batch = source.next_batch(1)
            newest = batch.sources[:, -1:]
            assert torch.equal(batch.text_sources[:, :1], newest)
            found += (newest - batch.text_sources[:, 1:]).flatten().tolist()
        return torch.tensor(found[300:], dtype=torch.float)

    recent = ages(mean_age=4.0, uniform=0.0)
    assert abs(float(recent.mean()) - 3.5) < 0.5  # rounded down
    assert float((recent == 0).float().mean()) == pytest.approx(1 - 2.718 ** (-1 / 4), abs=0.05)
    uniform = ages(uniform=1.0, max_age=9)
    assert set(uniform.tolist()) == set(range(10))
    assert abs(float(uniform.mean()) - 4.5) < 0.3
    source = make(kind, numbers=[0], questions=5, uniform=1.0, min_age=3, max_age=5)
    batches = [source.next_batch(1) for _ in range(40)]
    assert {int(age) for batch in batches[10:] for age in (batch.sources - batch.text_sources).flatten()} == {3, 4, 5}
    with pytest.raises(ConfigError, match="min_age must be at most max_age"):
        make(kind, min_age=7, max_age=6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_episode_starts_anew(make, kind):
    source, since = make(kind, episode=5, uniform=1.0), set()
    for step in range(20):
        batch = source.next_batch(2)
        assert batch.reset == (step > 0 and step % 2 == 0)
        since = set() if batch.reset else since
        since |= set(batch.sources.flatten().tolist())
        assert set(batch.text_sources.flatten().tolist()) <= since
    with pytest.raises(InputError, match=r"at most episode \(5\) chunks, got 6"):
        source.next_batch(6)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_hold_the_chunk_that_is_asked_about(make, kind):
    source, told = make(kind, chunk_tokens=200, window_tokens=600), ["", "", ""]
    for step in range(8):
        batch = source.next_batch(1)
        for place in range(3):
            told[place] += Letters.text(batch.chunks[place])
            window = batch.windows[place][batch.window_mask[place]]
            wanted = batch.window_labels[place] != IGNORE_INDEX
            assert torch.equal(batch.window_labels[place][wanted], batch.windows[place][wanted])
            answer = Letters.text(batch.windows[place][wanted])
            chunks = Letters.text(window)[: 200 * min(step + 1, 2)]
            assert told[place].endswith(chunks)
            assert answer.strip(" .") in chunks
            assert Letters.text(window).endswith(answer)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_is_refused(make, kind):
    with pytest.raises(InputError, match="generated data has no repeat task"):
        make(kind).next_batch(1, repeat=True)
    with pytest.raises(InputError, match="the first batch of this data must have at least 1 chunk"):
        make(kind).next_batch(0)
    with pytest.raises(ConfigError, match=r"chunk_tokens must be at least the .* of what is told, got 40"):
        make(kind, chunk_tokens=40)
    with pytest.raises(ConfigError, match="window_tokens must be 0 or at least chunk_tokens and a question"):
        make(kind, window_tokens=230)
    with pytest.raises(InputError, match=r"filler must have documents of at least .* tokens"):
        make(kind, chunk_tokens=5000).next_batch(1)
    with pytest.raises(ConfigError, match="uniform must be a number from 0 to 1"):
        make(kind, uniform=1.1)


def test_bad_options_of_each_kind(make):
    with pytest.raises(ConfigError, match=r"cue_words must be below the least number of words \(3\), got 3"):
        make("copying", words=3, cue_words=3)
    with pytest.raises(ConfigError, match="max_age must be below 10240"):
        make("questions", max_age=10240)


def test_no_question_can_be_answered_from_another_fact(make):
    source = make("questions", numbers=[0])
    facts = [source.fact(0, place) for place in range(300)]
    assert len({(relation, name) for relation, name, _ in facts}) == 300
    assert [fact[:2] for fact in facts] != [source.fact(1, place)[:2] for place in range(300)]
    again = [source.fact(0, place + 4 * len(people(held_out=False))) for place in range(300)]
    assert [fact[:2] for fact in again] == [fact[:2] for fact in facts]
    assert sum(a[2] == b[2] for a, b in zip(again, facts, strict=True)) < 40  # one in 32 by chance


def test_people_held_out_are_new_pairs_of_known_names(make):
    trained, held_out = people(held_out=False), people(held_out=True)
    assert not set(trained) & set(held_out)
    assert len(trained) == 4 * len(held_out)
    names = {name for person in trained for name in person.split()}
    assert {name for person in held_out for name in person.split()} == names
    source = make("questions", held_out=True)
    assert {source.fact(0, place)[1] for place in range(100)} <= set(held_out)


def test_facts_never_told_are_asked_for_and_the_answer_says_so(make):
    source = make("questions", unknown=0.5, questions=6)
    asked = older = 0
    for step in range(20):
        batch = source.next_batch(1)
        for stream, (about, row) in enumerate(zip(batch.text_sources, texts(batch), strict=True)):
            facts = [source.fact(stream, place)[:2] for place in range(step + 1)]
            for number, (text, answer) in zip(about.tolist(), row, strict=True):
                assert (number == NO_SOURCE) == (answer.strip() == "unknown")
                asked += number == NO_SOURCE
                older += number not in (NO_SOURCE, int(batch.sources[stream, -1]))
                if number == NO_SOURCE:
                    assert not any(f" {relation}" in text and name in text for relation, name in facts)
    assert 0.4 < asked / (asked + older) < 0.6


class First:
    """Draws that always fall on the first of all possibilities."""

    def below(self, limit):
        return 0

    def uniform(self):
        return 0.0


def test_the_nearest_fact_not_told_comes_after_the_newest(make):
    source = make("questions", unknown=0.5)
    source.next_batch(5)
    relation, name, _ = source.fact(0, 5)
    text = source.ask(0, 2, 77, First())
    assert Letters.text(text.ids) == f"Question: What is the {relation} of {name}? Answer: unknown."
    assert text.source == NO_SOURCE
    assert source.ask(0, 4, 77, First()).source == 77  # the newest is always told


def test_the_words_of_a_question_can_be_predicted_too(make):
    batch = make("questions", label_question=True).next_batch(1)
    assert torch.equal(batch.labels[..., 1:] != IGNORE_INDEX, batch.mask[..., 1:])
    assert bool((batch.answer_mask.sum(-1) < batch.mask.sum(-1) / 2).all())


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_real_tokenizer_and_the_novel(kind):
    tokenizer = load_tokenizer()
    implementation = SOURCES.get(kind)
    source = implementation(structure(implementation.Options, {}), tokenizer=tokenizer, numbers=[0, 1], seed=0)
    batch = source.next_batch(2)
    for place in range(2):
        chunk = tokenizer.decode(batch.chunks[place, -1])
        answer = tokenizer.decode(batch.texts[place, 0][batch.answer_mask[place, 0]]).strip()
        assert len(answer) > 2
        assert answer in chunk
    assert text_rows(batch)[0]["chunks"] != text_rows(batch)[1]["chunks"]


def test_notes_that_are_held_out_share_no_word_of_value_and_no_sentence_with_training():
    for items in (FIRST, LAST, *(relation.values for relation in RELATIONS.values())):
        trained, kept = set(part(items, False)), set(part(items, True))
        assert not trained & kept
        assert len(items) == len(set(items)) == len(trained | kept)
        assert 0.15 < len(kept) / len(items) < 0.25
    for relation in RELATIONS.values():
        for ways, places in ((relation.told, ("{name}", "{value}")), (relation.asked, ("{name}",))):
            assert not set(sentences(ways, False)) & set(sentences(ways, True))
            assert len(sentences(ways, True)) == 1
            assert all(way.count(place) == 1 for way in ways for place in places)
    assert not {*FIRST, *LAST} & {*half(people_asked.FIRST, "test"), *half(people_asked.LAST, "test")}


class Chats(Letters):
    chat_template = "there is one"

    def apply_chat_template(self, turns, *, add_generation_prompt, tokenize):
        assert (add_generation_prompt, tokenize) == (True, False)
        return "".join(f"<user>{turn['content']}</user>" for turn in turns) + "<answer>"


def test_notes_are_asked_for_in_the_chat_template_for_whole_batches(make):
    source, found = make("notes", tokenizer=Chats(), chat=0.5), set()
    for _ in range(12):
        batch = source.next_batch(1)
        chats = {text.startswith("<user>") for stream in texts(batch) for text, _ in stream}
        assert len(chats) == 1
        found |= chats
        given = [Letters.text(ids[seen]) for ids, seen in zip(batch.texts[0], batch.query_mask[0], strict=True)]
        assert all(text.endswith("<answer>" if True in chats else "Answer:") for text in given)
    assert found == {True, False}
    with pytest.raises(ConfigError, match="chat must be 0 where the tokenizer has no chat template"):
        make("notes", chat=1.0).next_batch(1)
