"""The little language, and the batches made of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mplus.errors import ConfigError, InputError
from mplus.facts.episodes import draw_facts
from mplus.facts.language import FILLERS, FIRST_NAMES, LAST_NAMES, OF, STOP, UNKNOWN, VALUES, Language
from mplus.training.batch import IGNORE_INDEX, NO_SOURCE
from mplus.training.data.generated.facts import RecallBatches, RecallOptions

LANGUAGE = Language(relations=5)
SMALL = Language(relations=3, firsts=10, lasts=10)


def spoken(ids):
    return [LANGUAGE.vocabulary[i] for i in ids.tolist() if i != 0]


def test_every_word_is_in_one_set_only():
    assert len(set(LANGUAGE.vocabulary)) == len(LANGUAGE.vocabulary)
    assert len(FIRST_NAMES) == len(LAST_NAMES) == 80
    assert all(len(values) == 32 for values in VALUES.values())


@given(st.integers(0, LANGUAGE.facts - 1), st.data())
def test_a_question_names_its_fact(fact, data):
    value = data.draw(st.integers(0, LANGUAGE.values(fact) - 1))
    sentence = LANGUAGE.sentence(fact, value)
    assert sentence[:4] == LANGUAGE.question(fact)
    assert sentence[4:-1] == LANGUAGE.value(fact, value)
    assert LANGUAGE.fact(" ".join(sentence[:4])) == fact


def test_a_malformed_question_says_what_one_looks_like():
    for text in ("hello", "colour of ada nobody", "taste of ada adler", "colour in ada adler"):
        with pytest.raises(InputError, match=r"RELATION of FIRST LAST .* \(such as ada abbott\), got"):
            LANGUAGE.fact(text)


def test_one_pair_of_names_in_five_is_held_out_and_every_name_is_trained():
    trained = LANGUAGE.people[False]
    assert len(trained) == 5120
    assert len(LANGUAGE.people[True]) == 1280
    assert {p // 80 for p in trained} == {p % 80 for p in trained} == set(range(80))


@given(
    st.integers(1, 60),
    st.booleans(),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_an_episode_tells_different_facts_of_the_right_people(count, held_out, siblings, one_relation, seed):
    generator = torch.Generator().manual_seed(seed)
    most = len(SMALL.people[held_out]) * (1 if one_relation else 3)
    if count > most:
        with pytest.raises(ConfigError, match=f"at most {most} chunks"):
            draw_facts(SMALL, count, held_out, siblings, generator, one_relation)
        return
    facts = draw_facts(SMALL, count, held_out, siblings, generator, one_relation)
    assert len(set(facts)) == count
    assert all(SMALL.held_out(fact) == held_out for fact in facts)
    if one_relation:
        assert len({fact // SMALL.names for fact in facts}) == 1


def test_siblings_are_facts_about_the_same_people():
    def people(siblings):
        facts = draw_facts(LANGUAGE, 200, held_out=False, siblings=siblings, generator=torch.Generator())
        return len({fact % LANGUAGE.names for fact in facts})

    assert people(0.0) == 200
    assert 85 < people(0.5) < 125


def batches(**options):
    seed, numbers = options.pop("seed", 0), options.pop("numbers", range(3))
    return RecallBatches(RecallOptions(**{"language": LANGUAGE, **options}), tokenizer=None, numbers=numbers, seed=seed)


def test_what_is_told_is_what_is_asked():
    source = batches(episode=6, questions=3, ages="mixed", window_tokens=32)
    told = [{} for _ in range(3)]
    for step in range(12):
        batch = source.next_batch(2)
        assert batch.reset == (step % 3 == 0)
        if batch.reset:
            told = [{} for _ in range(3)]
        for row in range(3):
            for chunk, fact in zip(batch.chunks[row], batch.sources[row].tolist(), strict=True):
                text = spoken(chunk)
                at = text.index(OF) - 1
                assert LANGUAGE.fact(" ".join(text[at : at + 4])) == fact
                assert set(text[-4:]) <= set(FILLERS), "the last tokens of a chunk are fillers"
                told[row][fact] = text[at + 4 : text.index(STOP)]
            for text, about, labels, query_mask, answers in zip(
                batch.texts[row],
                batch.text_sources[row].tolist(),
                batch.labels[row],
                batch.query_mask[row],
                batch.answer_mask[row],
                strict=True,
            ):
                said = spoken(text)
                assert LANGUAGE.fact(" ".join(said[:4])) == about
                assert said[4:] == told[row][about]
                assert text[query_mask].tolist() == text[:4].tolist(), "retrieval must not see the answer"
                assert spoken(labels[labels != IGNORE_INDEX]) == told[row][about] == spoken(text[answers])
            window = spoken(batch.windows[row])
            asked = LANGUAGE.fact(" ".join(window[32:36]))
            assert window[36:] == told[row][asked]
            assert " ".join(window[32:36]) in " ".join(window[:32])
            labels = batch.window_labels[row]
            assert spoken(labels[labels != IGNORE_INDEX]) == window[36:]


def test_the_first_question_is_about_the_newest_chunk():
    source = batches(episode=10, ages="recent")
    for _ in range(10):
        batch = source.next_batch(1)
        assert torch.equal(batch.text_sources[:, 0], batch.sources[:, -1])


def test_names_can_be_predicted_as_well():
    batch = batches(name_labels=True, episode=2, questions=2, ages="all").next_batch(2)
    for text, labels, answers in zip(batch.texts[0], batch.labels[0], batch.answer_mask[0], strict=True):
        assert labels[labels != IGNORE_INDEX].tolist() == text[text != 0][2:].tolist()
        assert spoken(text[answers]) == spoken(text)[4:]


def test_untold_facts_have_the_answer_unknown():
    source = batches(episode=30, questions=8, unknown=0.5)
    told, unknown, asked = [set() for _ in range(3)], 0, 0
    for _ in range(30):
        batch = source.next_batch(1)
        for row in range(3):
            told[row].update(batch.sources[row].tolist())
            for text, about in zip(batch.texts[row], batch.text_sources[row].tolist(), strict=True):
                fact = LANGUAGE.fact(" ".join(spoken(text)[:4]))
                asked += 1
                if about == NO_SOURCE:
                    unknown += 1
                    assert spoken(text)[4:] == [UNKNOWN]
                    assert not LANGUAGE.held_out(fact)
                    assert fact not in source._episodes[row].facts
                else:
                    assert fact == about in told[row]
    assert 0.4 < unknown / asked < 0.6


def test_a_stream_is_the_same_in_every_process_layout():
    together, alone = batches(numbers=range(4), episode=3), batches(numbers=[2], episode=3)
    for _ in range(7):
        first, second = together.next_batch(1), alone.next_batch(1)
        assert torch.equal(first.chunks[2:3], second.chunks)
        assert torch.equal(first.texts[2:3], second.texts)


def test_a_saved_source_goes_on_bit_for_bit():
    source = batches(episode=5, ages="mixed", unknown=0.3, window_tokens=16)
    for _ in range(7):
        source.next_batch(1)
    twin = batches(episode=5, ages="mixed", unknown=0.3, window_tokens=16, seed=9)
    twin.load_state_dict(source.state_dict())
    for _ in range(9):
        first, second = source.next_batch(1), twin.next_batch(1)
        assert first.reset == second.reset
        for name in ("chunks", "sources", "texts", "labels", "text_sources", "windows"):
            assert torch.equal(getattr(first, name), getattr(second, name))


def test_bad_options_and_turns_are_refused():
    with pytest.raises(
        ConfigError, match=r"chunk_tokens - tail must be at least the 7 tokens of a sentence, got 8 - 4"
    ):
        batches(chunk_tokens=8)
    with pytest.raises(ConfigError, match=r"window_tokens must be a multiple of chunk_tokens \(16\), got 40"):
        batches(window_tokens=40)
    with pytest.raises(ConfigError, match="firsts must be at most 80, got 81"):
        Language(firsts=81)
    source = batches(episode=3)
    with pytest.raises(InputError, match=r"must have 1 to episode \(3\) chunks, got 4"):
        source.next_batch(4)
    with pytest.raises(InputError, match="no repeat task"):
        source.next_batch(1, repeat=True)
